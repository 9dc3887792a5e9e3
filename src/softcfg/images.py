"""Pictures: reading them, and grids with labels of many samples at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from softcfg.errors import UserError, clean
from softcfg.files import open_regular

PAD = 2  # pixels between images
MARGIN = 8
BACKGROUND = "white"
INK = "#222222"


FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 1 << 26  # pixels of a picture
LARGEST_FILE = 1 << 28  # bytes


def read_picture(path: str | Path, largest: int = LARGEST) -> Image.Image:
    """Read a PNG, JPEG or WebP file as an RGB image.

    Args:
        largest: pixels that it may have at most.

    Raises:
        UserError: the file cannot be read, is of another format, too large, partly transparent or has more than 8 bits
            a channel.
    """
    try:
        with open_regular(path, LARGEST_FILE) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > largest:
                raise UserError(f"{path} has {image.width} x {image.height} pixels, more than {largest:,}, the limit")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA"):
                raise UserError(f"{path} has the mode {image.mode}; images must be RGB or grey, 8 bits a channel")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                opaque = image.convert("RGBA")
                if opaque.getchannel("A").getextrema() != (255, 255):
                    raise UserError(f"{path} is partly transparent; put it on a background first")
                return opaque.convert("RGB")
            return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} cannot be read as an image: it is no {', '.join(FORMATS)} file, or damaged") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error.strerror or error}") from error
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise UserError(f"{path} cannot be read as an image: {clean(error, 200)}") from error


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def grid(
    rows: Sequence[Sequence[Image.Image]], *, row_labels: Sequence[str] = (), title: str = "", min_size: int = 64
) -> Image.Image:
    """Put images of one size into rows, with a label in front of each row and a title above.

    Args:
        rows: the images; rows may have different lengths.
        row_labels: one text per row, or none.
        min_size: smaller images are enlarged by a whole factor to at least this side, without smoothing.
    """
    width, height = rows[0][0].size
    factor = -(-min_size // min(width, height))
    width, height = width * factor, height * factor
    size = max(12, height // 5)
    font = ImageFont.load_default(size)
    left = max((round(font.getlength(label)) for label in row_labels), default=-MARGIN) + MARGIN
    top = round(size * 1.6) if title else 0
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
    for r, row in enumerate(rows):
        y = MARGIN + top + r * (height + PAD)
        if row_labels:
            ink.text((MARGIN + left - MARGIN, y + height // 2), row_labels[r], fill=INK, font=font, anchor="rm")
        for c, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (MARGIN + left + c * (width + PAD), y))
    return canvas


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Join panels from left to right, aligned at the bottom."""
    canvas = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), BACKGROUND)
    x = 0
    for panel in panels:
        canvas.paste(panel, (x, canvas.height - panel.height))
        x += panel.width
    return canvas
