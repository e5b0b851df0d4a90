"""Who may import whom, and that no modules import each other in a circle."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = [ROOT / "train.py", *(path for top in ("grpo", "data", "reward") for path in (ROOT / top).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file it does, without those of a package that it is in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` imports the module, `from module import name` does not
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES or {node.module}
    return found


MODULES = {module_of(path) for path in FILES}
IMPORTS = {module_of(path): imports_of(path) for path in FILES}
RUNS = ("grpo.run", "grpo.evaluate", "grpo.benchmark", "grpo.demo")  # what is built on the algorithm


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("who", "never"),
    [
        # The command reads its flags as the others do.
        (
            lambda m: is_within(m, "reward") and m != "reward.explore",
            ("torch", "transformers", "data", "grpo", "train"),
        ),
        (lambda m: True, ("reward.explore",)),
        (lambda m: is_within(m, "data"), ("grpo", "train")),
        (lambda m: m.startswith("grpo.") and m.count(".") == 1, RUNS),
        (lambda m: is_within(m, "grpo.model"), RUNS),
        (lambda m: is_within(m, "grpo.run"), ("grpo.evaluate", "grpo.benchmark", "grpo.demo")),
        # A command stands above train.py: it times the trainer's own phases. Nothing imports it.
        (lambda m: m != "grpo.benchmark.__main__", ("train", "grpo.benchmark.__main__")),
    ],
    ids=["reward", "explore", "data", "algorithm", "model", "run", "train.py"],
)
def test_no_import_goes_upward(who, never):
    found = {module: imports for module, imports in IMPORTS.items() if who(module)}
    assert found
    wrong = {m: bad for m, imports in found.items() if (bad := {i for i in imports if is_within(i, *never)})}
    assert not wrong


def test_a_reward_is_explored_without_torch():
    """It takes seconds to import."""
    found, new = set(), {"reward.explore"}
    while new:
        found |= new
        new = {other for module in new for other in IMPORTS.get(module, ())} - found
    assert "data.flags" in found and not {module for module in found if is_within(module, "torch", "decord")}


def test_no_import_goes_in_a_circle():
    """Take away modules that import nothing of ours that is left, until none is left."""
    left = {module: imports & MODULES for module, imports in IMPORTS.items()}
    while free := {module for module, imports in left.items() if not imports & (left.keys() - {module})}:
        left = {module: imports for module, imports in left.items() if module not in free}
    assert not left


def test_the_algorithm_stays_short():
    """What a researcher reads to know the algorithm: comments included."""
    path = "train.py grpo/attention.py grpo/rollout.py grpo/logprobs.py grpo/loss.py data/video_cap.py"
    path += " reward/numerical.py"
    assert sum(len((ROOT / name).read_text().splitlines()) for name in path.split()) < 1000
