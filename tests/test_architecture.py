"""The rules about who may import whom, held by reading the sources.

Every import statement counts: inside functions, under ``TYPE_CHECKING``, in ``try``. What a rule permits beyond itself
stands in a table here with its reason, and an entry that is no longer needed fails.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dcp_plugins"

# A name stands for the module and everything below it.
FLOORS: dict[str, float] = {
    "dcp_plugins.contract": 0,
    "dcp_plugins.errors": 0,
    "dcp_plugins.events": 0,
    "dcp_plugins.collector": 0,
    "dcp_plugins.forks": 0,
    "dcp_plugins.pace": 0,
    "dcp_plugins.processes": 0,
    "dcp_plugins.progress": 0,
    "dcp_plugins.torch_private": -0.2,
    "dcp_plugins.torch_versions": -0.1,
    "dcp_plugins.user_warnings": -0.2,  # `contract` warns about releases of torch.
    "dcp_plugins.config": 0,
    "dcp_plugins.format": 1,
    "dcp_plugins.geometry": 1,
    "dcp_plugins.storage": 2,
    "dcp_plugins.tensors": 2,
    "dcp_plugins.templates": 2.5,  # Imports `tensors`, and floor 3 imports it.
    "dcp_plugins.plan": 3,
    "dcp_plugins.coord": 3,
    "dcp_plugins.staging": 3,
    "dcp_plugins.state_dict": 3,
    "dcp_plugins.engine": 4,
    "dcp_plugins.manager": 5,
    "dcp_plugins.convert": 5,
    "dcp_plugins.lightning": 6,
    "dcp_plugins.accelerate": 6,
    "dcp_plugins.transformers": 6,
    "dcp_plugins.cli": 6,
}

# The package itself and the modules that give torch's module paths: they re-export from the engine and below, and
# contain nothing of their own. No floor below the command line and the adapters imports them.
SURFACE_FLOOR = 4.5
SURFACE = {
    "dcp_plugins": "what `import dcp_plugins as dcp` gives",
    "dcp_plugins._extension": "torch's module path",
    "dcp_plugins.api": "torch's module path",
    "dcp_plugins.default_planner": "torch's module path",
    "dcp_plugins.filesystem": "torch's module path",
    "dcp_plugins.hf_storage": "torch's module path",
    "dcp_plugins.logger": "torch's module path",
    "dcp_plugins.logging_handlers": "torch's module path",
    "dcp_plugins.metadata": "torch's module path",
    "dcp_plugins.optimizer": "torch's module path",
    "dcp_plugins.planner": "torch's module path",
    "dcp_plugins.planner_helpers": "torch's module path",
    "dcp_plugins.protocol": "torch's module path, from torch 2.15 on",
    "dcp_plugins.quantized_hf_storage": "torch's module path",
    "dcp_plugins.resharding": "torch's module path",
    "dcp_plugins.state_dict_loader": "torch's module path",
    "dcp_plugins.state_dict_saver": "torch's module path",
    "dcp_plugins.stateful": "torch's module path",
    "dcp_plugins.utils": "torch's module path",
}

# Shipped for tests, ours and users'; imports what it helps to test and is imported by none of the floors.
TESTING = "dcp_plugins.testing"

# Modules of one floor that build on each other: (importer, imported) -> reason.
SAME_FLOOR: dict[tuple[str, str], str] = {
    ("dcp_plugins.pace", "dcp_plugins.progress"): "whatever may run Python for long gives way, and is a step of a save",
    ("dcp_plugins.errors", "dcp_plugins.contract"): "our CheckpointException is a subclass of torch's",
}

TORCH_CHECKPOINT = "torch.distributed.checkpoint"
TORCH_CHECKPOINT_IMPORTERS = {
    "dcp_plugins.contract": "the vocabulary is torch's own; everything else takes it from here",
    "dcp_plugins.cli.stock": "the benchmark's other side is stock torch itself",
}

# About 400 for what has to be understood as a whole; a test module is a list of claims, each read by itself.
MAX_LINES = {"dcp_plugins": 420, "examples": 260, "tests": 600}
LONGER_FILES: dict[str, str] = {}

FRAMEWORKS = ("lightning", "pytorch_lightning", "accelerate", "transformers", "fsspec")


@dataclass(frozen=True)
class Import:
    importer: str
    line: int
    # `from a import b` may name the module a.b or something inside a: both are listed, the longer first.
    candidates: tuple[str, ...]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text() for name, path in MODULES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imports_of(name: str) -> Iterator[Import]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, (alias.name,))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(name, node.lineno, (f"{node.module}.{alias.name}", str(node.module)))


def internal_imports(name: str) -> Iterator[tuple[Import, str]]:
    """Every import of a module of the package, with the module it resolves to."""
    for found in imports_of(name):
        target = next((candidate for candidate in found.candidates if candidate in MODULES), None)
        if target is not None:
            yield found, target
        else:
            inside = [candidate for candidate in found.candidates if candidate.split(".")[0] == "dcp_plugins"]
            assert not inside, f"{name}:{found.line} imports {inside[0]}, which does not exist"


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def unit_of(name: str) -> str:
    """The floor's member that the module belongs to: a package or a single module."""
    if name in SURFACE:
        return name
    return next((prefix for prefix in (*FLOORS, TESTING) if within(name, prefix)), "")


