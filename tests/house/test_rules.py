# SPDX-License-Identifier: Apache-2.0
"""The structure of the code is tested: imports, names, sizes, conventions, prose.

The rules are in the modules beside this one.
"""

import graphlib
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pyramid_jax import pyramid
from tests.house import conventions, imports, names, references, sizes
from tests.house.imports import MAY_IMPORT
from tests.house.sources import (
    ROOT,
    Breach,
    Rule,
    Source,
    import_graph,
    inside,
    repository,
)

BREACHES = [
    breach
    for module in (imports, names, sizes, conventions, references)
    for breach in module.BREACHES
]
RULES = list(dict.fromkeys(breach.rule for breach in BREACHES))
READ_DOCUMENTS = {references.what_prose_names_exists}
TREE_BYTES = 40 * 2**20

GOOD = Source(
    inside("models/layers"),
    f'''# SPDX-License-Identifier: Apache-2.0
"""Texts may mention print, fsdp and tensor, `mask.TokenMask` and kernels/visits.py."""

import math
from flax import linen as nn
from jax import numpy as jnp
from pyramid_jax import {", ".join(MAY_IMPORT["models"])}

class Row:
    def at(self, a, b, c, d, e, f, *, g, h):
        """Docstrings may be long.{chr(10) * sizes.BODY_LINES}"""
        return math.sqrt(a)
''',
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule):
    documents = references.documents() if rule in READ_DOCUMENTS else []
    complaints = list(rule([*repository(), *documents]))
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    "breach", BREACHES, ids=lambda breach: f"{breach.rule.__name__}-{breach.files[0]}"
)
def test_every_rule_sees_a_breach(breach: Breach):
    assert len(list(breach.rule(breach.files))) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_complains_about_a_good_file(rule: Rule):
    assert not list(rule([GOOD]))


def test_kernels_may_be_long_and_take_many_arguments():
    text = "def f(a, b, c, d, e, f, g):\n" + "    f()\n" * (sizes.BODY_LINES + 1)
    kernel, method = (
        [Source(inside(path), text)] for path in ("kernels/attention_gpu", "mask")
    )
    for rule in (sizes.functions_are_short, sizes.functions_take_few_parameters):
        assert not list(rule(kernel)) and list(rule(method))


def test_the_table_of_imports_is_read_from_the_ground_up():
    above = list(MAY_IMPORT)
    for part, imports_of_part in MAY_IMPORT.items():
        above.remove(part)
        assert imports_of_part.isdisjoint([part, *above]), part
        assert imports_of_part <= MAY_IMPORT.keys(), part


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(import_graph(repository())).prepare()


def test_a_cycle_between_modules_is_seen():
    first = Source(inside("data/rows"), "from pyramid_jax.data.files import read")
    second = Source(inside("data/files"), "from pyramid_jax.data import rows")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph([first, second])).prepare()


def test_docstrings_comments_and_blank_lines_are_no_code():
    text = '# A comment.\n"""Text."""\n\ndef f():\n    """Text.\n\n    More.\n    """\n'
    text += "    return (\n        1  # one\n    )\n"
    assert Source("a.py", text).code_lines() == 4


def test_importing_the_package_needs_no_accelerator_and_no_optional_library():
    """A platform that does not exist only raises when a backend is started."""
    modules = [source.module for source in repository() if source.in_package]
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


def test_a_checkout_is_small_enough_to_be_sent_anywhere():
    """Without what git ignores; models and recorded values are most of it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / os.fsdecode(name) for name in names.split(b"\0") if name]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    assert sizes and sum(sizes.values()) < TREE_BYTES, sorted(sizes, key=sizes.get)[-9:]


def test_shape_annotations_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        pyramid.up(jnp.zeros(2))


def test_implicit_broadcasts_and_promotions_are_refused_while_testing():
    x = jnp.zeros((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="broadcast"):
        x + jnp.zeros(3, jnp.float32)
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        x + jnp.zeros((2, 3), jnp.bfloat16)
