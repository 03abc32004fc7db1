# SPDX-License-Identifier: Apache-2.0
"""What people might say about a bouncing pair: templates and synonyms, at random."""

from collections.abc import Sequence

import numpy as np

from launch.pairs.scene import DIGITS, SHAPES, Actor

_SYNONYMS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
}
_NUMBERS = ("{}", "{}", "digit {}", "number {}", "handwritten {}")
_PLACES = {  # one object, many: "moves" or "move" comes before
    "sideways": ("sideways", "left and right", "from side to side", "horizontally"),
    "up and down": ("up and down", "vertically", "between top and bottom"),
    "diagonally": ("diagonally", "at an angle", "off all four walls"),
}
_VERBS = (("moves", "move"), ("bounces", "bounce"), ("goes", "go"))
_TWO = (
    "{a} {moves_a} and {b} {moves_b}",
    "{a} {moves_a} while {b} {moves_b}",
    "{a} {moves_a}, {b} {moves_b}",
    "there are {a} and {b}: the {kind_a} {moves_a}, the {kind_b} {moves_b}",
    "{a} that {moves_a} and {b} that {moves_b}",
)
_SAME = ("{a} and {b} both {move}", "{a} and {b} {move}")
_STILL = (
    "{a} and {b}",
    "{a} beside {b}",
    "a picture of {a} and {b}",
    "there are {a} and {b}",
)


def video_caption(actors: Sequence[Actor], rng: np.random.Generator) -> str:
    """A sentence that names both objects, their colours and their motions."""
    a, b = _shuffled(actors, rng)
    if a.motion == b.motion and rng.random() < 0.5:
        _, move = _moves(a.motion, rng)
        return _choice(_SAME, rng).format(a=_named(a, rng), b=_named(b, rng), move=move)
    kind_a, kind_b = _kind(a.kind, rng), _kind(b.kind, rng)
    return _choice(_TWO, rng).format(
        a=f"{_article(rng)} {a.colour} {kind_a}",
        b=f"{_article(rng)} {b.colour} {kind_b}",
        kind_a=kind_a,
        kind_b=kind_b,
        moves_a=_moves(a.motion, rng)[0],
        moves_b=_moves(b.motion, rng)[0],
    )


def image_caption(actors: Sequence[Actor], rng: np.random.Generator) -> str:
    """A sentence that names both objects and their colours."""
    a, b = _shuffled(actors, rng)
    return _choice(_STILL, rng).format(a=_named(a, rng), b=_named(b, rng))


def _shuffled(actors: Sequence[Actor], rng: np.random.Generator) -> list[Actor]:
    return [actors[i] for i in rng.permutation(2)]


def _named(actor: Actor, rng: np.random.Generator) -> str:
    return f"{_article(rng)} {actor.colour} {_kind(actor.kind, rng)}"


def _article(rng: np.random.Generator) -> str:
    return _choice(("a", "a", "a", "the"), rng)


def _kind(kind: str, rng: np.random.Generator) -> str:
    if kind in SHAPES:
        return _choice(_SYNONYMS.get(kind, (kind,)), rng)
    number = kind if rng.random() < 0.7 else str(DIGITS.index(kind))
    return _choice(_NUMBERS, rng).format(number)


def _moves(motion: str, rng: np.random.Generator) -> tuple[str, str]:
    """E.g. "moves sideways" and "move sideways"."""
    place = _choice(_PLACES[motion], rng)
    verbs = _VERBS[1:2] if place.startswith("off") else _VERBS
    one, many = verbs[int(rng.integers(len(verbs)))]
    return f"{one} {place}", f"{many} {place}"


def _choice(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
