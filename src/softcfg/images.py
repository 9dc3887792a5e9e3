"""Pictures: reading and resizing them, and grids with labels of many samples at once."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from softcfg.errors import UserError, clean, quote
from softcfg.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Picture = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor

PAD = 2  # pixels between images
MARGIN = 8
SMALL = 12  # pixels, the type of the labels of columns
MOST_LINES = 3
BACKGROUND = "white"
INK = "#222222"


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST = 1 << 26  # pixels of a picture
LARGEST_FILE = 1 << 28  # bytes
LARGEST_OUTPUT = 4096  # pixels of a side that images are resized to

OPAQUE = ("1", "L", "P", "RGB", "RGBX")  # modes of PIL
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 0x0102, 0x0106  # tags of EXIF and TIFF
BLACK_IS_ZERO = 1
WANTED = "images must be RGB or grey, 8 bits a channel or grey of 16"
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of the orientation


def read_picture(picture: Picture, largest: int = LARGEST, name: str = "the picture") -> Image.Image:
    """Read a picture as an RGB image, whatever it is handed in as.

    It is turned upright as its EXIF orientation says. Grey of 16 bits is scaled to 8. What is transparent anywhere is
    refused, in every mode and format, since nobody says what it would stand on.

    Args:
        picture: the path of a PNG, JPEG, WebP, BMP or TIFF file, or the content of one as bytes; an image of PIL; or an
            array or tensor, uint8 [H, W, 3].
        largest: pixels that it may have at most.
        name: what messages call a picture that has no path.

    Raises:
        UserError: it is none of these, or cannot be read, is too large, has several frames, is transparent somewhere or
            has other channels than RGB or grey.
    """
    if isinstance(picture, (str, os.PathLike)):
        name = os.fsdecode(picture) or "''"
    try:
        if isinstance(picture, (str, os.PathLike)):
            with open_regular(picture, LARGEST_FILE) as file:
                return _read(file, largest, name)
        if isinstance(picture, (bytes, bytearray, memoryview)):
            return _read(io.BytesIO(picture), largest, name)
        if isinstance(picture, Image.Image):
            return _as_rgb(picture, largest, name)
        return Image.fromarray(_pixels(picture, largest, name))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read as an image: it is no {', '.join(FORMATS)} file, or damaged") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read as an image: {error.strerror or error}") from error
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise UserError(f"{name} cannot be read as an image: {clean(error, 200)}") from error


def is_picture(path: str | Path) -> bool:
    """Whether there is a picture that `read_picture` reads: not if the file is missing or torn."""
    try:
        read_picture(path)
    except UserError:
        return False
    return True


def _read(file: Any, largest: int, name: str) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        _check_size(image, largest, name)
        if image.format in FORMATS and _has_frames(
            image
        ):  # a photo with a depth map beside it is "MPO", a kind of JPEG
            raise UserError(f"{name} has several frames; give one picture")
        return _as_rgb(image, largest, name)


def _as_rgb(image: Image.Image, largest: int, name: str) -> Image.Image:
    """The image upright, as RGB."""
    _check_size(image, largest, name)
    bits = _bits(image)
    image.load()  # before its orientation is asked for: some formats are turned here
    orientation = _orientation(image)
    if image.mode == "L" and bits < 8 and "transparency" in image.info:  # the level as the file has it
        image = image.copy()
        image.info["transparency"] *= 255 // (2**bits - 1)
    if _is_grey16(image):
        levels = np.asarray(image)
        if (clear := image.info.get("transparency")) is not None and (levels == clear).any():
            raise _transparent(name)
        rgb = Image.fromarray(np.rint(levels / 257).astype(np.uint8)).convert("RGB")  # 65535 / 255 = 257
    elif image.mode in (*OPAQUE, *TRANSPARENT) and bits > 8:
        raise UserError(f"{name} has {bits} bits a channel; {WANTED}")
    elif image.mode in TRANSPARENT or (image.mode in OPAQUE and "transparency" in image.info):
        if image.mode in ("La", "1"):
            image = image.convert("LA" if image.mode == "La" else "L")
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            raise _transparent(name)
        rgb = rgba.convert("RGB")
    elif image.mode in OPAQUE:
        rgb = image.convert("RGB")
    else:
        raise UserError(f"{name} has the mode {image.mode}; {WANTED}")
    rgb = rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    rgb.info = {}  # nobody shall turn it again
    return rgb


def _transparent(name: str) -> UserError:
    return UserError(f"{name} is partly transparent; put it on a background first")


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the PNG or TIFF file of an image that is not loaded yet, up to 16; 8 of any other."""
    if image.format == "TIFF":
        return int(max(getattr(image, "tag_v2", {}).get(BITS, (8,))))
    tiles: Any = getattr(image, "tile", None)
    found = re.search(r";(\d+)", str(tiles[0][3])) if tiles and image.format == "PNG" else None  # such as "RGB;16B"
    return int(found[1]) if found else 8


