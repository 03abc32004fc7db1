# SPDX-License-Identifier: Apache-2.0
"""The files of the repository as the house rules see them.

A rule is a function from files to complaints. `tests/house/test_rules.py` runs every
rule on the repository, and on small files that break it, so that no rule can pass
because it sees nothing.
"""

import ast
import functools
import io
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "pyramid_jax"
# What is installed, and what stays in the repository.
INSTALLED = (PACKAGE, "configs", "launch")
FOLDERS = (*INSTALLED, "tests", "benchmarks")

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """One file: its path relative to the repository, and its text."""

    def __init__(self, path: str, text: str):
        self.path, self.text = PurePosixPath(path), text

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def folder(self) -> str:
        return self.path.parts[0]

    @property
    def part(self) -> str:
        """The part of its folder, e.g. "models" for pyramid_jax/models/dit.py."""
        return PurePosixPath(self.path.parts[1]).stem

    @property
    def module(self) -> str:
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def in_package(self) -> bool:
        return self.folder == PACKAGE

    @property
    def is_kernel(self) -> bool:
        return self.in_package and self.part == "kernels"

    def imports(self) -> Iterator[str]:
        """Every imported name with its full path, e.g. `pyramid_jax.mask.joint`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                prefix = "." * node.level + (node.module or "")
                yield from (f"{prefix}.{name.name}" for name in node.names)

    def imported_parts(self) -> set[str]:
        """The parts of the package that it imports, its own not counted."""
        names = (name.split(".") for name in self.imports())
        parts = {parts[1] for parts in names if parts[0] == PACKAGE and len(parts) > 1}
        return parts - {self.part} if self.in_package else parts

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def docstrings(self) -> Iterator[ast.Constant]:
        for node in ast.walk(self.tree):
            if (
                isinstance(node, _WITH_DOCSTRING)
                and ast.get_docstring(node) is not None
            ):
                yield node.body[0].value

    def comments(self) -> Iterator[tokenize.TokenInfo]:
        for token in self._tokens():
            if token.type == tokenize.COMMENT:
                yield token

    def code_lines(self) -> int:
        """Lines with code: without docstrings, comments and blank lines."""
        lines = set()
        for token in self._tokens():
            if token.type not in _NO_CODE:
                lines |= set(range(token.start[0], token.end[0] + 1))
        for text in self.docstrings():
            lines -= set(range(text.lineno, text.end_lineno + 1))
        return len(lines)

    def _tokens(self) -> Iterator[tokenize.TokenInfo]:
        return tokenize.generate_tokens(io.StringIO(self.text).readline)


Rule = Callable[[Sequence[Source]], Iterator[str]]


class Breach(NamedTuple):
    """Files that break a rule."""

    rule: Rule
    files: Sequence[Source]


def each_file(check: Callable[[Source], Iterator[str]]) -> Rule:
    """A rule about files one by one; its complaints begin with the file's path."""

    @functools.wraps(check)
    def rule(files: Sequence[Source]) -> Iterator[str]:
        for source in files:
            yield from (f"{source}: {text}" for text in check(source))

    return rule


def breach(rule: Rule, path: str, text: str) -> Breach:
    """A rule that one file breaks."""
    return Breach(rule, [Source(path, text)])


def inside(name: str) -> str:
    """The path of a file of the package."""
    return f"{PACKAGE}/{name}.py"


@functools.cache
def repository(root: Path = ROOT) -> tuple[Source, ...]:
    """Every Python file of `FOLDERS`."""
    paths = [p for folder in FOLDERS for p in sorted((root / folder).rglob("*.py"))]
    return tuple(
        Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
    )


def import_graph(files: Sequence[Source]) -> dict[str, set[str]]:
    """Which module of the repository imports which."""
    modules = {source.module for source in files}
    graph: dict[str, set[str]] = {}
    for source in files:
        names = set(source.imports())
        names |= {name.rpartition(".")[0] for name in names - modules}
        graph[source.module] = names & modules - {source.module}
    return graph


def room_graph(files: Sequence[Source]) -> dict[str, set[str]]:
    """Which part of the package, or other folder, imports which of the others."""
    graph: dict[str, set[str]] = {}
    for source in files:
        room = source.part if source.in_package else source.folder
        names = (name.split(".") for name in source.imports())
        rooms = {
            parts[1] if parts[0] == PACKAGE else parts[0]
            for parts in names
            if parts[1:]
        }
        graph.setdefault(room, set()).update(rooms - {room})
    return {room: rooms & graph.keys() for room, rooms in graph.items()}


def part_graph(files: Sequence[Source]) -> dict[str, set[str]]:
    """Which part of the package imports which."""
    graph: dict[str, set[str]] = {}
    for source in files:
        if source.in_package:
            graph.setdefault(source.part, set()).update(source.imported_parts())
    return graph


def code_lines_by_part(files: Sequence[Source]) -> Counter[str]:
    """Code lines of every part of the package."""
    counts: Counter[str] = Counter()
    for source in files:
        if source.in_package:
            counts[source.part] += source.code_lines()
    return counts
