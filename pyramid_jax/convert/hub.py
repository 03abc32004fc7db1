# SPDX-License-Identifier: Apache-2.0
"""The folder of a released model: one on this machine, or downloaded from the hub."""

import re
from pathlib import Path

import huggingface_hub

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model
TRANSFORMERS = "diffusion_transformer_*"
NEEDED = ("causal_video_vae", "text_encoder*", "tokenizer*")


def folder(source: str | Path, variant: str | None = None) -> Path:
    """The folder itself, or the files of a model of the hub like "owner/model".

    Args:
        variant: the transformer to download; None: all of them.

    Raises:
        ValueError: there is no such folder, and no such model can be downloaded.
    """
    if (path := Path(source)).is_dir():
        return path
    patterns = [f"{name}/*" for name in (variant or TRANSFORMERS, *NEEDED)]
    if not NAME.fullmatch(str(source)):
        raise ValueError(
            f"{source} is no folder, and no name of a model of the hub (owner/model); "
            "give the folder of a released model, or its name"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(str(source), allow_patterns=patterns)
        )
    except OSError as error:  # of the network, or a refusal of the hub
        raise ValueError(
            f"{source} is no folder here, and can't be downloaded ({error}). Download "
            f"{', '.join(patterns)} of https://huggingface.co/{source} where there is "
            "a network, keep their folders, and give the folder that holds these"
        ) from error
