# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of README, and those of the web page.

    python -m docs.pictures
    python -m docs.pictures --only=drawing

`videos` are sampled by the embedded model. `drawing` is the method on a drawn clip,
computed by the functions of pyramid_jax/pyramid.py. `badges` repeat what pyproject.toml
and the results say. `page` is the web page in a real browser, for which playwright and
chromium are needed.
"""

import argparse
import base64
import io
import json
import re
import tempfile
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from launch.pairs.scene import scene
from pyramid_jax import pyramid
from pyramid_jax.data.pixels import to_model, to_uint8
from pyramid_jax.pipeline.folder import PAIRS
from pyramid_jax.pipeline.video import load
from tests.page_server import PATIENCE, Server, press, running_browser, served

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
PROMPTS = (
    "a red circle moves sideways while a blue seven goes up and down",
    "a yellow star and a magenta ring both bounce diagonally",
    "a green five moves vertically, a cyan square goes left and right",
    "a cyan cross that bounces off all four walls and a red two that moves sideways",
    "a magenta triangle moves up and down, a yellow circle moves diagonally",
    "there are a blue ring and a green star: the ring goes sideways, the star bounces "
    "vertically",
)
FRAMES = 17
COLUMNS, SCALE, MARGIN, LINES = 3, 3, 8, 3
QUALITY = 80  # of lossy WebP, 0 to 100

STAGES = pyramid.stages()
SCENE, SEED = 4, 0  # of the drawing
SIDES = 40, 80, 160  # of a square of each stage in the drawing
BASE = 214, 452  # the lower edges of its rows
# Of the browser's window for a picture of the page.
WINDOWS = {"web.png": (1280, 900), "web_phone.png": (390, 844)}
INK, GREY, PALE = "#24292f", "#6e7781", "#d0d7de"


# -------------------------------------------------------------------------- the videos


def sheet(videos: Sequence[np.ndarray], captions: Sequence[str]) -> list[Image.Image]:
    """Videos side by side as frames of one picture, each over its caption."""
    frames, height, width = videos[0].shape[:3]
    font = ImageFont.load_default(12)
    cell = SCALE * width + MARGIN, SCALE * height + 15 * LINES + 2 * MARGIN
    rows = -(-len(videos) // COLUMNS)
    blank = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, rows * cell[1]), "white")
    corners = [
        (i % COLUMNS * cell[0] + MARGIN, i // COLUMNS * cell[1] + MARGIN)
        for i in range(len(videos))
    ]
    draw = ImageDraw.Draw(blank)
    for (x, y), text in zip(corners, captions, strict=True):
        below = y + SCALE * height + 3
        draw.multiline_text(
            (x, below), _wrapped(text, font, SCALE * width), INK, font, spacing=2
        )
    pages = [blank.copy() for _ in range(frames)]
    for video, corner in zip(videos, corners, strict=True):
        for page, frame in zip(pages, video, strict=True):
            size = SCALE * width, SCALE * height
            page.paste(
                Image.fromarray(frame).resize(size, Image.Resampling.NEAREST), corner
            )
    return pages


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def write_videos(path: Path, seed: int) -> None:
    """Samples the prompts, and writes an animated WebP file that repeats for ever."""
    output = load(PAIRS)(PROMPTS, num_frames=FRAMES, seed=seed)
    first, *others = sheet(list(output.frames), PROMPTS)
    first.save(
        path,
        save_all=True,
        append_images=others,
        duration=round(1000 / output.fps),
        loop=0,
        quality=QUALITY,
        method=6,
    )


# ------------------------------------------------------------------------- the drawing


def drawing() -> str:
    """The method in SVG: one frame through three stages, then frame after frame."""
    film = np.asarray(to_model(scene(SCENE).film(17)))[::4]
    rng = np.random.default_rng(SEED)
    ways = _climb(film[4], rng)
    parts = [
        '<rect width="920" height="480" rx="8" fill="white"/>',
        _text(24, 30, "One frame: from noise through three resolutions", 16, INK),
        _text(24, 268, "Frame after frame: the older the past, the coarser", 16, INK),
        *_first_row(ways),
        *_second_row(film, ways[-1][0]),
    ]
    head = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 480"'
    font = "-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/>'
        "</marker></defs>"
    )
    return f'<svg {head} font-family="{font}">\n' + "\n".join(
        [marker, *parts, "</svg>\n"]
    )


def _climb(clean: np.ndarray, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """A frame at both ends of every stage, the jumps between them renoised."""
    levels = pyramid.levels(clean, len(STAGES))
    x = rng.standard_normal(levels[0].shape)
    ways = []
    for k, (level, stage) in enumerate(zip(levels, STAGES, strict=True)):
        coarser = pyramid.up(levels[k - 1]) if k else 0 * level
        if k:
            x = pyramid.renoise(x, rng.standard_normal(level.shape), stage.start)
        noise = (x - stage.start * coarser) / (1 - stage.start)
        start, x = pyramid.endpoints(level, coarser, noise, stage.start, stage.end)
        ways.append((start, x))
    return ways


def _first_row(ways: Sequence[tuple[Any, Any]]) -> list[str]:
    parts, x, base = [], 24, BASE[0]
    for k, ends in enumerate(ways):
        side = SIDES[k]
        size = f"{len(ends[0])} × {len(ends[0])}"
        parts.append(_text(x, base + 18, f"stage {k}: {size}", 13, GREY))
        for end, picture in enumerate(ends):
            parts.append(_square(x, base, side, picture))
            x += side
            last = k == len(ways) - 1
            if not (end and last):
                word = "jump" if end else "steps"
                parts += _arrow(x, base - 20, 60, word, dashed=bool(end))
                x += 60
    return parts


def _second_row(film: np.ndarray, noisy: Any) -> list[str]:
    base, x = BASE[1], 24
    parts = []
    for i, k in enumerate((0, 0, 1, 2)):
        level = pyramid.levels(film[i], len(STAGES))[k]
        parts.append(_square(x, base, SIDES[k], level))
        x += SIDES[k] + 8
    words = "past frames, without noise", "the frame being made", "then the next"
    parts.append(_text(24, base + 18, words[0], 13, GREY))
    parts += _arrow(x, base - 20, 60, "seen by")
    parts.append(_square(x + 68, base, SIDES[2], noisy))
    parts.append(_text(x + 68, base + 18, words[1], 13, GREY))
    x += 68 + SIDES[2]
    parts += _arrow(x, base - 20, 60, "")
    side, style = SIDES[2], f'stroke="{PALE}" stroke-width="2" stroke-dasharray="6 5"'
    where = f'x="{x + 68}" y="{base - side}" width="{side}" height="{side}"'
    parts.append(f'<rect {where} fill="none" {style}/>')
    parts.append(_text(x + 68, base + 18, words[2], 13, GREY))
    return parts


def _square(x: int, base: int, side: int, picture: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(to_uint8(np.asarray(picture, np.float32))).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    where = f'x="{x}" y="{base - side}" width="{side}" height="{side}"'
    style = 'style="image-rendering:pixelated"'
    return f'<image {where} {style} href="data:image/png;base64,{data}"/>'


def _arrow(x: int, y: int, width: int, word: str, dashed: bool = False) -> list[str]:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    line = f'<path d="M{x + 8} {y}H{x + width - 8}" stroke="{GREY}" stroke-width="1.5"'
    label = _text(x + width // 2, y - 8, word, 12, GREY, ' text-anchor="middle"')
    return [f'{line} marker-end="url(#tip)"{dash}/>', label]


def _text(x: int, y: int, text: str, size: int, colour: str, more: str = "") -> str:
    about = f'x="{x}" y="{y}" font-size="{size}" fill="{colour}"{more}'
    return f"<text {about}>{escape(text)}</text>"


# -------------------------------------------------------------------------- the badges


def badges() -> dict[str, str]:
    """File names of the badges, and what is in the files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (\d+\.\d+)", "\n".join(project["classifiers"]))
    (jax,) = (need for need in project["dependencies"] if need.startswith("jax>="))
    results = ROOT / "benchmarks" / "results" / "parity.json"
    parity = json.loads(results.read_text())["verdicts"]
    values = {
        "python": f"{versions[0]} to {versions[-1]}",
        "jax": f"{jax.removeprefix('jax>=')} or newer",
        "licence": project["license"],
        "parity": f"{parity['ok']} tensors, {parity['FAIL']} differ",
    }
    return {f"badge_{name}.svg": _badge(name, text) for name, text in values.items()}


