# SPDX-License-Identifier: Apache-2.0
"""Whether two checkouts sample the same videos, byte by byte.

    python -m benchmarks.same_bytes OLD
    python -m benchmarks.same_bytes OLD NEW --only 'tiny: *' --rename each=copies

OLD and NEW are folders with a checkout each; without NEW, this one. The demo and
`launch.sample` run in both, with the same flags and the interpreter of this command,
for both embedded models: with and without guidance, with negative prompts, for images,
batches and given first frames. The mp4 files of the demo are compared as they are; of
npz files, which also say when they were written, the frames. The exit code is 1 if
anything differs or fails.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny", "pairs")
PROMPT = "--prompt=a red circle moves left"
IMAGE = "first.png"  # drawn by `draw_first_frame`, beside the results
SAMPLED: Mapping[str, Sequence[str]] = {
    "defaults": [PROMPT, "--seed=5"],
    "no guidance": [PROMPT, "--seed=5", "--guidance=0", "--video_guidance=0"],
    "few steps": [PROMPT, "--seed=6", "--steps=3", "--video_steps=2", "--last_step"],
    "decay": [PROMPT, "--seed=7", "--guidance=5", "--decay=0.5", "--floor=2"],
    "negative": [PROMPT, "--seed=8", "--negative=a green star", "--steps=4"],
    "batch": [PROMPT, "--seed=9", "--each=3", "--batch=2", "--steps=4", "--scans=2"],
    "image": [PROMPT, "--seed=10", "--frames=1"],
    "from image": [PROMPT, "--seed=11", f"--image={IMAGE}"],
    "from image, no guidance": [
        *(PROMPT, "--seed=12", f"--image={IMAGE}"),
        *("--guidance=0", "--video_guidance=0"),
    ],
}


class Case(NamedTuple):
    """A command that is run in both checkouts: its name here, its module, its flags."""

    name: str
    module: str
    flags: Sequence[str]


class Outcome(NamedTuple):
    """What one checkout made of a case: its files as arrays, or why there are none."""

    files: Mapping[str, np.ndarray]
    error: str = ""


def cases() -> list[Case]:
    """The demo and all rows of `SAMPLED`, for both embedded models."""
    rows = []
    for model in MODELS:
        folder = f"--model=pyramid_jax/assets/{model}"
        rows.append(Case(f"{model}: demo", "launch.demo", [folder, "--seed=3"]))
        for name, flags in SAMPLED.items():
            flags = [folder, "--kind=npz", *flags]
            rows.append(Case(f"{model}: {name}", "launch.sample", flags))
    return rows


def check_checkout(folder: Path) -> None:
    """Ends the program where a folder's own package would not be imported there."""
    command = [sys.executable, "-c", "import pyramid_jax as p; print(p.__file__)"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    file = Path(process.stdout.strip())
    if process.returncode or not file.is_relative_to(folder.resolve()):
        sys.exit(f"{folder} is no checkout: pyramid_jax comes from {file} there")


def renamed(flags: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Flags in the words of a checkout where some have other names."""
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return [
        f"--{names.get(name, name)}{equals}{value}" for name, equals, value in pairs
    ]


def run(case: Case, checkout: Path, folder: Path) -> Outcome:
    """Runs a case in a checkout and reads the files that it wrote."""
    flags = [
        f"--image={folder.parent / IMAGE}" if flag == f"--image={IMAGE}" else flag
        for flag in case.flags
    ]
    command = [sys.executable, "-m", case.module, *flags, f"--to={folder}"]
    process = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        return Outcome({}, " / ".join(lines[-3:]) or "it said nothing")
    paths = [*folder.glob("*.mp4"), *folder.glob("*.npz")]
    return Outcome({path.name: read(path) for path in sorted(paths)})


def read(path: Path) -> np.ndarray:
    """The frames of an npz file, the bytes of any other."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["video"]
    return np.frombuffer(path.read_bytes(), np.uint8)


def difference(old: Outcome, new: Outcome) -> str:
    """How two checkouts differ in a case; empty if they do not."""
    for side, outcome in (("OLD", old), ("NEW", new)):
        if outcome.error:
            return f"{side} failed: {outcome.error}"
    if not old.files or old.files.keys() != new.files.keys():
        return f"OLD wrote {sorted(old.files)}, NEW {sorted(new.files)}"
    for name, a in old.files.items():
        b = new.files[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
        if count := int((a != b).sum()):
            return f"{name}: {count} of {a.size} bytes differ"
    return ""


def digest(outcome: Outcome) -> str:
    """The beginning of a hash over all files."""
    sha = hashlib.sha256()
    for array in outcome.files.values():
        sha.update(array.tobytes())
    return sha.hexdigest()[:12] if outcome.files else "-"


def draw_first_frame(path: Path) -> None:
    """A yellow square on dark blue, 32 x 32."""
    image = Image.new("RGB", (32, 32), (16, 16, 48))
    image.paste((240, 220, 40), (9, 11, 19, 21))
    image.save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="folder of a checkout")
    parser.add_argument(
        "new",
        type=Path,
        help="folder of the other; none: this one",
        nargs="?",
        default=ROOT,
    )
    parser.add_argument("--only", default="*", help="cases, e.g. 'pairs: *'")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="a flag of launch.sample that NEW calls something else",
    )
    options = parser.parse_args(arguments)
    for folder in (options.old, options.new):
        check_checkout(folder)
    names = dict(pair.split("=") for pair in options.rename)
    rows = [case for case in cases() if fnmatch(case.name, options.only)]
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_first_frame(folder / IMAGE)
        for i, case in enumerate(rows):
            old = run(case, options.old, folder / f"{i}_old")
            other = case._replace(flags=renamed(case.flags, names))
            new = run(other, options.new, folder / f"{i}_new")
            text = difference(old, new)
            failures += bool(text)
            size = sum(array.nbytes for array in old.files.values())
            verdict = f"DIFFERENT: {text}" if text else "same"
            print(
                f"{case.name:38} {len(old.files)} files {size:8,} bytes  "
                f"{digest(old):12} {digest(new):12} {verdict}",
                flush=True,
            )
    print(f"{len(rows) - failures} of {len(rows)} cases have the same bytes")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
