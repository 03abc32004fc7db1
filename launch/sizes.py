# SPDX-License-Identifier: Apache-2.0
"""Sizes of videos as commands take them, and refuse them."""

from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.sizes import Size, trained_sizes


def height_width(text: str) -> tuple[int, int]:
    """Height and width from text such as "384x640".

    Raises:
        ValueError: anything else.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"size {text!r} is not HEIGHTxWIDTH; write e.g. 384x640")
    return int(numbers[0]), int(numbers[1])


def check_trained(defaults: SampleConfig, size: Size, name: str) -> None:
    """Refuses sizes that the model of that name was not made for.

    Raises:
        ValueError: with the sizes and lengths that are allowed.
    """
    sizes = trained_sizes(defaults)
    fits = any(
        (size.height, size.width) == known[:2] and size.frames <= known.frames
        for known in sizes
    )
    if sizes and not fits:
        allowed = ", ".join(map(str, sizes))
        raise ValueError(
            f"{size.height}x{size.width} with {size.frames} frames was asked for, but "
            f"{name or 'this model'} was made for {allowed}; choose one of these, or "
            "allow any size if its weights were trained on others"
        )
