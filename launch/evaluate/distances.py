# SPDX-License-Identifier: Apache-2.0
"""How far apart two sets of clips are, by the features or the spectra of each clip.

Features may come from any network, a row for each clip. With few clips a distance is
far from zero even between sets of one kind: compare it with that of two real sets.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FEW = 2  # rows that a distance needs at least

_JEDI = 100.0  # the factor of JEDi's authors


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "_ d"]) -> float:
    """The Fréchet distance of two sets of features, taken as normal distributions.

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)
    """
    means = a.mean(axis=0) - b.mean(axis=0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The eigenvalues of Σa Σb are those of the symmetric √Σa Σb √Σa.
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(means @ means + np.trace(first) + np.trace(second) - 2 * common)


def jedi(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "_ d"]) -> float:
    """The distance of JEDi: squared maximum mean discrepancy, times 100.

    Its kernel is k(x, y) = (x·y / d)², whose mean discrepancy is that of the second
    moments: |E aaᵀ - E bbᵀ|² / d². Only with features of V-JEPA it is JEDi itself.

    Source: Luo et al., "Beyond FVD" (arXiv:2410.05203), and the package videojedi.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    moments = a.T @ a / len(a) - b.T @ b / len(b)
    return float(_JEDI * np.square(moments / a.shape[1]).sum())


def spectrum_distance(
    a: Sequence[Float[np.ndarray, "bins"]], b: Sequence[Float[np.ndarray, "bins"]]
) -> float:
    """The root mean square difference of two sets' mean spectra, in decibels."""
    difference = np.mean(a, axis=0) - np.mean(b, axis=0)
    return float(np.sqrt(np.square(difference).mean()))
