# SPDX-License-Identifier: Apache-2.0
"""Processes that share a mesh, as hosts do, compute what one of them computes alone."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax import sharding
from tests import hosts, spread

EVERY_MESH = """
import pickle
from pathlib import Path
from tests import spread

network, to, *names = arguments
network = getattr(spread, network)()
for name, mesh in spread.meshes(names):
    result = spread.two_steps(network, mesh)
    Path(to, f"{name}.{rank}").write_bytes(pickle.dumps(result))
"""


@pytest.mark.parametrize(
    ("network", "count", "names"),
    [
        ("small", 2, ("data-context", "fsdp-tensor")),
        pytest.param("small", 2, (), marks=pytest.mark.slow),
        pytest.param("small", 4, (), marks=pytest.mark.slow),
        pytest.param("transformer", 2, (), marks=pytest.mark.slow),
        pytest.param("transformer", 4, (), marks=pytest.mark.slow),
    ],
)
def test_processes_compute_what_one_computes_whatever_spans_them(
    tmp_path: Path, network: str, count: int, names: tuple[str, ...]
):
    """Losses, gradients (Adam's moments), weights and average after two steps."""
    hosts.run(EVERY_MESH, count, network, tmp_path, *names, devices=4 // count)
    alone = sharding.device_mesh(devices=jax.devices()[:1])
    state, losses = spread.two_steps(getattr(spread, network)(), alone)
    files = sorted(tmp_path.iterdir())
    assert len(files) == (len(names) or 10) * count
    for file in files:
        their_state, their_losses = pickle.loads(file.read_bytes())
        np.testing.assert_allclose(their_losses, losses, rtol=1e-5, err_msg=file.name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
            their_state,
            state,
        )
