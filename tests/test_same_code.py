"""Scripts share text, not modules: what has one name is one text in all of them."""

import ast
import functools
import re
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))

# Names whose text may differ, each with the reason.
MAY_DIFFER = {
    "Args": "each algorithm has options of its own, and their ranges",
    "TUNED": "and their values for a task",
    "Agent": "each script trains its own",
}
FAMILIES_DIFFER = {
    "train": "on-policy scripts learn from rollouts, off-policy ones from a replay buffer, and "
    "imitation learns from demonstrations as well",
}
FAMILY = dict(sac="off-policy", td3="off-policy", ppo="on-policy", gail="gail", lsiq="lsiq")


@functools.cache
def definitions(path):
    """Text of every function, class and constant at the top level of a script."""
    source = path.read_text()
    texts = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = "".join(f"@{ast.unparse(d)}\n" for d in node.decorator_list) + text
            texts[node.name] = text
        elif isinstance(node, ast.Assign):
            texts[ast.unparse(node.targets[0])] = text
    return texts


def family(path):
    return FAMILY[path.stem.split("_")[1]]


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_one_name_is_one_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = (first.keys() & second.keys()) - MAY_DIFFER.keys()
    if family(one) != family(other):
        shared -= FAMILIES_DIFFER.keys()
    assert len(shared) > 10, "the comparison has lost its subject"
    for name in sorted(shared):
        assert first[name] == second[name], f"{name} differs between {one.name} and {other.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_no_other_script(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {script.stem for script in SCRIPTS}


# What may differ between algorithms, but not between S2PG and its baseline.
TUNING = {"privileged_critic", "actor_lr", "alpha_lr"}


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_shared_options_have_the_same_default(one, other):
    """A baseline with another learning rate or target would be no baseline."""

    def defaults(script):
        definitions = ast.parse(script.read_text()).body
        (args,) = [node for node in definitions if getattr(node, "name", "") == "Args"]
        return {
            node.target.id: ast.unparse(node.value)
            for node in args.body
            if isinstance(node, ast.AnnAssign)
        }

    mine, theirs = defaults(one), defaults(other)
    shared = mine.keys() & theirs.keys()
    if one.stem.split("_")[1] != other.stem.split("_")[1]:
        shared -= TUNING
    assert len(shared) > 20
    assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_inline_metadata_lists_the_requirements(path):
    """`uv run script.py` installs what `pip install -r requirements.txt` does."""
    block = re.search(r"# /// script\n(.*?)# ///", path.read_text(), re.DOTALL).group(1)
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    assert sorted(re.findall(r'"([^"]+)"', block)[1:]) == sorted(required)
