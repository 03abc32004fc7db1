# SPDX-License-Identifier: Apache-2.0
"""Pictures, GIF animations and contact sheets as files, some with a comment inside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pyramid_jax.data.video_io import HeightWidth

_COMMENT = "Comment"  # the keyword that the PNG standard has for it


def read_picture(path: str | Path, size: HeightWidth) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as pixels of a size, see `fit_picture`.

    Raises:
        ValueError: no such file, or no picture.
    """
    with _opened(path) as image:
        return fit_picture(image, size)


def fit_picture(
    image: Image.Image | UInt8[np.ndarray, "_ _ 3"], size: HeightWidth
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture scaled with a Lanczos filter until it covers `size`, and cropped.

    It is cropped on both sides alike. Transparent parts become white, photographs
    upright. An array that has the size already is returned as it is.

    Args:
        image: a PIL image or pixels.
        size: height and width in pixels.

    Source: the image-to-video page of the original's demo.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == size:
            return image
        image = Image.fromarray(image)
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        opaque = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(opaque, upright.convert("RGBA"))
    rgb, (height, width) = upright.convert("RGB"), size
    fitted = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def write_picture(
    path: str | Path, picture: UInt8[np.ndarray, "h w 3"], comment: str = ""
) -> None:
    """Writes a PNG file; `read_picture_comment` reads the comment again."""
    texts = PngInfo()
    texts.add_itxt(_COMMENT, comment)
    Image.fromarray(picture).save(path, format="PNG", pnginfo=texts)


def write_gif(
    path: str | Path, video: UInt8[np.ndarray, "f h w 3"], fps: float, comment: str = ""
) -> None:
    """Writes a GIF animation that repeats for ever, every frame with its own palette.

    GIF counts hundredths of a second: frames differ by one, so that the rate is right.

    Raises:
        ValueError: no frame, or a rate that a GIF cannot have.
    """
    ends = np.rint(100 / fps * np.arange(len(video) + 1)) * 10
    if not len(video) or fps > 50:
        raise ValueError(
            f"{len(video)} frames at {fps:g} frames per second: a GIF has one frame or "
            "more, at 50 frames per second or less; write an mp4 file"
        )
    first, *others = (Image.fromarray(frame) for frame in video)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=np.diff(ends).astype(int).tolist(),
        loop=0,
        comment=comment.encode(),
    )


def read_picture_comment(path: str | Path) -> str:
    """The comment in a PNG or GIF file, "" if it has none.

    Raises:
        ValueError: no such file, or no picture.
    """
    with _opened(path) as image:
        image.load()  # PNG may have text behind the pixels
        text = image.info.get(_COMMENT, image.info.get("comment", ""))
        return text.decode() if isinstance(text, bytes) else str(text)


def write_contact_sheet(
    path: str | Path,
    videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
    captions: Sequence[str],
    columns: int = 8,
) -> Path:
    """Writes a PNG with up to `columns` frames of every video and the captions below.

    Raises:
        ValueError: no video, or not one caption for each.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; give one for each"
        )
    count = min(columns, max(len(video) for video in videos))
    height, width = videos[0].shape[1:3]
    tall = 1.25 * height / width + 0.3
    figure = Figure(figsize=(1.25 * count, tall * len(videos)), dpi=120)
    axes = figure.subplots(len(videos), count, squeeze=False)
    for row, video, caption in zip(axes, videos, captions, strict=True):
        places = np.linspace(0, len(video) - 1, min(count, len(video))).round()
        for axis in row:
            axis.axis("off")
        for axis, frame in zip(row, video[places.astype(int)], strict=False):
            axis.imshow(frame, interpolation="nearest")
        row[0].text(
            0, 1.04, caption, transform=row[0].transAxes, fontsize=9, va="bottom"
        )
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, wspace=0.03, hspace=0.25)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An open image; errors while it is read name the file and the cure."""
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:  # Pillow's own are of this kind
        raise ValueError(
            f"{path} cannot be read as an image ({error}); give the path of a whole "
            "png, jpg or webp file"
        ) from error
