# SPDX-License-Identifier: Apache-2.0
"""The flag --config: a config that ships by its name, or a file, and its mode."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

import configs

NO_EXPERIMENTS = ("__init__", "base")


def define_config() -> flags.FlagHolder[Any]:
    """Defines the flag, and those of its entries, such as --config.data.batch."""
    holder = config_flags.DEFINE_config_file(
        "config",
        help_string="The config: the name of one that ships, or a path of a Python "
        f"file, and a mode of it if need be, as in tiny:smoke. Those that ship are "
        f"{', '.join(names())}.",
    )
    flags.FLAGS["config"].parser = ConfigParser("config")
    return holder


class ConfigParser(ConfigFileFlagParser):
    """Makes a config from text such as "tiny", "tiny:smoke" and "mine/large.py"."""

    def parse(self, path: str) -> Any:
        name, colon, mode = path.partition(":")
        get_config = config_function(name)
        try:
            return (get_config(mode) if colon else get_config()).lock()
        except (AttributeError, KeyError) as error:  # which is no mistake in a flag
            raise RuntimeError(f"the config {name} can't be made") from error


def names() -> list[str]:
    """The names of the configs that ship."""
    folder = Path(configs.__file__ or "").parent
    stems = sorted(path.stem for path in folder.glob("*.py"))
    return [stem for stem in stems if stem not in NO_EXPERIMENTS]


def config_function(name: str) -> Any:
    """The function `get_config` of a config that ships, or of a file.

    Raises:
        ValueError: there is none.
    """
    if name in names():
        return importlib.import_module(f"configs.{name}").get_config
    spec = importlib.util.spec_from_file_location("config_file", name)
    if not Path(name).is_file() or spec is None or spec.loader is None:
        raise ValueError(
            f"there is no config {name!r}; give the path of a Python file, or one of "
            f"{', '.join(names())}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{name} has no function get_config; write one")
    return module.get_config
