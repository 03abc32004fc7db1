# SPDX-License-Identifier: Apache-2.0
"""Flags of the command, and the embedded model, which is loaded once."""

from collections.abc import Callable

import pytest
from absl import flags

from launch.evaluate import __main__
from pyramid_jax.pipeline.folder import PAIRS
from pyramid_jax.pipeline.video import VideoPipeline, load

Given = Callable[..., flags.FlagValues]


@pytest.fixture(scope="session")
def model() -> VideoPipeline:
    return load(PAIRS)


@pytest.fixture
def given() -> Given:
    """Makes the flags of a command line."""

    def parsed(*arguments: str) -> flags.FlagValues:
        values = flags.FlagValues()
        __main__.define(values)
        values(["evaluate", *arguments])
        return values

    return parsed
