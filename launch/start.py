# SPDX-License-Identifier: Apache-2.0
"""What every command does: parse flags, keep compiled programs, say what is wrong.

A user's mistake, a full disk or an interruption is one line on stderr, whenever it
shows; `--verbose` adds the traceback, and what libraries tell.

    if __name__ == "__main__":
        flags.DEFINE_string("to", "runs/demo", "folder to write to")
        start.run(main)

where `main` takes the parsed flags.
"""

import errno
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from jax.sharding import Mesh

from launch import usage
from pyramid_jax import programs, sharding

logger = logging.getLogger(__name__)

CACHES = "XDG_CACHE_HOME"  # the variable that names the folder of all caches
INTERRUPTED = 130  # the exit code of a program that SIGINT ended
# Who tells more than a user wants to know: of devices that are missing, of every kernel
# and every memory plan, of every request and every file.
CHATTY = (
    *("jax", "httpx", "launch.start"),
    *("pyramid_jax.kernels", "pyramid_jax.pipeline"),
)

# What they warn of, Orbax's registry at every start, is nothing that a user can mend.
LIBRARIES = ("absl", "orbax")

CURES = {
    errno.ENOSPC: "make room, or write to another disk; finished files stay",
    errno.EDQUOT: "make room, or write to another disk; finished files stay",
    errno.EACCES: "change its permissions, or give another path",
    errno.EROFS: "give a path on a disk that can be written to",
}

SMALLER = "work on fewer or smaller videos at once, or on more devices"

flags.DEFINE_bool("verbose", False, "Tell everything: programs, memory, tracebacks.")


def run(
    main: Callable[[flags.FlagValues], None],
    define: Callable[[flags.FlagValues], None] | None = None,
    headings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs a command with the flags of the command line, and ends the process.

    Its ValueErrors say what the user gave, and what to do. SIGTERM interrupts it.

    Args:
        main: the command.
        define: declares its flags, if they are not declared yet.
        headings: of groups of flags in the help, each by the name of its first flag.
    """
    if define is not None:
        define(flags.FLAGS)

    def command(_: object) -> None:
        if not flags.FLAGS.verbose:
            _quieten()
        enable_compile_cache()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with one_line_errors():
            main(flags.FLAGS)

    app.run(command, flags_parser=partial(usage.parse, _name(), headings))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line for what a user can mend, and exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{_name()}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if flags.FLAGS.verbose:
            raise
        sys.exit(f"{_name()}: {sentence(error)}")
    except jax.errors.JaxRuntimeError as error:
        if flags.FLAGS.verbose or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"{_name()}: {str(error).splitlines()[0]}; {SMALLER}")


def sentence(error: BaseException) -> str:
    """What an error says; of files, which one it is, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    files = [str(name) for name in (error.filename, error.filename2) if name]
    where = f"{' and '.join(files)}: " if files else ""
    cure = CURES.get(error.errno or 0, "correct the path, or give another one")
    return f"{where}{error.strerror}; {cure}"


def check_writable(folder: str | Path) -> None:
    """Checks that a folder is there or can be made, and takes files.

    Raises:
        ValueError: naming the folder, and the reason.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"nothing can be written to the folder {folder} ({error.strerror}); give "
            "another one"
        ) from error


def _quieten() -> None:
    """Leaves what a command prints, and warnings without the time and the place."""
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _name() -> str:
    """The name of the command, e.g. "pyramid-jax train-vae" of launch.train_vae."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    command = name.removeprefix("launch.")
    return name if command == name else f"pyramid-jax {command.replace('_', '-')}"


def enable_compile_cache() -> None:
    """Keeps compiled programs from now on, in ~/.cache/pyramid_jax/programs.

    For commands: importing the package changes nothing. What the user has decided
    stays: a folder (JAX_COMPILATION_CACHE_DIR, or JAX's config), or no cache at all
    (JAX_ENABLE_COMPILATION_CACHE=false). Programs that `programs.kept` knows are in the
    folder "kept" inside, and are not even traced again.
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache:
        return
    if not settings.jax_compilation_cache_dir:
        caches = os.environ.get(CACHES) or os.path.expanduser("~/.cache")
        folder = Path(caches) / "pyramid_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Without a cache a command is slower, and nothing else.
        warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
    folder = settings.jax_compilation_cache_dir
    if "://" not in folder:  # JAX's may be a bucket
        programs.keep(Path(folder) / "kept")
    logger.info("compiled programs are kept in %s", folder)


def parse_mesh(axes: Sequence[str] | None) -> Mesh | None:
    """Devices from texts such as "data=2"; None stands for the first device.

    Raises:
        ValueError: no such axis or size, or another number of devices.
    """
    if axes is None:
        return None
    sizes = {}
    for text in axes:
        axis, _, size = text.partition("=")
        if axis not in sharding.MESH_AXES or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"mesh {text!r} is not AXIS=SIZE with an axis of {sharding.MESH_AXES}; "
                "give e.g. data=2,fsdp=-1"
            )
        sizes[axis] = int(size)
    return sharding.device_mesh(**sizes)