def _badge(name: str, value: str) -> str:
    left, right = (round(6.6 * len(text)) + 14 for text in (name, value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" '
        f'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="white">'
        f'<rect width="{left + right}" height="20" rx="3" fill="#1f6feb"/>'
        f'<path d="M3 0H{left}V20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#444c56"/>'
        f'<text x="7" y="14" textLength="{left - 14}">{escape(name)}</text>'
        f'<text x="{left + 7}" y="14" textLength="{right - 14}">{escape(value)}</text>'
        "</svg>\n"
    )


# ------------------------------------------------------------------------ the web page


def write_page() -> None:
    """Photographs the page after a video of every example, wide and on a phone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder) / "results") as server,
        running_browser() as browser,
    ):
        for name, (width, height) in WINDOWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(1e3 * PATIENCE)
            _make_examples(page, server)
            page.screenshot(path=IMAGES / name, full_page=True)
            page.close()


def _make_examples(page: Any, server: Server) -> None:
    from launch.web.page import PROMPTS as EXAMPLES  # and Gradio, which takes seconds

    page.goto(server.url)
    for prompt in EXAMPLES[::-1]:
        page.get_by_label("Prompt", exact=True).first.fill(prompt)
        press(page.get_by_role("button", name="Make a video").first)
        page.wait_for_function(
            "prompt => [...document.querySelectorAll('textarea')].some("
            "area => area.value.startsWith(`prompt: ${prompt}`))",
            arg=prompt,
        )
        page.wait_for_function("document.querySelector('#made video')?.currentTime > 0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Makes the pictures of documents.")
    every = ("videos", "drawing", "badges", "page")
    parser.add_argument("--only", choices=every, help="make one kind")
    parser.add_argument("--seed", type=int, default=1, help="of the first video")
    options = parser.parse_args(arguments)
    if options.only in (None, "badges"):
        for name, text in badges().items():
            (IMAGES / name).write_text(text, encoding="utf-8")
    if options.only in (None, "drawing"):
        (IMAGES / "pyramid.svg").write_text(drawing(), encoding="utf-8")
    if options.only in (None, "videos"):
        write_videos(IMAGES / "videos.webp", options.seed)
    if options.only in (None, "page"):
        write_page()


if __name__ == "__main__":
    main()
