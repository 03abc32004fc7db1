# SPDX-License-Identifier: Apache-2.0
"""The page itself: Gradio's widgets, and what happens when they are used.

Gradio checks on the server what its widgets allow: the bounds of numbers, the choices
of menus, that files were uploaded. `launch/web/service.py` checks the rest.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np
from gradio.events import Dependency

from launch import moving_shapes
from launch.sample.outputs import Render
from launch.web import service as web
from launch.web.service import VideoService, WebForm
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.presets import default_size
from pyramid_jax.pipeline.request import SEEDS

STEPS = 100  # of a stage
GUIDANCE = 20.0
SEED = SEEDS - 1  # the largest one
# Gradio looks every hour for uploads and copies of results that are a day old.
CACHE = (3600, 24 * 3600)
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
# An event that no other program can call, and that does not wait for videos.
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private"}

Widgets = dict[str, Any]

_slider = partial(gr.Slider, buttons=[])  # without a button that resets it


def page(service: VideoService, examples: bool) -> gr.Blocks:
    """The page: two ways to make a video, the video, and the results so far.

    Args:
        examples: shows what the models know that ship with the package.

    Raises:
        ValueError: the model makes no videos.
    """
    name = service.model.name or "a model"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    demo = gr.Blocks(title="pyramid_jax", analytics_enabled=False, delete_cache=CACHE)
    with demo:
        devices = devices.removeprefix("1 x ")
        gr.Markdown(f"# pyramid_jax\nVideos of **{name}**, on {devices}.")
        with gr.Row():
            with gr.Column(), gr.Tabs():
                with gr.Tab("Text to video"):
                    text = _form(service, False, examples)
                with gr.Tab("Image to video"):
                    image = _form(service, True, examples)
            with gr.Column():
                video = gr.Video(
                    label="Video",
                    elem_id="made",
                    autoplay=True,
                    loop=True,
                    buttons=["download"],
                )
                recipe = gr.Textbox(label="Made with", lines=7, interactive=False)
        results, fill = _gallery(service, [video, recipe])
        demo.load(fill, outputs=results, **AT_ONCE)
        for widgets, button in (text, image):
            event = _connect(service, widgets, button, [video, recipe])
            event.success(fill, outputs=results, **AT_ONCE)
    return demo


def _form(
    service: VideoService, image: bool, examples: bool
) -> tuple[Widgets, gr.Button]:
    """The widgets of a tab by the names of `WebForm`, and its button."""
    widgets: Widgets = {}
    if image:
        # Without a mode Gradio hands on the file and decodes nothing.
        widgets["image"] = gr.Image(
            label="First frame",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=240,
        )
    widgets["prompt"] = gr.Textbox(label="Prompt", lines=2, max_length=web.PROMPT)
    if examples:
        _examples(widgets, service.uploads)
    narrow: dict[str, Any] = {"scale": 2, "min_width": 100}
    with gr.Row():
        sizes = list(service.sizes())
        size = gr.Dropdown(sizes, label="Height x width", **narrow)
        frames = _frames(service, sizes[0])
        seed = gr.Number(
            -1, label="Seed (-1: any)", precision=0, minimum=-1, maximum=SEED, **narrow
        )
    fit = partial(_frames, service)
    size.change(fit, size, frames, show_progress="hidden", **AT_ONCE)
    widgets |= {"size": size, "frames": frames, "seed": seed}
    with gr.Accordion("Steps, guidance, negative prompt", open=False):
        widgets |= _details(service, image)
    return widgets, gr.Button("Make a video", variant="primary")


def _details(service: VideoService, image: bool) -> Widgets:
    """The widgets that few visitors need."""
    defaults = service.model.defaults
    options = defaults.with_image() if image else defaults
    later = ("video", options.video_steps[0], options.guidance.video, "later")
    first = ("first", options.first_steps[0], options.guidance.first, "frame 1")
    widgets: Widgets = {}
    for name, steps, scale, which in [later] if image else [first, later]:
        with gr.Row():
            widgets[f"{name}_steps"] = _slider(
                1, STEPS, steps, step=1, precision=0, label=f"Steps, {which}"
            )
            widgets[f"{name}_guidance"] = _slider(
                0, GUIDANCE, scale, step=0.5, label=f"Guidance, {which}"
            )
    widgets["negative"] = gr.Textbox(
        label="Negative prompt (empty: that of the model)", max_length=web.PROMPT
    )
    return widgets


def _frames(service: VideoService, size: str) -> gr.Slider:
    """The slider with the lengths that the model can make in a size."""
    preset, model = service.sizes()[size], service.model
    sides, stride = (preset.height, preset.width), model.cfg.latent.temporal
    return _slider(
        1 + stride,
        preset.frames,
        default_size(model.cfg, model.defaults, *sides).frames,
        step=stride,
        precision=0,
        label=f"Frames ({preset.fps:g}/s)",
        scale=3,
        min_width=100,
    )


def _examples(widgets: Widgets, folder: Path) -> None:
    """Examples to click on: prompts of the embedded data, with drawn first frames."""
    rows: list[list[str]] = [[prompt] for prompt in PROMPTS]
    inputs = [widgets["prompt"]]
    if "image" in widgets:
        rows = [[str(_first_frame(folder, prompt)), prompt] for prompt in FIRST_FRAMES]
        inputs = [widgets["image"], widgets["prompt"]]
    gr.Examples(rows, inputs, label="Examples", api_visibility="private")


def _first_frame(folder: Path, prompt: str) -> Path:
    """An image file with the first frame that a prompt asks for."""
    caption, rng = moving_shapes.parse(prompt), np.random.default_rng(0)
    path = folder / f"{prompt.replace(' ', '_')}.png"
    write_picture(path, moving_shapes.render(caption, rng)[0])
    return path


def _connect(
    service: VideoService, widgets: Widgets, button: gr.Button, outputs: list[Any]
) -> Dependency:
    """Makes a video when the button is pressed, one at a time."""
    bar = gr.Progress()

    def make(values: dict[Any, Any], progress: gr.Progress = bar) -> tuple[str, str]:
        def show(step: Progress) -> None:
            progress(step.done, desc=str(step))

        form = {name: values[widget] for name, widget in widgets.items()}
        progress(0, desc="reading the prompt")
        if form.get("image", "") is None:
            raise _message("there is no first frame; upload an image")
        try:
            render = service.make(WebForm(**form), show)
        except (ValueError, FloatingPointError) as error:
            raise _message(str(error)) from error
        return _shown(outputs[0], render)

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
    service: VideoService, outputs: list[Any]
) -> tuple[list[Any], Callable[[], list[Any]]]:
    """Results so far, shown when they are selected; the function that lists them."""
    renders = gr.State([])
    gallery = gr.Gallery(
        label="Earlier results",
        elem_id="results",
        format="png",
        columns=6,
        height="auto",
        allow_preview=False,
        fit_columns=False,
        visible=False,
        buttons=[],
    )

    def fill() -> list[Any]:
        results = service.results()
        stills = [(web.still(render), render.recipe.prompt) for render in results]
        return [results, gr.Gallery(stills, visible=bool(stills))]

    def show(event: gr.SelectData, results: list[Render]) -> tuple[str, str]:
        render = results[event.index]
        if not render.path.is_file():
            raise _message("this result is gone; reload the page")
        return _shown(outputs[0], render)

    gallery.select(show, renders, outputs, **AT_ONCE)
    return [renders, gallery], fill


def _shown(video: gr.Video, render: Render) -> tuple[str, str]:
    """What the page shows of a result: its file, and the text that says what made it.

    The file is a copy among the uploads, as Gradio serves no other folder.
    """
    copy = video.move_resource_to_block_cache(render.path)
    return str(copy), web.recipe_text(render)


def _message(text: str) -> gr.Error:
    """An error that the page shows, and the log does not."""
    return gr.Error(text, print_exception=False)
