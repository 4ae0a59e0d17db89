r"""Offline to online: flow_sac.py that begins with data of another policy, as in its paper.

First come updates on the data alone, with flow matching in the actor's loss (Lipman et al., ICLR
2023, arXiv 2210.02747), before the tanh and at the times t = k / K that the policy asks for:

    L = E|v((1 - t) x_0 + t x_1, t, o) - (x_1 - x_0)|^2,   x_1 = atanh(a)

Then flow_sac.py goes on online, with the data in its buffer and without random actions. In both
phases --beta adds beta |a~ - a|^2 to the actor's loss on rows of the data, a pull of its action a~
towards theirs. --noise fixed replaces the learned noise; a drift keeps it from spreading x_K:

    x_{k+1} = x_k + (v + sigma^2 / 2 grad log p_t(x_k)) / K + sigma / sqrt(K) eps_k
    grad log p_t(x) = (t v - x) / (1 - t)

The last line holds for a v that flow matching has learned, and not for any other. The first phase
is logged as `offline_losses/...`, at steps that count up to 0, where the policy is evaluated.

    python benchmark/flow_offline.py --env-id HalfCheetah-v4 --demonstrations halfcheetah.npz \
        --offline-steps 20000 --beta 100 --total-timesteps 50000
    python benchmark/flow_offline.py --resume runs/RUN
"""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs.demonstrations
import flow_sac


@dataclass
class Args(flow_sac.Args):
    demonstrations: str = ""  # an .npz file or minari:NAME, which goes into the buffer
    offline_steps: int = 20_000  # updates on the demonstrations, with flow matching, before step 0
    beta: float = 100.0  # pull towards the actions of the demonstrations: beta |a~ - a|^2
    noise: Literal["learned", "fixed"] = "learned"  # of a step: std(o), or sigma / sqrt(K)
    sigma: float = 0.1  # of the whole path, if fixed; the temperature then stays at --alpha
    exp_name: str = Path(__file__).stem  # part of the run folder's name

    def __post_init__(self):
        super().__post_init__()
        if self.offline_steps < 0 or self.total_timesteps < 1 or not 0 <= self.beta < math.inf:
            sys.exit("--offline-steps and --beta must be at least 0, --total-timesteps at least 1")
        if not 1e-3 <= self.sigma <= 1:
            sys.exit("--sigma must be in [0.001, 1]")


class OnlineArgs(SimpleNamespace):
    """Options of flow_sac.py, as args.json gets them; but `train` sees no random steps."""

    learning_starts = property(lambda self: 0)


