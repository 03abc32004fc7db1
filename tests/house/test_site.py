# SPDX-License-Identifier: Apache-2.0
"""Links of documents lead to the same files on the site, which `make docs` builds."""

import importlib.util
from types import SimpleNamespace

import pytest

from tests.house.sources import ROOT

SPEC = importlib.util.spec_from_file_location("links", ROOT / "docs" / "links.py")
assert SPEC and SPEC.loader
links = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(links)


@pytest.mark.parametrize(
    "page, link, expected",
    [
        ("index.md", "docs/memory.md#compiled-programs", "memory.md#compiled-programs"),
        ("index.md", "docs/images/web.png", "images/web.png"),
        ("index.md", "notebooks/01_the_pyramid.ipynb", "notebooks/01_the_pyramid.md"),
        ("memory.md", "performance.md", "performance.md"),
        ("where_to_begin.md", "../CONTRIBUTING.md", "contributing.md"),
        (
            "vae.md",
            "../benchmarks/results/vae.json",
            "files/benchmarks/results/vae.json",
        ),
        ("vae.md", "../benchmarks/results", "files/benchmarks/results/index.md"),
        ("notebooks/01_the_pyramid.md", "../README.md", "../index.md"),
        ("index.md", "https://arxiv.org/abs/2410.05954", None),
        (
            "index.md",
            "docs/gone.md",
            None,
        ),  # mkdocs complains of what is left as it was
    ],
)
def test_a_link_leads_to_the_same_file(page: str, link: str, expected: str | None):
    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    markdown = links.on_page_markdown(f"[a]({link}).", at, None, None)
    assert markdown == f"[a]({expected or link})."
