# SPDX-License-Identifier: Apache-2.0
"""A folder of videos and images with captions in text files becomes a manifest."""

from pathlib import Path

from pyramid_jax.data.manifest import Kind, Record, text_lines, write_manifest
from pyramid_jax.data.pictures import SUFFIXES

CAPTION = ".txt"
BESIDE = (CAPTION, ".json", ".jsonl")  # what is no video or image
NAMED = 5  # of the files in a message


def list_folder(source: str | Path, folder: str | Path) -> Path:
    """Writes the manifest of the videos and images in `source`; returns its path.

    Hidden files are left out. Lines of a caption are joined.

    Raises:
        ValueError: no such folder or nothing in it, or files without a caption.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give one with videos and captions")
    files = [path for path in sorted(source.rglob("*")) if _counts(path, source)]
    without = [path for path in files if not path.with_suffix(CAPTION).is_file()]
    captions = {
        path: " ".join(" ".join(text_lines(path.with_suffix(CAPTION))).split())
        for path in files
        if path not in without
    }
    without += [path for path, text in captions.items() if not text]
    if without or not files:
        shown = ", ".join(str(path) for path in without[:NAMED])
        what = (
            f"{len(without)} files without a caption: {shown}" if files else "no file"
        )
        raise ValueError(
            f"{source} has {what}; write what waves.mp4 shows into waves{CAPTION}"
        )
    return write_manifest(
        Path(folder) / "manifest.jsonl",
        [Record(path, _kind(path), text) for path, text in captions.items()],
    )


def _counts(path: Path, source: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
    return path.is_file() and not hidden and path.suffix.lower() not in BESIDE


def _kind(path: Path) -> Kind:
    return "image" if path.suffix.lower() in SUFFIXES else "video"
