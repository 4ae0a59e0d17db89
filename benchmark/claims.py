"""The claims that are to be settled, one entry each: what `sweep.py` runs, `collect.py` gathers and
`plot.py` draws.
"""

from typing import NamedTuple


class Claim(NamedTuple):
    """Every method on every task with every seed."""

    question: str
    # {label: script and options, which come after those of the task; HORIZON stands for its steps}
    methods: dict[str, str]
    tasks: list[str]  # options, among them --env-id
    seeds: int = 5  # 1, 2, ...
    threshold: dict[str, float] = {}  # {env_id: return}, to be reached soon  # noqa: RUF012
    column: str = "return_stochastic"  # of the CSV, to be drawn, or success_stochastic, ...
    clock: bool = True  # draw the return against time, too: the runs had a core each
    cloning: tuple[str, ...] = ()  # methods of which step 0 counts alone


MEDIUM = "--matmul-precision medium"  # on a CPU faster for SAC, slower for PPO; GAIL had it
PENDULUM = f"--env-id InvertedPendulum-v4 --eval-episodes 10 {MEDIUM}"
BALANCE = f"{PENDULUM} --total-timesteps 15000 --eval-frequency 2500"
PUBLISHED = "--critic-lr 1e-3 --target-entropy-z -1"  # of S2PG-SAC on Hopper; the rest is ours
LESS_NOISE = "s2pg_sac.py --chrono 32 --log-std-z-max -3 --target-entropy-z -3"
HOPPER = f"--env-id Hopper-v4 --eval-episodes 10 {MEDIUM}"
CUE = f"--eval-episodes 10 {MEDIUM} --env-id"
LONG = f"--total-timesteps 200000 --eval-frequency 10000 --eval-episodes 10 {MEDIUM} --env-id"
PENDULUM_PPO = (
    "--env-id InvertedPendulum-v4 --total-timesteps 100000 --eval-frequency 10000 "
    "--eval-episodes 10"
)
POINT_MASS = (
    "--num-envs 16 --num-steps 512 --total-timesteps 1000000 --eval-frequency 100000 "
    "--eval-episodes 10 --env-id"
)
LONGER = "--checkpoint-frequency 20000 --eval-frequency 20000 --eval-episodes 10 --total-timesteps"
FLOW = "--total-timesteps 100000 --eval-frequency 5000 --eval-episodes 10 --env-id"
OFFLINE = "benchmark/flow_offline.py --demonstrations ../halfcheetah.npz --beta 100"
ROBOTS = [
    "--env-id InvertedDoublePendulum-v4 --total-timesteps 25000 --eval-frequency 2500 "
    f"--eval-episodes 10 {MEDIUM}",
    "--env-id Hopper-v4 --total-timesteps 100000 --eval-frequency 5000 --eval-episodes 10",
    "--env-id HalfCheetah-v4 --total-timesteps 40000 --eval-frequency 5000 --eval-episodes 10",
]
# the same options stand in the same words everywhere, so that claims share their runs
THREE_METHODS = {
    "S2PG-SAC": "s2pg_sac.py",
    "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
    "memoryless SAC": "s2pg_sac.py --memoryless",
}
PPO_METHODS = {
    "S2PG-PPO": "s2pg_ppo.py",
    "S2PG-PPO, separate ratios": "s2pg_ppo.py --separate-ratios",
    "BPTT-PPO, L = 1": "bptt_ppo.py --sequence-length 1",
    "BPTT-PPO, L = 32": "bptt_ppo.py",
    "memoryless PPO": "s2pg_ppo.py --memoryless",
}
SAC_METHODS = {
    "S2PG-SAC": "s2pg_sac.py",
    "BPTT-SAC, L = 5, last row": "bptt_sac.py --sequence-length 5 --loss-on last",
    "BPTT-SAC, L = 32, last row": "bptt_sac.py --sequence-length 32 --loss-on last",
    "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
    "memoryless SAC": "s2pg_sac.py --memoryless",
    "SAC that sees everything": "s2pg_sac.py --memoryless --hide none",
}

