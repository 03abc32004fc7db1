# SPDX-License-Identifier: Apache-2.0
"""House rules that one line can break: prints, licences, mesh axes."""

import ast
from collections.abc import Iterator

from tests.house.sources import Source, breach, each_file, inside

MESH_AXES = {"data", "fsdp", "context", "tensor"}
# Checkpoints use the same words for items and weights.
MAY_NAME_MESH_AXES = {"sharding", "config", "kernels", "checkpoint"}


@each_file
def the_package_does_not_print(source: Source) -> Iterator[str]:
    if source.in_package:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name) and node.id == "print":
                yield f"line {node.lineno} prints; use logging"


@each_file
def files_name_their_licence(source: Source) -> Iterator[str]:
    if not source.text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
        yield "the first line is not the SPDX line"


@each_file
def few_files_name_mesh_axes(source: Source) -> Iterator[str]:
    if not source.in_package or source.part in MAY_NAME_MESH_AXES:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            yield f"line {node.lineno} names mesh axis {node.value!r}; use logical axes"


BREACHES = [
    breach(the_package_does_not_print, inside("training/loop"), "print('loss')"),
    breach(files_name_their_licence, "configs/base.py", '"""Docstring."""\n'),
    breach(few_files_name_mesh_axes, inside("models/dit"), "axes = ('batch', 'fsdp')"),
]
