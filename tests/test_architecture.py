"""The module chain, file and function sizes: the folder tree shows the architecture, and it stays true."""

import ast
from pathlib import Path

import safeshape

ROOT = Path(safeshape.__file__).parent
CHAIN = [
    "types",
    "config",
    "store",
    "client",
    "stats",
    "models",
    "data",
    "signals",
    "policies",
    "losses",
    "kernels",
    "steps",
    "caching",
    "refusals",
    "attacks",
    "evals",
    "callbacks",
    "provenance",
    "onpolicy",
    "trainer",
    "defences",
    "world",
    "report",
    "sources",
    "train",
    "bench",
    "demo",
    "verbs",
    "cli",
]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "safeshape":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("safeshape."))


def test_imports_go_only_to_the_left():
    for name, path, tree in modules():
        for other in imported(tree):
            assert CHAIN.index(other) <= CHAIN.index(name), f"{path.name} imports {other}, which is to its right"


def test_files_and_functions_stay_short():
    for _, path, tree in modules():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_every_module_says_what_it_is_for():
    for _, path, tree in modules():
        assert ast.get_docstring(tree), path