HORIZONS = {
    "CueRecall-v0": 20, "CueRecall-100-v0": 100, "CueRecall-300-v0": 300, "CueRecall-1000-v0": 1000,
    "CueRecall-delayed-5-v0": 5, "CueRecall-delayed-10-v0": 10, "CueRecall-delayed-v0": 20,
    "CueRecall-delayed-100-v0": 100,
}  # fmt: skip
CUE_METHODS = {
    "S2PG-SAC": "s2pg_sac.py",
    "BPTT-SAC, L = 5, all rows": "bptt_sac.py --sequence-length 5 --loss-on all",
    "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
    "BPTT-SAC, L = 32, from zeros": "bptt_sac.py --loss-on all --initial-state zero",
    # beyond the batch size one sequence is an update, of L rows
    "BPTT-SAC, L = the horizon": "bptt_sac.py --sequence-length HORIZON --loss-on all",
    "memoryless SAC": "s2pg_sac.py --memoryless",
}
CLAIMS = {
    "smoke": Claim(
        "Does the sweep work on this machine, or on this cluster? Half a minute, and no science.",
        {"S2PG-SAC": "s2pg_sac.py", "memoryless SAC": "s2pg_sac.py --memoryless"},
        [
            "--env-id CueRecall-v0 --env-kwargs horizon 5 --learning-starts 20 --batch-size 16 "
            "--total-timesteps 800 --eval-frequency 200 --eval-episodes 2 "
            "--checkpoint-frequency 100"
        ],
        seeds=2,
    ),
    "sac_and_bptt": Claim(
        "Hidden velocities: is S2PG-SAC faster than BPTT, by steps and by the clock?",
        SAC_METHODS,
        ROBOTS,
        threshold={"Hopper-v4": 1500, "HalfCheetah-v4": 1000, "InvertedDoublePendulum-v4": 5000},
    ),
    "random_bodies": Claim(
        "The same, where the velocities are seen and the bodies change.",
        {
            "S2PG-SAC": "s2pg_sac.py",
            "S2PG-SAC, no privileged critic": "s2pg_sac.py --no-privileged-critic",
            "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
            "memoryless SAC": "s2pg_sac.py --memoryless",
        },
        [
            "--env-id InvertedDoublePendulum-v4 --hide none --env-kwargs random_bodies True "
            f"--total-timesteps 15000 --eval-frequency 1500 --eval-episodes 20 {MEDIUM}",
            f"{LONG} HalfCheetah-v4 --hide none --env-kwargs random_bodies True",
        ],
        seeds=3,
        threshold={"InvertedDoublePendulum-v4": 5000, "HalfCheetah-v4": 2000},
    ),
    "ppo_and_bptt": Claim(
        "PPO with hidden velocities: what does training without sequences gain?",
        PPO_METHODS,
        [
            "--env-id HalfCheetah-v4 --num-envs 4 --num-steps 512 --total-timesteps 500000 "
            "--eval-frequency 25000 --eval-episodes 10"
        ],
        seeds=3,
        threshold={"HalfCheetah-v4": 1000},
        clock=False,  # not all ran on one CPU
    ),
    "ppo_in_wind": Claim(
        "PPO in a wind of unknown direction.",
        {
            "S2PG-PPO": "s2pg_ppo.py",
            "S2PG-PPO, separate ratios": "s2pg_ppo.py --separate-ratios",
            "BPTT-PPO, L = 32": "bptt_ppo.py",
            "memoryless PPO": "s2pg_ppo.py --memoryless",
        },
        [
            "--env-id HalfCheetah-v4 --hide none --env-kwargs wind True --num-envs 4 "
            "--num-steps 512 --total-timesteps 500000 --eval-frequency 25000 --eval-episodes 10"
        ],
        seeds=3,
        threshold={"HalfCheetah-v4": 1000},
    ),
    "cue_recall": Claim(
        "Long memory: how far back can a cue lie?",
        CUE_METHODS,
        [
            f"{CUE} CueRecall-v0 --total-timesteps 15000 --eval-frequency 1000",
            f"{CUE} CueRecall-100-v0 --total-timesteps 20000 --eval-frequency 1000",
            f"{CUE} CueRecall-300-v0 --total-timesteps 40000 --eval-frequency 2000",
            f"{CUE} CueRecall-1000-v0 --total-timesteps 40000 --eval-frequency 2000",
        ],
        seeds=3,
        threshold={
            "CueRecall-v0": 17,
            "CueRecall-100-v0": 85,
            "CueRecall-300-v0": 255,
            "CueRecall-1000-v0": 850,
        },
    ),
    "delayed_response": Claim(
        "And if the cue is asked for at the end alone, and no action may hold it until then?",
        {
            "S2PG-SAC": "s2pg_sac.py",
            "S2PG-SAC, chrono, less noise": LESS_NOISE,
            "S2PG-SAC, chrono, less noise, Sobolev": f"{LESS_NOISE} --sobolev 1",
        }
        | {
            label: CUE_METHODS[label]
            for label in CUE_METHODS
            if label not in ("S2PG-SAC", "BPTT-SAC, L = 32, from zeros")
        },
        [
            f"{CUE} CueRecall-delayed-5-v0 --total-timesteps 10000 --eval-frequency 1000",
            f"{CUE} CueRecall-delayed-10-v0 --total-timesteps 10000 --eval-frequency 1000",
            f"{CUE} CueRecall-delayed-v0 --total-timesteps 15000 --eval-frequency 1000",
            f"{CUE} CueRecall-delayed-100-v0 --total-timesteps 15000 --eval-frequency 1000",
        ],
        seeds=3,
        # 85 % of what is possible
        threshold={
            "CueRecall-delayed-5-v0": 7.6,
            "CueRecall-delayed-10-v0": 16.1,
            "CueRecall-delayed-v0": 33.1,
            "CueRecall-delayed-100-v0": 169,
        },
        clock=False,  # not all ran on one CPU
    ),
    "state_size": Claim(
        "How large should the internal state be?",
        {
            f"{size} units": f"s2pg_sac.py{'' if size == 32 else f' --state-dim {size}'}"
            for size in (8, 32, 128)
        },
        [f"{PENDULUM} {PUBLISHED} --total-timesteps 15000 --eval-frequency 2500"],
        seeds=3,
    ),
    "cells": Claim(
        "Which recurrent cell?",
        {
            "GRU": "s2pg_sac.py",
            "LSTM": "s2pg_sac.py --rnn lstm",
            "plain RNN": "s2pg_sac.py --rnn rnn",
        },
        [f"{PENDULUM} {PUBLISHED} --total-timesteps 15000 --eval-frequency 2500"],
        seeds=3,
    ),
    "critic_and_noise": Claim(
        "A slower critic, less noise on the memory of SAC: what do they gain?",
        {
            "S2PG-SAC, published critic and noise": "s2pg_sac.py",
            "entropy -3Z": "s2pg_sac.py --critic-lr 1e-3 --target-entropy-z -3",
            "entropy -3Z, critic 3e-4": "s2pg_sac.py --critic-lr 3e-4 --target-entropy-z -3",
        },
        [
            # elsewhere these are the defaults
            f"--env-id InvertedPendulum-v4 {PUBLISHED} --total-timesteps 30000 "
            "--eval-frequency 2500",
            *ROBOTS[:2],
        ],
        seeds=3,
        clock=False,
    ),
    "memory_gradient": Claim(
        "What must a memory be taught? With L = 1 it learns for the action that reads it at once, "
        "and for nothing later.",
        {
            "S2PG-SAC": "s2pg_sac.py",
            "S2PG-SAC, chrono, less noise": LESS_NOISE,
            "BPTT-SAC, L = 1": "bptt_sac.py --sequence-length 1 --loss-on all",
            "BPTT-SAC, L = 1, chrono": "bptt_sac.py --sequence-length 1 --loss-on all --chrono 32",
            "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
            "memoryless SAC": "s2pg_sac.py --memoryless",
        },
        [
            BALANCE,
            *ROBOTS,
            f"{CUE} CueRecall-100-v0 --total-timesteps 20000 --eval-frequency 1000",
            f"{CUE} CueRecall-delayed-10-v0 --total-timesteps 10000 --eval-frequency 1000",
            f"{CUE} CueRecall-delayed-v0 --total-timesteps 15000 --eval-frequency 1000",
        ],
        seeds=3,
        clock=False,
    ),
    "sobolev": Claim(
        "Does the slope of Q in the memory help where velocities are hidden?",
        {"S2PG-SAC": "s2pg_sac.py", "S2PG-SAC, Sobolev": "s2pg_sac.py --sobolev 1"},
        [BALANCE, *ROBOTS[1:]],
        seeds=3,
        clock=False,
    ),
    "hidden_velocities": Claim(
        "Can a memory make up for velocities that are not seen?",
        THREE_METHODS,
        [BALANCE, f"{HOPPER} --total-timesteps 50000 --eval-frequency 5000"],
        seeds=3,
        clock=False,
    ),
    "privileged_critic": Claim(
        "What is a critic worth that sees the velocities which the policy does not?",
        {
            "S2PG-SAC": "s2pg_sac.py",
            "S2PG-SAC, no privileged critic": "s2pg_sac.py --no-privileged-critic",
            "BPTT-SAC, L = 32, all rows": "bptt_sac.py",
            "BPTT-SAC, no privileged critic": "bptt_sac.py --no-privileged-critic",
            "memoryless SAC": "s2pg_sac.py --memoryless",
        },
        [BALANCE],
        seeds=3,
        clock=False,
    ),
    "td3": Claim(
        "Can a memory make up for velocities that are not seen, with TD3?",
        {"S2PG-TD3": "s2pg_td3.py", "memoryless TD3": "s2pg_td3.py --memoryless"},
        [BALANCE],
        seeds=3,
        clock=False,
    ),
    "ppo": Claim(
        "And with PPO?",
        PPO_METHODS,
        [PENDULUM_PPO],
        seeds=3,
        clock=False,
    ),
    "ppo_memory_noise": Claim(
        "How much noise should the memory of PPO have?",
        {
            "memory std .1": "s2pg_ppo.py",
            "memory std .2": "s2pg_ppo.py --std-z 0.2",
            "memory std .5": "s2pg_ppo.py --std-z 0.5",
        },
        [PENDULUM_PPO],
        seeds=3,
        clock=False,
    ),
    "matmul_precision": Claim(
        "Do results depend on the precision that matrix products are allowed?",
        {"highest": "s2pg_sac.py --matmul-precision highest", "medium": "s2pg_sac.py"},
        [f"{PENDULUM} {PUBLISHED} --total-timesteps 15000 --eval-frequency 2500"],
        seeds=3,
        clock=False,
    ),
    "gail": Claim(
        "Imitation without rewards, from five episodes of an expert that saw the velocities.",
        {
            "S2PG-GAIL": "s2pg_gail.py",
            "memoryless GAIL": "s2pg_gail.py --memoryless",
            "cloning alone, GAIL's actor": "s2pg_gail.py --bc-steps 2000 --total-timesteps 100 "
            "--num-envs 1 --num-steps 100",
        },
        [
            "--env-id InvertedPendulum-v4 --total-timesteps 100000 --eval-frequency 10000 "
            f"--eval-episodes 8 {MEDIUM}",
            "--env-id Hopper-v4 --num-envs 4 --num-steps 512 --total-timesteps 1000000 "
            f"--eval-frequency 50000 --eval-episodes 8 {MEDIUM}",
        ],
        seeds=3,
        clock=False,
        cloning=("cloning alone, GAIL's actor",),
    ),
    "lsiq": Claim(
        "The same with LSIQ.",
        {"S2PG-LSIQ": "s2pg_lsiq.py", "memoryless LSIQ": "s2pg_lsiq.py --memoryless"},
        [
            "--env-id InvertedPendulum-v4 --total-timesteps 20000 --eval-frequency 2500 "
            f"--eval-episodes 8 {MEDIUM}",
            "--env-id Hopper-v4 --batch-size 128 --total-timesteps 50000 --eval-frequency 5000 "
            f"--eval-episodes 8 {MEDIUM}",
        ],
        seeds=3,
        clock=False,
    ),
    "humanoid": Claim(
        "The published regime: a million steps of Humanoid with hidden velocities.",
        THREE_METHODS,
        [f"{LONGER} 1000000 --env-id Humanoid-v4"],
        seeds=1,
        clock=False,  # beside other runs
    ),
    "long": Claim(
        "300 000 steps: does S2PG-SAC stay level on HalfCheetah, and come up on Hopper?",
        THREE_METHODS,
        [f"{LONGER} 300000 --env-id HalfCheetah-v4", f"{LONGER} 300000 --env-id Hopper-v4"],
        seeds=3,
    ),
    "flow": Claim(
        "Does the velocity of a flow policy matter, and does a flow, with the same critic?",
        {
            "Flow-G, K = 4": "flow_sac.py",
            "Gaussian": "flow_sac.py --velocity none",
            "naive flow, K = 4": "flow_sac.py --velocity mlp",
            "Flow-T, K = 4": "flow_sac.py --velocity flow_t --flow-width 96",
            "Flow-G, K = 10": "flow_sac.py --flow-steps 10",
            "naive flow, K = 10": "flow_sac.py --velocity mlp --flow-steps 10",
            "Flow-T, K = 10": "flow_sac.py --velocity flow_t --flow-width 96 --flow-steps 10",
        },
        [f"{FLOW} HalfCheetah-v4", f"{FLOW} Hopper-v4"],
        seeds=3,
        threshold={"HalfCheetah-v4": 3000},
        clock=False,
    ),
    "flow_memory": Claim(
        "A flow policy with a memory: does the one help the other?",
        {
            "Flow-G with a memory": "flow_sac.py --state-dim 32",
            "Flow-G without": "flow_sac.py",
            "S2PG-SAC": "s2pg_sac.py",
        },
        [f"{FLOW} HalfCheetah-v4 --hide velocities"],
        seeds=3,
    ),
    "flow_offline": Claim(
        "What do updates on data of another policy gain, before the first step?",
        {  # OUT/halfcheetah.npz is made by the commands of docs/flow_sac.md
            "offline, then online": OFFLINE,
            "online, data in the buffer": f"{OFFLINE} --offline-steps 0",
        },
        [
            "--total-timesteps 50000 --eval-frequency 5000 --eval-episodes 10 "
            "--env-id HalfCheetah-v4"
        ],
        seeds=3,
        clock=False,
    ),
    "rp_pgm": Claim(
        "Does the gradient through a model learn faster, and does it need spectral normalisation?",
        {
            "h = 0, SAC": "rp_pgm.py --estimator model-free --spectral-norm none",
            "h = 0, normalised": "rp_pgm.py --estimator model-free",
            "h = 2, normalised": "rp_pgm.py --horizon 2",
            "h = 2": "rp_pgm.py --horizon 2 --spectral-norm none",
            "h = 8, normalised": "rp_pgm.py --horizon 8",
            "h = 8": "rp_pgm.py --horizon 8 --spectral-norm none",
            "h = 2, DR, normalised": "rp_pgm.py --horizon 2 --estimator dr",
        },
        [
            "--total-timesteps 12000 --eval-frequency 1000 --grad-var-every 0 "
            "--env-id InvertedDoublePendulum-v4",
            "--total-timesteps 50000 --eval-frequency 5000 --grad-var-every 0 --width 128 "
            "--model-length 2 --warmup-steps 5000 --env-id HalfCheetah-v4",
        ],
        seeds=3,
        threshold={"InvertedDoublePendulum-v4": 9000, "HalfCheetah-v4": 3000},
        clock=False,  # beside other runs
    ),
    "point_mass": Claim(
        "How often is a goal reached that is long out of sight, or behind doors that are?",
        {
            "S2PG-PPO, memory std .1": "s2pg_ppo.py",
            "BPTT-PPO, L = 32": "bptt_ppo.py",
            "memoryless PPO": "s2pg_ppo.py --memoryless",
        },
        [f"{POINT_MASS} PointMassMemory-v0", f"{POINT_MASS} PointMassDoor-v0"],
        seeds=3,
        column="success_stochastic",
        clock=False,
    ),
}


