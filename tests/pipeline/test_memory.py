# SPDX-License-Identifier: Apache-2.0
"""The memory plan: what it counts and estimates, and what it says of too much work."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pairs
from pyramid_jax import sharding
from pyramid_jax.convert.source import abstract_weights
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import (
    MINIFLUX,
    MMDIT,
    ModelConfig,
    initialise,
    model_config,
    sample_config,
)
from pyramid_jax.models import vae
from pyramid_jax.models.dit import DiT, DiTConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import (
    DECODING,
    GIB,
    SAMPLING,
    STREAMING,
    TEXT,
    ModelParts,
    Work,
)
from pyramid_jax.pipeline.prompts import Network, abstract_encoder
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Pieces

SECTIONS = pairs.get_config()
CFG: ModelConfig = model_config(SECTIONS.model.to_dict())
OPTIONS = sample_config(SECTIONS.sample.to_dict())
VAE = VAEConfig(latent=CFG.latent.channels, groups=8)
TWO = Pieces(frames=2 * CFG.latent.temporal)
WORK = Work((16, 16, 16, CFG.latent.channels), 1, OPTIONS, TWO)
RELEASED = VAEConfig(dtype="bfloat16")
SMALL_VAE = VAEConfig(
    latent=4,
    encoder_widths=(8, 16, 16),
    decoder_widths=(8, 16, 16),
    encoder_layers=(1, 1, 1),
    decoder_layers=(1, 2, 1),
    spatial=(True, True, False),
    temporal=(True, False, True),
    groups=4,
)
SMALL = DiTConfig(
    width=64,
    heads=4,
    double_blocks=2,
    single_blocks=2,
    rope_axes=(16,),
    patch_values=16,
    text_width=32,
    pooled_width=32,
    position_table=None,
    text_ends_early=False,
)


def shapes(fresh: Any) -> Any:
    """The weights that a function of a key would make, without making them."""
    return jax.eval_shape(fresh, jax.random.key(0))


@cache
def boxed() -> Any:
    return shapes(partial(initialise, CFG))


@cache
def coder() -> Any:
    return sharding.unbox(shapes(partial(vae.initialise_vae, VAE)))


@cache
def networks() -> ModelParts:
    autoencoder = Autoencoder(VAE, CFG.latent, coder())
    return ModelParts(CFG, sharding.unbox(boxed()), autoencoder)


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def placed(tree: Any, kind: str) -> Any:
    """Shapes of arrays on the first device, in one of its kinds of memory."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree
    )


def phase(name: str, **changes: Any) -> memory.Phase:
    """A phase of WORK with other attributes."""
    plan = memory.memory_plan(networks(), WORK._replace(**changes))
    (found,) = (p for p in plan.phases if p.name == name)
    return found


def test_weights_of_a_phase_and_those_that_wait_are_all_there_are():
    everything = size((networks().params, coder()))
    for found in memory.memory_plan(networks(), WORK).phases:
        assert found.weights + found.waiting == everything
    assert phase(SAMPLING).weights == size(networks().params["dit"])
    assert phase(DECODING).weights == size(coder()["decoder"])
    assert phase(TEXT).weights == size(networks().params["text"])


def test_text_encoders_read_instead_of_the_models_own():
    cfg = T5Config(vocabulary=100, width=64, heads=2, head_dim=8, mlp_width=32)
    reader = Network(cfg, sharding.unbox(abstract_encoder(cfg)))
    plan = memory.memory_plan(networks()._replace(encoders=(reader,)), WORK)
    assert plan.phases[0].name == TEXT
    assert plan.phases[0].weights == size(reader.params)


def test_parked_weights_take_nothing_but_in_their_phase():
    kinds = {
        kind: placed(networks().params, kind) for kind in ("device", sharding.HOST)
    }
    here, there = (
        memory.memory_plan(networks()._replace(params=params), WORK)
        for params in kinds.values()
    )
    for before, after in zip(here.phases, there.phases, strict=True):
        assert after.weights == before.weights
    assert there.phases[-1].waiting == size(coder()["encoder"])


def test_devices_that_divide_weights_hold_their_parts():
    mesh = sharding.device_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    where = sharding.shardings(boxed(), mesh)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        networks().params,
        where,
    )
    parts = [
        np.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
        for x, at in zip(
            jax.tree.leaves(params["dit"]), jax.tree.leaves(where["dit"]), strict=True
        )
    ]
    plan = memory.memory_plan(networks()._replace(params=params), WORK, mesh)
    sampling = next(p for p in plan.phases if p.name == SAMPLING)
    assert sampling.weights == sum(parts) < size(params["dit"]) / 2


