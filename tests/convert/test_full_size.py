# SPDX-License-Identifier: Apache-2.0
"""A transformer of the released size is converted and exported in little memory."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from pyramid_jax.checkpoint.tensors import open_safetensors, write_tensors
from tests import original_files

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LIMIT = 4.0  # GiB; the checkpoint has 3.9, the largest parameter 0.4
# In a process of its own, whose memory is then known.
SCRIPT = """
import resource, sys
from pathlib import Path
from pyramid_jax.checkpoint import rename
from pyramid_jax.checkpoint.tensors import read_tensors, write_tensors
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.model import VARIANTS

theirs, ours, back = map(Path, sys.argv[1:])
cfg = VARIANTS["mmdit"]
table, tensors = tensor_table(cfg), read_tensors(theirs)
specs = rename.parameter_specs(abstract_weights(cfg), table, tensors)
write_tensors(ours, specs, rename.converted_parameters(tensors, table, specs))
params = dict(read_tensors(ours))
specs = rename.tensor_specs(params, table)
write_tensors(back, specs, rename.export_tensors(params, table))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB
"""


@pytest.mark.slow
def test_the_released_size_is_converted_and_exported_in_little_memory(tmp_path: Path):
    theirs, ours, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    shapes = original_files.mmdit(original_files.MMDIT)
    rng = np.random.default_rng(0)
    row = rng.normal(size=2**20).astype(BFLOAT16)
    specs = {key: ShapeDtypeStruct(s, BFLOAT16) for key, s in shapes.items()}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for i, (key, shape) in enumerate(shapes.items()):
            values = np.resize(np.roll(row, i), shape)
            if key == "pos_embed.pos_embed":
                values = original_files.positions(original_files.MMDIT).astype(BFLOAT16)
            yield key, values

    write_tensors(theirs, specs, tensors())
    command = [sys.executable, "-c", SCRIPT, *map(str, (theirs, ours, back))]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert float(run.stdout.split()[-1]) < LIMIT
    with theirs.open("rb") as one, back.open("rb") as two:
        while block := one.read(2**24):
            assert two.read(2**24) == block
        assert not two.read(1)
    _compare_some(theirs, ours)


def _compare_some(theirs: Path, ours: Path) -> None:
    """Parameters here and there, by the documented meaning of their names."""
    one, two = (
        open_safetensors(theirs),
        open_safetensors(ours),
    )
    query = np.asarray(one["transformer_blocks.5.attn.to_q.weight"])
    qkv = np.asarray(two["double/video/qkv/kernel"])
    assert qkv.dtype == BFLOAT16 and qkv.shape == (23, 1536, 3, 24, 64)
    assert (qkv[5, :, 0].reshape(1536, 1536) == query.T).all()
    head = np.asarray(two["head/kernel"])
    assert (head == np.asarray(one["proj_out.weight"]).T).all()
