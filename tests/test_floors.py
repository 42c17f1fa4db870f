"""The rooms of the package stand on floors: a module imports only from its own room or below."""

import ast
import functools
import pathlib

import detailflow_jax

PACKAGE = pathlib.Path(detailflow_jax.__file__).parent
# From the bottom up. The rooms of one floor do not know each other.
FLOORS = (
    {"ops", "runtime"},
    {"models"},
    {"data", "tasks"},
    {"convert"},
    {"inference"},
    {"evaluate"},
    {"training"},
    {"train"},
    {"pod", "demo", "app", "cli"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# What takes seconds to import, or is not part of the base install.
HEAVY = {
    "torch",
    "tensorflow",
    "tensorflow_datasets",
    "sklearn",
    "matplotlib",
    "transformers",
    "diffusers",
    "gradio",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree; "" is the package itself."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that are imported anywhere below `tree`; from a import b: a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute in this package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_import(tree: ast.Module) -> set[str]:
    """What is imported while the module itself is: not the imports inside functions."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return names


def own(names: set[str], known) -> set[str]:
    """The modules of this package among the imported names."""
    found = set()
    for name in names:
        package, _, inner = name.partition(".")
        if package == "detailflow_jax":
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def room(name: str) -> str:
    return name.partition(".")[0]


def test_imports_go_downwards():
    trees, upward = modules(), []
    for name, tree in trees.items():
        if room(name) not in LEVEL:
            continue  # The package itself, and the one-line commands at its top.
        for other in own(imported(tree), trees):
            here, there = LEVEL[room(name)], LEVEL.get(room(other), len(FLOORS))
            if room(name) != room(other) and there >= here:
                upward.append(f"{name} imports {other or 'the package itself'}")
    assert not upward, "\n".join(sorted(upward))


def test_there_is_no_circle():
    trees = modules()
    below = {name: own(at_import(tree), trees) - {name} for name, tree in trees.items()}
    while free := [name for name, names in below.items() if not names & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"circles among {sorted(below)}"


def test_every_room_has_a_floor():
    doors = {"", "compile_pod", "extract_codes", "extract_latents", "generate", "weights"}
    doors |= {"__main__", "evaluate.__main__"}
    rooms = {room(name) for name in modules() if name not in doors}
    assert rooms <= LEVEL.keys(), f"without a floor: {sorted(rooms - LEVEL.keys())}"


def test_heavy_packages_are_imported_where_they_are_used():
    heavy = {
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in at_import(tree)
        if other.partition(".")[0] in HEAVY
    }
    assert not heavy, "\n".join(sorted(heavy))