def floor_of(name: str) -> float:
    return SURFACE_FLOOR if name in SURFACE else FLOORS[unit_of(name)]


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in MODULES if not unit_of(name)]
    assert not homeless, f"no floor for {homeless}: add them to FLOORS, at the lowest that works"


def test_a_floor_imports_only_floors_below_it() -> None:
    wrong = []
    for name in MODULES:
        if unit_of(name) == TESTING:
            continue
        for found, target in internal_imports(name):
            where = f"{name}:{found.line} imports {target}"
            if unit_of(target) == TESTING:
                wrong.append(f"{where}, which is for tests")
                continue
            together = (
                unit_of(name) == unit_of(target)
                or (unit_of(name), unit_of(target)) in SAME_FLOOR
                or floor_of(name) == floor_of(target) == SURFACE_FLOOR
            )
            if not together and floor_of(target) >= floor_of(name):
                wrong.append(f"{where}: floor {floor_of(name)} may not import floor {floor_of(target)}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles() -> None:
    graph = {
        name: {target for _, target in internal_imports(name) if target != name and not within(name, target)}
        for name in MODULES
    }
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            pytest.fail("cycle: " + " -> ".join([*path[path.index(name) :], name]))
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_torchs_checkpoint_package_is_imported_in_one_module() -> None:
    importers: dict[str, int] = {}
    for name in MODULES:
        for found in imports_of(name):
            if any(within(candidate, TORCH_CHECKPOINT) for candidate in found.candidates):
                importers[name] = found.line
    unexpected = {name: line for name, line in importers.items() if name not in TORCH_CHECKPOINT_IMPORTERS}
    assert not unexpected, f"take the names from dcp_plugins.contract: {unexpected}"
    unused = set(TORCH_CHECKPOINT_IMPORTERS) - set(importers)
    assert not unused, f"no longer needed here: {unused}"


def test_the_adapters_framework_is_imported_only_in_the_adapter() -> None:
    homes = {
        "lightning": ("dcp_plugins.lightning",),
        "pytorch_lightning": ("dcp_plugins.lightning",),
        "lightning_fabric": ("dcp_plugins.lightning",),
        "accelerate": ("dcp_plugins.accelerate", "dcp_plugins.transformers"),
        "transformers": ("dcp_plugins.transformers",),
        "fsspec": ("dcp_plugins.storage",),
        "hypothesis": (TESTING,),
        "pytest": (TESTING,),
    }
    wrong = []
    for name in MODULES:
        for found in imports_of(name):
            top = found.candidates[-1].split(".")[0]
            if top in homes and unit_of(name) not in homes[top]:
                wrong.append(f"{name}:{found.line} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long_to_read() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): length
        for folder, limit in MAX_LINES.items()
        for path in (ROOT / folder).rglob("*.py")
        if (length := path.read_bytes().count(b"\n")) > limit
    }
    unexplained = {name: length for name, length in long.items() if name not in LONGER_FILES}
    assert not unexplained, f"too long; split them, or give a reason in LONGER_FILES: {unexplained}"
    assert not set(LONGER_FILES) - set(long), "no longer long"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_what_it_exports(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    exported = [
        node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        for node in tree.body
        for target in (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(target, ast.Name) and target.id == "__all__"
    ]
    if name.endswith("__main__"):
        return
    assert exported, f"{name} has no __all__"


def test_every_broad_except_gives_its_reason() -> None:
    """`except Exception`, `except BaseException` and bare `except` carry a comment on the line or next to it."""
    bare = []
    for name, tree in TREES.items():
        with MODULES[name].open("rb") as file:
            comments = {
                token.start[0]
                for token in tokenize.tokenize(file.readline)
                if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa"))
            }
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                raises = isinstance(node.body[-1], ast.Raise)
                if not raises and not comments & {node.lineno - 1, node.lineno, node.lineno + 1}:
                    bare.append(f"{name}:{node.lineno}")
    assert not bare, f"say why everything is caught there: {bare}"


def _is_broad(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in names)


def test_assertions_are_not_used_for_users_mistakes() -> None:
    """An `AssertionError` is never raised by name: `assert` marks our own bugs, users get errors of errors.py."""
    raised = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in {"AssertionError", "NotImplementedError"}
    ]
    assert not raised, raised
