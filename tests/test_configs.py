# SPDX-License-Identifier: Apache-2.0
"""Every config builds at full size and takes a training step as `:smoke`."""

import dataclasses
import importlib
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import ablations, base, clean_history
from launch.config_flag import names as config_names
from launch.moving_shapes import Settings, write_dataset
from pyramid_jax import objective, sharding
from pyramid_jax.data.examples import latent_loader
from pyramid_jax.data.loader import batches, longest
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.model import initialise, model_config, model_section, training_loss
from pyramid_jax.train import data_config

# What is no config of a model of its own.
EXTRA = {"__init__", "base", "student", "clean_history", "lora"}
EXTRA |= {"vae", "pairs_vae"}
CONFIGS = sorted(
    path.stem
    for path in (Path(base.__file__).parent).glob("*.py")
    if path.stem not in EXTRA
)
SIZES = ("image", "384p", "768p")  # the paper's stages
PYRAMID = model_config(ablations.get_config("pyramid").model.to_dict())
RELEASED_PARAMETERS = {"mmdit": 2_028_334_144, "miniflux": 1_972_059_200}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A handful of real clips."""
    folder = tmp_path_factory.mktemp("clips")
    return str(write_dataset(folder / "shapes", 12, seed=3, settings=Settings()))


def build(name: str, mode: str):
    return importlib.import_module(f"configs.{name}").get_config(mode)


def test_all_configs_are_found():
    stages = {f"{name}_{size}" for name in ("flux", "mmdit") for size in SIZES}
    assert {"tiny", *stages} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_full_model_has_the_released_size(name: str):
    cfg = build(name, "full")
    model = model_config(cfg.model.to_dict())
    shapes = jax.eval_shape(partial(initialise, model), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes)["dit"]))
    if name.startswith(("tiny", "pairs", "ablations")):
        assert count < 5e6  # 10 MB in float16
    else:
        assert count == RELEASED_PARAMETERS[cfg.model.variant]


@pytest.mark.parametrize("name", config_names())
def test_every_config_names_a_machine(name: str):
    cfg = importlib.import_module(f"configs.{name}").get_config()
    assert re.fullmatch(r"cpu|(a100|h200)x\d+|v\d[ep]:\d+(x\d+)+", cfg.machine)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_segment_fits_a_row_of_the_full_config(name: str):
    cfg = build(name, "full")
    model = model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    assert 0 < longest(data).tokens <= data.tokens


# Their smoke versions are about those of other configs.
ALIKE = {"ablations", "flux_768p", "flux_image", "mmdit_768p", "mmdit_image"}
STEPPED = [
    pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ())
    for name in CONFIGS
    if name != "tiny"  # which tests/test_train.py trains
]


@pytest.mark.parametrize("name", STEPPED)
def test_a_smoke_step_is_finite_and_moves_the_weights(
    name: str, manifest: str, tmp_path: Path
):
    cfg = build(name, "smoke")
    model = model_config(cfg.model.to_dict())
    cfg.data.update(manifest=manifest, batch=2)
    data = data_config(cfg, model)
    rows = next(batches(data, load_tokenizer(model.tokenizer), tmp_path))

    init = jax.jit(partial(initialise, model))
    params = sharding.unbox(init(jax.random.key(0)))
    step = jax.jit(jax.value_and_grad(partial(training_loss, model), has_aux=True))
    (value, aux), gradient = step(params, rows, jax.random.key(1))

    assert isinstance(aux, objective.Losses)
    assert np.isfinite(value) and 0.05 < value < 5
    head = gradient["dit"]["head"]["kernel"]
    assert np.isfinite(head).all() and np.abs(head).max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_mode_is_refused(name: str):
    with pytest.raises(ValueError, match="unknown mode 'fast'; use 'full' or 'smoke'"):
        build(name, "fast")


@pytest.mark.parametrize("name", ["pairs", "mmdit_768p", "smoke"])
def test_any_model_is_tuned_to_a_clean_history(name: str):
    """Which its config alone does not have, so that runs begun without it go on."""
    tuned = clean_history.get_config(name)
    module, mode = ("tiny", "smoke") if name == "smoke" else (name, "full")
    plain = build(module, mode)
    assert "clean_history" not in plain.model.dit
    dit = model_config(plain.model.to_dict()).dit
    expected = dataclasses.replace(dit, clean_history=True)
    assert model_config(tuned.model.to_dict()).dit == expected
    assert tuned.data == plain.data
    with pytest.raises(ValueError, match="no config 'nothing' of a model"):
        clean_history.get_config("nothing")


def test_a_misspelt_key_is_refused():
    with pytest.raises((KeyError, AttributeError), match="widht"):
        build("tiny", "full").model.dit.widht = 3


def test_an_unknown_variant_is_refused():
    section = build("tiny", "smoke").model.to_dict() | {"variant": "unet"}
    with pytest.raises(ValueError, match=r"unknown variant 'unet'; use one of \['mini"):
        model_config(section)


def test_an_unknown_entry_is_refused():
    section = build("tiny", "smoke").model.to_dict()
    section["latent"]["chanels"] = 4
    with pytest.raises(ValueError, match=r"LatentConfig has no \['chanels'\]"):
        model_config(section)


def test_patch_values_must_fit_patch_and_channels():
    section = build("tiny", "full").model.to_dict()
    section["layout"]["patch"] = 2
    with pytest.raises(
        ValueError, match=r"patch_values 48 must be 12 = 2² .patch. x 3"
    ):
        model_config(section)


def test_text_widths_must_agree():
    section = build("tiny", "full").model.to_dict()
    section["text"]["width"] = 64
    with pytest.raises(
        ValueError, match="text width 64 must equal the DiT's text_width"
    ):
        model_config(section)


def test_a_model_is_read_back_from_what_is_saved_of_it():
    model = model_config(build("tiny", "full").model.to_dict())
    assert model_config(model_section(model)) == model


def test_a_latent_model_trains_on_stored_latents(tmp_path: Path):
    cfg = build("mmdit_384p", "full")
    model = model_config(cfg.model.to_dict())
    load = latent_loader(data_config(cfg, model))
    with pytest.raises(ValueError, match=r"no latent .* pyramid-jax prepare --latents"):
        load(Record(tmp_path / "a.mp4", "video", "a"), ((384, 640),))


@pytest.mark.parametrize("arm", ablations.ARMS)
def test_arms_of_the_ablations_fit_their_rows_and_stages(arm: str):
    cfg = build("ablations", arm)
    model = model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    assert 0 < longest(data).tokens <= data.tokens
    steps = cfg.sample.first_steps
    assert len(steps) == len(model.stages) and sum(steps) == ablations.STEPS
    changes = {
        "dit": dataclasses.replace(model.dit, causal=True),
        "layout": dataclasses.replace(model.layout, history="pyramid"),
        **{name: getattr(PYRAMID, name) for name in ("edges", "corrupt")},
    }
    assert dataclasses.replace(model, **changes) == PYRAMID


def test_shares_for_another_number_of_stages_are_refused():
    cfg = build("ablations", "images_2_stages")
    cfg.data.stage_shares = (1, 2, 1)
    model = model_config(cfg.model.to_dict())
    with pytest.raises(ValueError, match=r"stage_shares \(1, 2, 1\) .* the 2 stages"):
        data_config(cfg, model)


def test_whole_sequences_are_given_no_first_frame():
    section = build("ablations", "sequences").model.to_dict()
    with pytest.raises(ValueError, match=r"first_frame_share 0.5, but whole sequences"):
        model_config(section | {"first_frame_share": 0.5})


def test_corruption_is_a_share_of_noise():
    section = build("tiny", "full").model.to_dict() | {"corrupt": 1.5}
    with pytest.raises(ValueError, match=r"corrupt 1.5 must be 0 .clean. to 1"):
        model_config(section)
