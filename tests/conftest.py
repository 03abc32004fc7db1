# SPDX-License-Identifier: Apache-2.0
"""The strict settings under which every test runs."""

import os
import platform
import signal
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings

# `pytest --hypothesis-profile=fuzz` looks further, and elsewhere each time.
settings.register_profile(
    "default", max_examples=60, derandomize=True, deadline=None, database=None
)
settings.register_profile("fuzz", max_examples=5000, deadline=None)
settings.load_profile("default")

ROOT = Path(__file__).resolve().parent.parent
# What JAX may use in `pytest -m gpu` and `pytest -m tpu`; otherwise only the CPU.
PLATFORMS = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # perf: compiling is most of the suite's time; these halve it, and halve it again.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if platform.machine() == "x86_64":
    FLAGS.append("--xla_cpu_max_isa=AVX2")
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones do not know it


# Linux lets a process map 65,530 regions of memory. Compiled programs take a few each,
# and one too many ends the process without a word: half of the tests come close.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 30_000


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before JAX starts, then makes JAX strict.

    Implicit broadcasting across ranks and implicit promotion of dtypes raise. An
    explicit JAX_PLATFORMS, and every flag in XLA_FLAGS, is respected.
    """
    os.environ.setdefault("JAX_PLATFORMS", PLATFORMS.get(config.option.markexpr, "cpu"))
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

    # A shell starts commands in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import jax
    from absl import flags as absl_flags

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # With a size limit JAX locks the cache, so that parallel test processes share it.
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    # Grain reads absl flags, which nobody parses under pytest.
    absl_flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Forgets what a file's tests compiled when there is too much of it."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose accelerator is not there, saying how to run it."""
    for name in PLATFORMS:
        if item.get_closest_marker(name) is None:
            continue
        import jax

        if jax.default_backend() != name:
            pytest.skip(
                f"needs a {name.upper()}: run `pytest -m {name}` on a machine with one"
            )
