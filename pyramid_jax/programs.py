# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in files, for the next process that runs the same.

JAX's own cache spares a process the compiler, but every program is traced and lowered
to be found there, which takes most of the time that is left. Here the name of a file
says all that tracing depends on, so that a process that finds it reads the program and
runs it. Weights are arguments of programs, and not in the files.

    @partial(programs.kept, static=1)
    def step(cfg, params, x): ...

Nothing is kept before `keep` names a folder. As in JAX's cache, files are trusted: they
hold what is executed, so that nobody else should be able to write into the folder.
"""

import hashlib
import logging
import os
import pickle
import platform
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial, update_wrapper
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, Sharding

logger = logging.getLogger(__name__)

LIMIT = 2**30  # bytes of a folder
DIGEST = 16  # bytes of a checksum
FORMAT = "2"  # of the files that hold programs; those of another one are left alone
# What compilers are told of all kept programs, by kind of device. Without Triton's
# products, cuBLASLt adds the bias and computes GELU before it writes a product; and
# between blocks that are not in a loop, too, tokens are bfloat16.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_allow_excess_precision": False}
}
# What they are told, besides, of steps that several devices make together, by the
# beginning of a device's name. Otherwise devices wait while weights are gathered.
_SPARSE_CORES = {  # exchanges run on a core of their own, beside the products
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
    for kind in (
        "all_gather",  # of weights, before a block
        "2d_all_gather",  # the same in groups that lie along two axes of the torus
        "3d_all_gather",  # or along three
        "reduce_scatter",  # of the gradients of weights, after a block
        "all_reduce",  # of what each group of devices has summed
    )
}
OVERLAP: Mapping[str, Mapping[str, Any]] = {
    "TPU v5 lite": {},  # has no such cores; its products fetch what they need
    "TPU v5e": {},
    "TPU v5": _SPARSE_CORES,
    "TPU v6": _SPARSE_CORES,
    "NVIDIA": {
        # Exchanges begin as early, and end as late, as the order of work allows,
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # also from one block to the next: a turn of the loop is two blocks.
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # what a compiler is told by the environment
# Settings of JAX with such names change no program.
HARMLESS = ("cache", "log", "traceback", "dump", "explain")
# Objects without a name that means the same in the next process.
NAMELESS = (" at 0x", "<locals>", "<lambda>")
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ProgramFolder:
    """Files by name, checked when they are read; those that lie unused go first.

    Args:
        limit: bytes of all files.
    """

    path: Path
    limit: int = LIMIT

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None if there is nothing, or it is damaged."""
        file = self.path / name
        try:
            stored = file.read_bytes()
        except OSError:
            return None
        if _checksum(stored[DIGEST:]) != stored[:DIGEST]:
            logger.warning("%s is damaged, and is made again", file)
            self.remove(name)
            return None
        try:
            os.utime(file)
        except OSError:
            logger.debug("%s can only be read", file)
        return zlib.decompress(stored[DIGEST:])

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all; where that can't be done, nothing."""
        unfinished = self.path / f"{name}.{uuid.uuid4().hex}"
        packed = zlib.compress(data, 1)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_bytes(_checksum(packed) + packed)
                unfinished.replace(self.path / name)
            finally:
                unfinished.unlink(missing_ok=True)
            self._shorten()
        except OSError as error:
            logger.info("the program %s is not kept (%s)", name, error)

    def remove(self, name: str) -> None:
        """Removes a file, where that can be done."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s stays (%s)", name, error)

    def _shorten(self) -> None:
        """Removes the files that were used last the longest time ago."""
        states = {file: file.stat() for file in self.path.iterdir()}
        total = 0
        for file in sorted(states, key=lambda file: -states[file].st_mtime_ns):
            total += states[file].st_size
            if total > self.limit:
                file.unlink(missing_ok=True)


_folder: ProgramFolder | None = None  # like JAX's cache, one for the process
_alone = threading.Lock()


def overlap(devices: Sequence[Any]) -> dict[str, Any]:
    """Options of the compiler for a step that these devices make together."""
    kind = devices[0].device_kind
    if len(devices) == 1:
        return {}
    return next((dict(OVERLAP[k]) for k in OVERLAP if kind.startswith(k)), {})


def keep(path: str | Path | None) -> None:
    """Keeps programs in a folder from now on; None: keeps and reads none."""
    global _folder
    _folder = None if path is None else ProgramFolder(Path(path))


def kept(
    function: Callable[..., Any],
    static: int = 0,
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A function that `jax.jit` compiles, whose programs are kept in the folder.

    It takes positional arguments only.

    Args:
        static: how many arguments are static, which are the first ones.
        donate: arguments whose arrays the program may overwrite, counted from 0.
        options: of the compiler, besides those in `OPTIONS`.
    """
    return update_wrapper(KeptFunction(function, static, donate, options), function)