def _is_grey16(image: Image.Image) -> bool:
    """Whether its levels are 0 (black) to 65535."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, where the same mode is 12 bits or white at 0
    if tags.get(BITS, (16,)) != (16,) or tags.get(PHOTOMETRIC, BLACK_IS_ZERO) != BLACK_IS_ZERO:
        return False
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # "I" in PIL before 11


def _orientation(image: Image.Image) -> int:
    """How the image is to be turned, as EXIF counts; 1, not at all, where its EXIF cannot be read."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _has_frames(image: Image.Image) -> bool:
    try:
        image.seek(1)  # one step: there may be millions
    except EOFError:
        return False
    return True


def _check_size(image: Image.Image, largest: int, name: str) -> None:
    if not image.width * image.height:
        raise UserError(f"{name} has no pixels")
    if image.width * image.height > largest:
        raise UserError(f"{name} has {image.width} x {image.height} pixels, more than {largest:,}, the limit")


def _pixels(values: Any, largest: int, name: str) -> NDArray[np.uint8]:
    """An array or tensor as an array, uint8 [H, W, 3]."""
    wanted = "a path, an image of PIL, the bytes of a file, or an array uint8 [H, W, 3]"
    if not hasattr(values, "__array__"):
        raise UserError(f"{name} must be {wanted}, got {clean(quote(values), 100)}")
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(f"{name} must be {wanted}, got {array.dtype} {list(array.shape)}")
    if array.shape[0] * array.shape[1] > largest:
        raise UserError(f"{name} has {array.shape[1]} x {array.shape[0]} pixels, more than {largest:,}, the limit")
    return np.ascontiguousarray(array)


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize images [B, 3, H, W] to `size` x `size` pixels as LlamaGen's released evaluation does.

    Bicubic with the coefficient -0.75, centres of pixels at halves, no antialiasing: `torch.nn.functional.interpolate`.
    Values may go beyond those of the images. Images of that size stay as they are.
    """
    import torch.nn.functional as F

    return pixels if pixels.shape[2:] == (size, size) else F.interpolate(pixels, (size, size), mode="bicubic")


def checked_size(size: Any) -> int:
    """Return a side that images can be resized to, in pixels; raises `UserError` for anything else."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_OUTPUT:
        raise UserError(f"image_size_eval must be a whole number from 1 to {LARGEST_OUTPUT}, got {quote(size)}")
    return size


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    min_size: int = 64,
) -> Image.Image:
    """Put images of one size into rows, with a label in front of each row, and a title and labels of columns above.

    Args:
        rows: the images; rows may have different lengths.
        row_labels: one text per row, or none.
        column_labels: one text per column, or none; broken into lines, and cut after `MOST_LINES`.
        min_size: smaller images are enlarged by a whole factor to at least this side, without smoothing.
    """
    width, height = rows[0][0].size
    factor = -(-min_size // min(width, height))
    width, height = width * factor, height * factor
    size = max(12, height // 5)
    font = ImageFont.load_default(size)
    left = max((round(font.getlength(label)) for label in row_labels), default=-MARGIN) + MARGIN
    small = ImageFont.load_default(SMALL)
    headings = [_wrapped(text, width - MARGIN, small) for text in column_labels]
    title_height = round(size * 1.6) if title else 0
    top = title_height + round(SMALL * 1.4) * max((heading.count("\n") + 1 for heading in headings), default=0)
    columns = max(len(row) for row in rows)
    across = max(columns * (width + PAD) - PAD, round(font.getlength(title)))
    canvas = Image.new(
        "RGB",
        (2 * MARGIN + left + across, 2 * MARGIN + top + len(rows) * (height + PAD) - PAD),
        BACKGROUND,
    )
    ink = ImageDraw.Draw(canvas)
    if title:
        ink.text((MARGIN + left, MARGIN), title, fill=INK, font=font)
    for c, heading in enumerate(headings):
        x = MARGIN + left + c * (width + PAD) + width // 2
        ink.text((x, MARGIN + top - PAD), heading, fill=INK, font=small, anchor="md", align="center")
    for r, row in enumerate(rows):
        y = MARGIN + top + r * (height + PAD)
        if row_labels:
            ink.text((MARGIN + left - MARGIN, y + height // 2), row_labels[r], fill=INK, font=font, anchor="rm")
        for c, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (MARGIN + left + c * (width + PAD), y))
    return canvas


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in lines of at most `width` pixels where its words allow, at most `MOST_LINES` of them."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        while font.getlength(lines[number]) > width and len(line) > 1:
            line = line[:-1]
            lines[number] = f"{line}…"
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"])


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Join panels from left to right, aligned at the bottom."""
    canvas = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), BACKGROUND)
    x = 0
    for panel in panels:
        canvas.paste(panel, (x, canvas.height - panel.height))
        x += panel.width
    return canvas
