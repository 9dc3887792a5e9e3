"""A text-to-image family outside of the package, in one file with one registration: what the contract asks for.

Images are rows of two codes and an end; their words are in a file, and the unconditional branch reads a negative text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prompt_model import CODES, LINE, PromptGenerator, Prompts
from softcfg import UserError
from softcfg.models.base import Condition
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.geometry import Geometry
from softcfg.prompts import Prompt
from softcfg.zoo import register_generator

PIXELS = 2  # per code
COLUMNS = LINE - 1


@dataclass(frozen=True)
class ToyConfig:
    """The unknown word and the rows of an image whose prompt does not say; the word file overrides the first."""

    unknown_word: int = 6
    rows: int = 4


@dataclass(frozen=True)
class ToyPrompt:
    """The ids of a text and of its negative text, and the rows of the image."""

    words: Sequence[int]
    negative: Sequence[int] = (0,)
    rows: int = 4


class ToyPrompts(PromptConditioning):
    """Texts by their words, with a template; images are two codes wide and of any height."""

    generator: Toy
    options = ("negative_text",)

    @classmethod
    def published_config(cls, files: Mapping[str, Path]) -> dict[str, Any]:
        return {"unknown_word": json.loads(files["words"].read_text())["?"]} if "words" in files else {}

    def check_tokenizer(self) -> None:
        if self.tokenizer.codebook_size != CODES:
            raise UserError(f"the tokenizer must have {CODES} codes")

    @property
    def default_size(self) -> tuple[int, int]:
        return COLUMNS * PIXELS, self.generator.config.rows * PIXELS

    def size_of_ratio(self, ratio: str) -> tuple[int, int]:
        width, height = (int(side) for side in ratio.split(":"))
        return COLUMNS * PIXELS, COLUMNS * PIXELS * height // width

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        own = self.default_size
        geometry = Geometry.of_image(width or own[0], height or own[1], PIXELS, row_end=1)
        if geometry.columns != COLUMNS:
            raise UserError(f"images are {own[0]} pixels wide")
        return geometry

    def inputs(self, requests: Sequence[Prompt]) -> list[ToyPrompt]:
        known = json.loads(self.files["words"].read_text())

        def ids(text: str) -> list[int]:
            return [known.get(word, self.generator.config.unknown_word) for word in text.split()]

        return [
            ToyPrompt(
                ids(self.settings.get("template", "{prompt}").format(prompt=prompt.text)),
                (0,) if prompt.negative_text is None else ids(prompt.negative_text),
                (prompt.height or self.default_size[1]) // PIXELS,
            )
            for prompt in requests
        ]


@register_generator("toy", ToyConfig)
class Toy(PromptGenerator):
    """The generator of prompt_model.py for images of any height."""

    conditioning_type = ToyPrompts
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(LINE * config.rows)
        self.config = config

    def condition(self, prompts: list[ToyPrompt], *, guided: bool) -> Prompts:  # type: ignore[override]
        (rows,) = {prompt.rows for prompt in prompts}
        texts = [list(prompt.words) for prompt in prompts]
        texts += [list(prompt.negative) for prompt in prompts] if guided else []
        slots = max(map(len, texts))
        padding = torch.tensor([slots - len(text) for text in texts])
        ids = torch.tensor([[7] * (slots - len(text)) + text for text in texts])
        geometry = Geometry(rows, COLUMNS, row_end=1)
        return Prompts(ids, padding if padding.any() else None, geometry.num_tokens, geometry)

    def example_inputs(self, count: int) -> list[ToyPrompt]:
        return [ToyPrompt([1, 2, 3])] * count

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        return condition.geometry.on_grid(tokens).flatten(1)
