"""Modules and functions stay small, and nothing unfinished or personal is left lying about."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.sources import Source, decorators, functions

MODULE_LINES = 400
FUNCTION_LINES = 60

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.:/$}-])/(?:work|root|tmp|home|Users|mnt)/(?=[\w.])")
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")


def size_breaches(source: Source) -> Iterator[str]:
    """Modules and functions that are too long. A docstring is not counted against its function."""
    lines = source.text.count("\n") + 1
    if lines >= MODULE_LINES:
        yield f"{source.path}:1 {lines} lines; a module has fewer than {MODULE_LINES}: split it by subject"
    for name, node in functions(source):
        first = node.body[0]
        has_docstring = ast.get_docstring(node, clean=False) is not None
        docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
        length = (node.end_lineno or 0) - node.lineno + 1 - docstring
        if length >= FUNCTION_LINES:
            yield f"{source.at(node)} {name} has {length} lines; a function has fewer than {FUNCTION_LINES}"


def stub_breaches(source: Source) -> Iterator[str]:
    """Functions that only say that they are not written yet."""
    for name, node in functions(source):
        if "abstractmethod" in decorators(node):
            continue
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.Raise)
                and inner.exc is not None
                and "NotImplementedError" in ast.unparse(inner.exc)
            ):
                yield f"{source.at(inner)} {name} raises NotImplementedError and is not abstract"


def text_breaches(path: str, text: str) -> Iterator[str]:
    """Paths of somebody's machine, and notes to finish something later."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := MACHINE_PATH.search(line):
            yield f"{path}:{number} names a path of one machine: {line[found.start() :][:40]}"
        if found := UNFINISHED.search(line):
            yield f"{path}:{number} leaves a note behind: {line[found.start() :][:40]}"


def repository_files(root: Path) -> list[str]:
    """What belongs to the repository, new files included; all that lies there if it is no checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        return sorted(filter(None, listing.stdout.split("\0")))
    skipped = re.compile(r"^(\.[^/]*|build|dist|runs)/|/__pycache__/|\.egg-info/")
    names = (file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    return sorted(name for name in names if not skipped.search(name))


def report(breaches: Iterator[str]) -> None:
    listed = list(breaches)
    assert not listed, "\n" + "\n".join(listed)


def test_modules_and_functions_are_small(sources):
    report(breach for source in sources for breach in size_breaches(source))


def test_nothing_is_left_unwritten(sources):
    report(breach for source in sources for breach in stub_breaches(source))


def test_no_machine_paths_and_no_notes_to_self(root: Path):
    def breaches() -> Iterator[str]:
        for name in repository_files(root):
            try:
                text = (root / name).read_text("utf-8")
            except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
                continue  # pictures and weights; files that were removed and not yet recorded so; links
            yield from text_breaches(name, text)

    assert {"pyproject.toml", "Makefile"} <= set(repository_files(root))
    report(breaches())


def module(body: str) -> Source:
    return Source("detrkit.x", "x.py", body)


def test_the_size_rule_counts_code_and_not_docstrings():
    short = "def f():\n" + "    a = 1\n" * (FUNCTION_LINES - 2)
    assert not list(size_breaches(module(short)))
    assert "f has 60 lines" in next(size_breaches(module(short + "    a = 1\n")))
    explained = short.replace("def f():\n", 'def f():\n    """Say.\n\n    More.\n    """\n')
    assert not list(size_breaches(module(explained)))
    assert "400 lines" in next(size_breaches(module("\n" * (MODULE_LINES - 1))))
    assert not list(size_breaches(module("\n" * (MODULE_LINES - 2))))


def test_the_stub_rule_spares_abstract_methods():
    method = "class A:\n    {}\n    def f(self):\n        raise NotImplementedError\n"
    assert len(list(stub_breaches(module(method.format(""))))) == 1
    assert not list(stub_breaches(module(method.format("@abc.abstractmethod"))))


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("open('/{}/data')".format("work"), 1),
        ("cd /{}/x".format("root"), 1),
        ("DATA=/{}/x".format("home"), 1),
        ("# TO{}: later".format("DO"), 1),
        ("https://example.org/work/page", 0),
        ("$ROOT/work/x", 0),
        ("a todo list, runs/work/x", 0),
    ],
)
def test_the_text_rule(line, count):
    assert len(list(text_breaches("x", line))) == count
