"""Imports point downwards only, optional packages are loaded late, and nothing but the command line talks."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.sources import Source, imports

TIERS = (
    ("cli", "__main__"),
    ("serve", "card"),
    ("training", "predict", "find", "export"),
    ("sources",),
    ("one_shot",),
    ("pretrain",),
    ("holders",),
    ("checkpoint", "convert", "hub"),
    ("answers",),
    ("segmentation", "prompts"),
    ("models",),
    ("losses", "nn", "data", "evaluation", "postprocess", "visualize"),
    ("boxes",),
    ("panoptic", "arithmetic"),
    ("structures",),
    ("masks", "whole"),
    ("documents",),
    ("errors",),
)
"""The parts of the library, the highest first. A part imports from the tiers below its own."""

SIDEWAYS = {
    "__main__": {"cli"},
    "training": {"predict"},
    "predict": {"find"},
    "find": {"predict"},
    "checkpoint": {"convert"},
    "evaluation": {"data", "visualize"},
    "visualize": {"data"},
}
"""What a part may import from its own tier."""

HEIGHT = {part: -row for row, parts in enumerate(TIERS) for part in parts}

IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Distributions whose module has another name."""

ARGUMENT_PARSERS = {"optparse", "getopt", "tyro", "click", "typer", "fire"}

OF_PROGRAMS = {
    *("print", "pprint", "stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"),
    *("argv", "ArgumentParser"),
    *("exit", "_exit", "quit", "SystemExit"),
}
"""What only a program does, however the name comes to a module. Of argparse that is no `Namespace`, which published
checkpoints hold."""


def part(module: str) -> str:
    """The part of the library that a module belongs to; empty for the package itself."""
    return [*module.split("."), ""][1]


def takes_only_the_version(node: ast.AST) -> bool:
    """Whether a statement is `from detrkit import __version__`, which loads nothing; modules may stand beside it."""
    return isinstance(node, ast.ImportFrom) and "__version__" in {alias.name for alias in node.names}


def direction_breaches(source: Source, known: set[str]) -> Iterator[str]:
    """Imports that point upwards, sideways without leave, or from one variant to another."""
    own = part(source.name)
    if source.name == "detrkit":  # the list of public names, which loads them when they are used
        return
    if own not in HEIGHT:
        yield f"{source.path}:1 {own!r} has no tier; give it one in TIERS of tests/contracts/test_imports.py"
        return
    for found in imports(source, known):
        if found.module.split(".")[0] != "detrkit":
            continue
        other = part(found.module)
        says = f"{source.at(found.node)} {source.name} imports {found.module}: "
        if not other:
            if own != "cli" and not takes_only_the_version(found.node):
                yield says + "only cli may use the public package; import the module that defines the name"
        elif other not in HEIGHT:
            yield says + "there is no such part of the library"
        elif other == own:
            siblings = own == "models" and found.module != "detrkit.models" and source.name != "detrkit.models"
            is_shared = found.module.startswith("detrkit.models._")  # what belongs to no variant
            if siblings and found.module != source.name and not is_shared:
                yield says + "variants do not import each other; shared leaves belong in nn"
        elif HEIGHT[other] > HEIGHT[own]:
            yield says + f"imports point downwards only, and {other} lies above {own}"
        elif HEIGHT[other] == HEIGHT[own] and other not in SIDEWAYS.get(own, set()):
            yield says + f"{own} and {other} stand side by side and do not know each other"


def talk_breaches(source: Source, known: set[str]) -> Iterator[str]:
    """Printing and reading of arguments outside the command line."""
    if part(source.name) in {"cli", "__main__"}:
        return
    for found in imports(source, known):
        if found.module.split(".")[0] in ARGUMENT_PARSERS:
            yield f"{source.at(found.node)} {source.name} imports {found.module}: only cli reads arguments"
    for node in ast.walk(source.tree):
        name = next((text for kind in ("id", "attr", "name") if (text := getattr(node, kind, None)) in OF_PROGRAMS), "")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "input":  # also what layers call a parameter
            name = "input"
        if name:
            yield f"{source.at(node)} {source.name} uses {name}: only cli is a program and talks to the terminal"


def package_breaches(source: Source, known: set[str], core: set[str], extras: set[str]) -> Iterator[str]:
    """Packages that pyproject.toml does not name, and optional ones that are imported before they are used."""
    always = sys.stdlib_module_names | core | {"detrkit"}
    for found in imports(source, known):
        package = found.module.split(".")[0]
        if package in always:
            continue
        says = f"{source.at(found.node)} {source.name} imports {package}: "
        if package not in extras:
            yield says + "pyproject.toml names it neither as a dependency nor in an extra"
        elif not (found.in_function or found.for_types):
            yield says + "an optional package is imported in the function that uses it"