class KeptFunction:
    """See `kept`."""

    def __init__(
        self,
        function: Callable[..., Any],
        static: int,
        donate: tuple[int, ...],
        options: Mapping[str, Any] | None,
    ):
        self._function, self._static, self._donate = function, static, donate
        self._given = options or {}
        self._programs: dict[Any, Callable[..., Any]] = {}

    @cached_property
    def jitted(self) -> Any:
        """The function where nothing is kept, for the devices of this process."""
        return jax.jit(
            self._function,
            static_argnums=tuple(range(self._static)),
            donate_argnums=self._donate,
            compiler_options=self._options or None,
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {**OPTIONS.get(jax.default_backend(), {}), **self._given}

    def __call__(self, *args: Any) -> Any:
        statics, arrays = args[: self._static], args[self._static :]
        leaves, tree = jax.tree.flatten(arrays)
        if _folder is None or any(isinstance(x, Tracer) for x in leaves):
            return self.jitted(*args)
        kinds, mesh = tuple(map(_kind, leaves)), jax.sharding.get_abstract_mesh()
        call = (_folder, statics, tree, kinds, mesh)
        if call not in self._programs:
            self._programs[call] = self._program(_folder, args, call[1:])
        return self._programs[call](*arrays)

    def _program(
        self, folder: ProgramFolder, args: Sequence[Any], call: Sequence[Any]
    ) -> Callable[..., Any]:
        """The program for a call, from the folder, or made and put there."""
        written = self._written(call)
        if written is None or jax.process_count() > 1:
            return partial(self.jitted, *args[: self._static])
        known = self._name(_source(), written)
        name = (folder.read(known) or b"").decode()
        if name and (found := _found(folder, name)):
            return found
        lowered = self.jitted.lower(*args)
        if _folder is not folder:  # tracing has found that this process is unusual
            return lowered.compile()
        trees = f"{lowered.in_tree}\n{lowered.out_tree}"
        name = self._name(lowered.as_text(), trees, written)
        program = _found(folder, name)
        if program is None:
            with _without_other_cache():
                program = lowered.compile()
            try:
                folder.write(name, _packed(program))
            except Exception as error:  # not every program of every device can be kept
                logger.info("the program %s is not kept (%s)", name, error)
                return program
        folder.write(known, name.encode())
        return program

    def _written(self, call: Sequence[Any]) -> str | None:
        """All that a call's program depends on besides the package's source."""
        whole = (self._function, self._options, *call)
        text = "\n".join([_surroundings(), *map(_spelled, whole)])
        return None if any(word in text for word in NAMELESS) else text

    def _name(self, *texts: str) -> str:
        digest = hashlib.sha256("\n".join([FORMAT, *texts]).encode()).hexdigest()
        return f"{self._function.__name__}-{digest}"


def _packed(program: Any) -> bytes:
    """A compiled program, and the devices that run it, in its order.

    They may be more than those of its arguments, where it has a mesh of its own.
    """
    devices = program.runtime_executable().local_devices()
    places = [(device.platform, device.id) for device in devices]
    return pickle.dumps((places, *serialize_executable.serialize(program)))


def _found(folder: ProgramFolder, name: str) -> Callable[..., Any] | None:
    """The program in a file; None if there is none that this process can run."""
    data = folder.read(name)
    if data is None:
        return None
    try:
        places, *program = pickle.loads(data)
        platforms = {platform for platform, _ in places}
        local = [x for name in platforms for x in jax.local_devices(backend=name)]
        here = {(device.platform, device.id): device for device in local}
        devices = [here[place] for place in places]
        return serialize_executable.deserialize_and_load(
            *program, backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # whatever a runtime says
        logger.warning("%s can't be used, and is made again (%s)", name, error)
        folder.remove(name)
        return None


@contextmanager
def _without_other_cache() -> Iterator[None]:
    """Programs are compiled, and not read from JAX's own cache.

    What XLA for CPUs has read from there and writes again lacks its functions.
    """
    name = "jax_enable_compilation_cache"
    with _alone:
        before = jax.config.values[name]
        jax.config.update(name, False)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update(name, before)
            compilation_cache.reset_cache()


def _kind(x: Any) -> Any:
    """All of an argument that a program depends on."""
    if isinstance(x, jax.Array):
        return x.shape, x.dtype, x.weak_type, x.committed, x.sharding
    return (x.shape, x.dtype) if isinstance(x, np.ndarray | np.generic) else type(x)


def _ordered(place: Sharding) -> list[Any]:
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        return list(place.mesh.devices.flat)
    return sorted(place.device_set, key=lambda device: device.id)


# ------------------------------------------------------------------------------- names


def _spelled(value: Any) -> str:
    """A text that tells values apart, the same in every process."""
    if isinstance(value, Mesh):
        return f"{value!r} {[device.id for device in value.devices.flat]}"
    if isinstance(value, Sharding):
        return f"{value!r} {[device.id for device in _ordered(value)]}"
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(_spelled, value))})"
    return repr(value)


def _surroundings() -> str:
    """All that programs depend on besides their arguments and the package's source."""
    values: dict[str, Any] = jax.config.values
    settings = {
        name: value
        for name, value in values.items()
        if not any(word in name for word in HARMLESS)
    }
    return f"{_machine()}\n{settings}\n{[os.environ.get(x) for x in FLAGS]}"


@cache
def _machine() -> str:
    """The versions of everything installed, the devices, and the processor."""
    folders = [Path(folder) for folder in sys.path if folder]
    versions = sorted(x.name for folder in folders for x in folder.glob("*.dist-info"))
    version = jax.local_devices()[0].client.platform_version
    devices = [(device.id, device.device_kind) for device in jax.local_devices()]
    return f"{versions}\n{sys.version}\n{version}\n{devices}\n{_processor()}"


@cache
def _source() -> str:
    """A hash of the package's source, and of the tables that belong to it."""
    source, package = hashlib.sha256(), Path(__file__).parent
    for file in sorted([*package.rglob("*.py"), *package.glob("assets/*.json")]):
        source.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return source.hexdigest()


def _processor() -> str:
    """What this machine's processor can do, as far as the system tells."""
    told = PROCESSORS.read_text().splitlines() if PROCESSORS.is_file() else []
    flags = [line for line in told if line.startswith(("flags", "Features"))]
    return f"{platform.machine()} {flags[:1]}"


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()
