# SPDX-License-Identifier: Apache-2.0
"""What prose names exists: files, modules, and the names in them.

Prose is the text of documents, docstrings, comments, and the heads of configs. What is
clearly a reference is looked up in the files of the repository, without importing them:

- a path: `kernels/visits.py`, pyramid_jax/models/dit.py, `tests/golden/`, [text](a.md);
- a module that can be run or imported: launch.sample, pyramid_jax.mask.TokenMask;
- a name in backquotes: `mask.TokenMask`, `Stage.start`, `TokenMask`.
"""

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

from tests.house.sources import (
    FOLDERS,
    PACKAGE,
    ROOT,
    Source,
    breach,
    each_file,
    inside,
    repository,
)

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "notebooks/*.py")
TOP = (*FOLDERS, "docs", "notebooks")
# Names of other programs, where no import tells that they are theirs.
OTHERS = {
    "Accelerator",  # the library accelerate, which benchmarks replace
    "ex2.approx.ftz",  # an instruction of NVIDIA's GPUs
}
# The paragraph that names the paper's section and the original's function.
_ORIGINAL = re.compile(r"^ *Source:.*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)

_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([\w./-]+)\)")
_PATH = re.compile(r"(?<![\w./~$-])[\w.-]+(?:/[\w-]+)*/[\w-]+\.(?:py|md|ipynb)\b")
_FOLDER = re.compile(rf"(?:{'|'.join(TOP)})/(?:[\w.]+/)*")
_FILE = re.compile(r"\w+\.py")
_FILE_NAME = re.compile(r"[\w.]+\.(?:py|jsonl?|lock|md|png|pth|safetensors|toml)")
_MODULE = re.compile(rf"(?<![\w./`-])(?:{'|'.join(FOLDERS)})(?:\.[A-Za-z_]\w*)+(?!/)")
_DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*|\[.*)?")
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*")


def documents() -> list[Source]:
    """Every document, and every notebook as a script."""
    paths = [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
    ]


def prose(source: Source) -> str:
    """A document, or the docstrings and comments of a program, without sources."""
    if source.path.suffix != ".py":
        return source.text
    texts = [_ORIGINAL.sub("", node.value) for node in source.docstrings()]
    comments = [token.string.lstrip("#") for token in source.comments()]
    return "\n".join([*texts, *comments])


class Definitions:
    """What the programs of the repository define, read from their text."""

    def __init__(self, files: tuple[Source, ...]):
        self.modules = {source.module: _top_level(source) for source in files}
        self.members: dict[str, set[str]] = defaultdict(set)
        self.words: set[str] = set()
        self.libraries = set(sys.stdlib_module_names)
        for source in files:
            self.words |= words(source)
            self.libraries |= _libraries(source)
            for node in ast.walk(source.tree):
                if isinstance(node, ast.ClassDef):
                    self.members[node.name] |= _members(node)
        # A folder without `__init__` is a module, too.
        for name in list(self.modules):
            for i in range(1, name.count(".") + 1):
                self.modules.setdefault(".".join(name.split(".")[:i]), set())

    def knows(self, dotted: str) -> bool:
        """Whether a module, written from any folder on, or a name in one exists."""
        parts = dotted.split(".")
        for i in range(len(parts), 0, -1):
            end, rest = "." + ".".join(parts[:i]), parts[i:]
            modules = [m for m in self.modules if f".{m}".endswith(end)]
            if not rest and modules:
                return True
            if any(rest[0] in self.modules[m] and self._has(*rest) for m in modules):
                return True
        return parts[0] in self.members and self._has(*parts)

    def is_config_value(self, dotted: str) -> bool:
        """Whether it may be set in a config, e.g. `data.batch`."""
        section, _, value = dotted.rpartition(".")
        sections = set().union(
            *(words(s) for s in repository() if s.folder == "configs")
        )
        classes = (
            self.members[name] for name in self.members if name.endswith("Config")
        )
        return section in sections and any(value in fields for fields in classes)

    def _has(self, first: str, second: str = "", *_: str) -> bool:
        members = self.members.get(first)
        return not second or members is None or second in members


@functools.cache
def definitions() -> Definitions:
    return Definitions(repository())


