# SPDX-License-Identifier: Apache-2.0
"""The structure of the code is tested: who imports whom, sizes, and the house rules.

A rule is a function from one source file to its complaints. Every rule is also run on a
small file that breaks it, so that no rule can pass because it sees nothing.
"""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pyramid_jax import pyramid

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pyramid_jax"
FOLDERS = (PACKAGE, "configs", "launch", "tests", "benchmarks")

# What each part of the package may import from the package, from the ground up:
# vocabulary, the method, kernels and networks, services, what a model is, the wings.
VOCABULARY = {"shapes", "sharding", "config"}
METHOD = {"pyramid", "layout", "mask", "latents", "objective", "sampler"}
MAY_IMPORT = {
    "shapes": set(),
    "sharding": set(),
    "config": set(),
    "pyramid": {"shapes"},
    "mask": {"shapes"},
    "latents": {"shapes"},
    "layout": {"shapes", "pyramid"},
    "objective": {"shapes", "pyramid"},
    "sampler": {"shapes", "pyramid", "layout"},
    "kernels": VOCABULARY | {"mask"},
    "models": VOCABULARY | {"mask", "latents", "kernels"},
    "data": VOCABULARY | {"pyramid", "layout", "latents"},
    "checkpoint": VOCABULARY,
    "training": VOCABULARY | {"checkpoint"},
    "model": VOCABULARY | METHOD | {"models"},
    "vae": VOCABULARY
    | {"latents", "kernels", "models", "data", "checkpoint", "training"},
    "pipeline": VOCABULARY
    | METHOD
    | {"kernels", "models", "model", "data", "checkpoint", "vae"},
    "train": VOCABULARY
    | METHOD
    | {"model", "data", "training", "checkpoint", "vae", "pipeline"},
    "convert": VOCABULARY
    | METHOD
    | {"models", "model", "checkpoint", "vae", "pipeline"},
    "__init__": {"pipeline"},
}

# The files that a newcomer reads as mathematics need nothing else.
METHOD_LIBRARIES = {"jax", "numpy", "einops", "jaxtyping", PACKAGE}

MESH_AXES = {"data", "fsdp", "context", "tensor"}
# Checkpoints use the same words for items and weights.
MAY_NAME_MESH_AXES = {"sharding", "config", "kernels", "checkpoint"}
FILE_LINES, BODY_LINES, PARAMETERS = 400, 60, 6


