# SPDX-License-Identifier: Apache-2.0
"""Stage reflow with teachers whose velocity is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import objective, reflow
from pyramid_jax.guidance import Guidance
from pyramid_jax.reflow import ReflowConfig
from tests.test_objective import REAL, ROWS, STAGES, draws

PATH = objective.stage_path(ROWS, draws(), STAGES)
WAY = PATH.start - PATH.end
CFG = ReflowConfig(steps=3, guidance=Guidance(first=3.0, video=2.0), at_start=0.5)


def exact(tokens, time):
    """The velocity of the data's own paths."""
    return WAY


def two(tokens, time):
    """A velocity of 2, for captions."""
    return jnp.full_like(tokens.values, 2)


def one(tokens, time):
    """A velocity of 1, for the negative caption."""
    return jnp.full_like(tokens.values, 1)


def loss(student, teacher, away, level: float):
    return reflow.reflow_loss(
        student,
        teacher,
        away,
        ROWS,
        draws(level),
        stages=STAGES,
        noise=objective.PAPER_NOISE,
        cfg=CFG,
    )


def test_an_exact_teacher_arrives_where_the_path_ends():
    end = reflow.walk(exact, exact, PATH, ROWS, CFG)
    np.testing.assert_allclose(end[REAL], PATH.end[REAL], atol=1e-5)


def test_guidance_of_first_frames_differs_from_that_of_later_ones():
    end = reflow.walk(two, one, PATH, ROWS, CFG)
    way = np.asarray(PATH.start - end)
    first = ROWS.frame == 0
    assert (REAL & first).any()
    assert (REAL & ~first).any()
    np.testing.assert_allclose(way[REAL & first], 1 + 3.0 * (2 - 1), rtol=1e-5)
    np.testing.assert_allclose(way[REAL & ~first], 1 + 2.0 * (2 - 1), rtol=1e-5)


def test_the_teacher_sees_corrupted_history_and_the_times_of_every_stage():
    seen = []

    def curious(tokens, time):
        jax.debug.callback(lambda *x: seen.append(x), tokens.values, time)
        return WAY

    jax.block_until_ready(reflow.walk(curious, curious, PATH, ROWS, CFG))
    jax.effects_barrier()
    past = (ROWS.segment >= 0) & ~ROWS.current
    assert len(seen) == 2 * CFG.steps
    for values, _ in seen:
        np.testing.assert_array_equal(values[past], PATH.history[past])
    late, early = np.asarray(PATH.late), np.asarray(PATH.early)
    times = sorted({tuple(np.ravel(time).tolist()) for _, time in seen}, reverse=True)
    np.testing.assert_allclose(times[0], np.ravel(late), rtol=1e-6)
    assert len(times) == CFG.steps
    assert (np.array(times[-1]) > np.ravel(early)).all()


@pytest.mark.parametrize("level", [0.0, 0.49, 0.5, 0.99])
def test_a_student_on_the_teachers_way_has_no_loss(level: float):
    def student(tokens, time):
        return jnp.where(
            (ROWS.frame == 0)[..., None], 4.0, jnp.full(tokens.values.shape, 3.0)
        )

    assert float(loss(student, two, one, level).loss) < 1e-9


def test_below_the_share_segments_are_at_their_start():
    times = []

    def student(tokens, time):
        times.append(np.asarray(time))
        return jnp.zeros_like(tokens.values)

    for level in (0.2, 0.5, 0.75):
        loss(student, two, one, level)
    late, early = np.asarray(PATH.late), np.asarray(PATH.early)
    for time, sigma in zip(times, (1.0, 1.0, 0.5), strict=True):
        np.testing.assert_allclose(time, early + sigma * (late - early), rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
    def of_teacher(gain: jax.Array) -> jax.Array:
        def teacher(tokens, time):
            return gain * two(tokens, time)

        def student(tokens, time):
            return jnp.zeros_like(tokens.values)

        return loss(student, teacher, one, 0.1).loss

    assert float(of_teacher(jnp.float32(1))) > 0
    assert float(jax.grad(of_teacher)(jnp.float32(1))) == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps 0 must be 1 or more"),
        ({"at_start": 1.5}, "at_start 1.5 must be 0 to 1"),
        ({"guidance": Guidance(decay=0.1)}, "guidance decays by 0.1 per unit"),
    ],
)
def test_impossible_choices_are_refused(wrong: dict, words: str):
    with pytest.raises(ValueError, match=words):
        ReflowConfig(**wrong)
