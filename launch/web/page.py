# SPDX-License-Identifier: Apache-2.0
"""The page itself: Gradio's widgets, and what happens when they are used.

Gradio checks on the server what its widgets allow: the bounds of numbers, the choices
of menus, that files were uploaded. `launch/web/service.py` checks the rest.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np

from launch.pairs.dataset import pair
from launch.pairs.scene import COLOURS, MOTIONS, SHAPES, Settings
from launch.sample.outputs import Render
from launch.web import service as web
from launch.web.screen import Screen
from launch.web.service import Continuation, VideoService, WebForm
from launch.web.tasks import TaskQueue, VideoTask
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.model import PRESET_NOTES
from pyramid_jax.pipeline.request import SEEDS
from pyramid_jax.pipeline.sizes import default_size

STEPS = 100  # of a stage
GUIDANCE = 20.0
SEED = SEEDS - 1  # the largest one
# Gradio looks every hour for uploads and copies of results that are a day old.
CACHE = (3600, 24 * 3600)
PROMPTS = (
    "a red circle moves sideways while a blue seven goes up and down",
    "a yellow star and a magenta one both bounce diagonally",
    "a cyan square moves vertically and a green ring goes left and right",
)
FIRST_FRAMES = 5, 10  # numbers of held-out scenes
GLANCE = 0.1  # seconds between two looks at a task
PREVIEW = 48  # new frames that are shown at most
# Events that no other program can call: one that does not wait, one that follows tasks.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = PRIVATE | {"queue": False}
FOLLOWING: dict[str, Any] = PRIVATE | {"concurrency_limit": None}

Widgets = dict[str, Any]
Watched = dict[str, VideoTask | None]  # {"task": what the page follows}, or {}

_slider = partial(gr.Slider, buttons=[])  # without a button that resets it


def page(tasks: TaskQueue, examples: bool) -> gr.Blocks:
    """The page: two ways to make a video, the video, and the results so far.

    Args:
        examples: shows what the models know that ship with the package.

    Raises:
        ValueError: the model makes no videos.
    """
    service = tasks.service
    demo = gr.Blocks(title="pyramid_jax", analytics_enabled=False, delete_cache=CACHE)
    with demo:
        gr.Markdown(f"# pyramid_jax\n{_about(service, examples)}")
        visitor = gr.BrowserState("", storage_key="pyramid_jax")
        with gr.Row():
            with gr.Column(), gr.Tabs():
                with gr.Tab("Text to video"):
                    text = _form(service, False, examples)
                with gr.Tab("Image to video"):
                    image = _form(service, True, examples)
            with gr.Column():
                screen = Screen()
        results, fill = _gallery(service, screen)
        demo.load(fill, outputs=results, **AT_ONCE)
        known = demo.load(_name, visitor, visitor, **AT_ONCE)
        returned = known.then(
            partial(_resume, tasks, screen),
            [visitor, screen.watched],
            screen.parts,
            **FOLLOWING,
        )
        returned.then(fill, outputs=results, **AT_ONCE)
        longer = {"prompt": screen.prompt, "video": screen.shown}, screen.button
        for widgets, button in (text, image, longer):
            event = button.click(
                partial(_make, tasks, screen, widgets | {"visitor": visitor}),
                {*widgets.values(), visitor, screen.watched},
                screen.parts,
                **FOLLOWING,
            )
            # Gradio itself refuses what its widgets don't allow.
            event.failure(screen.empty, outputs=screen.parts, **AT_ONCE)
            event.success(fill, outputs=results, **AT_ONCE)
    return demo


def _about(service: VideoService, examples: bool) -> str:
    """What the model can draw, and where it runs."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    device = device.removeprefix("1 x ")
    name = service.model.name or "a model"
    sizes = ", ".join(map(str, service.sizes().values()))
    about = f"Videos of **{name}**, on {device}: {sizes}."
    if examples:
        about += (
            " It draws two objects that move, and nothing else. Name each one's colour "
            f"({_choice(COLOURS)}), what it is ({', '.join(SHAPES)} or a digit), and "
            f"how it moves ({_choice(MOTIONS)})."
        )
    return about


