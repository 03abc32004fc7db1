# SPDX-License-Identifier: Apache-2.0
"""The page itself: Gradio's widgets, and what happens when they are used.

Gradio checks some of what visitors send; `launch.web.studio.Studio` checks all of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np
from gradio.events import Dependency

from launch.web import studio as web
from launch.web.studio import Studio, WebForm
from pyramid_jax.data import moving_shapes
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.pipeline import presets
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.presets import Preset

# Uploads and copies of results are looked for every hour, and kept for a day.
KEPT = (3600, 24 * 3600)
PROMPTS = (
    "a red circle moves left",
    "a green star moves up",
    "a cyan ring moves right",
)
FIRST_FRAMES = ("a yellow star moves left", "a magenta square moves down")
STYLE = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#results .grid-wrap { min-height: 0; max-height: 420px; }
#made video, #results img { image-rendering: pixelated; }
"""


def page(studio: Studio, examples: bool) -> gr.Blocks:
    """The page: two ways to make a video, the video, and the results so far.

    Args:
        examples: shows what the models know that ship with the package.

    Raises:
        ValueError: the model makes no videos.
    """
    name = studio.model.name or "a model"
    with gr.Blocks(
        title="pyramid_jax", analytics_enabled=False, delete_cache=KEPT
    ) as demo:
        gr.Markdown(f"# pyramid_jax\nVideos of **{name}**, on {_device()}.")
        with gr.Row():
            with gr.Column(), gr.Tabs():
                with gr.Tab("Text to video"):
                    text = _form(studio, False, examples)
                with gr.Tab("Image to video"):
                    image = _form(studio, True, examples)
            with gr.Column():
                video = gr.Video(
                    label="Video",
                    elem_id="made",
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    buttons=["download"],
                )
                about = gr.Textbox(label="Made with", lines=7, interactive=False)
        listed, fill = _gallery(studio, [video, about])
        demo.load(fill, outputs=listed, queue=False, api_visibility="private")
        for widgets, button in (text, image):
            _connect(studio, widgets, button, [video, about]).success(
                fill, outputs=listed, queue=False, api_visibility="private"
            )
    return demo