class Source:
    """One Python file: its path relative to the repository, and its text."""

    def __init__(self, path: str, text: str):
        self.path, self.text = PurePosixPath(path), text

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
    def is_kernel(self) -> bool:
        return self.folder == PACKAGE and self.part == "kernels"

    def imports(self) -> Iterator[str]:
        """Every imported name with its full path, e.g. `pyramid_jax.mask.dense`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                prefix = "." * node.level + (node.module or "")
                yield from (f"{prefix}.{name.name}" for name in node.names)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


Rule = Callable[[Source], Iterator[str]]


def imports_follow_the_table(source: Source) -> Iterator[str]:
    if source.folder == PACKAGE:
        if source.part not in MAY_IMPORT:
            yield f"{source.part} is not in MAY_IMPORT; say there what it may import"
            return
        allowed = {source.part} | MAY_IMPORT[source.part]
    else:
        allowed = set(MAY_IMPORT)
    for name in source.imports():
        first, *rest = name.split(".")
        if not first:
            yield f"relative import {name}; write the full path"
        elif source.folder == PACKAGE and first in {"configs", "launch"}:
            yield f"the package must not know {first}"
        elif first == PACKAGE and rest and rest[0] in MAY_IMPORT.keys() - allowed:
            yield f"{source.part} must not import {rest[0]}"


def method_files_need_few_libraries(source: Source) -> Iterator[str]:
    if source.folder == PACKAGE and source.part in METHOD:
        libraries = {name.split(".")[0] for name in source.imports()}
        for library in libraries - METHOD_LIBRARIES - sys.stdlib_module_names:
            yield f"{source.part} must not need {library}"


def files_are_short(source: Source) -> Iterator[str]:
    if (lines := len(source.text.splitlines())) > FILE_LINES:
        yield f"{lines} lines, at most {FILE_LINES}"


def functions_are_short(source: Source) -> Iterator[str]:
    if source.is_kernel:
        return
    for function in source.functions():
        body = function.body[ast.get_docstring(function) is not None :]
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > BODY_LINES:
            yield f"{function.name} has a body of {lines} lines, at most {BODY_LINES}"


def functions_take_few_parameters(source: Source) -> Iterator[str]:
    if source.is_kernel:
        return
    for function in source.functions():
        given = function.args
        names = [a.arg for a in given.posonlyargs + given.args + given.kwonlyargs]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > PARAMETERS:
            yield f"{function.name} takes {count} parameters, at most {PARAMETERS}"


def the_package_does_not_print(source: Source) -> Iterator[str]:
    if source.folder == PACKAGE:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and node.id == "print":
                yield f"line {node.lineno} prints; use logging"


def files_name_their_licence(source: Source) -> Iterator[str]:
    if not source.text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
        yield "the first line is not the SPDX line"


def few_files_name_mesh_axes(source: Source) -> Iterator[str]:
    if source.folder != PACKAGE or source.part in MAY_NAME_MESH_AXES:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            yield f"line {node.lineno} names mesh axis {node.value!r}; use logical axes"


def inside(name: str) -> str:
    """The path of a file of the package."""
    return f"{PACKAGE}/{name}.py"


RULES_AND_BREACHES = [
    (imports_follow_the_table, inside("pyramid"), "from pyramid_jax.models import dit"),
    (imports_follow_the_table, inside("data/rows"), "from pyramid_jax import vae"),
    (imports_follow_the_table, inside("sampler"), "import pyramid_jax.models.dit"),
    (imports_follow_the_table, inside("models/dit"), "from .layers import dense"),
    (imports_follow_the_table, inside("training/loop"), "from configs import base"),
    (imports_follow_the_table, inside("misc"), ""),
    (method_files_need_few_libraries, inside("mask"), "from flax import linen"),
    (files_are_short, "tests/test_it.py", "\n" * (FILE_LINES + 1)),
    (
        functions_are_short,
        inside("codec"),
        "def f():\n    '''Docstring.'''\n" + "    f()\n" * (BODY_LINES + 1),
    ),
    (
        functions_take_few_parameters,
        "launch/train.py",
        "def f(a, b, c, d, /, e, f, *, g): ...",
    ),
    (the_package_does_not_print, inside("training/loop"), "print('loss')"),
    (files_name_their_licence, "configs/base.py", '"""Docstring."""\n'),
    (few_files_name_mesh_axes, inside("models/dit"), "axes = ('batch', 'fsdp')"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in RULES_AND_BREACHES))

GOOD = Source(
    inside("models/layers"),
    f'''# SPDX-License-Identifier: Apache-2.0
"""Texts may mention print, fsdp and tensor."""

import math
from jax import numpy as jnp
from pyramid_jax.mask import TokenMask

class Row:
    def at(self, a, b, c, d, e, f):
        """Docstrings may be long.{chr(10) * BODY_LINES}"""
        return math.sqrt(a)
''',
)


def sources() -> list[Source]:
    """Every Python file of the folders above."""
    paths = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
    ]


def import_graph(files: list[Source]) -> dict[str, set[str]]:
    """Which module of the repository imports which."""
    modules = {source.module for source in files}
    graph: dict[str, set[str]] = {}
    for source in files:
        names = set(source.imports())
        names |= {name.rpartition(".")[0] for name in names - modules}
        graph[source.module] = names & modules - {source.module}
    return graph


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule):
    complaints = [f"{s.path}: {text}" for s in sources() for text in rule(s)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    RULES_AND_BREACHES,
    ids=[f"{rule.__name__}-{path}" for rule, path, _ in RULES_AND_BREACHES],
)
def test_every_rule_sees_a_breach(rule: Rule, path: str, text: str):
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_complains_about_a_good_file(rule: Rule):
    assert not list(rule(GOOD))


def test_kernels_may_be_long_and_take_many_arguments():
    text = "def f(a, b, c, d, e, f, g):\n" + "    f()\n" * (BODY_LINES + 1)
    kernel, method = (
        Source(inside(p), text) for p in ("kernels/attention_gpu", "mask")
    )
    for rule in (functions_are_short, functions_take_few_parameters):
        assert not list(rule(kernel)) and list(rule(method))


def test_the_table_of_imports_has_no_cycle():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert order[0] == "shapes"


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(import_graph(sources())).prepare()


def test_a_cycle_between_modules_is_seen():
    first = Source(inside("data/rows"), "from pyramid_jax.data.files import read")
    second = Source(inside("data/files"), "from pyramid_jax.data import rows")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph([first, second])).prepare()


def test_importing_the_package_needs_no_accelerator_and_no_optional_library():
    """A platform that does not exist only raises when a backend is started."""
    modules = [s.module for s in sources() if s.folder == PACKAGE]
    script = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, sklearn=None, gradio=None)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "missing"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def test_shape_annotations_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        pyramid.up(jnp.zeros(2))


def test_implicit_broadcasts_and_promotions_are_refused_while_testing():
    x = jnp.zeros((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="broadcast"):
        x + jnp.zeros(3, jnp.float32)
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        x + jnp.zeros((2, 3), jnp.bfloat16)
