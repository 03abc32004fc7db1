# SPDX-License-Identifier: Apache-2.0
"""Shows a web page that makes videos from prompts and images.

    pyramid-jax web
    pyramid-jax web --model=MODEL --to=runs/mine --port=8000

It is for this machine only, unless `--host` says otherwise, and asks no other machine
for anything. It needs the extra `web`: `pip install "pyramid_jax[web]"`.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

from absl import flags

from launch import start
from launch.web.service import VideoService
from launch.web.tasks import TaskQueue
from pyramid_jax.pipeline.folder import DTYPES, PAIRS
from pyramid_jax.pipeline.video import load

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from launch.web import limits
    from launch.web.page import page
    from launch.web.screen import STYLE
except ModuleNotFoundError as error:
    sys.exit(f"pyramid-jax web: {error}; run pip install 'pyramid_jax[web]'")

LOOPBACK = ("127.0.0.1", "localhost")
FOLLOWERS = 1000  # events that may wait; each begins at once


def main(values: flags.FlagValues) -> None:
    host, folder, model = values.host, Path(values.to), Path(values.model)
    if host not in LOOPBACK:
        reach = "everyone who reaches %s can make videos and see all in %s"
        logging.warning(reach, host, folder)
    start.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = start.parse_mesh(values.mesh)
    pipeline = load(model, mesh, values.dtype, offload=values.offload)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        streams = not values.offload
        tasks = TaskQueue(VideoService(pipeline, folder, Path(uploads), streams))
        demo = page(tasks, examples=model.resolve() == PAIRS.resolve())
        url = serve(demo, host, values.port)
        print(f"the page: {url}\nits results: {folder}", flush=True)
        demo.block_thread()
        tasks.close()


def serve(demo: gr.Blocks, host: str, port: int) -> str:
    """Shows a page until the process ends; returns its address.

    Raises:
        ValueError: another program has the port.
    """
    demo.queue(max_size=FOLLOWERS, api_open=False)
    # A browser sends the name it was given: no other site may pose as this one.
    names = [*LOOPBACK] if host in LOOPBACK else ["*"]
    guards = [
        Middleware(TrustedHostMiddleware, names),
        Middleware(limits.RequestLimits),
    ]
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            css=STYLE,
            max_file_size=limits.UPLOAD,
            app_kwargs={"middleware": guards},
        )
    except OSError as error:
        raise ValueError(f"port {port} is taken; give another --port") from error
    return url


if __name__ == "__main__":
    flags.DEFINE_string("model", str(PAIRS), "Folder of the model.")
    flags.DEFINE_string("to", "runs/web", "Folder for results, which the page shows.")
    flags.DEFINE_string("host", LOOPBACK[0], "Address to listen on.")
    flags.DEFINE_integer(
        "port", 7860, "Port to listen on.", lower_bound=1, upper_bound=65535
    )
    flags.DEFINE_enum("dtype", None, DTYPES, "Type of weights; none: as stored.")
    flags.DEFINE_list("mesh", None, "Devices, e.g. fsdp=2,tensor=-1; none: the first.")
    flags.DEFINE_bool("offload", False, "Weights wait in the host's memory.")
    headings = {"model": "files", "host": "address", "dtype": "devices"}
    start.run(main, headings=headings)