def module_names(requirements: list[str]) -> set[str]:
    """The modules that a list of requirements installs."""
    names = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.fixture(scope="module")
def known(sources: list[Source]) -> set[str]:
    return {source.name for source in sources}


def report(breaches: Iterator[str]) -> None:
    listed = list(breaches)
    assert not listed, "\n" + "\n".join(listed)


def test_imports_point_downwards(sources, known):
    report(breach for source in sources for breach in direction_breaches(source, known))


def test_only_the_command_line_talks(sources, known):
    report(breach for source in sources for breach in talk_breaches(source, known))


def test_optional_packages_are_declared_and_imported_late(sources, known, root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    core = module_names(project["dependencies"])
    extras = module_names([item for name, items in project["optional-dependencies"].items() for item in items])
    report(breach for source in sources for breach in package_breaches(source, known, core, extras))


KNOWN = {"detrkit", "detrkit.cli", "detrkit.models", "detrkit.models.a", "detrkit.models.b", "detrkit.nn"}


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("detrkit.boxes", "from detrkit.nn import heads", "nn lies above boxes"),
        ("detrkit.boxes", "from . import cli", "cli lies above boxes"),
        ("detrkit.nn.heads", "from detrkit import models", "models lies above nn"),
        ("detrkit.nn.heads", "from ..models.a import Model", "models lies above nn"),
        ("detrkit.nn.heads", "def f():\n    import detrkit.training.loop", "training lies above nn"),
        ("detrkit.nn.heads", "if TYPE_CHECKING:\n    from detrkit.cli import main", "cli lies above nn"),
        ("detrkit.nn.heads", "importlib.import_module(f'detrkit.models.{name}')", "models lies above nn"),
        ("detrkit.losses.x", "from detrkit.nn.heads import MLP", "side by side"),
        ("detrkit.data.x", "from detrkit.evaluation import run", "side by side"),
        ("detrkit.models.a", "from detrkit.models.b import Model", "variants do not import each other"),
        ("detrkit.models.a", "from . import b", "variants do not import each other"),
        ("detrkit.predict", "import detrkit", "only cli may use the public package"),
        ("detrkit.predict", "from detrkit import Detections", "only cli may use the public package"),
        ("detrkit.novelty", "", "has no tier"),
        ("detrkit.predict", "import detrkit.novelty", "no such part"),
    ],
)
def test_the_direction_rule_finds(name, text, rule):
    (breach,) = direction_breaches(Source(name, "x.py", text), KNOWN)
    assert rule in breach
    assert breach.startswith("x.py:")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("detrkit.cli.train", "import detrkit\nfrom detrkit.training import loop"),
        ("detrkit.models.a", "from detrkit.models import Variant\nfrom detrkit.nn import heads"),
        ("detrkit.models", "from detrkit.models import a"),
        ("detrkit.evaluation.run", "from detrkit.data.annotations import Annotations"),
        ("detrkit.predict", "from detrkit import __version__, models"),
        ("detrkit.nn.heads", "import torch\nfrom detrkit.nn.attention import Attention"),
    ],
)
def test_the_direction_rule_allows(name, text):
    assert not list(direction_breaches(Source(name, "x.py", text), KNOWN))


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "show = print",
        "from rich import print as show",
        "Console().print(1)",
        "input()",
        "sys.stdout.write('x')",
        "from sys import stderr",
        "argparse.ArgumentParser()",
        "from argparse import ArgumentParser",
        "def f():\n    from tyro import cli",
        "sys.exit(1)",
        "from sys import exit",
        "os._exit(1)",
        "raise SystemExit",
    ],
)
def test_the_talk_rule_finds(text):
    assert len(list(talk_breaches(Source("detrkit.data.x", "x.py", text), KNOWN))) == 1
    assert not list(talk_breaches(Source("detrkit.cli.x", "x.py", text), KNOWN))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import matplotlib.pyplot", 1),
        ("try:\n    import matplotlib\nexcept ImportError:\n    pass", 1),
        ("def f():\n    import unheard_of", 1),
        ("def f():\n    import matplotlib", 0),
        ("if TYPE_CHECKING:\n    import matplotlib", 0),
        ("import json, numpy", 0),
    ],
)
def test_the_package_rule_finds(text, count):
    source = Source("detrkit.data.x", "x.py", text)
    assert len(list(package_breaches(source, KNOWN, {"numpy"}, {"matplotlib"}))) == count
