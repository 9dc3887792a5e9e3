"""How Emu3-Gen reads prompts, after `image_generation.py` of https://github.com/baaivision/Emu3.

A prompt is: begin of sentence, text, image start, height and width in codes, image token. The negative prompt has the
same form, with the same size.
"""

from __future__ import annotations

import math
import re
import unicodedata

from softcfg.models.text import Piece, Special, TextTokenizer

BEGIN_OF_SENTENCE = Special("<|extra_203|>")
IMAGE_START = Special("<|image start|>")
IMAGE_TOKEN = Special("<|image token|>")
# Names of the other special tokens that an image is made of.
END_OF_LINE = Special("<|extra_200|>")
END_OF_FRAME = Special("<|extra_201|>")
IMAGE_END = Special("<|image end|>")
END_OF_SENTENCE = Special("<|extra_204|>")
FIRST_CODE = Special("<|visual token 000000|>")

# What the released program adds to every prompt, and its negative prompt.
POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

IMAGE_AREA = 720 * 720  # pixels
PIXELS_PER_CODE = 8
LEAST_COLUMNS = 3  # with fewer, the end of a line and the end of the image fall on the same token


def grid_of_ratio(ratio: str, area: int = IMAGE_AREA) -> tuple[int, int]:
    """Return the rows and columns (h, w) of codes of an image whose sides are as WIDTH:HEIGHT, on about `area` pixels.

    Raises:
        ValueError: `ratio` has another form, or the image would be too small.
    """
    match = re.fullmatch(r"(\d+):(\d+)", ratio, re.ASCII)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise ValueError(f"ratio must be WIDTH:HEIGHT, such as 16:9, got {ratio!r}")
    if area < 1:
        raise ValueError(f"the area of an image must be greater than 0 pixels, got {area}")
    unit = math.sqrt(area / (width * height))
    # Halves are rounded to the even number, as released.
    rows, columns = (round(side * unit / PIXELS_PER_CODE) for side in (height, width))
    check_grid(rows, columns)
    return rows, columns


def check_grid(rows: int, columns: int) -> None:
    """Raise `ValueError` for a grid of codes that cannot be drawn."""
    if rows < 1 or columns < LEAST_COLUMNS:
        raise ValueError(
            f"an image must have at least 1 row and {LEAST_COLUMNS} columns of codes of {PIXELS_PER_CODE} pixels, "
            f"got {rows} x {columns}"
        )


def prompt_pieces(text: str, grid: tuple[int, int]) -> list[Piece]:
    """Return the prompt, or the negative prompt, of an image with a grid (h, w) of codes."""
    return [BEGIN_OF_SENTENCE, text, IMAGE_START, f"{grid[0]}*{grid[1]}", IMAGE_TOKEN]


def prompt_ids(tokenizer: TextTokenizer, text: str, grid: tuple[int, int]) -> list[int]:
    """Return the token ids of `prompt_pieces`; the text is brought into Unicode's form NFC first."""
    return tokenizer.ids(prompt_pieces(unicodedata.normalize("NFC", text), grid))