def _form(
    studio: Studio, image: bool, examples: bool
) -> tuple[dict[str, Any], gr.Button]:
    """The widgets of a tab by the names of `WebForm`, and its button."""
    widgets: dict[str, Any] = {}
    if image:
        widgets["image"] = gr.Image(
            label="First frame",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=240,
        )
    widgets["prompt"] = gr.Textbox(label="Prompt", lines=2, max_length=web.PROMPT)
    if examples:
        _examples(widgets, studio.uploads)
    sizes = studio.sizes()
    with gr.Row():
        widgets["size"] = gr.Dropdown(
            [preset.name for preset in sizes],
            label="Height x width",
            scale=2,
            min_width=100,
        )
        widgets["frames"] = gr.Slider(**_frames(studio, sizes[0]), buttons=[])
        widgets["seed"] = gr.Number(
            -1, label="Seed (-1: any)", precision=0, scale=2, min_width=100
        )
    widgets["size"].change(
        lambda name: gr.Slider(**_frames(studio, studio.size(name))),
        widgets["size"],
        widgets["frames"],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    with gr.Accordion("Steps, guidance, negative prompt", open=False):
        widgets |= _details(studio, image)
    return widgets, gr.Button("Make a video", variant="primary")


def _details(studio: Studio, image: bool) -> dict[str, Any]:
    """Widgets that few visitors need."""
    made = studio.model.defaults.with_image() if image else studio.model.defaults
    later = ("video", made.video_steps[0], made.guidance.video, "later")
    first = ("first", made.first_steps[0], made.guidance.first, "frame 1")
    widgets: dict[str, Any] = {}
    for name, steps, scale, of in [later] if image else [first, later]:
        with gr.Row():
            widgets[f"{name}_steps"] = gr.Slider(
                1, web.STEPS, steps, step=1, label=f"Steps, {of}", buttons=[]
            )
            widgets[f"{name}_guidance"] = gr.Slider(
                0,
                web.GUIDANCE,
                scale,
                step=0.5,
                label=f"Guidance, {of}",
                buttons=[],
            )
    widgets["negative"] = gr.Textbox(
        label="Negative prompt (empty: that of the model)", max_length=web.PROMPT
    )
    return widgets


def _examples(widgets: dict[str, Any], folder: Path) -> None:
    """What to click on: prompts of the embedded data, with drawn first frames."""
    rows: list[list[Any]] = [[prompt] for prompt in PROMPTS]
    inputs = [widgets["prompt"]]
    if "image" in widgets:
        rows = [[str(_drawn(folder, prompt)), prompt] for prompt in FIRST_FRAMES]
        inputs = [widgets["image"], widgets["prompt"]]
    gr.Examples(rows, inputs, label="Examples", api_visibility="private")


def _drawn(folder: Path, prompt: str) -> Path:
    """An image file with the first frame that a prompt asks for."""
    picture = moving_shapes.render(
        moving_shapes.parse(prompt), np.random.default_rng(0)
    )[0]
    path = folder / f"{prompt.replace(' ', '_')}.png"
    write_picture(path, picture)
    return path


def _connect(
    studio: Studio, widgets: dict[str, Any], button: gr.Button, outputs: list[Any]
) -> Dependency:
    """Makes a video when the button is pressed, one at a time."""
    bar = gr.Progress()

    def make(given: dict[Any, Any], progress: gr.Progress = bar) -> tuple[str, str]:
        def watch(at: Progress) -> None:
            progress(at.done, desc=str(at))

        filled = {name: given[widget] for name, widget in widgets.items()}
        progress(0, desc="reading the prompt")
        with _readable():
            if "image" in filled and filled["image"] is None:
                raise ValueError("there is no first frame; upload an image")
            made = studio.make(WebForm(**filled), watch)
        return str(studio.copy(made)), web.told(made)

    return button.click(
        make,
        set(widgets.values()),
        outputs,
        concurrency_limit=1,
        concurrency_id="sampling",
        show_progress_on=outputs[0],
        api_visibility="private",
    )


def _gallery(
    studio: Studio, outputs: list[Any]
) -> tuple[list[Any], Callable[[], list[Any]]]:
    """Results so far, shown when they are chosen; the function that lists them."""
    names = gr.State([])
    gallery = gr.Gallery(
        label="Earlier results",
        elem_id="results",
        columns=6,
        height="auto",
        allow_preview=False,
        fit_columns=False,
        interactive=False,
        visible=False,
        buttons=[],
    )

    def fill() -> list[Any]:
        found = studio.results()
        shown = [(str(studio.still(result)), result.recipe.prompt) for result in found]
        listed = [result.path.name for result in found]
        return [listed, gr.Gallery(shown, visible=bool(shown))]

    def show(event: gr.SelectData, listed: list[str]) -> tuple[str, str]:
        found = {result.path.name: result for result in studio.results()}
        if (chosen := found.get(listed[event.index])) is None:
            raise gr.Error(
                "this result is gone; reload the page", print_exception=False
            )
        return str(studio.copy(chosen)), web.told(chosen)

    gallery.select(show, names, outputs, queue=False, api_visibility="private")
    return [names, gallery], fill


def _frames(studio: Studio, preset: Preset) -> dict[str, Any]:
    """Of the slider: lengths that the model can make in a size."""
    stride = studio.model.cfg.latent.temporal
    usual = presets.choose(studio.model, (preset.height, preset.width)).frames
    return {
        "minimum": 1 + stride,
        "maximum": preset.frames,
        "step": stride,
        "value": usual,
        "label": f"Frames ({preset.fps:g}/s)",
        "scale": 3,
        "min_width": 100,
    }


def _device() -> str:
    count, kind = len(jax.devices()), jax.devices()[0].device_kind
    return kind if count == 1 else f"{count} x {kind}"


@contextmanager
def _readable() -> Iterator[None]:
    """Errors that visitors can do something about become messages on the page."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise gr.Error(str(error), print_exception=False) from error
