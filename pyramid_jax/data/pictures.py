# SPDX-License-Identifier: Apache-2.0
"""Pictures, GIF animations and contact sheets as files, some with a comment inside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pyramid_jax.data.pixels import HeightWidth, array_image, over_white

# Of image files, by which a file is known as one before it is opened.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_COMMENT = "Comment"  # the keyword that the PNG standard has for it
_LYING = (5, 6, 7, 8)  # values of EXIF's orientation
# Others are rare, less well kept by Pillow, or start programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")


def read_picture(path: str | Path, size: HeightWidth) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as pixels of a size, see `fit_picture`.

    Raises:
        ValueError: no such file, no picture, or one that is too large.
    """
    with _opened(path) as image:
        return _fitted(image, size)


def picture_size(path: str | Path) -> HeightWidth:
    """Height and width of an image file as it is shown.

    Raises:
        ValueError: no such file, no picture, or one that is too large.
    """
    with _opened(path) as image:
        lying = image.getexif().get(ExifTags.Base.Orientation) in _LYING
        width, height = image.size
        return (width, height) if lying else (height, width)


def fit_picture(image: Any, size: HeightWidth) -> UInt8[np.ndarray, "h w 3"]:
    """An image scaled with a Lanczos filter until it covers `size`, and cropped.

    It is cropped on both sides alike. Transparent parts become white, photographs
    upright.

    Args:
        image: a PIL image, or an array as `pixels.array_image` takes it.
        size: height and width in pixels.

    Raises:
        ValueError: an array of another kind, or an image that can't be read.

    Source: the image-to-video page of the original's demo.
    """
    if not isinstance(image, Image.Image):
        return _fitted(array_image(image), size)
    with _reading("the image"):
        return _fitted(image, size)


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
    from matplotlib.figure import Figure  # slow, and only drawings need it

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


def _fitted(image: Image.Image, size: HeightWidth) -> UInt8[np.ndarray, "h w 3"]:
    rgb, (height, width) = over_white(ImageOps.exif_transpose(image)), size
    fitted = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An open image; errors while it is read name the file and the cure."""
    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        yield image


@contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """Makes a ValueError of all that Pillow raises, which may be anything."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read as an image ({reason}); use a whole png, jpg or "
            "webp file of ordinary size"
        ) from error