def _choice(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


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
        # It opens the file all the same, and says "Error" of one that is no image.
        widgets["image"].preprocess = _path
    widgets["prompt"] = gr.Textbox(label="Prompt", lines=2, max_length=web.PROMPT)
    if examples:
        _examples(widgets, service.uploads)
    narrow: dict[str, Any] = {"scale": 2, "min_width": 120}
    with gr.Row():
        sizes = list(service.sizes())
        size = gr.Dropdown(sizes, label="Height x width", **narrow)
        seed = gr.Number(
            -1, label="Seed (-1: any)", precision=0, minimum=-1, maximum=SEED, **narrow
        )
        frames = _frames(service, sizes[0])
    fit = partial(_frames, service)
    size.change(fit, size, frames, **AT_ONCE)
    widgets |= {"size": size, "frames": frames, "seed": seed}
    with gr.Accordion("Steps, guidance, negative prompt", open=False):
        widgets |= _details(service, image)
    return widgets, gr.Button("Make a video", variant="primary")


def _path(payload: Any) -> str | None:
    """The path of an uploaded file."""
    return payload and payload.path


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
    notes = [(f"{name}: {note}", name) for name, note in PRESET_NOTES.items()]
    presets = [("the model's", ""), *notes]
    widgets["preset"] = gr.Dropdown(presets, value="", label="Preset of steps")
    widgets["negative"] = gr.Textbox(
        label="Negative prompt (empty: that of the model)", max_length=web.PROMPT
    )
    return widgets


def _frames(service: VideoService, size: str) -> gr.Slider:
    """The slider with the lengths that the model can make in a size."""
    made, model = service.sizes()[size], service.model
    sides, stride = (made.height, made.width), model.cfg.latent.temporal
    return _slider(
        1 + stride,
        made.frames,
        default_size(model.cfg, model.defaults, *sides).frames,
        step=stride,
        precision=0,
        label=f"Frames ({made.fps:g}/s)",
        scale=3,
        min_width=200,
    )


def _examples(widgets: Widgets, folder: Path) -> None:
    """Examples to click on: prompts of the embedded data, with drawn first frames."""
    rows: list[list[str]] = [[prompt] for prompt in PROMPTS]
    inputs = [widgets["prompt"]]
    if "image" in widgets:
        rows = [_first_frame(folder, number) for number in FIRST_FRAMES]
        inputs = [widgets["image"], widgets["prompt"]]
    gr.Examples(rows, inputs, label="Examples", api_visibility="private")


def _first_frame(folder: Path, number: int) -> list[str]:
    """An image file with the first frame of a scene, and the caption of its video."""
    scene = pair(number, split="held out", settings=Settings(frames=1), kind="video")
    path = folder / f"scene_{number}.png"
    write_picture(path, scene.pixels[0])
    return [str(path), scene.text]


async def _make(
    tasks: TaskQueue,
    screen: Screen,
    widgets: Widgets,
    values: dict[Any, Any],
) -> AsyncIterator[list[Any]]:
    """Makes the video that a form asks for, or what continues the one shown."""
    watched = values[screen.watched]
    watched["task"] = None
    yield screen.progress("reading the prompt", 0, b"")
    form = {name: values[widget] for name, widget in widgets.items()}
    visitor = _name(form.pop("visitor"))
    try:
        if form.get("image", "") is None:
            raise ValueError("there is no first frame; upload an image")
        if "video" in form:
            wish = Continuation(Path(form["video"]), form["prompt"])
        else:
            wish = WebForm(**form)
        task = await asyncio.to_thread(tasks.add, wish, visitor)
    except ValueError as error:
        yield screen.refusal(str(error))
        return
    async for shown in _follow(tasks, screen, task, watched):
        yield shown


def _name(visitor: Any) -> str:
    """The visitor's random id: that in his browser, or a new one."""
    known = isinstance(visitor, str) and 0 < len(visitor) <= 64
    return visitor if known else secrets.token_urlsafe()


async def _resume(
    tasks: TaskQueue, screen: Screen, visitor: Any, watched: Watched
) -> AsyncIterator[list[Any]]:
    """Shows a visitor who comes back what became of his last video."""
    task = tasks.latest(_name(visitor))
    if task is None or watched:  # he may have asked for another by now
        yield screen.unchanged()
    else:
        async for shown in _follow(tasks, screen, task, watched):
            yield shown


async def _follow(
    tasks: TaskQueue, screen: Screen, task: VideoTask, watched: Watched
) -> AsyncIterator[list[Any]]:
    """Shows a task until it has ended or another is watched, and then its result."""
    watched["task"], last, seen = task, None, 0
    fps = tasks.service.model.defaults.fps
    while not task.future.done():
        now, new = (tasks.status(task), task.done), task.frames[seen:]
        seen += len(new)
        if new:
            newest = np.concatenate(new)[-PREVIEW:]
            film = await asyncio.to_thread(web.preview, newest, fps)
            yield screen.progress(*now, film)
        elif now != last:
            yield screen.progress(*now)
        last = now
        await asyncio.sleep(GLANCE)
        if watched.get("task") is not task:
            yield screen.unchanged()  # Gradio shows what was yielded last once more
            return
    error = task.error()
    yield screen.refusal(error) if error else screen.result(task.future.result())


def _gallery(
    service: VideoService, screen: Screen
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

    def show(event: gr.SelectData, results: list[Render]) -> list[Any]:
        try:
            return screen.result(service.result(results[event.index].path))
        except ValueError:
            return screen.refusal("this result is gone; reload the page")

    gallery.select(show, renders, screen.parts, **AT_ONCE)
    return [renders, gallery], fill
