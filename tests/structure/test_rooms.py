"""The package's rooms: imports point inward only, nothing goes in circles, heavy packages stay where they belong."""

import ast
import sys
from pathlib import Path

import pytest

import cppo_verl

PACKAGE = Path(cppo_verl.__file__).parent

# From the inside out; a room imports from itself and from those before it in this list (picture: docs/design.md).
ROOMS = (
    *("core", "methods", "problems", "grading", "run", "checkpoint", "data"),
    *("adapters", "adapters.cpu", "adapters.rollout", "adapters.actor", "adapters.driver"),
    *("config", "dry_run", "quickstart", "smollm2", "evaluation", "figures", "training", "inspection"),
    *("policy_loss", "bench", "doctor"),
    "cli",
)
# Outside adapters/ only the processes that are started for it touch verl, Ray and vLLM.
HEAVY = {"verl", "ray", "vllm", "transfer_queue"}
MEASURED = tuple(f"bench.measure.{name}" for name in ("engine", "rollout", "tensors", "transfer"))
PROCESSES = ("bench.rounds", *MEASURED, "doctor.probe", "evaluation.generation")


def modules(package):
    """Dotted name inside the package ("" for its own __init__) -> syntax tree."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(tree):
    """Full names of everything that is imported, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(trees):
    """Module -> the modules of the package that it imports."""
    edges = {name: set() for name in trees}
    for name, tree in trees.items():
        for full in imported(tree):
            if not full.startswith("cppo_verl."):
                continue
            target = full.removeprefix("cppo_verl.")
            while target not in trees:  # a name inside a module
                target = target.rpartition(".")[0]
            if target not in ("", name):
                edges[name].add(target)
    return edges


def room(module):
    """The longest name in ROOMS that the module lies in."""
    inside = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    assert inside, f"{module} is in no room: give it one in ROOMS"
    return max(inside, key=len)


def upward(edges):
    """Imports of a room from one that lies outside it."""
    for module, targets in edges.items():
        for target in targets if module else ():
            if ROOMS.index(room(target)) > ROOMS.index(room(module)):
                yield f"{module} imports {target}"


def circles(edges):
    """Modules that can be reached from themselves."""
    for start in edges:
        seen, waiting = set(), list(edges[start])
        while waiting:
            if (module := waiting.pop()) not in seen:
                seen.add(module)
                waiting += edges[module]
        if start in seen:
            yield start


@pytest.fixture(scope="module")
def trees():
    return modules(PACKAGE)


def test_every_module_is_in_a_room_and_every_room_has_modules(trees):
    assert {room(module) for module in trees if module} == set(ROOMS)


def test_imports_point_inward_only(trees):
    assert list(upward(graph(trees))) == []


def test_nothing_imports_itself_by_a_detour(trees):
    assert list(circles(graph(trees))) == []


def test_heavy_packages_are_imported_by_adapters_and_processes_of_their_own(trees):
    users = {name for name, tree in trees.items() if {full.split(".")[0] for full in imported(tree)} & HEAVY}
    assert {name for name in users if not name.startswith("adapters.")} == set(PROCESSES)


def test_no_module_has_the_name_of_a_standard_one(trees):
    """evaluation/statistics.py is a name that other programs rely on."""
    shadowing = {name for name in trees if name.rpartition(".")[2] in sys.stdlib_module_names}
    assert shadowing == {"evaluation.statistics"}


def test_the_checks_can_fail():
    def edges(**sources):
        return graph({name.replace("__", "."): ast.parse(text) for name, text in sources.items()})

    climbing = edges(core__masks="def f():\n    from cppo_verl.config.compose import compose", config__compose="")
    assert list(upward(climbing)) == ["core.masks imports config.compose"]
    assert list(upward(edges(config__compose="import cppo_verl.core.masks", core__masks=""))) == []
    round_about = edges(
        run__log="from cppo_verl.run import machine",
        run__machine="from cppo_verl.run.folder import x",
        run__folder="import cppo_verl.run.log",
        run="",
    )
    assert sorted(circles(round_about)) == ["run.folder", "run.log", "run.machine"]
    with pytest.raises(AssertionError, match="attic is in no room"):
        room("attic")
