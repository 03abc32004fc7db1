# SPDX-License-Identifier: Apache-2.0
"""Recorded cases on disk, answers to them, and the comparison of the two.

A case is a folder with a `config.json`; each of its scenarios is a safetensors file
whose tensors start with `in.`, `draw.` (recorded randomness), `mid.` or `out.`, or have
plain names. Layouts are the original's: latents `b c t h w`.
"""

import fnmatch
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float
from safetensors.numpy import load_file

# Largest accepted absolute differences in float32 on a CPU (of losses: relative).
SCHEDULE, TARGETS, DIT, LOSS, SAMPLING = 1e-6, 1e-5, 2e-5, 1e-4, 5e-4
TEXT, VAE = 5e-5, 5e-5
# A scenario runs once or twice: compile quickly, half the time, rather than run fast.
QUICK = {"xla_backend_optimization_level": 0}
# The reason why frames are left out; the weights of a VAE are large.
NO_WEIGHTS = "the VAE's weights are not there"
# How the names of what goes in begin, or end.
GIVEN, GIVEN_PLAIN = ("in.", "draw."), ("_in", "_model_outputs")


class Case(NamedTuple):
    """A folder of recorded scenarios of one model or function."""

    name: str
    folder: Path
    config: dict[str, Any]

    def weights(self) -> Path:
        """The file with the weights of the case's transformer."""
        return self.folder / self.config.get("model_weights", "weights.safetensors")


class Scenario(NamedTuple):
    """One recorded run: its settings, and its tensors by name."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def latent(self, name: str) -> Float[np.ndarray, "b t h w c"]:
        """A recorded latent in the layout of this package; an image may lack time."""
        x = self.tensors[name]
        x = x[:, :, None] if x.ndim == 4 else x
        return rearrange(x, "b c t h w -> b t h w c")

    def family(self, prefix: str) -> list[str]:
        """The names `prefix`0, `prefix`1, ... as far as they were recorded."""
        names = []
        while f"{prefix}{len(names)}" in self.tensors:
            names.append(f"{prefix}{len(names)}")
        return names


class Answer(NamedTuple):
    """What this package computes for a recorded tensor.

    Args:
        relative: the error is divided by the largest recorded magnitude.
        where: compare only there.
        recorded: compare with this, derived from the recorded tensor, instead.
        way: by which the value was computed, where there are several.
    """

    tensor: str
    value: Any
    tolerance: float
    relative: bool = False
    where: np.ndarray | None = None
    recorded: np.ndarray | None = None
    note: str = ""
    way: str = ""


class Line(NamedTuple):
    """The verdict on a recorded tensor: `ok`, `FAIL`, or `skipped` with the reason."""

    case: str
    scenario: str
    tensor: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        place = f"{self.case:<36} {self.scenario:<26} {self.tensor:<58}"
        if self.error is None:
            return f"{place} {self.verdict}: {self.note}"
        numbers = f"{self.error:9.2e} {self.tolerance:8.1e} {self.verdict:<4}"
        return f"{place} {numbers} {self.note}".rstrip()


def latent_back(x: Any) -> np.ndarray:
    """A latent `b t h w c` in the recorded layout."""
    return rearrange(np.asarray(x), "b t h w c -> b c t h w")


def find(folder: Path, only: str = "*") -> dict[str, Path]:
    """The folders of the cases in `folder`, at any depth, whose names match `only`.

    Raises:
        ValueError: there is none.
    """
    folders = {}
    for path in sorted(folder.rglob("config.json")):
        name = path.parent.relative_to(folder).as_posix()
        if fnmatch.fnmatch(name, only):
            folders[name] = path.parent
    if not folders:
        raise ValueError(
            f"no case (a folder with config.json) matching {only!r} in {folder}; "
            "give the folder that holds the cases, or another pattern"
        )
    return folders


def read_case(folder: Path, name: str) -> Case:
    """The case in a folder, whose config.json is read."""
    return Case(name, folder, json.loads((folder / "config.json").read_bytes()))


def scenario_files(case: Case) -> list[Path]:
    """The files of a case's scenarios; files of weights are none."""
    config = case.config
    named = [config.get(f"{network}_weights", "") for network in ("model", "vae")]
    weights = {"weights.safetensors", *config.get("state_dict_shapes", ()), *named}
    files = sorted(case.folder.glob("*.safetensors"))
    return [path for path in files if path.name not in weights]


def read_scenario(case: Case, path: Path) -> Scenario:
    """The scenario in a file."""
    own = case.config.get("scenarios", {}).get(path.stem, {})
    return Scenario(path.stem, {**case.config, **own}, load_file(path))


def compare(
    case: Case, scenario: Scenario, answers: Iterable[Answer], why: str = ""
) -> Iterator[Line]:
    """One line per recorded result, those without an answer as skipped, or say why."""
    recorded = {name for name in scenario.tensors if not _is_given(name)}
    answered = set()
    for answer in answers:
        name = answer.tensor
        if name not in recorded or (name, answer.way) in answered:
            continue  # not every case records every state
        answered.add((name, answer.way))
        error = _error(answer, scenario.tensors[name])
        verdict = "ok" if error <= answer.tolerance else "FAIL"
        notes = ["relative" * answer.relative, answer.note, answer.way]
        note = "; ".join(filter(None, notes))
        line = (case.name, scenario.name, name, verdict, error, answer.tolerance, note)
        yield Line(*line)
    for name in sorted(recorded - {name for name, _ in answered}):
        note = why or _missing(name)
        yield Line(case.name, scenario.name, name, "skipped", note=note)


def _is_given(name: str) -> bool:
    return name.startswith(GIVEN) or ("." not in name and name.endswith(GIVEN_PLAIN))


def _missing(tensor: str) -> str:
    """Why a tensor has no answer."""
    if tensor.startswith(("out.frames", "out.decoded")):
        return NO_WEIGHTS
    return "a scenario of an unknown kind"


def _error(answer: Answer, recorded: np.ndarray) -> float:
    """The largest difference; infinite where shapes differ or a value is not finite."""
    if answer.recorded is not None:
        recorded = answer.recorded
    value, recorded = (np.asarray(x, np.float64) for x in (answer.value, recorded))
    if value.shape != recorded.shape or not np.isfinite([value, recorded]).all():
        return np.inf
    scale = max(np.abs(recorded).max(initial=0.0), 1e-30) if answer.relative else 1.0
    difference = np.abs(value - recorded)
    if answer.where is not None:
        difference = difference[np.broadcast_to(answer.where, difference.shape)]
    return float(difference.max(initial=0.0)) / scale
