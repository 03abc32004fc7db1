# SPDX-License-Identifier: Apache-2.0
"""The chips to compile for, as their compilers need them described."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies


@contextmanager
def compilers() -> Iterator[None]:
    """Says what to install where JAX has no compiler for a chip.

    Raises:
        ValueError: instead of JAX's own errors, which are plain ones; those of a
            compiler that is there stay.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) not in (RuntimeError, NotImplementedError):
            raise
        raise ValueError(
            f"the chip's compiler is not installed ({error}); "
            "run pip install 'pyramid_jax[compile]'"
        ) from error


@dataclass(frozen=True)
class TPU:
    """A TPU, by the smallest slice that libtpu knows."""

    name: str
    topology: str
    platform = "tpu"

    @property
    def backend(self) -> str:
        return "pallas_tpu"

    @property
    def backends(self) -> tuple[str, ...]:
        return (self.backend,)

    def device(self) -> Any:
        """A device to compile for; it holds no arrays and runs nothing."""
        with compilers():
            return topologies.get_topology_desc(
                platform="tpu", topology_name=self.topology
            ).devices[0]


@dataclass(frozen=True)
class GPU:
    """An NVIDIA GPU, by its data sheet and device query."""

    name: str
    capability: tuple[int, int]
    cores: int
    units_per_core: int
    clock: float  # GHz
    bandwidth: int  # bytes per second
    cache: int  # bytes, level 2
    memory: int  # bytes
    shared: tuple[int, int]  # bytes, per block at most and per core
    feature: str = ""  # what ptxas needs to be told about the architecture
    platform = "cuda"

    @property
    def backend(self) -> str:
        return "pallas_triton"

    @property
    def backends(self) -> tuple[str, ...]:
        """All whose kernels are made for it, the default first."""
        hopper = self.capability == (9, 0)
        return (self.backend, "pallas_mosaic_gpu") if hopper else (self.backend,)

    @property
    def architecture(self) -> str:
        """Its name for ptxas, e.g. sm_80."""
        return "sm_{}{}".format(*self.capability) + ("a" if self.feature else "")

    def device(self) -> Any:
        """A device to compile for; it holds no arrays and runs nothing."""
        return self.devices(1)[0]

    def devices(self, count: int) -> Sequence[Any]:
        """Devices of one host."""
        with compilers():
            return topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x1x{count}",
                target_config=self._description(),
            ).devices

    def _description(self) -> str:
        major, minor = self.capability
        facts = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "shared_memory_per_block": 49152,
            "shared_memory_per_block_optin": self.shared[0],
            "shared_memory_per_core": self.shared[1],
            "core_count": self.cores,
            "fpus_per_core": self.units_per_core,
            "clock_rate_ghz": self.clock,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.cache,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "block_dim_limit_x": 2147483647,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
        }
        numbers = " ".join(f"{key}: {value}" for key, value in facts.items())
        return (
            f"gpu_device_info {{ {numbers} cuda_compute_capability "
            f"{{ major: {major} minor: {minor} {self.feature} }} "
            'driver_version: "13.0.0" runtime_version: "13.0.0" '
            'compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" } '
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } '
            f'device_description_str: "NVIDIA {self.name}"'
        )


A100 = GPU(
    name="A100",
    capability=(8, 0),
    cores=108,
    units_per_core=64,
    clock=1.41,
    bandwidth=2039 * 10**9,
    cache=40 * 2**20,
    memory=85100068864,
    shared=(166912, 167936),
)
H200 = GPU(
    name="H200",
    capability=(9, 0),
    cores=132,
    units_per_core=128,
    clock=1.98,
    bandwidth=4800 * 10**9,
    cache=50 * 2**20,
    memory=151397597184,
    shared=(232448, 233472),
    feature="feature_extension: ACCELERATED_FEATURES",
)
CHIPS: dict[str, GPU | TPU] = {
    "a100": A100,
    "h200": H200,
    "v5e": TPU("v5e", "v5e:2x4"),
    "v5p": TPU("v5p", "v5p:2x2x1"),
    "v6e": TPU("v6e", "v6e:8x8"),
}
