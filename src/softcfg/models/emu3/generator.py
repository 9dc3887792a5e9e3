"""The Emu3-Gen generator: a Llama decoder over one vocabulary of text and image tokens.

Emu3 (https://arxiv.org/abs/2409.18869, https://github.com/baaivision/Emu3). Parameter names are those of
`BAAI/Emu3-Gen`; files of the transformers library hold the same tensors under other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softcfg.configuration import require_positive
from softcfg.errors import UserError
from softcfg.layouts import rename
from softcfg.models.base import Condition
from softcfg.models.emu3.prompts import PIXELS_PER_CODE, Emu3Prompt, Emu3Prompts, check_grid
from softcfg.models.geometry import Geometry
from softcfg.models.llama import LlamaConfig, PromptIds, SharedVocabularyGenerator, left_pad, only_size, prompt_ids

EXAMPLE_TOKENS = 64
ENDING = ("eof", "eoi", "eos")  # what follows the last line
SPECIAL_IDS = {
    "pad": 151643, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852,
    "eoi": 151853, "visual0": 151854,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Emu3Config(LlamaConfig):
    """Sizes and token ids of an Emu3 generator; the defaults are those of Emu3-Gen.

    Attributes:
        vocab_size: V, text, special tokens and image codes.
        code_count: image code c is the token `special_ids["visual0"]` + c.
        special_ids: "pad"; "boi" and "img", before the size of an image and after it; "eol", the end of a line of
            codes, and "eof", "eoi" and "eos", which follow the last line; "visual0", the first code.
        image_size: H and W, in pixels, of images whose prompt does not say.
    """

    vocab_size: int = 184622
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 9216
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    code_count: int = 32768
    special_ids: dict[str, int] = field(default_factory=SPECIAL_IDS.copy)
    image_size: int = 720

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "code_count", "image_size")
        names = ("pad", "boi", "img", "eol", *ENDING)
        self.check_ids(self.special_ids, names, self.vocab_size)
        self.check_ids(self.special_ids, ("visual0",), self.vocab_size - self.code_count + 1)
        if self.image_size % PIXELS_PER_CODE:
            raise ValueError(f"image_size must be a multiple of {PIXELS_PER_CODE}, got {self.image_size}")
        self.geometry(*self.default_grid)

    @property
    def default_grid(self) -> tuple[int, int]:
        """Rows and columns (h, w) of codes of images whose prompt does not say."""
        side = self.image_size // PIXELS_PER_CODE
        return side, side

    def geometry(self, rows: int, columns: int) -> Geometry:
        """The layout of an image with a grid of codes.

        Raises:
            UserError: the image is too small.
        """
        check_grid(rows, columns)
        return Geometry(rows, columns, row_end=1, tail=len(ENDING))


class Emu3(SharedVocabularyGenerator):
    """The Emu3 generator.

    A row is a prompt and an image: lines of codes, each with an end of line, then the ends of the frame, the image and
    the text. An unconditional row begins with the negative prompt, which may be longer or shorter.
    """

    config: Emu3Config
    conditioning_type = Emu3Prompts

    def __init__(self, config: Emu3Config) -> None:
        super().__init__(config)
        self.num_tokens = config.geometry(*config.default_grid).num_tokens

    @property
    def code_ids(self) -> range:
        """See `SharedVocabularyGenerator.code_ids`."""
        first = self.config.special_ids["visual0"]
        return range(first, first + self.config.code_count)

    def structure(self, steps: Tensor, condition: Condition) -> Tensor:
        """See `SharedVocabularyGenerator.structure`: the end after a line, the three ends after the last one."""
        special = self.config.special_ids
        tokens = torch.full_like(steps, special["eol"])
        for step, name in enumerate(ENDING, start=condition.num_tokens - len(ENDING)):
            tokens = tokens.masked_fill(steps == step, special[name])
        return tokens

    def condition(self, prompts: Sequence[Emu3Prompt], *, guided: bool) -> PromptIds:
        """See `Generator.condition`.

        Raises:
            UserError: no prompts, ids outside of the vocabulary, a size that cannot be drawn, sizes that differ, or a
                sequence longer than the model's positions.
        """
        config = self.config
        if not prompts or not all(isinstance(prompt, Emu3Prompt) for prompt in prompts):
            raise UserError(f"prompts must be a list of at least one Emu3Prompt, got {prompts!r}")
        grids = [config.default_grid if prompt.grid is None else prompt.grid for prompt in prompts]
        geometry = config.geometry(*only_size(grids, "grids of codes of "))
        ids = [prompt_ids(prompt.ids, self.vocab_size) for prompt in prompts]
        if guided:
            ids += [self._negative(prompt, own) for prompt, own in zip(prompts, list(ids), strict=True)]
        condition = PromptIds(*left_pad(ids, config.special_ids["pad"], self.device), geometry)
        self.check_length(condition)
        return condition

    def example_inputs(self, count: int) -> list[Emu3Prompt]:
        """See `Generator.example_inputs`: prompts and negative prompts of 64 tokens."""
        return [Emu3Prompt([0] * EXAMPLE_TOKENS, [0] * EXAMPLE_TOKENS)] * count

    def _negative(self, prompt: Emu3Prompt, ids: Tensor) -> Tensor:
        if prompt.negative is not None:
            return prompt_ids(prompt.negative, self.vocab_size)
        header = (ids == self.config.special_ids["boi"]).nonzero()
        if not len(header):
            raise UserError("a prompt must have the header of its image; without it, give a negative prompt")
        return torch.cat((ids[:1], ids[int(header[-1]) :]))


def from_published(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an `Emu3`, of a whole checkpoint of either layout."""
    renamed = rename(
        tensors,
        patterns=[
            (r"^(model\.)?vqmodel\.", "vqmodel."),
            (r"^model\.text_model\.", "model."),
            (r"^text_model\.", ""),  # the library's first layout
        ],
    )
    return {name: tensor for name, tensor in renamed.items() if not name.startswith("vqmodel.")}
