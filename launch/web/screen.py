# SPDX-License-Identifier: Apache-2.0
"""Where a web page shows one video: how far it is, why there is none, or what it is."""

import base64
import html
from typing import Any

import gradio as gr

from launch.sample.outputs import Render
from launch.web import service as web

STYLE = """
.gradio-container .fillable { max-width: 1140px !important; }
#status { border: 1px dashed var(--border-color-primary); border-radius: 4px; }
#status p { margin: 0; padding: 16px; overflow-wrap: anywhere; }
#status progress { appearance: none; display: block; width: 100%; height: 6px; }
#status progress::-webkit-progress-bar { background: var(--border-color-primary); }
#status progress::-webkit-progress-value { background: var(--color-accent); }
#status progress::-moz-progress-bar { background: var(--color-accent); }
#status .refusal { color: var(--error-text-color); }
#preview img { height: 256px; max-width: 100%; object-fit: contain; }
#made video { max-height: 384px; }
#preview img, #made video, #results img { image-rendering: pixelated; }
#results .grid-wrap { min-height: 0; max-height: 420px; }
#results .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr));
}
"""
EMPTY = "<p>The video will be here.</p>"


class Screen:
    """A status, new frames, a video, what made it, and a button that continues it.

    What says nothing is not seen. Each function returns what its `parts` show from then
    on. `shown` is the file of the video, `watched` names the task that a visitor's page
    follows; both stay on the server.
    """

    def __init__(self):
        self.video = gr.Video(
            label="Video",
            elem_id="made",
            autoplay=True,
            loop=True,
            buttons=["download"],
            visible=False,
        )
        self.preview = gr.HTML(elem_id="preview", padding=False, visible=False)
        self.status = gr.HTML(EMPTY, elem_id="status", padding=False)
        self.recipe = gr.Textbox(
            label="Made with", lines=1, interactive=False, visible=False
        )
        self.prompt = gr.Textbox(
            label="How it goes on (empty: the same prompt)",
            max_length=web.PROMPT,
            visible=False,
        )
        self.button = gr.Button("Continue", visible=False)
        self.shown = gr.State("")
        self.watched = gr.State({})
        self.parts = [self.status, self.preview, self.video, self.recipe]
        self.parts += [self.prompt, self.button, self.shown]

    def empty(self) -> list[Any]:
        """Shows that there is no video yet."""
        return self._words(EMPTY)

    def progress(
        self, step: str, done: float, preview: bytes | None = None
    ) -> list[Any]:
        """Shows how far a video is, in words and as a share of the work.

        Args:
            preview: a WebP file of new frames, or of none; None: the last ones stay.
        """
        bar = f"<progress value={done:.3f}></progress>"
        shown = self._words(f"<p>{bar}{html.escape(step)}</p>")
        shown[1] = gr.skip()
        if preview is not None:
            source = f"data:image/webp;base64,{base64.b64encode(preview).decode()}"
            image = f'<img src="{source}" alt="new frames">'
            shown[1] = gr.HTML(image, visible=bool(preview))
        return shown

    def unchanged(self) -> list[Any]:
        """Shows what is there."""
        return [gr.skip()] * len(self.parts)

    def refusal(self, why: str) -> list[Any]:
        """Shows why there is no video."""
        return self._words(f'<p class="refusal" role="alert">{html.escape(why)}</p>')

    def result(self, render: Render) -> list[Any]:
        """Shows a finished video.

        The file is a copy among the uploads, as Gradio serves no other folder.
        """
        copy = self.video.move_resource_to_block_cache(render.path)
        text = web.recipe_text(render)
        return [
            gr.HTML(visible=False),
            gr.HTML("", visible=False),
            gr.Video(str(copy), visible=True),
            gr.Textbox(text, visible=True),
            gr.Textbox(visible=True),
            gr.Button(visible=True),
            str(render.path),
        ]

    def _words(self, words: str) -> list[Any]:
        return [
            gr.HTML(words, visible=True),
            gr.HTML("", visible=False),
            gr.Video(None, visible=False),
            gr.Textbox("", visible=False),
            gr.Textbox(visible=False),
            gr.Button(visible=False),
            "",
        ]
