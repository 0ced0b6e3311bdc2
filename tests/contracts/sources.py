"""Python sources as the contracts see them: a name, a place and a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module: its dotted name, its path from the root of the repository, and its text."""

    name: str
    path: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree, which all rules share and none changes."""
        return ast.parse(self.text, self.path)

    def at(self, node: ast.AST) -> str:
        """Where a node stands, in the form that editors jump to."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def read_sources(folder: Path, package: str) -> list[Source]:
    """All modules of a package that lies in `folder`, by name."""
    found = []
    for file in sorted((folder / package).rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Source(name, file.relative_to(folder.parent).as_posix(), file.read_text("utf-8"), is_package))
    return found


@dataclass(frozen=True)
class Import:
    """One imported module: its name, the statement, and the circumstances."""

    module: str
    node: ast.AST
    in_function: bool
    for_types: bool


def imports(source: Source, known: set[str]) -> Iterator[Import]:
    """Every import of a module, wherever it stands: in functions, for type checkers, by `importlib`.

    Args:
        source: the module.
        known: the names of all modules of the library, which tell `from package import module` from
            `from module import name`.
    """

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for name in imported_by(node, source, known):
            yield Import(name, node, in_function, for_types)
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, in_function, True)
            for child in node.orelse:
                yield from visit(child, in_function, for_types)
            return
        inside = in_function or isinstance(node, Function | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, for_types)

    yield from visit(source.tree, False, False)


def imported_by(node: ast.AST, source: Source, known: set[str]) -> list[str]:
    """The modules that one statement or call imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = source.name.split(".")
            kept = len(package) - node.level + source.is_package
            base = ".".join([*package[:kept], *([base] if base else [])])
        inner = [f"{base}.{alias.name}" for alias in node.names]
        return sorted({name if name in known else base for name in inner})
    if isinstance(node, ast.Call) and last_name(node.func) in {"import_module", "__import__"}:
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.JoinedStr) and argument.values:
            argument = argument.values[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return [argument.value.rstrip(".")]
    return []


def last_name(node: ast.AST) -> str:
    """`c` for the expressions `a.b.c` and `c`; empty for others."""
    return str(getattr(node, "attr", "") or getattr(node, "id", ""))


def functions(source: Source) -> Iterator[tuple[str, Function]]:
    """Every function and method, with its dotted name inside the module."""
    for name, node in definitions(source):
        if isinstance(node, Function):
            yield name, node


def definitions(source: Source) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Every function, method and class, nested ones included, with its dotted name inside the module."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                name = f"{prefix}{child.name}"
                yield name, child
                within = ".<locals>." if isinstance(child, Function) else "."
                yield from visit(child, name + within)
            else:
                yield from visit(child, prefix)

    yield from visit(source.tree, "")


def is_public(name: str) -> bool:
    """Whether a dotted name can be reached from outside: nothing in it starts with an underscore or is local."""
    return not any(part.startswith(("_", "<")) for part in name.split("."))


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last names of a definition's decorators: `abstractmethod` for `@abc.abstractmethod`."""
    plain = (item.func if isinstance(item, ast.Call) else item for item in node.decorator_list)
    return {last_name(item) for item in plain}
