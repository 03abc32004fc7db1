# SPDX-License-Identifier: Apache-2.0
"""Names mean one thing: what one module of the package defines, no other does."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from tests.house.sources import Breach, Source, inside

# Public names that several modules may define, each with the reason.
SHARED_NAMES: dict[str, str] = {}

# A type by assignment, e.g. `Encode = Callable[...]`; constants are in capitals.
_ALIAS = re.compile(r"[A-Z]\w*[a-z]\w*")


def public_names(source: Source) -> Iterator[str]:
    """Functions, classes and aliases of types that a module defines."""
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("_"):
                yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and _ALIAS.fullmatch(target.id):
                    yield target.id


def names_are_defined_once(files: Sequence[Source]) -> Iterator[str]:
    paths = defaultdict(list)
    for source in files:
        if source.in_package:
            for name in set(public_names(source)):
                paths[name].append(str(source))
    for name, places in sorted(paths.items()):
        if not name.startswith("__") and len(places) > 1 and name not in SHARED_NAMES:
            yield f"{name} is defined in {' and in '.join(places)}; rename"


BREACHES = [
    Breach(
        names_are_defined_once,
        [
            Source(inside("models/clip"), "class ClipConfig: ..."),
            Source(inside("vae/clips"), "ClipConfig = dict[str, int]"),
        ],
    ),
    Breach(
        names_are_defined_once,
        [
            Source(inside("mask"), "def dense(): ..."),
            Source(inside("models/layers"), "def dense(x): return x"),
        ],
    ),
]
