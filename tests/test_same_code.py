"""Scripts share text, not modules: what has one name is one text in all of them. And none grows."""

import ast
import functools
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# lines of each script, at most
LIMITS = dict(s2pg_sac=600, bptt_sac=600, s2pg_td3=600, s2pg_ppo=600, bptt_ppo=600)
LIMITS |= dict(s2pg_gail=700, s2pg_lsiq=700, flow_sac=700, rp_pgm=700)
SCRIPTS = [ROOT / f"{name}.py" for name in LIMITS]
PAIRS = list(combinations(SCRIPTS, 2))

# Names whose text may differ, each with the reason.
MAY_DIFFER = {
    "Args": "each algorithm has options of its own, and their ranges",
    "TUNED": "and their values for a task",
    "Agent": "each script trains its own",
    "train": "each has its own buffer",
}
# Options that may have other defaults in another family of algorithms.
TUNING = {"privileged_critic", "actor_lr", "critic_lr", "alpha_lr", "num_envs", "policy_frequency"}
# Lines that are the algorithm: actor, critic, buffer, losses, agent, CUDA graph, training loop.
LEARNING = {"StochasticStatefulActor", "chrono_init", "atanh", "squashed_gaussian", "TwinCritic"}
LEARNING |= {"Transitions", "TransitionBuffer", "soft_critic_loss", "soft_actor_loss", "S2PGSAC"}
LEARNING |= {"descend", "Graphed", "train"}


def nodes(path):
    return ast.parse(path.read_text()).body


@functools.cache
def definitions(path):
    """Text of every function, class and constant at the top level of a script."""
    texts, lines = {}, path.read_text().splitlines()
    for node in nodes(path):
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts[node.name] = "".join(f"@{ast.unparse(d)}\n" for d in node.decorator_list) + text
        elif isinstance(node, ast.Assign):
            texts[ast.unparse(node.targets[0])] = text
    return texts


@pytest.mark.parametrize("one, other", PAIRS, ids=lambda path: path.stem)
def test_one_name_is_one_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = (first.keys() & second.keys()) - MAY_DIFFER.keys()
    assert len(shared) >= 5, "the comparison has lost its subject"
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


# Lines of `train` of s2pg_sac.py, or s2pg_ppo.py, that another script lacks; those it has not.
BUFFER = "buffer = TransitionBuffer(args.buffer_size, args.num_envs, *agent.row_sizes, device)"
OWN_TRAINING = {
    "s2pg_td3": [], "bptt_ppo": [], "bptt_sac": [BUFFER],
    "s2pg_lsiq": [
        "metrics = agent.update(buffer)",
        "obs, reward, terminated, truncated, info = env.step(a)",
        "buffer.add(policy_obs, critic_obs, z, action, reward, terminated, first)",
    ],
    "s2pg_gail": ['metrics = agent.update(rollout) | {"charts/learning_rate": lr}'],
    "flow_sac": [
        "for _ in range(updates_due):",
        "updates_due = global_step - last_step if global_step >= first_update else 0",
    ],
    "rp_pgm": [
        BUFFER,
        "z = torch.zeros(args.num_envs, agent.z_dim, device=device)",
        "a_prev = torch.zeros(args.num_envs, agent.action_dim, device=device)",
        "policy_obs, critic_obs = (to_device(view, device) for view in views(obs))",
        "action, z_next = agent.act(policy_obs, z, a_prev)",
        "metrics = agent.update(buffer)",
        "buffer.add(policy_obs, critic_obs, z, action, reward, terminated, first)",
        "keep = to_device(~final, device).unsqueeze(-1)",
        "z, a_prev = z_next * keep, action * keep",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_TRAINING)
def test_a_run_is_that_of_the_script_it_follows_but_for_these_lines(name):
    """So that what tests/test_scripts.py tells of s2pg_sac.py and s2pg_ppo.py is true of all."""

    def lines(script):
        text = definitions(ROOT / f"{script}.py")["train"]
        return [line.split("  # ")[0].strip() for line in text.splitlines()]

    own = lines(name)
    shared = lines("s2pg_ppo" if name in ("bptt_ppo", "s2pg_gail") else "s2pg_sac")
    missing = [line for line in shared if line not in own and line[:2] not in ("", "# ")]
    assert missing == OWN_TRAINING[name]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_no_other_script(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("one, other", PAIRS, ids=lambda path: path.stem)
def test_shared_options_have_the_same_default(one, other):
    """A baseline with another learning rate or target would be no baseline."""

    def defaults(script):
        (args,) = [node for node in nodes(script) if getattr(node, "name", "") == "Args"]
        fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
        return {field.target.id: ast.unparse(field.value) for field in fields}

    mine, theirs = defaults(one), defaults(other)
    shared = mine.keys() & theirs.keys()
    if "flow_sac" in (one.stem, other.stem):
        shared -= {"state_dim", "alpha"}  # as published: no internal state, and .2
    if "rp_pgm" in (one.stem, other.stem):
        shared -= {"alpha"}  # as published, RP-PGM begins with a lower temperature
    if one.stem.split("_")[1] != other.stem.split("_")[1]:
        shared -= TUNING
    assert len(shared) > 15
    assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short(path):
    assert len(path.read_text().splitlines()) <= LIMITS[path.stem]


@pytest.mark.parametrize("page, most", [("README.md", 130), ("docs/results.md", 200)])
def test_a_page_is_short(page, most):
    lines = (ROOT / page).read_text().splitlines()
    assert len(lines) <= most
    # of a page of results, tables are as wide as they have to be
    assert max(len(line) for line in lines if line[:1] not in ("|", "!")) <= 120


def test_the_lines_that_the_readme_quotes_are_in_the_script():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "actor.sample(" in line)
    text = (ROOT / "s2pg_sac.py").read_text()
    assert all(f"\n    {line}\n" in text for line in lines[first : first + 2])


def test_the_sac_pair_differs_by_the_algorithm():
    """`diff bptt_sac.py s2pg_sac.py` has at most 260 changed lines."""
    command = ["diff", "bptt_sac.py", "s2pg_sac.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    changed = [line for line in diff.splitlines() if line[0] in "<>"]
    assert 100 < len(changed) <= 260


def test_three_fifths_of_a_script_are_learning():
    texts, source = definitions(SCRIPTS[0]), SCRIPTS[0].read_text()
    assert texts.keys() >= LEARNING
    learning = sum(text.count("\n") + 1 for name, text in texts.items() if name in LEARNING)
    assert learning >= 0.6 * source.count("\n")
