# SPDX-License-Identifier: Apache-2.0
"""What README and docs tell users to type works.

Python blocks of README and of docs/sample.md run; of those of other documents the
imports do. Every command is parsed by the program that it names, flags and configs
included. README's run in tests/house/test_readme.py, and of those of docs/sample.md and
docs/own_models.md the short ones here.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.house.documents import (
    CONVERTED,
    DOCUMENTS,
    OWN_MODELS,
    PYTHON,
    README,
    SAMPLE,
    TRAINED,
    blocks,
    commands,
    program,
    run,
    words,
)
from tests.house.sources import ROOT

MAKEFILE = ROOT / "Makefile"
# Commands that take a minute or two.
SHORT = (
    *("pyramid-jax sample --prompts=", "cat ", "pyramid-jax prepare --embedded"),
    "pyramid-jax train --config=tiny:smoke",
)
OTHERS = ("cat", "pip", ".venv/bin/pre-commit")  # which are not ours

# Reads commands as lists of words; writes, for each, the flags that its program knows,
# or what the program has against it. Programs end when they have parsed their flags.
PARSER = """
import argparse, importlib, json, os, pkgutil, runpy, sys
from absl import app, flags
import pyramid_jax

class Parsed(BaseException): pass

def run(main, *_, **__):
    rest = flags.FLAGS(sys.argv)[1:]
    if rest: raise ValueError(f"unknown arguments {rest}")
    raise Parsed(list(flags.FLAGS))

parse = argparse.ArgumentParser.parse_args

def parse_args(parser, arguments=None, *_):
    parse(parser, sys.argv[1:] if arguments is None else arguments)
    raise Parsed([name.strip("-") for name in parser._option_string_actions])

for module in pkgutil.walk_packages(pyramid_jax.__path__, "pyramid_jax."):
    importlib.import_module(module.name)  # once, for all children
app.run, argparse.ArgumentParser.parse_args = run, parse_args
for command in json.load(sys.stdin):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    answer = {"error": "it did not parse its flags", "flags": []}
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=False)
    except Parsed as parsed:
        answer = {"error": "", "flags": parsed.args[0]}
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    os.write(1, (json.dumps(answer) + "\\n").encode())
    os._exit(0)
"""

WRONG = {
    ("launch.sing",),
    ("launch.sample", "--promt=la"),
    ("launch.sample", "--seed=one"),
    ("launch.demo", "runs/demo"),
    ("launch.parity", "--casses", "tests/golden"),
    ("launch.train", "--config=tiny", "--config.data.bach=2"),
    ("launch.train", "--config=tinny"),
}


class Answer(NamedTuple):
    """What a program says of a command."""

    error: str
    flags: list[str]


Answers = Mapping[tuple[str, ...], Answer]


def recipes() -> list[str]:
    """What the targets of the Makefile run in the environment."""
    text = MAKEFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"\$\((?!RUN)\w+\)", "1", text)
    pattern = r"^\t\$\(RUN\) (-m (?:launch|benchmarks)\..*)"
    return [f"python {line}" for line in re.findall(pattern, text, re.MULTILINE)]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What its program says of every command of every document, and of wrong ones."""
    lines = [words(c) for document in DOCUMENTS for c in commands(document)]
    lines += [words(command) for command in recipes()]
    every = sorted({*map(tuple, lines), *WRONG} - {()})
    process = subprocess.run(
        [sys.executable, "-c", PARSER],
        input=json.dumps(every),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    texts = process.stdout.splitlines()
    assert len(texts) == len(every), process.stderr
    return {c: Answer(**json.loads(x)) for c, x in zip(every, texts, strict=True)}


def short(lines: list[str], beginnings: tuple[str, ...]) -> list[str]:
    """The commands that begin like this and need nothing that is not here."""
    lines = [line for line in lines if CONVERTED not in line]
    return [line for line in lines if line.startswith(beginnings)]


def run_python(document: Path) -> dict[str, Any]:
    """Runs the Python blocks of a document; returns the names that they define."""
    texts = [block.text for block in blocks(document) if block.language == "python"]
    texts = [text for text in texts if CONVERTED not in text and TRAINED not in text]
    assert texts
    namespace: dict[str, Any] = {}
    for text in texts:
        exec(compile(text, str(document), "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_python_in_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_python(README)


@pytest.mark.slow
def test_the_sampler_alone_makes_what_the_pipeline_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The program in docs/sample.md, as it stands there."""
    monkeypatch.chdir(tmp_path)
    names = run_python(SAMPLE)
    videos = names["pipeline"].latents(names["texts"][1], num_frames=5, seed=1)
    np.testing.assert_allclose(names["latents"], videos, atol=2e-4)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_python_in_documents_imports_what_exists(document: Path):
    for block in blocks(document):
        if block.language == "python":
            tree = ast.parse(block.text, str(document))
            tree.body = [
                n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)
            ]
            exec(compile(tree, str(document), "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_in_documents_are_understood(document: Path, answers: Answers):
    makefile = MAKEFILE.read_text(encoding="utf-8")
    complaints = []
    for command in commands(document):
        first, *rest = command.split()
        if program(command):
            error = answers[tuple(words(command))].error
        elif first == "make":
            is_target = re.search(rf"^{rest[0]}:", makefile, re.MULTILINE)
            error = "" if is_target else "no such target"
        else:
            error = "" if first in OTHERS else "what is it?"
        if error:
            complaints.append(f"{command}: {error}")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_flags_in_documents_exist(document: Path, answers: Answers):
    """Also flags that a sentence or a comment names."""
    flags = {flag for answer in answers.values() for flag in answer.flags}
    flags |= {f"no{flag}" for flag in flags}
    text = PYTHON.sub("", document.read_text(encoding="utf-8"))
    assert set(re.findall(r"(?<![\w-])--([\w-]*\w)", text)) <= flags


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_extras_in_documents_exist(document: Path):
    """pip only warns of those that do not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = document.read_text(encoding="utf-8")
    named = ",".join(re.findall(r"(?:\.|pyramid_jax)\[([a-z,]+)\]", text))
    extras = project["project"]["optional-dependencies"]
    assert {*named.split(",")} <= {*extras, ""}


def test_commands_in_the_makefile_are_understood(answers: Answers):
    assert recipes()
    assert not "".join(answers[tuple(words(command))].error for command in recipes())


def test_wrong_commands_are_seen(answers: Answers):
    assert all(answers[command].error for command in WRONG)


@pytest.mark.slow
def test_commands_that_take_a_minute_run(tmp_path: Path):
    lines = short([*commands(SAMPLE), *commands(OWN_MODELS)], SHORT)
    assert any("train" in line for line in lines)
    run(lines, tmp_path)
