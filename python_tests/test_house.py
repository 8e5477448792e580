"""The order of the house: short parameter lists, imports in one direction, one stem a family, one list of backends."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from convnextv2_kernels import backends, ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnextv2_kernels"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def parsed(folder: str) -> dict[str, ast.Module]:
    """Syntax trees of the Python files below a folder of the repository, by path."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


# -- parameters

MOST = 8
# Their parameters are those of a kernel or of an operator's schema, which has its own place.
SIGNATURE_IS_A_SCHEMA = re.compile(r"triton\.jit\b|(_fake|operator)\b")


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its dotted name, those within classes and functions too."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        name = f"{inside}{node.name}" if named else inside
        if isinstance(node, FUNCTIONS):
            yield name, node
        yield from functions(node, f"{name}." if named else inside)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of what a caller passes."""
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p.arg for p in named if p.arg not in ("self", "cls", "ctx")]


def may_be_long(path: str, name: str, function: ast.FunctionDef) -> bool:
    """Public ops, constructors of models and layers, kernels, and what has the signature of an operator."""
    if any(SIGNATURE_IS_A_SCHEMA.match(ast.unparse(decorator)) for decorator in function.decorator_list):
        return True
    if path.startswith((f"{PACKAGE}/ops/", f"{PACKAGE}/backends/reference/")):
        return name in ops.__all__  # the reference of an op is its specification, and takes its arguments
    return path.startswith((f"{PACKAGE}/models/", f"{PACKAGE}/nn/")) and name.endswith("__init__")


def test_no_function_has_more_than_eight_parameters():
    over = [
        f"{path}: {name} has {len(parameters(function))}"
        for path, tree in {**parsed(PACKAGE), **parsed("bench")}.items()
        for name, function in functions(tree)
        if len(parameters(function)) > MOST and not may_be_long(path, name, function)
    ]
    assert not over, f"more than {MOST} parameters; group what belongs together (params.py): {over}"


# -- imports

# Who may import whom: a module of a layer takes from layers above it in this table, and from its own.
LAYERS = (
    ("version", "errors", "_console", "_interrupts"),
    ("_files", "_progress", "layout", "params", "dtypes", "settings", "sizes", "tracing"),
    ("backends", "checkpoints"),
    ("schedule",),
    ("ops",),
    ("nn", "_info"),
    ("models", "fuse", "graphs"),
    ("data",),
    ("benchmark",),  # train's demo ends with one measurement
    ("train",),
    ("analysis",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# parts of a layer that must not even take from each other, or from less than the whole layers below
ONLY = {
    "nn": {"nn", "ops", "layout", "params", "dtypes", "settings", "tracing"},
    "models": {"models", "nn", "ops", "layout", "params", "dtypes", "settings", "sizes", "tracing", "version"},
    "checkpoints": {"checkpoints", "errors", "_console", "_files", "sizes", "version"},
    "data": {"data", "errors", "_files", "_console", "_progress", "layout"},
}
# know torch and each other
BOTTOM = ("layout", "params", "dtypes", "settings", "tracing")


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def modules() -> frozenset[str]:
    return frozenset(map(module_name, parsed(PACKAGE)))


def imports(path: str, tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """``(module, line, whether at the top)`` of every import but those for type checkers."""
    folder = path.removesuffix(".py").split("/")[:-1]

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in modules() else base), node.lineno, top
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not isinstance(node, FUNCTIONS))

    yield from walk(tree, True)


@cache
def own_imports() -> dict[str, list[tuple[str, str, bool]]]:
    """``{module: [(module of the package, place, whether at the top)]}``."""
    return {
        module_name(path): [
            (target, f"{path}:{line}", top) for target, line, top in imports(path, tree) if target in modules()
        ]
        for path, tree in parsed(PACKAGE).items()
    }


def part(module: str) -> str:
    """The file or folder right in the package; of the package itself its name."""
    return module.split(".")[1] if "." in module else module


def crossing() -> Iterator[tuple[str, str, str]]:
    """``(part, part it imports, place)`` of every import from one part of the package to another."""
    for module, targets in own_imports().items():
        for target, place, _ in targets:
            if part(module) not in (PACKAGE, part(target)):
                yield part(module), part(target), place


def test_every_part_of_the_package_has_a_layer():
    parts = {part(module) for module in modules()} - {PACKAGE}
    unknown = sorted(parts - LEVEL.keys())
    assert not unknown, f"give these a line of LAYERS: {unknown}"


def test_imports_point_one_way():
    wrong = [
        f"{place}: {importer} imports {imported}"
        for importer, imported, place in crossing()
        # the package as a whole is what its users see; whoever lies below models would import itself
        if (LEVEL[importer] < LEVEL["models"] if imported == PACKAGE else LEVEL[imported] > LEVEL[importer])
        or (LEVEL.get(imported) == LEVEL[importer] and imported not in BOTTOM)
    ]
    assert not wrong, f"an import from a higher layer, or from beside: {wrong}"


def test_layers_are_thin():
    wrong = [
        f"{place}: {importer} imports {imported}"
        for importer, imported, place in crossing()
        if importer in ONLY and imported not in ONLY[importer]
    ]
    assert not wrong, f"nn and models take from ops and from what has no kernels: {wrong}"


def test_the_bottom_knows_torch_alone():
    allowed = {*sys_modules(), "torch", *(f"{PACKAGE}.{name}" for name in BOTTOM)}
    wrong = []
    for name in BOTTOM:
        path = f"{PACKAGE}/{name}.py"
        for target, line, _ in imports(path, parsed(PACKAGE)[path]) if path in parsed(PACKAGE) else ():
            if target not in allowed and target.split(".")[0] not in allowed:
                wrong.append(f"{path}:{line} imports {target}")
    assert not wrong, f"{', '.join(BOTTOM)} import torch and each other: {wrong}"


def sys_modules() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


def test_no_late_import_closes_a_cycle():
    graph = {module: {target for target, _, _ in targets} for module, targets in own_imports().items()}
    closing = [
        f"{place}: {' -> '.join([module, *way])}"
        for module, targets in own_imports().items()
        for target, place, top in targets
        if not top and (way := path_between(graph, target, module))
    ]
    assert not closing, f"an import inside a function hides a cycle: {closing}"


def test_no_import_at_the_top_closes_a_cycle():
    graph = {
        module: {target for target, _, top in targets if top and target != module}
        for module, targets in own_imports().items()
    }
    cycles = [
        " -> ".join([module, *way])
        for module, targets in graph.items()
        for target in sorted(targets)
        if (way := path_between(graph, target, module))
    ]
    assert not cycles, cycles


def path_between(graph: dict[str, set[str]], start: str, end: str) -> list[str] | None:
    """Modules from ``start`` to ``end``, each imported by the one before; None if there is no way."""
    before: dict[str, str | None] = {start: None}
    queue = [start]
    for module in queue:
        if module == end:
            way = [module]
            while before[way[-1]] is not None:
                way.append(before[way[-1]])
            return way[::-1]
        for target in sorted(graph.get(module, ()) - before.keys()):
            before[target] = module
            queue.append(target)
    return None


# -- one stem a family

FAMILIES = ("conv", "norm", "mlp", "patches", "resample")
# Columns of the table that `ls **/conv*` shows, and the families each has. LayerNorm, GRN and the products of
# resampling are in other families' kernels below the reference.
COLUMNS = {
    f"{PACKAGE}/ops": FAMILIES,
    f"{PACKAGE}/backends/reference": FAMILIES,
    f"{PACKAGE}/backends/triton": FAMILIES[:4],
    "csrc/cpu": FAMILIES[:4],
    "csrc/cuda": FAMILIES[:4],
    "csrc/torch": FAMILIES[:4],
    "docs/kernels": FAMILIES[:3],
}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_family_has_its_stem_in_every_column(column):
    there = sorted(path.name for path in (ROOT / column).glob("*"))
    stems = [name.partition(".")[0] for name in there]
    absent = [f for f in COLUMNS[column] if not any(s == f or s.startswith(f"{f}_") for s in stems)]
    assert not absent, f"{column} has no file or folder called {absent} or {absent}_*, only {there}"


# -- sizes

LONGEST = 700
SOURCES = ("*.py", "*.cpp", "*.h", "*.inl", "*.cu", "*.cuh", "*.md")
FOLDERS = (PACKAGE, "csrc", "bench", "python_tests", "docs", "examples", "tools")


def test_no_file_is_longer_than_700_lines():
    below = itertools.chain.from_iterable((ROOT / f).rglob(kind) for f in FOLDERS for kind in SOURCES)
    paths = [*below, *itertools.chain.from_iterable(ROOT.glob(kind) for kind in SOURCES)]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST}
    assert not long, f"cut these in two: {long}"


# -- one list of backends

HOME = f"{PACKAGE}/backends/__init__.py"


def enumerations(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """``(line, names)`` of every list, tuple, set, Literal or keys of a dict that has three backends or more."""
    names = set(backends.NAMES) - {"auto"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = node.elts
        else:
            continue
        said = [p.value for p in parts if isinstance(p, ast.Constant) and p.value in names]
        if len(said) > 2:
            yield node.lineno, said


def test_backends_are_enumerated_once():
    found = [
        f"{path}:{line} names {', '.join(names)}"
        for path, tree in {**parsed(PACKAGE), **parsed("bench")}.items()
        for line, names in enumerations(tree)
        if path != HOME
    ]
    assert not found, f"ask backends.REGISTRY instead: {found}"
    assert len(list(enumerations(parsed(PACKAGE)[HOME]))) <= 2, "the registry and the order of preference, no more"
    assert hasattr(backends, "REGISTRY"), f"{HOME} has no REGISTRY"
