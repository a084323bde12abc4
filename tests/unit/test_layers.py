"""Who may import whom, as docs/architecture.md says, and how large a file and a function may be."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABOVE = ("m4train.build", "m4train.restore", "m4train.commands", "m4train.cli")
LATER = ("m4train.data", "m4train.training", "m4train.inspection", "m4train.evaluation")
HEAVY = ("torch", "peft", "transformers", "deepspeed", "wandb", "webdataset", "bitsandbytes")
FORBIDDEN = {  # what a package must not import, anywhere in its files
    "m4train": ("transformers",),
    "m4train/models": (*ABOVE, *LATER, "m4train.processing", "hydra"),
    "m4train/processing": (*ABOVE, *LATER, "m4train.models", "torch.nn"),
    "m4train/data": (*ABOVE, "m4train.models", *LATER[1:], "torch.distributed"),
    "m4train/data/storage": tuple(
        f"m4train.data.{name}" for name in ("documents", "sources", "index", "plan", "loading")
    ),
    "m4train/data/documents": tuple(
        f"m4train.data.{name}" for name in ("sources", "index", "source", "plan", "loading")
    ),
    "m4train/data/sources": tuple(f"m4train.data.{name}" for name in ("index", "source", "plan", "loading")),
    "m4train/data/index": tuple(f"m4train.data.{name}" for name in ("source", "plan", "loading")),
    "m4train/data/plan": ("m4train.data.loading",),
    "m4train/training": (*ABOVE, "m4train.data", "m4train.processing", "m4train.inspection", "m4train.evaluation"),
    "m4train/config": (*ABOVE, *LATER, "m4train.models", "m4train.processing", *HEAVY),
    "m4train/inspection": ("m4train.commands", "m4train.cli"),
    "m4train/evaluation": ("m4train.commands", "m4train.cli"),
    "data_pipelines": (*ABOVE, "m4train.models", "m4train.training"),
}
GROUND = ("families.py", "gpus.py", "parts.py", "optimizers.py")  # import nothing of m4train


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import; of `from package import module` the module."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_goes_against_the_layers(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _files(folder)
        if path.name != "__main__.py"  # a door to the command line
        for line, name in _imports(path)
        if any(name == banned or name.startswith(f"{banned}.") for banned in FORBIDDEN[folder])
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", GROUND)
def test_tables_at_the_ground_import_nothing(name: str) -> None:
    assert not [imported for _, imported in _imports(ROOT / "m4train" / name) if imported.startswith("m4train")]


def test_modules_import_each_other_in_one_direction_only() -> None:
    """No circle of imports but that of types: what stands under TYPE_CHECKING or in a function is not followed."""
    modules = {_module(path): path for path in _files("m4train")}
    edges = {name: _eager(path, modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _eager(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("m4train"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
    return found - {_module(path)}


def test_files_and_functions_are_of_a_size_to_be_read() -> None:
    paths = [path for folder in ("m4train", "data_pipelines") for path in _files(folder)]
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {path: count for path, count in lines.items() if count > 400}
    assert statistics.median(lines.values()) < 150
    functions = [
        (node.end_lineno - node.lineno, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
        for path in paths
        for node in ast.walk(_tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]
    assert not [where for length, where in functions if length > 60]
    assert statistics.quantiles([length for length, _ in functions], n=10)[-1] < 40
