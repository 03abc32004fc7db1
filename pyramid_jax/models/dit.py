# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer, which gives every token a velocity, at all stages.

Text and video tokens first attend to each other with weights of their own (double
blocks), then, in the miniFLUX variant, as one sequence with shared weights (single
blocks). A row may hold several segments, each with its own time and prompt. A variant
is a `DiTConfig`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float

from pyramid_jax.kernels.attention import AttentionPlan, attention_plan
from pyramid_jax.kernels.visits import Mask
from pyramid_jax.mask import TokenMask, joint
from pyramid_jax.models import layers
from pyramid_jax.models.cache import Cache
from pyramid_jax.models.dit_blocks import (
    Block,
    DiTConfig,
    DoubleBlock,
    KeyValues,
    SingleBlock,
    TokenPlaces,
)
from pyramid_jax.models.layers import layer_norm
from pyramid_jax.models.linear import dense
from pyramid_jax.models.rotary import Turns, angles, turns
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.sharding import constrain, shares

# Blocks by the names of their weights, in the order in which they run: equal ones,
# whose weights are stacked, and last ones, which answer fewer tokens.
BLOCKS = ("double", "last_double", "single", "last_single")
STACKED = ("double", "single")
Modulations = dict[str, Any]  # vectors of the blocks by these names, and of the "head"


