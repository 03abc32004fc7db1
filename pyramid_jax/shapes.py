# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: the few structures that travel between the parts of the package.

One letter has one meaning everywhere: `b` batch rows, `f` pixel frames, `t` latent
frames, `h w` height and width, `c` channels, `p` values of a patch token, `m` text
tokens, `n` video tokens, `l = m + n`, `s` segments in a row, `d` model width, `r`
rotary pairs.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

# The method's functions work on both. Arrays are checked where it counts, with their
# shapes, while the tests run; static checkers only know that they are there.
if TYPE_CHECKING:
    Array = Any
else:
    Array = jax.Array | np.ndarray


class Text(NamedTuple):
    """What the network knows of the prompts of a batch of rows.

    `segment` says which example of the row a text token belongs to, -1 for padding;
    `pooled` holds one vector per segment.
    """

    features: Float[Array, "b m text"]
    segment: Int[Array, "b m"]
    pooled: Float[Array, "b s pooled"]

    def without_words(self) -> "Text":
        """What is left for a network that remembers the words."""
        return Text(self.features[:, :0], self.segment[:, :0], self.pooled)


class Tokens(NamedTuple):
    """Patches of video, flattened into rows; a row holds one or several segments.

    `position` is (frame, y, x), with y and x in cells of the target stage's token grid;
    `segment` is -1 for padding; `frame` orders the tokens of a segment for the causal
    mask.
    """

    values: Float[Array, "b n p"]
    position: Float[Array, "b n 3"]
    segment: Int[Array, "b n"]
    frame: Int[Array, "b n"]

    def filled(self, size: int) -> "Tokens":
        """With padding at the end, up to a multiple of `size` tokens."""
        padding = -self.segment.shape[1] % size

        def fill(x: Array, value: int = 0) -> Array:
            rest = [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, ((0, 0), (0, padding), *rest), constant_values=value)

        segment = fill(self.segment, -1)
        return Tokens(fill(self.values), fill(self.position), segment, fill(self.frame))


# In a list of `Tokens` all would have the same number n; in a list of these, any.
AnyTokens = tuple[Array, ...]


class Velocity(Protocol):
    """A network as the algorithms see it; only sampling with reuse gives a memory."""

    def __call__(
        self,
        tokens: Tokens,
        time: Float[Array, "b s"],
        text: Text,
        last: int | None = None,
        memory: Any = None,
        first: int = 0,
    ) -> Any:
        """The velocity of the `last` tokens at the end of the rows; None: of all.

        Where the network is given what it remembers of the rows' beginning, they go on
        from there, and it returns a pair: the velocity, and the memory with all words
        and the `first` tokens at the beginning of these rows.
        """
        ...


class Rows(NamedTuple):
    """Packed training examples without noise, as the data workers assemble them.

    Each segment is one unit of one clip at one stage, preceded by its history. `clean`
    are the tokens themselves, `coarser` the same region of the next coarser level
    copied up (zero at stage 0), `current` marks the tokens of the unit that is being
    denoised. `text` are token ids (`b m`) or stored features (`b m text`) of the
    captions, `pooled` their stored pooled vectors (empty last axis if the text encoder
    makes them).
    """

    clean: Float[Array, "b n p"]
    coarser: Float[Array, "b n p"]
    position: Float[Array, "b n 3"]
    segment: Int[Array, "b n"]
    frame: Int[Array, "b n"]
    current: Bool[Array, "b n"]
    stage: Int[Array, "b s"]
    text: Int[Array, "b m"] | Float[Array, "b m _"]
    text_segment: Int[Array, "b m"]
    pooled: Float[Array, "b s _"]
