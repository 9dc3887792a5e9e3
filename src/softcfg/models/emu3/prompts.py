"""How Emu3-Gen reads prompts, after `image_generation.py` of https://github.com/baaivision/Emu3.

A prompt is: begin of sentence, text, image start, height and width in codes, image token. The negative prompt has the
same form, with the same size.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softcfg.errors import UserError
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.emu3.vocabulary import EmuTokenizer
from softcfg.models.geometry import Geometry
from softcfg.models.text import TOKENIZER, Piece, Special, TextTokenizer
from softcfg.prompts import Prompt

if TYPE_CHECKING:
    from softcfg.models.emu3.generator import Emu3

BEGIN_OF_SENTENCE = Special("<|extra_203|>")
IMAGE_START = Special("<|image start|>")
IMAGE_TOKEN = Special("<|image token|>")
# Key of `Emu3Config.special_ids` -> the name of the token.
SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "bos": BEGIN_OF_SENTENCE.name,
    "boi": IMAGE_START.name,
    "img": IMAGE_TOKEN.name,
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "eoi": "<|image end|>",
    "eos": "<|extra_204|>",
    "visual0": "<|visual token 000000|>",
}

# What the released program adds to every prompt, and its negative prompt.
POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

IMAGE_AREA = 720 * 720  # pixels
PIXELS_PER_CODE = 8
SPECIAL_FILE = "special_tokens"  # the role of emu3_vision_tokens.txt, beside a vocabulary in tiktoken's format
LEAST_COLUMNS = 3  # with fewer, the end of a line and the end of the image fall on the same token


def grid_of_ratio(ratio: str, area: int = IMAGE_AREA) -> tuple[int, int]:
    """Return rows and columns (h, w) of codes of an image of about `area` pixels whose sides are as WIDTH:HEIGHT.

    Raises:
        UserError: `ratio` has another form, or the image would be too small.
    """
    match = re.fullmatch(r"(\d+):(\d+)", ratio, re.ASCII)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise UserError(f"ratio must be WIDTH:HEIGHT, such as 16:9, got {ratio!r}")
    if area < 1:
        raise UserError(f"the area of an image must be greater than 0 pixels, got {area}")
    unit = math.sqrt(area / (width * height))
    # Halves are rounded to the even number, as released.
    rows, columns = (round(side * unit / PIXELS_PER_CODE) for side in (height, width))
    check_grid(rows, columns)
    return rows, columns


def check_grid(rows: int, columns: int) -> None:
    """Raise `UserError` for a grid of codes that cannot be drawn."""
    if rows < 1 or columns < LEAST_COLUMNS:
        raise UserError(
            f"an image must have at least 1 row and {LEAST_COLUMNS} columns of codes of {PIXELS_PER_CODE} pixels, "
            f"got {rows} x {columns}"
        )


def prompt_pieces(text: str, grid: tuple[int, int]) -> list[Piece]:
    """Return the prompt, or the negative prompt, of an image with a grid (h, w) of codes."""
    return [BEGIN_OF_SENTENCE, text, IMAGE_START, f"{grid[0]}*{grid[1]}", IMAGE_TOKEN]


def prompt_ids(tokenizer: TextTokenizer, text: str, grid: tuple[int, int]) -> list[int]:
    """Return the token ids of `prompt_pieces`; the text is brought into Unicode's form NFC first."""
    return tokenizer.ids(prompt_pieces(unicodedata.normalize("NFC", text), grid))


def text_tokenizer(files: Mapping[str, Path]) -> TextTokenizer | None:
    """Return the text tokenizer among a model's files, in either format; None if it is not, or not all of it, there."""
    if TOKENIZER not in files or files[TOKENIZER].suffix == ".json":
        return TextTokenizer.of(files)
    return EmuTokenizer(files[TOKENIZER], files[SPECIAL_FILE]) if SPECIAL_FILE in files else None


@dataclass(frozen=True)
class Emu3Prompt:
    """A prompt as the generator reads it.

    Attributes:
        ids: token ids, from the begin of the sentence to the image token.
        negative: token ids of the prompt of the unconditional row; by default the prompt without its text.
        grid: rows and columns (h, w) of the image's codes, as the ids say as well; by default the model's.
    """

    ids: Sequence[int] | Tensor
    negative: Sequence[int] | Tensor | None = None
    grid: tuple[int, int] | None = None


class Emu3Prompts(PromptConditioning):
    """The prompts of an Emu3 model: texts and negative texts, for images of any size.

    Its file is "tokenizer", the `tokenizer.json`; or, as the authors publish it, the vocabulary `emu3.tiktoken`, with
    `emu3_vision_tokens.txt` as "special_tokens". Its settings are "positive_text", which is put after every text, and
    "negative_text", what the unconditional branch reads where a prompt does not say; as released by default.
    """

    generator: Emu3
    read_settings = ("positive_text", "negative_text")
    options = ("negative_text",)
    any_size = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = {"positive_text": POSITIVE_PROMPT, "negative_text": NEGATIVE_PROMPT, **self.settings}
        self.reader = text_tokenizer(self.files)

    @classmethod
    def published_config(cls, files: Mapping[str, Path]) -> dict[str, Any]:
        """See `Conditioning.published_config`: the ids of the special tokens."""
        reader = text_tokenizer(files)
        if reader is None:
            return {}
        return {"special_ids": {key: reader.special_id(name) for key, name in SPECIAL_TOKENS.items()}}

    def check_tokenizer(self) -> None:
        """See `Conditioning.check_tokenizer`: it decodes images of any size, of the generator's codes."""
        codes = self.generator.config.code_count
        decoded = (self.tokenizer.codebook_size, getattr(self.tokenizer, "patch_size", None))
        if not self.tokenizer.any_size or decoded != (codes, PIXELS_PER_CODE):
            raise UserError(
                f"the generator draws {codes} codes, {PIXELS_PER_CODE} pixels wide, for images of any size; the "
                "tokenizer does not decode them"
            )

    def inputs(self, requests: Sequence[Prompt]) -> list[Emu3Prompt]:
        """See `Conditioning.inputs`."""
        if self.reader is None:
            raise UserError(f"{self.name} has no text tokenizer, so it cannot read prompts")
        read = []
        for prompt in requests:
            grid = self.geometry(prompt.width, prompt.height).grid
            text = prompt.text + self.settings["positive_text"]
            negative = self.settings["negative_text"] if prompt.negative_text is None else prompt.negative_text
            read.append(Emu3Prompt(prompt_ids(self.reader, text, grid), prompt_ids(self.reader, negative, grid), grid))
        return read

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`."""
        default_width, default_height = self.default_size
        size = Geometry.of_image(width or default_width, height or default_height, PIXELS_PER_CODE)
        return self.generator.config.geometry(*size.grid)

    def size_of_ratio(self, ratio: str) -> tuple[int, int]:
        """See `PromptConditioning.size_of_ratio`; the area is about that of an image of the default size."""
        width, height = self.default_size
        rows, columns = grid_of_ratio(ratio, width * height)
        return columns * PIXELS_PER_CODE, rows * PIXELS_PER_CODE

    @property
    def default_size(self) -> tuple[int, int]:
        """See `PromptConditioning.default_size`."""
        return self.generator.config.image_size, self.generator.config.image_size
