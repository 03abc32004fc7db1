# SPDX-License-Identifier: Apache-2.0
"""The sections of a config become frozen dataclasses.

Nothing beyond the functions that train sees a ConfigDict.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def build(cls: type, section: Mapping[str, Any]) -> Any:
    """`cls(**section)` with lists as tuples; a ValueError names unknown entries."""
    return cls(**fields(cls, section))


def fields(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a section as arguments of `cls`, lists as tuples.

    Raises:
        ValueError: entries that `cls` does not have.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(section) - set(names))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {unknown}; it has {names}")
    return {key: _frozen(value) for key, value in dict(section).items()}


def check_entries(
    cfg: Any, fits: Callable[[Any], bool], expected: str, *names: str
) -> None:
    """Raises ValueError for an entry of a dataclass that does not fit."""
    for name in names:
        if not fits(value := getattr(cfg, name)):
            raise ValueError(f"{name} {value!r} must be {expected}")


def asset_path(path: str | Path) -> Path:
    """The path itself, or where a file is that ships with the package.

    Configs name such files as "pyramid_jax/assets/tiny/tokenizer.json", whatever the
    working folder.
    """
    path, package = Path(path), Path(__file__).resolve().parent
    if path.parts[:2] == (package.name, "assets") and not path.exists():
        return package.parent / path
    return path


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value
