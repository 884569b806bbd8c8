"""Who may import whom: walks every import with `ast` and names the offenders."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPURE = ("jax", "numpy", "grpc", "time", "random", "asyncio", "threading", "os", "logging")
STDLIB = tuple(sys.stdlib_module_names)
NOUNS = ("blitzjax.types", "blitzjax.events", "blitzjax.commands", "blitzjax.config", "blitzjax.errors")

# package or module → (all it may import, or None: anything; what it must not)
RULES: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "blitzjax.types": (STDLIB, ()),
    "blitzjax.events": ((*STDLIB, "blitzjax.types"), ()),
    "blitzjax.commands": ((*STDLIB, "blitzjax.types"), ()),
    "blitzjax.errors": (STDLIB, ()),
    "blitzjax.config": ((*STDLIB, "blitzjax.types", "blitzjax.errors"), ()),
    "blitzjax.control": ((*STDLIB, *NOUNS, "blitzjax.control"), IMPURE),
    "blitzjax.models": ((*STDLIB, "blitzjax.types", "blitzjax.errors", "blitzjax.models", "jax", "flax", "numpy"), ()),
    "blitzjax.transfer": (None, ("blitzjax.control", "blitzjax.engine", "blitzjax.models", "blitzjax.serve")),
    "blitzjax.engine": (None, ("blitzjax.serve", "blitzjax.sim")),
    "blitzjax.serve": (None, ("blitzjax.sim",)),
    "blitzjax.arrivals": ((*STDLIB, "blitzjax.errors"), ()),
    "blitzjax.sim": ((*STDLIB, *NOUNS, "blitzjax.arrivals", "blitzjax.control", "blitzjax.sim"), ()),
}
PRIVATE_JAX = ("jax._src", "jaxlib")
COMPAT = "blitzjax.transfer.compat"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its dotted name; models/ is installed as blitzjax.models."""
    for folder, package in (("blitzjax", "blitzjax"), ("models", "blitzjax.models")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def offences(module: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """What the rules say against `module`, one line each."""
    found = []
    for line, name in imports(module, tree, is_package):
        if within(name, PRIVATE_JAX) and module != COMPAT:
            found.append(f"{module}:{line} imports {name}; only {COMPAT} may")
        for package, (allowed, forbidden) in RULES.items():
            if within(module, (package,)):
                if within(name, forbidden) or (allowed is not None and not within(name, allowed)):
                    found.append(f"{module}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", RULES)
def test_every_rule_is_about_something(package: str) -> None:
    assert any(within(module, (package,)) for module, _ in modules())


def test_imports_point_downwards() -> None:
    found = [offence for module, path in modules()
             for offence in offences(module, ast.parse(path.read_text(), str(path)), path.name == "__init__.py")]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(("module", "source", "name"), [
    ("blitzjax.types", "import numpy", "numpy"),
    ("blitzjax.config", "from blitzjax import control", "blitzjax.control"),
    ("blitzjax.control.cluster", "import os.path", "os.path"),
    ("blitzjax.control.cluster", "from time import monotonic", "time.monotonic"),
    ("blitzjax.control.cluster", "from ..engine import instance", "blitzjax.engine.instance"),
    ("blitzjax.models.llama", "from blitzjax.engine.stages import Stages", "blitzjax.engine.stages.Stages"),
    ("blitzjax.transfer.world", "def f():\n  import blitzjax.control", "blitzjax.control"),
    ("blitzjax.engine.loading", "from blitzjax.serve import codec", "blitzjax.serve.codec"),
    ("blitzjax.engine.loading", "from jax._src import xla_bridge", "jax._src.xla_bridge"),
    ("blitzjax.serve.worker", "import jaxlib", "jaxlib")])
def test_offenders_are_named(module: str, source: str, name: str) -> None:
    (offence,) = offences(module, ast.parse(source))
    assert offence.startswith(f"{module}:") and f"imports {name}" in offence


def test_allowed_imports_pass() -> None:
    source = "from __future__ import annotations\nimport enum\nfrom blitzjax.types import Phase\nfrom . import routing"
    assert offences("blitzjax.control.cluster", ast.parse(source)) == []
