# SPDX-License-Identifier: Apache-2.0
"""Small models with the original's exact layout, and one of them converted."""

from pathlib import Path

import pytest

from pyramid_jax.convert.convert import convert_model
from pyramid_jax.convert.source import ReleasedFolder
from tests import original_files


@pytest.fixture(scope="session")
def mmdit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original_files.write(tmp_path_factory.mktemp("mmdit"), "mmdit")


@pytest.fixture(scope="session")
def miniflux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original_files.write(tmp_path_factory.mktemp("miniflux"), "miniflux")


@pytest.fixture(scope="session")
def ours(mmdit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    convert_model(ReleasedFolder(mmdit), folder)
    return folder