class FixedNoiseActor(flow_sac.FlowActor):
    """Each step has noise sigma / sqrt(K), and the drift that makes up for it."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.sigma, self.drifts = args.sigma, True
        self.velocity.register_forward_hook(self.drift)
        # evaluate.py would play a learned noise, so it shall refuse the checkpoint
        self.register_buffer("fixed_noise", torch.tensor(True))

    def forward(self, obs, z, a_prev):
        g, log_std, log_std_z = super().forward(obs, z, a_prev)
        return g, torch.full_like(log_std, math.log(self.sigma / self.steps**0.5)), log_std_z

    def drift(self, velocity, inputs, v):
        """v + sigma^2 / 2 grad log p_t(x), what a call of the velocity returns."""
        _, x, t = inputs
        return v + 0.5 * self.sigma**2 * (t * v - x) / (1 - t) if self.drifts else v

    def act(self, obs, z, a_prev, deterministic=False):
        self.drifts = not deterministic  # without noise there is nothing to make up for
        action, z = super().act(obs, z, a_prev, deterministic)
        self.drifts = True
        return action, z


def pulled_actor_loss(actor, critic, batch, alpha, alpha_z, beta):
    """The loss of flow_sac.py + E[beta |a~ - a|^2], as if that were a part of -min_i Q_i.

    beta [B]; 0 where there is no pull.
    """

    def pulled_q(state, a, z, a_prev):
        return critic(state, a, z, a_prev) - beta * (a - batch.action).square().sum(-1)

    return flow_sac.soft_actor_loss(actor, pulled_q, batch, alpha, alpha_z)


def flow_matching_loss(actor, batch):
    """E|v((1 - t) x_0 + t x_1, t, o) - (x_1 - x_0)|^2; a Gaussian policy regresses x_1 on o."""
    g, *_ = actor(batch.obs, batch.z, batch.a_prev)
    context = actor.velocity.context(torch.cat([batch.obs, g], -1))
    x_1 = torch.atanh(batch.action.clamp(-0.999, 0.999))
    x_0 = torch.randn_like(x_1) * actor.from_noise
    t = torch.randint_like(x_1[:, :1], actor.steps) / actor.steps
    v = actor.velocity.forward(context, (1 - t) * x_0 + t * x_1, t)  # never with the drift
    return (batch.weight * (v - x_1 + x_0).square().sum(-1)).sum()


class DataAgent(flow_sac.FlowSAC):
    """SAC Flow with the pull, and an update for the offline phase."""

    def __init__(self, args, env, device):
        super().__init__(args, env, device)
        self.pulled = torch.compile(pulled_actor_loss) if args.compile else pulled_actor_loss
        self.actor_loss = self.pulled_loss
        if args.noise == "fixed":  # the entropy cannot follow a temperature
            self.actor_optimizer.param_groups[1]["lr"] = 0.0

    def pulled_loss(self, actor, critic, batch, alpha, alpha_z):
        """The pull is on rows of the data, which are the first, and those of them that are left."""
        overwritten = (self.buffer.steps - self.buffer.slots) * self.buffer.num_envs
        of_data = (batch.after >= overwritten) & (batch.after < self.buffer.rows_of_data)
        return self.pulled(actor, critic, batch, alpha, alpha_z, self.args.beta * of_data)

    def matched_loss(self, actor, critic, batch, alpha, alpha_z):
        loss, *rest = self.pulled_loss(actor, critic, batch, alpha, alpha_z)
        self.matching = flow_matching_loss(actor, batch)
        return loss + self.matching, *rest

    def update(self, buffer):
        self.buffer = buffer
        return super().update(buffer)

    def offline_update(self, buffer):
        """`update` with flow matching in the step of the actor."""
        self.actor_loss = self.matched_loss
        losses = DataAgent.update(self, buffer)  # self.update may be a graph
        self.actor_loss = self.pulled_loss
        losses["losses/flow_matching_loss"] = self.matching.detach()
        losses["losses/actor_loss"] -= losses["losses/flow_matching_loss"]
        return losses


def fill(buffer, args, env):
    """Write the demonstrations as if they had been played in training; of z nothing is known."""
    episodes = envs.demonstrations.load(args.demonstrations, env)
    for row in envs.demonstrations.rows(episodes, args.num_envs):
        obs, state, action = (flow_sac.to_device(column, buffer.device) for column in row[:3])
        buffer.add(obs, state, obs.new_zeros(args.num_envs, buffer.widths[2]), action, *row[3:])
    buffer.rows_of_data = int(buffer.steps) * args.num_envs
    if not 4 <= int(buffer.steps) <= buffer.slots:
        sys.exit(f"{args.demonstrations} is too short for --num-envs, or long for --buffer-size")


def offline(args, run_dir, agent, buffer, env, step, seconds):
    """The updates from `step` on, up to step 0, an evaluation, and a checkpoint to go on from."""
    stopped_by = []  # signals that asked to stop; nohup ignores SIGHUP, Windows has none
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: stopped_by.append(signum))
    writer = SummaryWriter(run_dir, purge_step=step + 1 if args.resume else None)
    bar = tqdm(total=-step, unit="update", dynamic_ncols=True)
    start_time = time.time() - seconds
    while step < 0 and not stopped_by:
        losses = agent.offline_update(buffer)
        step += 1
        bar.update()
        seconds = time.time() - start_time
        if step % 100 == 0:
            for name, value in losses.items():
                writer.add_scalar(f"offline_{name}", value, step)
        if step and step % args.checkpoint_frequency == 0:
            flow_sac.save_checkpoint(run_dir, agent, buffer, global_step=step, seconds=seconds)
    flow_sac.save_checkpoint(run_dir, agent, buffer, global_step=step, seconds=seconds)
    if step == 0 and args.eval_frequency and args.eval_episodes:
        env.score(agent, args.eval_episodes, args.seed, writer, step)
        writer.add_scalar("charts/seconds", seconds, step)
    bar.close()
    writer.close()
    if stopped_by:
        print(f"stopped at step {step}; go on with flow_offline.py --resume {run_dir}")
        sys.exit(128 + stopped_by[0])
    return step, seconds


def train(args):
    """`flow_sac.train`, resumed where the offline phase ends, with the data in its buffer."""
    if not args.demonstrations:
        sys.exit("--demonstrations FILE.npz or minari:NAME is needed")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}"
    run_dir = Path(args.resume or "runs/" + name.replace("/", "_").replace(":", "_"))
    shared = {field.name: getattr(args, field.name) for field in fields(flow_sac.Args)}
    own = {name: value for name, value in vars(args).items() if name not in shared}
    load_checkpoint = flow_sac.load_checkpoint

    def prepare(run_dir, agent, buffer):
        """What `train` calls to load a checkpoint: it also fills the buffer, and learns offline."""
        env = flow_sac.make_env(args, max(1, min(args.eval_episodes, 8)))
        fill(buffer, args, env)
        step, seconds = -args.offline_steps, 0.0
        if (run_dir / "checkpoint.pt").exists():
            step, seconds = load_checkpoint(run_dir, agent, buffer)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:  # `train` takes it again, as a singleton allows
            agent.lock = FileLock(run_dir / "lock", is_singleton=True).acquire(timeout=0)
        except Timeout:
            sys.exit(f"another process trains {run_dir}")
        saved_args = shared | dict(resume=None, script="flow_sac.py")  # for evaluate.py
        (run_dir / "args.json").write_text(json.dumps(saved_args, indent=2))
        (run_dir / "offline.json").write_text(json.dumps(own, indent=2))
        if step <= 0:  # also if it was killed in the evaluation at step 0
            step, seconds = offline(args, run_dir, agent, buffer, env, step, seconds)
        return step, seconds

    flow_sac.load_checkpoint = prepare
    flow_sac.Agent = lambda _, env, device: DataAgent(args, env, device)
    if args.noise == "fixed":
        flow_sac.FlowActor = FixedNoiseActor
    flow_sac.train(OnlineArgs(**shared | dict(resume=str(run_dir))))


def parse_args():
    """As in flow_sac.py; of a run to resume there are two files of options."""
    asked = tyro.cli(Args, args=[o for o in sys.argv[1:] if o not in ("-h", "--help")])
    options = flow_sac.TUNED.get(asked.env_id.split("-")[0], {})
    if asked.resume is not None:
        try:
            options = json.loads(Path(asked.resume, "args.json").read_text())
            options |= json.loads(Path(asked.resume, "offline.json").read_text())
            del options["script"]
            Args(**options)
        except (OSError, ValueError, TypeError, KeyError) as error:
            sys.exit(f"{asked.resume} is no run of this script: {error!r}")
    args = tyro.cli(Args, default=Args(**options), description=__doc__)
    if asked.resume is not None and args.offline_steps != options["offline_steps"]:
        sys.exit("--offline-steps of a run cannot be changed")
    return args


if __name__ == "__main__":
    train(parse_args())
