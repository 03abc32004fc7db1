# SPDX-License-Identifier: Apache-2.0
"""The steps, most valuable first, and what each may use of the time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.device import chip, kernels, networks
from benchmarks.device.records import Log


class Step(NamedTuple):
    """What a process of its own runs, and its part of the time beside the others."""

    run: Callable[[Log, bool], None]
    share: float


STEPS = {
    "ceilings": Step(chip.ceilings, 25),
    "correctness": Step(kernels.correctness, 60),
    "attention_768p": Step(partial(kernels.against_others, "768p"), 90),
    "euler_768p": Step(partial(networks.euler, "768p_5s"), 220),
    "tiles": Step(kernels.tiles, 60),
    "decoder": Step(networks.decoder, 60),
    "training": Step(networks.training, 90),
    "attention_packed": Step(partial(kernels.against_others, "packed"), 45),
    "euler_384p": Step(partial(networks.euler, "384p_5s"), 90),
    "text": Step(networks.text, 35),
    "attention_384p": Step(partial(kernels.against_others, "384p"), 45),
}


def part(name: str, others: Sequence[str]) -> float:
    """What a step may use of the time that is left for it and the others, 0 to 1."""
    return STEPS[name].share / sum(STEPS[each].share for each in (name, *others))
