# SPDX-License-Identifier: Apache-2.0
"""What a config trains, by its sections, and the command for it."""

from typing import Any

# The first of these sections that a config has says what is trained.
COMMANDS = {"vae": "train-vae", "teacher": "distill", "lora": "lora", "model": "train"}


def kind(cfg: Any) -> str:
    """The section that says what a config trains, one of `COMMANDS`.

    Raises:
        ValueError: it has none of them.
    """
    for section in COMMANDS:
        if section in cfg:
            return section
    raise ValueError(
        f"the config has none of the sections {', '.join(COMMANDS)}, so that nothing "
        "says what it trains; begin with one of those in configs/"
    )
