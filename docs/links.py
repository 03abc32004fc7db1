# SPDX-License-Identifier: Apache-2.0
"""Makes links between files of the repository work on the site, too; a hook of mkdocs.

Documents are written for the repository: their links are paths there. On the site,
README, CONTRIBUTING, CHANGELOG and the notebooks are pages like those of docs/, and any
other file that a document links to is copied.
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(?<=\]\()([^()#:\s]+)(?=[#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and the files that any page links to."""
    for uri, path in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for file in _notebook_files(path, config):
            files.append(file)
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            for file in _copies(_repository_path(page.src_uri, target), config):
                if files.get_file_from_path(file.src_uri) is None:
                    files.append(file)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns paths of the repository into those of the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = _repository_path(here, match.group(1))
        if not (ROOT / path).exists():
            return match.group(1)  # mkdocs complains
        return posixpath.relpath(_site_uri(path), posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _repository_path(uri: str, target: str) -> str:
    """What a link of a page means in the repository."""
    own = uri.startswith(("notebooks/", "files/"))
    page = PAGES.get(uri, uri.removeprefix("files/") if own else f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _site_uri(path: str) -> str:
    """Where a file of the repository is on the site."""
    for uri, original in PAGES.items():
        if path == original:
            return uri
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    return f"files/{path}/index.md" if (ROOT / path).is_dir() else f"files/{path}"


def _copies(path: str, config: MkDocsConfig) -> Iterator[File]:
    """A file of the repository, or those of a folder and a page that lists them."""
    uri = _site_uri(path)
    if not uri.startswith("files/"):
        return
    if (ROOT / path).is_file():
        yield File.generated(config, uri, abs_src_path=str(ROOT / path))
    elif (ROOT / path).is_dir():
        inside = sorted(each for each in (ROOT / path).iterdir() if each.is_file())
        for each in inside:
            yield from _copies(f"{path}/{each.name}", config)
        lines = [f"- [{each.name}]({each.name})" for each in inside]
        text = "\n".join([f"# {path}", "", *lines])
        hidden = InclusionLevel.NOT_IN_NAV
        yield File.generated(config, uri, content=text, inclusion=hidden)


def _notebook_files(path: Path, config: MkDocsConfig) -> Iterator[File]:
    """A notebook as a page, and the pictures that it holds."""
    uri, parts = f"notebooks/{path.stem}.md", []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```" if code else text)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            printed = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                picture = base64.b64decode("".join(data["image/png"]))
                name = f"{path.stem}_{len(parts)}.png"
                parts.append(f"![]({name})")
                yield File.generated(config, f"notebooks/{name}", content=picture)
            elif printed:
                parts.append(f"```text\n{printed.rstrip()}\n```")
    yield File.generated(config, uri, content="\n\n".join(parts))