class Line(NamedTuple):
    """A line of the first table of docs/results.md: the methods that are compared there."""

    task: str
    claim: str
    env_id: str
    s2pg: str
    bptt: str | None  # there is no BPTT-TD3
    memoryless: str
    readme: bool = False  # a line of the README's table, too


SAC_LINE = "S2PG-SAC", "BPTT-SAC, L = 32, all rows", "memoryless SAC"
SAC_L1 = "S2PG-SAC", "BPTT-SAC, L = 1", "memoryless SAC"
PPO_LINE = "S2PG-PPO", "BPTT-PPO, L = 32", "memoryless PPO"
PPO_L1 = "S2PG-PPO", "BPTT-PPO, L = 1", "memoryless PPO"
OVERVIEW = [
    Line("SAC, pendulum", "hidden_velocities", "InvertedPendulum-v4", *SAC_LINE),
    Line("the same, BPTT with L = 1", "memory_gradient", "InvertedPendulum-v4", *SAC_L1),
    Line(
        "SAC, double pendulum", "sac_and_bptt", "InvertedDoublePendulum-v4", *SAC_LINE, True
    ),
    Line("the same, BPTT with L = 1", "memory_gradient", "InvertedDoublePendulum-v4", *SAC_L1),
    Line(
        "SAC, double pendulum, velocities seen, random bodies", "random_bodies",
        "InvertedDoublePendulum-v4", *SAC_LINE,
    ),
    Line("SAC, Hopper", "sac_and_bptt", "Hopper-v4", *SAC_LINE, True),
    Line("the same, BPTT with L = 1", "memory_gradient", "Hopper-v4", *SAC_L1),
    Line("SAC, HalfCheetah", "sac_and_bptt", "HalfCheetah-v4", *SAC_LINE, True),
    Line("the same, BPTT with L = 1", "memory_gradient", "HalfCheetah-v4", *SAC_L1),
    Line("SAC, a cue, repeated for 20 steps", "cue_recall", "CueRecall-v0", *SAC_LINE),
    Line("the same for 100 steps", "cue_recall", "CueRecall-100-v0", *SAC_LINE),
    Line("the same for 1000 steps", "cue_recall", "CueRecall-1000-v0", *SAC_LINE),
    Line(
        "SAC, a cue, asked for after 20 steps (BPTT: L = 20)", "delayed_response",
        "CueRecall-delayed-v0", "S2PG-SAC", "BPTT-SAC, L = the horizon", "memoryless SAC", True,
    ),
    Line(
        "the same, S2PG with `--chrono 32`, less noise and `--sobolev 1`", "delayed_response",
        "CueRecall-delayed-v0", "S2PG-SAC, chrono, less noise, Sobolev",
        "BPTT-SAC, L = the horizon", "memoryless SAC", True,
    ),
    Line("the same, BPTT with L = 1", "memory_gradient", "CueRecall-delayed-v0", *SAC_L1),
    Line("TD3, pendulum", "td3", "InvertedPendulum-v4", "S2PG-TD3", None, "memoryless TD3"),
    Line("PPO, pendulum", "ppo", "InvertedPendulum-v4", *PPO_LINE),
    Line(
        "the same, S2PG with `--separate-ratios`", "ppo", "InvertedPendulum-v4",
        "S2PG-PPO, separate ratios", *PPO_LINE[1:],
    ),
    Line("the same, BPTT with L = 1", "ppo", "InvertedPendulum-v4", *PPO_L1),
    Line("PPO, HalfCheetah", "ppo_and_bptt", "HalfCheetah-v4", *PPO_LINE, True),
    Line(
        "the same, S2PG with `--separate-ratios`", "ppo_and_bptt", "HalfCheetah-v4",
        "S2PG-PPO, separate ratios", *PPO_LINE[1:], True,
    ),
    Line("the same, BPTT with L = 1", "ppo_and_bptt", "HalfCheetah-v4", *PPO_L1),
    Line("the same, velocities seen, in a wind", "ppo_in_wind", "HalfCheetah-v4", *PPO_LINE),
]  # fmt: skip
