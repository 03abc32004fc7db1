# SPDX-License-Identifier: Apache-2.0
"""What raters compare: pairs of clips of one prompt, and who sees which clip where."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from launch.sample import outputs

# The three questions of the paper's own study.
QUESTIONS = MappingProxyType(
    {
        "aesthetic quality": "Which video looks better?",
        "motion smoothness": "Which video moves more smoothly?",
        "semantic alignment": "Which video shows better what the text says?",
    }
)
LEFT, SAME, RIGHT = CHOICES = ("left", "same", "right")
NAME = 40  # characters


class Pair(NamedTuple):
    """Two clips of a prompt, from the first and from the second folder."""

    prompt: str
    clips: tuple[Path, Path]


class Turn(NamedTuple):
    """A pair, by its number, as a rater sees it; `left` is 0 or 1, the clip there."""

    pair: int
    left: int


@dataclass(frozen=True)
class Study:
    """Pairs of clips, and what the two sides are called in results.

    `seed` decides who sees which clip on which side, and in which order.
    """

    names: tuple[str, str]
    pairs: tuple[Pair, ...]
    seed: int

    def turns(self, rater: str) -> list[Turn]:
        """The pairs in a rater's own order, each clip as often left as right."""
        rng = np.random.default_rng((self.seed, *rater.encode()))
        count = len(self.pairs)
        order = rng.permutation(count)
        sides = (rng.permutation(count) + rng.integers(2)) % 2
        return [Turn(*turn) for turn in np.stack([order, sides], axis=1).tolist()]

    def manifest(self) -> dict[str, Any]:
        """What is compared, as JSON; clips are known by their contents."""
        pairs = [
            {"prompt": pair.prompt, "clips": [*map(outputs.fingerprint, pair.clips)]}
            for pair in self.pairs
        ]
        return {"names": [*self.names], "seed": self.seed, "pairs": pairs}


def paired(first: Path, second: Path) -> tuple[Pair, ...]:
    """The clips of two folders that `pyramid-jax sample` wrote, prompt by prompt.

    Several clips of a prompt are paired in the order of their seeds.

    Raises:
        ValueError: no clips, clips that don't say what they were made from, or other
            prompts in one folder than in the other.
    """
    if first.resolve() == second.resolve():
        raise ValueError(f"{first} is compared with itself; give two folders")
    one, other = _by_prompt(first), _by_prompt(second)
    for prompt in [*one, *other]:
        counts = len(one.get(prompt, ())), len(other.get(prompt, ()))
        if counts[0] != counts[1]:
            raise ValueError(
                f"{first} has {counts[0]} clips of {prompt[0]!r}, {second} has "
                f"{counts[1]}; sample both folders from one list of prompts"
            )
    return tuple(
        Pair(prompt[0], clips)
        for prompt in one
        for clips in zip(one[prompt], other[prompt], strict=True)
    )


def rater_name(text: Any) -> str:
    """A rater's name as it is kept: "  Anna " and "anna" are one person.

    Raises:
        ValueError: an empty, long or unprintable name.
    """
    name = " ".join(text.split()).casefold() if isinstance(text, str) else ""
    if not (0 < len(name) <= NAME and name.isprintable()):
        raise ValueError(
            f"{text!r} is no name; give one of 1 to {NAME} letters, the same each time"
        )
    return name


def _by_prompt(folder: Path) -> dict[tuple[str, str | None], list[Path]]:
    """The clips of each prompt and first frame, by their seeds."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; correct the path")
    found: dict[tuple[str, str | None], list[tuple[int, Path]]] = defaultdict(list)
    for path in sorted(folder.glob("*.mp4")):
        recipe = outputs.read(path).recipe
        found[recipe.prompt, recipe.image].append((recipe.seed, path))
    if not found:
        raise ValueError(
            f"{folder} holds no mp4 files; give a folder that pyramid-jax sample wrote"
        )
    return {key: [path for _, path in sorted(clips)] for key, clips in found.items()}