class DiT(nn.Module):
    """Computes the velocity of video tokens; that of history means nothing."""

    cfg: DiTConfig

    def setup(self):
        c = self.cfg
        small = nn.initializers.normal(0.02)
        zeros = nn.initializers.zeros
        self.video_in = dense(c.width, (None, "embed"), c.dtype)
        self.text_in = dense(c.width, (None, "embed"), c.dtype, init=small)
        embedder = partial(layers.Embedder, c.width, c.dtype)
        self.time, self.pooled = embedder(), embedder()

        self.double = self._weights("double")
        self.last_double = self._weights("last_double")
        self.single = self._weights("single")
        self.last_single = self._weights("last_single")

        self.head_modulation = layers.Modulation(2, c.width, c.dtype)
        self.head = dense(c.patch_values, ("embed", None), c.dtype, init=zeros)

    def __call__(
        self,
        tokens: Tokens,
        time: Float[jax.Array, "b s"],
        text: Text,
        last: int | None = None,
        modulations: Modulations | None = None,
        current: Bool[jax.Array, "b n"] | None = None,
    ) -> Float[jax.Array, "b _ p"]:
        """The velocities of the last tokens of every row, or of all.

        Args:
            tokens: patches with positions, of each segment the history and the unit.
            time: the network's clock of each segment, 0..1000.
            text: features, and the pooled vector of each segment.
            last: how many tokens at the end of the rows are answered; None: all.
            modulations: what `modulations` makes of time and pooled vectors, which then
                are not read.
            current: the tokens that are not history, None: the last ones; read where
                the history is clean.
        """
        condition = modulations or self._condition(time, text.pooled)
        return self._answer(tokens, text, condition, last, current)[0]

    def continued(
        self,
        tokens: Tokens,
        time: Float[jax.Array, "b s"],
        text: Text,
        last: int,
        cache: Cache,
        *,
        first: int,
        modulations: Modulations | None = None,
    ) -> tuple[Float[jax.Array, "b _ p"], Cache]:
        """The velocities of rows that go on from a cache; and it, with what is new.

        The rows are those of a call, without what the cache holds. The first ones find
        it empty; in others there are no words, but the pooled vectors.

        A clean history is kept as a whole, for rows of current tokens alone; the next
        row that has a history, and is not one of these, finds its first tokens only.

        Args:
            first: how many video tokens at the beginning of the rows are kept, besides
                all words. They must see none of the others.
        """
        condition = modulations or self._condition(time, text.pooled)
        words, kept = text.segment.shape[1], first
        if self.cfg.clean_history and (kept := tokens.segment.shape[1] - last):
            cache = cache.lasting()
        past = cache, words + kept
        answer, blocks = self._answer(tokens, text, condition, last, past=past)
        if not words + kept:
            return answer, cache
        order = tokens.frame[:, :kept]
        mask = joint(text.segment, tokens.segment[:, :kept], order, self.cfg.causal)
        return answer, cache.append(blocks, mask, words + first)

    def _answer(
        self,
        tokens: Tokens,
        text: Text,
        condition: Float[jax.Array, "b _ d"] | Modulations,
        last: int | None,
        current: Bool[jax.Array, "b n"] | None = None,
        past: tuple[Cache, int] | None = None,
    ) -> tuple[Float[jax.Array, "b _ p"], dict[str, KeyValues]]:
        """The velocities, and keys and values of so many tokens, words first.

        The latter only where there is a past, with which the rows go on.
        """
        current = self._current(tokens, last, current)
        c, m, n = self.cfg, text.segment.shape[1], tokens.segment.shape[1]
        last, tokens = n if last is None else last, tokens.filled(shares("tokens"))
        filled = tokens.segment.shape[1]
        kept = last + filled - n
        kept += -kept % shares("tokens")  # the devices divide them evenly
        mask = joint(text.segment, tokens.segment, tokens.frame, c.causal)
        mask = TokenMask(*(constrain(x, ("batch", None)) for x in mask))
        key = mask if past is None else past[0].before(mask)
        vectors = mask.segment
        if current is not None:  # the rest have the second ones of their segments
            clean = jnp.pad(~current, ((0, 0), (m, filled - n)), constant_values=True)
            second = text.pooled.shape[1] + jnp.maximum(vectors, 0)
            vectors = jnp.where(clean, second, vectors)
        at = TokenPlaces(self._turns(tokens.position, m), vectors)
        blocks = dict[str, KeyValues]()

        words = self.text_in(text.features)
        video = self.video_in(tokens.values)
        if c.position_table is not None:
            video = video + self._table(tokens.position).astype(video.dtype)

        def run(name: str, state: layers.Streams, plan: AttentionPlan) -> Any:
            if getattr(self, name) is None:
                return state
            before = None if past is None else (past[0].blocks[name], past[1])
            state, note = self._run(condition, name, state, (at, plan), before)
            if note is not None:
                blocks[name] = note
            return state

        whole, end = self._plan(mask, key), self._plan(mask.last(kept), key)
        words, video = run("double", (words, video), whole)
        if c.text_ends_early:
            ends = self._plan(mask.last(filled), key) if c.single_blocks else end
            words, video = run("last_double", (words, video), ends)
        if c.single_blocks:
            x = jnp.concatenate([words, video], axis=1)
            (video,) = run("last_single", run("single", (x,), whole), end)

        head = self.head_modulation
        made = condition["head"] if isinstance(condition, dict) else head(condition)
        shift, scale = head.of_tokens(made, vectors[:, -kept:])
        out = self.head(layer_norm(video[:, -kept:]) * (1 + scale) + shift)
        answered = kept - (filled - n)
        return out[:, answered - last : answered].astype(jnp.float32), blocks

    def modulations(
        self, time: Float[jax.Array, "b s"], pooled: Float[jax.Array, "b s pooled"]
    ) -> Modulations:
        """All that the blocks and the head make of times and pooled vectors.

        The same for all steps at a time, so that a video needs it only once for each.
        """
        cond = self._condition(time, pooled)
        made: Modulations = {"head": self.head_modulation(cond)}
        for name in BLOCKS:
            if (weights := getattr(self, name)) is not None:
                vectors = partial(self._block(name).apply, method="vectors")
                made[name] = layers.each(
                    lambda one, vectors=vectors: vectors({"params": one}, cond), weights
                )
        return made

    def _condition(self, time: jax.Array, pooled: jax.Array) -> jax.Array:
        """What modulates every segment, and then, if it is clean, its past."""
        if self.cfg.clean_history:
            time = jnp.concatenate([time, jnp.zeros_like(time)], axis=1)
            pooled = jnp.concatenate([pooled, pooled], axis=1)
        return self.time(layers.sinusoid(time)) + self.pooled(pooled)

    def _current(
        self, tokens: Tokens, last: int | None, current: jax.Array | None
    ) -> Bool[jax.Array, "b n"] | None:
        """Which tokens are modulated by the time; None: all.

        Raises:
            ValueError: the history is clean, and nothing says what history is.
        """
        if not self.cfg.clean_history:
            return None
        if current is not None:
            return current
        if last is None:
            raise ValueError(
                "a network with clean_history has to know which tokens are history; "
                "give `current`, or how many are the last"
            )
        n = tokens.segment.shape[1]
        return jnp.broadcast_to((jnp.arange(n) >= n - last)[None], tokens.segment.shape)

    def _run(
        self,
        condition: Float[jax.Array, "b s d"] | Modulations,
        name: str,
        state: layers.Streams,
        where: tuple[TokenPlaces, AttentionPlan],
        past: tuple[KeyValues, int] | None,
    ) -> tuple[layers.Streams, KeyValues | None]:
        """The streams after the blocks of a name.

        Where there is a past, so many of the tokens' first keys and values, too.
        """
        block, weights = self._block(name), getattr(self, name)
        vectors = condition[name] if isinstance(condition, dict) else None
        before, kept = (None, 0) if past is None else past

        def one(weights: Any, inputs: tuple[Any, Any], *state: jax.Array) -> Any:
            variables, (vectors, before) = {"params": weights}, inputs
            if vectors is None:
                vectors = block.apply(variables, condition, method="vectors")
            made: Any = block.apply(variables, vectors, *state, *where, before)
            *streams, new = made
            note = None if past is None else KeyValues(*(x[:, :kept] for x in new))
            return tuple(streams), note

        return layers.scan(
            one,
            weights,
            state,
            (vectors, before),
            axes=("batch", "tokens", None),
            remat=self.cfg.remat if name in STACKED else layers.PRODUCTS,
            noting=True,
        )

    def _block(self, name: str) -> "Block":
        """The block of a name, without weights."""
        if name.endswith("single"):
            return SingleBlock(self.cfg, parent=None)
        return DoubleBlock(self.cfg, name == "last_double", parent=None)

    def _plan(self, query: Mask, key: Mask) -> AttentionPlan:
        c = self.cfg
        return attention_plan(
            query, key, c.head_dim, c.dtype, c.attention, c.attention_tiles
        )

    def _turns(self, position: Float[jax.Array, "b n 3"], words: int) -> Turns:
        """The rotations of text, which stands at position 0, and video tokens."""
        angle = angles(position, self.cfg.rope_axes)
        angle = jnp.pad(angle, ((0, 0), (words, 0), (0, 0)))
        return turns(constrain(angle, ("batch", None, None)))

    def _table(self, position: Float[jax.Array, "b n 3"]) -> Float[jax.Array, "b n d"]:
        """The position table, x in the first half of the width and y in the second."""
        c = self.cfg
        assert c.position_table is not None
        table = layers.position_table(c.position_table, c.position_table_base, c.width)
        y, x = (layers.interpolate_table(table, position[..., axis]) for axis in (1, 2))
        return jnp.concatenate([x, y], axis=-1)

    def _weights(self, name: str) -> Any:
        """The weights of equal blocks, stacked, or of a last one; None: there is none.

        Trees of weights may also be given for each of the equal blocks, see `scan`.
        """
        c, block, count = self.cfg, self._block(name), self.cfg.depths[name]

        def init(key: jax.Array) -> Any:
            token = jnp.zeros((1, 1, c.width), jnp.float32)
            order = jnp.zeros((1, block.streams), jnp.int32)
            angle = jnp.zeros((1, block.streams, c.head_dim // 2), jnp.float32)
            mask = TokenMask(order, order)
            plan = self._plan(mask if name in STACKED else mask.last(1), mask)
            at = TokenPlaces(turns(angle), order)
            inputs = (token, *[token] * block.streams, at, plan)
            if name in STACKED:
                return layers.stacked(key, block, count, *inputs, method="conditioned")
            return block.init(key, *inputs, method="conditioned")["params"]

        if not count:
            return None
        if self.is_initializing():
            weights = self.param(name, init)
        else:  # stacked or not
            weights = self.get_variable("params", name)
        return weights if name in STACKED else (weights,)


def initialise_dit(cfg: DiTConfig, key: jax.Array) -> Any:
    """Fresh weights, in boxes that name the axes of each."""
    time, order = jnp.zeros((1, 1), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    patches, position = (
        jnp.zeros((1, 1, cfg.patch_values), jnp.float32),
        jnp.zeros((1, 1, 3), jnp.float32),
    )
    features = jnp.zeros((1, 1, cfg.text_width), jnp.float32)
    pooled = jnp.zeros((1, 1, cfg.pooled_width), jnp.float32)
    tokens = Tokens(patches, position, order, order)
    text = Text(features, order, pooled)
    return DiT(cfg).init(key, tokens, time, text, 1)["params"]
