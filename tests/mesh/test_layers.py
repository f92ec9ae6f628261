"""The layer table of docs/architecture.md and the purity of its protocols, over the syntax tree of every package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT: dict[str, set[str]] = {
    "mesh": set(),
    "kernels": set(),
    "engine": {"mesh", "kernels"},
    "kvtransfer": {"mesh", "kernels"},
    "worker": {"engine", "kvtransfer", "mesh"},
    "prefill": {"worker", "engine", "kvtransfer", "mesh"},
    "decode": {"worker", "engine", "kvtransfer", "mesh"},
    "proxy": {"mesh"},
}
NO_TORCH = ("mesh", "proxy")
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
CORES = (
    *("kvtransfer.fetching", "kvtransfer.holding", "kvtransfer.protocol"),
    *("proxy.lifecycle", "proxy.routing.pool", "mesh.lifecycle"),
)
"""The protocols, with their parts of the same name: pure functions of state, event and time."""
WORLD = {"time", "random", "secrets", "asyncio", "threading", "socket", "zmq", "torch"}
"""What a pure function does not know."""
PICKLING_CALLS = {"send_pyobj", "recv_pyobj", "broadcast_object_list", "all_gather_object"}


@dataclass(frozen=True, slots=True)
class Source:
    module: str
    package: str
    is_package: bool
    tree: ast.Module

    @property
    def imports(self) -> dict[str, int]:
        """Every dotted name imported, submodule or attribute, with its line."""
        nodes = (n for n in ast.walk(self.tree) if isinstance(n, ast.Import | ast.ImportFrom))
        return {name: node.lineno for node in nodes for name in self._names(node)}

    def _names(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = self._base(node)
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        kept = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])


def source(path: Path) -> Source:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(module, parts[0], parts[-1] == "__init__", ast.parse(path.read_text(), str(path)))


SOURCES = {s.module: s for package in MAY_IMPORT for s in map(source, sorted((ROOT / package).rglob("*.py")))}


def wrong_layers(s: Source) -> list[str]:
    allowed = MAY_IMPORT[s.package] | {s.package}
    ours = MAY_IMPORT.keys()
    return [
        f"{s.module}:{line} imports {name}"
        for name, line in s.imports.items()
        if ((top := name.split(".")[0]) in ours and top not in allowed)
        or (top == "torch" and s.package in NO_TORCH)
        or top in ("tests", "benchmarks")
    ]


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def hidden_imports(s: Source) -> list[str]:
    """Imports inside functions or behind TYPE_CHECKING."""
    inside = [n for f in functions(s.tree) for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [n for n in ast.walk(s.tree) if isinstance(n, ast.Name) and n.id == "TYPE_CHECKING"]
    return [f"{s.module}:{n.lineno}" for n in [*inside, *names]]


def pickling(s: Source) -> list[str]:
    modules = [f"{s.module}:{line} {name}" for name, line in s.imports.items() if name.split(".")[0] in PICKLES]
    calls = [
        f"{s.module}:{n.lineno} {n.attr}"
        for n in ast.walk(s.tree)
        if isinstance(n, ast.Attribute) and n.attr in PICKLING_CALLS
    ]
    return modules + calls


def cycle(graph: dict[str, list[str]]) -> list[str]:
    """The modules of some import cycle, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in graph[module]:
            if found := visit(other, (*path, module)):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, ()))), [])


def import_graph() -> dict[str, list[str]]:
    return {m: [name for name in s.imports if name in SOURCES and name != m] for m, s in SOURCES.items()}


def reached(module: str, graph: dict[str, list[str]]) -> set[str]:
    """What importing `module` imports of ours: itself, its packages, and theirs."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in graph and name not in found:
            found.add(name)
            waiting += [*graph[name], name.rpartition(".")[0]]
    return found


def worldly(s: Source) -> list[str]:
    return [f"{s.module}:{line} imports {name}" for name, line in s.imports.items() if name.split(".")[0] in WORLD]


def parsed(package: str, code: str) -> Source:
    return Source(f"{package}.x", package, False, ast.parse(code))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_package_keeps_to_its_layer(package: str) -> None:
    found = [s for s in SOURCES.values() if s.package == package]
    assert found
    assert [wrong for s in found for wrong in wrong_layers(s)] == []


def test_no_import_is_hidden() -> None:
    assert [hidden for s in SOURCES.values() for hidden in hidden_imports(s)] == []


def test_nothing_pickles() -> None:
    assert [found for s in SOURCES.values() for found in pickling(s)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle(import_graph()) == []


@pytest.mark.parametrize("core", [m for m in SOURCES if m.startswith(CORES)])
def test_a_protocol_knows_no_clock_no_chance_and_no_socket(core: str) -> None:
    modules = reached(core, import_graph())
    assert core in modules
    assert [wrong for m in sorted(modules) for wrong in worldly(SOURCES[m])] == []


def test_every_protocol_is_looked_at() -> None:
    assert all(any(m.startswith(core) for m in SOURCES) for core in CORES)


def test_what_a_module_reaches_is_found() -> None:
    graph = {"a.b": ["c.d"], "c.d": ["e"], "e": ["c.d"], "a": ["f"], "f": [], "c": [], "g": []}
    assert reached("a.b", graph) == {"a.b", "c.d", "e", "a", "f", "c"}
    around = reached("worker.process", import_graph())
    assert {"time", "zmq"} <= {name.split(".")[0] for m in around for name in SOURCES[m].imports}
    assert worldly(parsed("mesh", "from time import monotonic"))
    assert worldly(parsed("mesh", "import torch.nn"))
    assert not worldly(parsed("mesh", "import json"))


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("mesh", "import torch.nn"),
        ("mesh", "from engine.engine import Engine"),
        ("proxy", "from torch import nn"),
        ("proxy", "import kvtransfer"),
        ("engine", "from kvtransfer import endpoint"),
        ("kvtransfer", "import engine.step"),
        ("prefill", "import decode.role"),
        ("kernels", "import mesh"),
        ("mesh", "def f():\n    import proxy.app"),
        ("worker", "from tests import tiny_models"),
    ],
)
def test_a_wrong_layer_is_found(package: str, code: str) -> None:
    assert wrong_layers(parsed(package, code))


def test_a_hidden_import_a_pickle_and_a_circle_are_found() -> None:
    assert hidden_imports(parsed("mesh", "def f():\n    import json"))
    assert hidden_imports(parsed("mesh", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json"))
    assert pickling(parsed("mesh", "import pickle"))
    assert pickling(parsed("mesh", "socket.send_pyobj(1)"))
    assert cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
