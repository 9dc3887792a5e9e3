"""A model of transformers as the generator of a `softcfg.Pipeline`: its image tokens, its prompts, the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softcfg.errors import UserError, quote, require_whole
from softcfg.integrations.transformers.generator import TransformersGenerator
from softcfg.integrations.transformers.image_head import ImageHead
from softcfg.integrations.transformers.prompts import PromptCondition, Prompts
from softcfg.models.base import Condition
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.geometry import Geometry
from softcfg.models.ids import LARGEST_ID, as_ids
from softcfg.prompts import PROMPT_OPTIONS, Prompt


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in the vocabulary of a model: rows of codes, which may end with structure tokens.

    Attributes:
        rows, columns: (h, w), the grid of codes.
        num_codes: the number of image codes.
        first_code_id: image code c is the token `first_code_id` + c.
        row_end: ids of the tokens after each row, such as the end of a line.
        tail: ids of the tokens after the last row, such as the end of the image.

    Raises:
        UserError: a field is something else, such as a grid without rows.
    """

    rows: int
    columns: int
    num_codes: int
    first_code_id: int = 0
    row_end: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("columns", 1), ("num_codes", 1), ("first_code_id", 0)):
            require_whole(getattr(self, name), name, least)
        for name in ("row_end", "tail"):
            if as_ids(getattr(self, name), name, LARGEST_ID).dim() != 1:
                raise UserError(f"{name} must be a tuple of ids, got {quote(getattr(self, name))}")

    @property
    def geometry(self) -> Geometry:
        """Where the tokens stand."""
        return Geometry(self.rows, self.columns, row_end=len(self.row_end), tail=len(self.tail))

    @property
    def structure(self) -> Tensor:
        """The id of each structure token, int64 [T]; -1 where a code is drawn."""
        return torch.tensor((*(*[-1] * self.columns, *self.row_end) * self.rows, *self.tail))


class TextPrompts(PromptConditioning):
    """Prompts of an `ImageGenerator`, which its `encode` turns into ids; images have one size."""

    generator: ImageGenerator

    @property
    def options(self) -> Sequence[str]:  # type: ignore[override]
        """See `PromptConditioning`."""
        return self.generator.options

    def check_tokenizer(self) -> None:
        """See `Conditioning.check_tokenizer`."""
        config, tokenizer = self.generator.config, self.tokenizer
        codes = config.rows * config.columns
        if config.num_codes != tokenizer.codebook_size or not (tokenizer.any_size or codes == tokenizer.num_tokens):
            raise UserError(
                f"the model draws {codes} codes out of {config.num_codes} for an image, but the tokenizer reads "
                f"{tokenizer.num_tokens} out of {tokenizer.codebook_size}"
            )

    def inputs(self, requests: Sequence[Prompt]) -> list[Prompts]:
        """See `Conditioning.inputs`."""
        return [self.generator.encode(prompt) for prompt in requests]

    @property
    def default_size(self) -> tuple[int, int]:
        """See `PromptConditioning.default_size`."""
        if not self.tokenizer.any_size:
            return super().default_size
        config, pixels = self.generator.config, self.tokenizer.patch_size
        return config.columns * pixels, config.rows * pixels

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`."""
        super().geometry(width, height)  # refuses other sizes
        return self.generator.config.geometry


class ImageGenerator(TransformersGenerator):
    """A model of transformers as the generator of a `softcfg.Pipeline`, and so of runs, traces and the web page.

    Its inputs are `Prompts` of one row each. Codes are allowed in the rows only, structure tokens elsewhere only.
    A run identifies it by the name of the pipeline, by `tokens` and by the hash of its weights; keeping `encode` the
    same is up to the user.

    Args:
        model, head, cache, pad_token_id: see `TransformersGenerator`.
        tokens: the tokens of an image.
        encode: turns a `softcfg.prompts.Prompt` into `Prompts` of one row: the ids of its text, with the template
            and the special tokens of the model, and those of the unconditional branch.
        options: which of the `softcfg.prompts.PROMPT_OPTIONS` `encode` reads; prompts with others are refused.

    Raises:
        UserError: tokens outside of the model's vocabulary, or an argument of another kind.
    """

    conditioning_type = TextPrompts
    config: ImageTokens

    def __init__(
        self,
        model: Any,
        tokens: ImageTokens,
        encode: Callable[[Prompt], Prompts],
        *,
        head: ImageHead | None = None,
        options: Sequence[str] = (),
        cache: str = "dynamic",
        pad_token_id: int = 0,
    ) -> None:
        if not isinstance(tokens, ImageTokens):
            raise UserError(f"tokens must be ImageTokens(...), got {quote(tokens)}")
        if not callable(encode):
            raise UserError(f"encode must be a function of a Prompt, got {quote(encode)}")
        if isinstance(options, str) or not set(options) <= set(PROMPT_OPTIONS):
            raise UserError(f"options must be a list of {', '.join(PROMPT_OPTIONS)}, got {quote(options)}")
        super().__init__(model, tokens.geometry.num_tokens, head=head, cache=cache, pad_token_id=pad_token_id)
        ends = (tokens.first_code_id + tokens.num_codes - 1, tokens.first_code_id, *tokens.row_end, *tokens.tail)
        as_ids(ends, "image tokens", self.vocab_size)
        self.config = tokens
        self.geometry = tokens.geometry
        self.encode = encode
        self.options = tuple(options)
        self.requires_grad_(False).eval()

    def condition(self, inputs: Any, *, guided: bool) -> PromptCondition:
        """See `Generator.condition`; `inputs` are `Prompts` of one row each."""
        if not isinstance(inputs, Sequence):
            raise UserError(f"prompts must be a list of Prompts(input_ids, ...), got {quote(inputs)}")
        if not inputs:
            raise UserError("there must be at least one prompt")
        return super().condition(Prompts.batch(inputs, self.pad_token_id, self._behind_padding), guided=guided)

    def allowed(self, steps: Tensor, condition: Condition) -> Tensor:
        """See `Generator.allowed`."""
        config = self.config
        structure = config.structure.to(steps.device)[steps]
        first = structure.where(structure >= 0, config.first_code_id)
        stop = (structure + 1).where(structure >= 0, config.first_code_id + config.num_codes)
        return torch.stack((first, stop), dim=-1)

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """See `Generator.image_codes`."""
        return self.config.geometry.on_grid(tokens).flatten(1) - self.config.first_code_id