def _top_level(source: Source) -> set[str]:
    """The names of a module; of `__init__`, the words in its texts, too."""
    names = set()
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {n.asname or n.name for n in node.names}
    if source.path.stem == "__init__":  # names that `__getattr__` answers
        constants = (n for n in ast.walk(source.tree) if isinstance(n, ast.Constant))
        names |= {str(node.value) for node in constants}
    return names


def _libraries(source: Source) -> set[str]:
    """Libraries that a program imports, and what it calls their modules."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            imports = [(n.name, n.asname or n.name.split(".")[0]) for n in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports = [(node.module or "", n.asname or n.name) for n in node.names]
        else:
            continue
        names |= {name for library, name in imports if library.split(".")[0] not in TOP}
        names |= {library.split(".")[0] for library, _ in imports}
    return names - set(TOP)


def _members(node: ast.ClassDef) -> set[str]:
    """Fields, methods, and what methods set."""
    names = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    for n in ast.walk(node):
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(n.name)
        elif isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store):
            names.add(n.id if isinstance(n, ast.Name) else n.attr)
    return names


@functools.cache
def words(source: Source) -> set[str]:
    """Every identifier of a program; of a document, none."""
    if source.path.suffix != ".py":
        return set()
    names = set()
    for node in ast.walk(source.tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names |= set(value.split("."))
    return names


@each_file
def what_prose_names_exists(source: Source) -> Iterator[str]:
    text = prose(source)
    names = [*_missing_paths(source, text), *_MODULE.findall(text)]
    for span in _SPAN.findall(text):
        if _CLASS.fullmatch(span):
            names.append(span)
        elif (match := _DOTTED.fullmatch(span)) and not _FILE_NAME.fullmatch(span):
            names.append(match.group(1))
    for name in dict.fromkeys(names):
        if not _is_known(source, name):
            yield f"names {name}, which does not exist"


def _missing_paths(source: Source, text: str) -> Iterator[str]:
    here = (ROOT / source.path).parent
    for link in _LINK.findall(text) if source.path.suffix == ".md" else ():
        if not (here / link).exists():
            yield link
    roots = [ROOT, here, ROOT / PACKAGE, ROOT / "launch"]
    for path in _PATH.findall(text):
        is_ours = any((root / path.split("/")[0]).is_dir() for root in roots)
        if is_ours and not any((root / path).exists() for root in roots):
            yield path
    files = {source.path.name for source in repository()}
    for span in _SPAN.findall(text):
        is_gone = _FOLDER.fullmatch(span) and not (ROOT / span).exists()
        if is_gone or (_FILE.fullmatch(span) and span not in files):
            yield span


def _is_known(source: Source, name: str) -> bool:
    """Whether a name, or the beginning of a dotted one, means something to a reader."""
    first = name.split(".")[0]
    known = definitions()
    return (
        name in OTHERS
        or any(part.isupper() for part in re.split(r"[./]", name))  # kernels/NAME.py
        or known.knows(name)
        or known.is_config_value(name)
        or (name == first and name in known.words | {"None", "True", "False"})
        or first in known.libraries
        or first in words(source)  # a variable, or what the file calls a module
    )


BREACHES = [
    breach(what_prose_names_exists, path, text)
    for path, text in (
        ("docs/a.md", "`pyramid.rennoise(x, z, s)` jumps"),
        ("docs/a.md", "`latents.LatentConfig.grids`"),
        ("docs/a.md", "`TokenMask.frames`"),
        ("docs/a.md", "`generate.load` of a module that is gone"),
        ("docs/a.md", "classes that are gone: `VideoModel`"),
        ("docs/a.md", "classes that never were: `Steppper`"),
        ("docs/a.md", "`tests/test_magic.py`"),
        ("docs/a.md", "`stepping.py`"),
        ("docs/a.md", "the folder `pyramid_jax/web/`"),
        ("docs/a.md", "[the map](map.md)"),
        ("README.md", "python -m launch.sing --prompt=la"),
        (inside("mask"), '"""As in `layout.histories`."""'),
        (inside("mask"), "# see launch/web.py"),
        (inside("mask"), "def f():\n    'See data/judge.py.'"),
        ("configs/tiny.py", '"""Run python -m launch.trian."""'),
    )
]