def test_devices_divide_the_videos_of_a_batch():
    mesh = sharding.device_mesh(data=4, devices=jax.devices()[:4])
    one = memory.memory_plan(networks(), WORK)
    four = memory.memory_plan(networks(), WORK._replace(videos=4), mesh)
    for alone, shared in zip(one.phases[1:], four.phases[1:], strict=True):
        assert shared.state == alone.state and shared.working == alone.working


def test_decoding_in_pieces_takes_no_more_for_longer_videos():
    short, long = (phase(DECODING, shape=(t, 16, 16, 4)) for t in (8, 31))
    assert short[1:] == long[1:]


def test_whole_videos_and_larger_pieces_take_more():
    whole, two, one = (
        phase(DECODING, pieces=Pieces(frames)).total
        for frames in (None, *(n * CFG.latent.temporal for n in (2, 1)))
    )
    assert whole > two > one


def test_sampling_grows_with_the_history():
    short, long = (phase(SAMPLING, shape=(t, 16, 16, 4)) for t in (20, 31))
    assert long.working > short.working and long.state > short.state


def test_guidance_doubles_the_rows_of_the_network():
    alone = replace(OPTIONS, guidance=Guidance(first=0.0))
    rows = {WORK.rows, WORK._replace(options=alone).rows}
    assert rows == {2, 1}
    assert phase(SAMPLING).working > phase(SAMPLING, options=alone).working


def test_history_of_the_longest_row_counts():
    assert len(CFG.stages) == 3
    tokens = memory.longest_row(CFG, WORK, 2)
    cells = 16 * 16 // CFG.layout.patch**2
    assert tokens == cells + cells + cells // 4 + (16 - 3) * cells // 16


def test_a_stream_has_the_transformer_and_the_decoder_at_once():
    found = phase(STREAMING, streamed=True)
    assert found.weights == phase(SAMPLING).weights + phase(DECODING).weights
    assert found.working >= phase(SAMPLING).working


def test_a_given_image_adds_the_encoder():
    found = phase(memory.IMAGE, image=True)
    assert found.weights == size(coder()["encoder"])
    side = 16 * CFG.latent.spatial
    assert found.working == memory.encoder_working(VAE, 1, side, side)


def test_latents_alone_need_no_decoder():
    plan = memory.memory_plan(networks(), WORK._replace(pieces=None))
    assert [p.name for p in plan.phases] == [TEXT, SAMPLING]


def test_work_that_fits_or_whose_devices_are_unknown_is_not_refused():
    plan = memory.memory_plan(networks(), WORK)
    plan.check(None)
    plan.check(plan.largest.total)
    assert memory.device_memory() is None  # CPUs don't say


def test_work_that_does_not_fit_says_what_to_change():
    plan = memory.memory_plan(networks(), WORK._replace(videos=3))
    with pytest.raises(ValueError) as refused:
        plan.check(0.5 * GIB)
    said = str(refused.value)
    assert said.startswith(
        f"decoding needs {plan.largest.total / GIB:.1f} GiB on a device, which lends "
        "0.5; load with"
    )
    for change in (
        "load with offload=True",
        "dtype='bfloat16'",
        "VideoPipeline.pieces",
        "fewer videos at once",
        "fsdp or tensor",
        "smaller size or fewer frames",
    ):
        assert change in said
    assert "reading text" in said  # the whole table


def test_pieces_are_the_largest_that_fit():
    temporal, spatial = CFG.latent.temporal, CFG.latent.spatial
    work = WORK._replace(shape=(16, 64, 64, CFG.latent.channels))

    def chosen(most: float | None) -> Pieces:
        return memory.decoding_pieces(networks(), work, None, most)

    def needed(pieces: Pieces) -> int:
        return (
            memory.memory_plan(networks(), work._replace(pieces=pieces))
            .phases[-1]
            .total
        )

    two, one = Pieces(2 * temporal), Pieces(temporal)
    tiles = Pieces(2 * temporal, 32 * spatial)
    assert needed(two) > needed(one) > needed(tiles)
    assert chosen(None) == chosen(needed(two)) == two
    assert chosen(needed(two) - 1) == one
    assert chosen(needed(one) - 1) == tiles
    assert chosen(1) == two  # which `MemoryPlan.check` then refuses


def test_a_plan_is_a_table():
    text = str(memory.memory_plan(networks(), WORK))
    head, *rows = text.splitlines()
    assert head.split() == [
        *("GiB", "of", "a", "device"),
        *("weights", "waiting", "state", "working", "total"),
    ]
    assert [row[:16].strip() for row in rows] == [TEXT, SAMPLING, DECODING]


