# SPDX-License-Identifier: Apache-2.0
"""Images beside videos: which of two manifests an example is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from pyramid_jax.data.manifest import Record

GROUP = 64  # successive examples, among which the places of images are drawn


@dataclass(frozen=True)
class Mixture:
    """Records of which a share of the examples are the second ones.

    Each kind comes in epochs of its own. The number of an example alone decides its
    kind; that of a row's next one, its stage and its unit say nothing about it.
    """

    videos: Sequence[Record]
    images: Sequence[Record]
    share: float

    def __len__(self) -> int:
        return len(self.videos) + len(self.images)

    def of(self, number: int, seed: int) -> tuple[Sequence[Record], int]:
        """The records that an example is of, and its number among those of its kind."""
        group, place = divmod(number, GROUP)
        first, last = (int(n * GROUP * self.share) for n in (group, group + 1))
        places = _order(seed, group)[: last - first]
        images = first + int((places < place).sum())
        if place in places:
            return self.images, images
        return self.videos, number - images


@lru_cache(maxsize=4096)
def _order(seed: int, group: int) -> Int[np.ndarray, "_"]:
    return np.random.default_rng((seed, group)).permutation(GROUP)
