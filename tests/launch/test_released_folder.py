# SPDX-License-Identifier: Apache-2.0
"""Released models are found in a folder or on the hub."""

from pathlib import Path

import huggingface_hub
import pytest

from launch.convert import released_folder

VARIANT, VAE = "diffusion_transformer_384p", "causal_video_vae"


def test_a_folder_is_itself(tmp_path: Path):
    assert released_folder(str(tmp_path)) == tmp_path


def test_a_model_that_is_not_here_and_cannot_be_downloaded_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="can't be downloaded") as raised:
        released_folder("rain1011/pyramid-flow-sd3", VARIANT)
    for needed in (VARIANT, VAE, "text_encoder*", "tokenizer*"):
        assert f"{needed}/*" in str(raised.value)
    with pytest.raises(ValueError, match="is no folder, and no name"):
        released_folder("/nowhere")