def array(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(f: Any, *arguments: Any) -> int:
    """Bytes that the compiler for this machine plans for, beside what goes in."""
    analysis: Any = jax.jit(f).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def small_vae() -> Any:
    fresh = partial(vae.initialise_vae, SMALL_VAE)
    return sharding.unbox(jax.eval_shape(fresh, jax.random.key(0)))


@pytest.mark.parametrize(
    ("frames", "height", "width", "gib"),
    [(1, 48, 80, 3.3), (2, 48, 80, 5.7), (1, 96, 160, 13.2), (2, 96, 160, 22.7)],
)
def test_decoding_holds_what_the_compiler_for_an_a100_says(
    frames: int, height: int, width: int, gib: float
):
    found = memory.decoder_working(RELEASED, (1, frames, height, width)) / GIB
    assert found == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize(
    ("frames", "height", "width", "gib"),
    [(1, 384, 640, 0.295), (1, 768, 1280, 1.377), (9, 384, 640, 1.705)],
)
def test_encoding_holds_what_the_compiler_for_an_a100_says(
    frames: int, height: int, width: int, gib: float
):
    found = memory.encoder_working(RELEASED, frames, height, width) / GIB
    assert found == pytest.approx(gib, rel=0.2)


@pytest.mark.parametrize(
    ("cfg", "backend", "tokens", "gib"),
    [
        (MMDIT, "blocks", 2940, 0.154),
        (MMDIT, "pallas_triton", 2940, 0.155),
        (MMDIT, "pallas_triton", 11000, 0.499),
        (MMDIT, "xla", 2940, 2.613),
        (MINIFLUX, "blocks", 2940, 0.219),
        (MINIFLUX, "pallas_triton", 2940, 0.203),
    ],
)
def test_a_transformer_holds_what_the_compiler_for_an_a100_says(
    cfg: DiTConfig, backend: str, tokens: int, gib: float
):
    half = replace(cfg, dtype="bfloat16", attention=backend)
    found = memory.dit_working(half, rows=2, tokens=tokens, words=128) / GIB
    assert found == pytest.approx(gib, rel=0.3)
    assert found >= gib * 0.99  # rather too much than too little


def test_a_text_encoder_holds_what_the_compiler_for_an_a100_says():
    found = memory.text_working(T5Config(dtype="bfloat16"), rows=2, words=128) / GIB
    assert found == pytest.approx(0.111, rel=0.1)


@pytest.mark.parametrize("backend", ["xla", "blocks"])
def test_a_transformer_holds_about_what_the_compiler_for_this_machine_says(
    backend: str,
):
    cfg = replace(SMALL, attention=backend)
    rows, tokens, words = 2, 600, 40
    order = array(rows, tokens, dtype=jnp.int32)
    video = Tokens(array(rows, tokens, 16), array(rows, tokens, 3), order, order)
    text = Text(
        array(rows, words, 32),
        array(rows, words, dtype=jnp.int32),
        array(rows, 1, 32),
    )
    params = sharding.unbox(abstract_weights(cfg))

    def step(params, tokens, time, text):
        return DiT(cfg).apply({"params": params}, tokens, time, text)

    said = compiled(step, params, video, array(rows, 1), text)
    found = memory.dit_working(cfg, rows, tokens, words)
    assert 1 / 2 < found / said < 1.5  # compilers for CPUs keep more


@pytest.mark.slow
def test_decoding_holds_about_what_the_compiler_for_this_machine_says():
    cells = array(1, 2, 8, 8, 4)
    decode = partial(vae.decode, SMALL_VAE)
    _, past = jax.eval_shape(decode, small_vae(), cells)
    said = compiled(decode, small_vae(), cells, past)
    found = memory.decoder_working(SMALL_VAE, (1, 2, 8, 8))
    assert 1 / 2 < found / said < 2


def test_the_past_is_what_the_decoder_keeps():
    sides = 5, 7
    decode = partial(vae.decode, SMALL_VAE)
    _, past = jax.eval_shape(decode, small_vae(), array(1, 3, *sides, 4))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(past))
    assert kept == memory.decoder_past(SMALL_VAE) * sides[0] * sides[1]


def test_twice_the_videos_hold_twice_as_much():
    one, two = (memory.decoder_working(SMALL_VAE, (n, 1, 16, 16)) for n in (1, 2))
    assert two == 2 * one
    one, two = (memory.dit_working(SMALL, rows, 600, 40) for rows in (1, 2))
    assert two == 2 * one
