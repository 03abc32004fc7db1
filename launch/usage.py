# SPDX-License-Identifier: Apache-2.0
"""What a command says of its flags: the help, in groups, and one line for a mistake."""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import flags

HELP = {"--help", "-help", "-h", "-?", "--helpshort"}
EVERY = "launch.start"  # the module whose flags all commands have
VALUES = {
    "string": "TEXT",
    "int": "N",
    "float": "X",
    "comma separated list of strings": "A,B",
    "config object": "NAME",
}
_MISSING = re.compile(r"flag --(\w+)=None: Flag .* other than None\.")
_SIMILAR = re.compile(r'mean "(\w+)" instead of "(\w+)"')  # says ml_collections


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong as all commands do."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {message}; see --help")


def parse(name: str, headings: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Parses flags. Ends the process after help, or a mistake.

    Args:
        headings: of groups of flags, each by the name of its first flag.
        arguments: of the process, the first of which is the program.
    """
    if HELP.intersection(arguments):
        print(text(name, sys.modules["__main__"].__doc__ or "", headings))
        sys.exit()
    try:
        rest = flags.FLAGS(arguments)[1:]
        reason = f"unknown arguments {rest}" if rest else _not_finite()
        if not reason:
            return
    except flags.Error as error:
        reason = _MISSING.sub(r"--\1 is missing", str(error))
    except (AttributeError, KeyError) as error:  # a config is asked for its entries
        reason = _no_entry(str(error))
    sys.exit(f"{name}: {' '.join(reason.split())}; see --help")


def text(name: str, description: str, headings: Mapping[str, str]) -> str:
    """The help of a command: what it does, and its own flags in groups."""
    parser = argparse.ArgumentParser(
        usage=f"{name} [--OPTION=VALUE ...]",
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    modules = {n: str(flags.FLAGS.find_module_defining_flag(n)) for n in flags.FLAGS}
    own = [n for n in modules if modules[n] == sys.argv[0] or _is_ours(modules[n])]
    group = parser.add_argument_group("options")
    for each in sorted(own, key=lambda n: modules[n] == EVERY):
        if each in headings:
            group = parser.add_argument_group(headings[each])
        elif modules[each] == EVERY:
            group = parser.add_argument_group("as for every command")
        _add(group, flags.FLAGS[each])
    return parser.format_help().rstrip()


def _not_finite() -> str:
    """Which flag has no finite number, if any: bounds let NaN pass."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            return f"flag --{name}={value}: expected a finite number"
    return ""


def _no_entry(error: str) -> str:
    """What is wrong with an option such as --config.data.bach=2."""
    if match := _SIMILAR.search(error):
        return "the config has no entry {1!r}; did you mean {0!r}?".format(
            *match.groups()
        )
    return f"the config has no such entry: {error}"


def _is_ours(module: str) -> bool:
    return module.startswith(("launch.", "ml_collections."))  # which defines --config


def _add(group: argparse._ArgumentGroup, flag: flags.Flag) -> None:
    """A flag as argparse shows it; what is given is never parsed by it."""
    choices = "|".join(getattr(flag.parser, "enum_values", []))
    help = (flag.help or "").removeprefix(f"<{choices}>: ").replace("%", "%%")
    default = flag.default
    if default is not None and not isinstance(default, bool):
        shown = ",".join(default) if isinstance(default, list) else default
        help += f" Default: {shown}."
    if flag.boolean:
        no = "" if default is False else "[no]"
        group.add_argument(f"--{no}{flag.name}", action="store_true", help=help)
        return
    value = choices or VALUES.get(flag.flag_type(), "VALUE")
    group.add_argument(f"--{flag.name}", metavar=value, help=help)
