# SPDX-License-Identifier: Apache-2.0
"""The prose of documents keeps to a short vocabulary.

codespell finds misspellings. Here are phrases that sell, that say nothing, or that are
not English, each with what to write instead; names that have one spelling; and words
that stand twice.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.sources import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.py")),
]
# Case matters in names only.
PHRASES = {
    r"allows? to \w+": "lets you, or: can",
    r"(?:blazing|lightning)(?:ly)?[ -]fast": "a number",
    r"cutting[ -]edge|state[ -]of[ -]the[ -]art|world[ -]class": "a number",
    r"easily|simply|obviously|of course|effortless(?:ly)?": "nothing",
    r"in order to": "to",
    r"(?:information|software|training|data)s": "the singular",
    r"it should be noted that|please note that|note that": "nothing",
    r"leverag(?:e|es|ing)|utili[sz](?:e|es|ing)": "use",
    r"powerful|seamless(?:ly)?|robust(?:ly)?|elegant(?:ly)?": "what it does",
    r"respectively|resp\.": "two sentences, or a table",
    r"so[ -]called": "nothing",
    r"the both|both of both": "both",
    r"till": "until",
    r"very|really|quite|extremely": "a number, or nothing",
}
NAMES = {
    r"Mini-?[Ff][Ll][Uu][Xx]|mini-FLUX|miniFlux": "miniFLUX",
    r"Jax|FLAX|Pytorch|pytorch(?!\.org)": "JAX, Flax, PyTorch",
    r"VBENCH|Vbench": "VBench",
    r"Lora\b|LORA\b": "LoRA",
}
_CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|https?:\S+", re.DOTALL)
_COMMENT = re.compile(r"^# ?(.*)$", re.MULTILINE)
_TWICE = re.compile(r"\b([a-z]{2,}) \1\b(?! [a-z]+ \1)")


def prose(path: Path) -> str:
    """The text of a document, or of the cells of a notebook, without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        cells = re.split(r"^# %%", text, flags=re.MULTILINE)
        texts = [cell for cell in cells if cell.startswith(" [markdown]")]
        text = "\n".join(line for each in texts for line in _COMMENT.findall(each))
    return _CODE.sub(" ` ", text)


def complaints(text: str) -> Iterator[str]:
    """What should be said in another way."""
    for table, flags in ((PHRASES, re.IGNORECASE), (NAMES, 0)):
        for pattern, better in table.items():
            for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, flags):
                yield f"{match.group()!r}: write {better}"
    for match in _TWICE.finditer(text):
        yield f"{match.group()!r}: a word twice"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_prose_keeps_to_the_vocabulary(path: Path):
    assert not list(complaints(prose(path)))


def test_bad_prose_is_seen(tmp_path: Path):
    bad = "It allows to to Utilize Jax, very easily."
    assert len(list(complaints(bad))) == 6
    assert not list(complaints("JAX makes it bit for bit, till-ed or not."))
    page = tmp_path / "page.md"
    page.write_text("`very` and [a](very.md)\n```\nvery\n```\n")
    assert not list(complaints(prose(page)))
    notebook = tmp_path / "page.py"
    notebook.write_text("# %% [markdown]\n# very\n\n# %%\n# quite = 1\n")
    assert list(complaints(prose(notebook))) == ["'very': write a number, or nothing"]
