"""The Lumina-mGPT 2.0 generator: a Llama decoder over one vocabulary of text and image tokens.

Lumina-mGPT 2.0 (https://arxiv.org/abs/2507.17801, https://github.com/Alpha-VLLM/Lumina-mGPT-2.0). Parameter names are
those of the released checkpoints, and the ids of the special tokens are theirs by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_multiple, require_positive
from softcfg.errors import UserError
from softcfg.models.base import Condition
from softcfg.models.geometry import Geometry
from softcfg.models.ids import as_ids
from softcfg.models.llama import LlamaConfig, PromptIds, SharedVocabularyGenerator, left_pad, make_decoder, only_size
from softcfg.models.lumina.prompts import LuminaPrompts, TokenPrompt
from softcfg.nn.context import AttentionContext
from softcfg.nn.fused import KINDS
from softcfg.nn.llama import LlamaAttention, LlamaBlock, LlamaDecoder

HEAD_NORM_EPS = 1e-5
EXAMPLE_TOKENS = 64


@dataclass(frozen=True)
class LuminaConfig(LlamaConfig):
    """Sizes and token ids of a Lumina-mGPT generator, under the names of the released `config.json` where it has them.

    An image is laid out as: start, two tokens for its height and width in grid cells, h lines of w codes and a
    new-line token each, end. A grid cell is `codes_per_cell` codes or `cell_pixels` pixels wide.

    Attributes:
        vocab_size: V, text, special tokens and image codes.
        max_position_embeddings: the longest sequence, prompt and image together.
        model_parallel_size: rows of the head norms' weights; each serves as many consecutive heads as the others.
        swin_norm: norms after attention and MLP rather than before them.
        prompt_start_id, separator_id: first and last token of a prompt.
        image_start_id, image_end_id, new_line_id: see above.
        size_id: a side of n grid cells is the token `size_id` + n.
        first_code_id, num_codes: image code c is the token `first_code_id` + c.
        image_size: H and W, in pixels, of images whose prompt does not say.
    """

    vocab_size: int = 171385
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 10240
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    model_parallel_size: int = 1
    swin_norm: bool = False
    prompt_start_id: int = 151645
    separator_id: int = 171384
    image_start_id: int = 151665
    image_end_id: int = 151666
    new_line_id: int = 151670
    size_id: int = 151671
    first_code_id: int = 155000
    num_codes: int = 16384
    codes_per_cell: int = 4
    cell_pixels: int = 32
    image_size: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "model_parallel_size", "num_codes", "codes_per_cell", "cell_pixels", "image_size")
        heads = self.num_attention_heads
        if self.num_key_value_heads not in (None, heads):
            raise ValueError(
                f"num_key_value_heads must be num_attention_heads ({heads}), as released, got "
                f"{self.num_key_value_heads}"
            )
        require_multiple(self, ("num_attention_heads", "model_parallel_size"), ("cell_pixels", "codes_per_cell"))
        for name in ("prompt_start_id", "separator_id", "image_start_id", "image_end_id", "new_line_id", "size_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is outside of the {self.vocab_size} tokens")
        if not 0 <= self.first_code_id <= self.vocab_size - self.num_codes:
            raise ValueError(
                f"{self.num_codes} image codes from {self.first_code_id} on do not fit into {self.vocab_size} tokens"
            )
        self.geometry(self.image_size, self.image_size)

    def geometry(self, width: int, height: int) -> Geometry:
        """The tokens of an image of `width` x `height` pixels: lines of codes with an end each, and the image's end.

        Raises:
            UserError: a side is not a multiple of a grid cell, or there is no token for its size.
        """
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % self.cell_pixels:
                raise UserError(f"{name} must be a multiple of {self.cell_pixels}, got {side}")
            token = self.size_id + side // self.cell_pixels
            if token >= self.vocab_size or self.first_code_id <= token < self.first_code_id + self.num_codes:
                raise UserError(f"{name} {side} is too large: the vocabulary has no token for this size")
        rows, columns = (side // self.cell_pixels * self.codes_per_cell for side in (height, width))
        return Geometry(rows, columns, row_end=1, tail=1)


class PromptCondition(PromptIds):
    """Prompts, left-padded to one length, for images of one size.

    Attributes:
        given: int64 [B, k, w], codes of the first k lines, which stand in the prompt.
    """

    def __init__(self, ids: Tensor, padding: Tensor | None, geometry: Geometry, given: Tensor) -> None:
        super().__init__(ids, padding, geometry)
        self.given = given

    def __getitem__(self, rows: slice) -> PromptCondition:
        """See `Condition.__getitem__`."""
        padding = None if self.padding is None else self.padding[rows]
        return PromptCondition(self.ids[rows], padding, self.geometry, self.given)


class HeadNorm(nn.LayerNorm):
    """Layer norm over the channels of each head; each row of weights serves as many consecutive heads."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__(width, HEAD_NORM_EPS)
        self.weight = nn.Parameter(torch.ones(groups, width))
        self.bias = nn.Parameter(torch.zeros(groups, width))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, heads, n, width] -> the same shape."""
        groups, width = self.weight.shape
        if groups == 1:
            return F.layer_norm(x, (width,), self.weight[0], self.bias[0], self.eps)
        x = F.layer_norm(x, (width,), eps=self.eps).unflatten(1, (groups, -1))
        return (x * self.weight[:, None, None] + self.bias[:, None, None]).flatten(1, 2)


KINDS[HeadNorm] = KINDS[nn.LayerNorm]


class LuminaBlock(LlamaBlock):
    """Transformer block; its norms stand before attention and MLP or, with `swin_norm`, after them."""

    def __init__(self, config: LuminaConfig) -> None:
        norms = (HeadNorm(config.model_parallel_size, config.head_dim) for _ in range(2))
        attention = LlamaAttention(config.hidden_size, config.num_attention_heads, config.key_heads, *norms)
        super().__init__(attention, config.hidden_size, config.intermediate_size, config.rms_norm_eps)
        self.swin_norm = config.swin_norm

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """[rows, n, hidden_size] -> the same shape."""
        if not self.swin_norm:
            return super().forward(x, layer, context)
        x = x + self.input_layernorm(self.self_attn(x, layer, context))
        return x + self.post_attention_layernorm(self.mlp(x))


class Lumina(SharedVocabularyGenerator):
    """The Lumina-mGPT generator.

    A conditional row is: prompt, image start, height, width, image tokens; an unconditional row begins at the image
    start. Both stand left-padded in one batch, and positions count from 0 at a row's first real token. The three
    tokens that open an image are given, not drawn. Image tokens are the codes, the ends of lines and the end of the
    image.
    """

    config: LuminaConfig
    conditioning_type = LuminaPrompts
    no_split_modules = ("LuminaBlock",)

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__(config)
        self.num_tokens = config.geometry(config.image_size, config.image_size).num_tokens

    def make_body(self) -> LlamaDecoder:
        """See `SharedVocabularyGenerator.make_body`."""
        return make_decoder(self.config, LuminaBlock)

    @property
    def code_ids(self) -> range:
        """See `SharedVocabularyGenerator.code_ids`."""
        return range(self.config.first_code_id, self.config.first_code_id + self.config.num_codes)

    def structure(self, steps: Tensor, condition: Condition) -> Tensor:
        """See `SharedVocabularyGenerator.structure`: a new line after a line, the end after the last one."""
        last = steps == condition.num_tokens - 1
        return torch.where(last, self.config.image_end_id, self.config.new_line_id)

    def condition(self, prompts: Sequence[TokenPrompt], *, guided: bool) -> PromptCondition:
        """See `Generator.condition`.

        Raises:
            UserError: no prompts, ids outside of the vocabulary, a size that is not a multiple of a grid cell,
                different sizes, or a sequence longer than the model's positions.
        """
        config = self.config
        if not prompts or not all(isinstance(prompt, TokenPrompt) for prompt in prompts):
            raise UserError(f"prompts must be a list of at least one TokenPrompt, got {prompts!r}")
        sizes = [(prompt.width or config.image_size, prompt.height or config.image_size) for prompt in prompts]
        geometry = config.geometry(*only_size(sizes))
        given = self._given(prompts, geometry.grid)
        opening = [config.image_start_id, *(config.size_id + side // config.codes_per_cell for side in geometry.grid)]
        lines = F.pad(given + config.first_code_id, (0, 1), value=config.new_line_id).flatten(1)
        opened = torch.cat((torch.tensor([opening]).expand(len(prompts), -1), lines), dim=1)
        texts = [as_ids(prompt.ids, "prompt ids", self.vocab_size).flatten() for prompt in prompts]
        if guided:
            texts += [texts[0][:0]] * len(prompts)
            opened = opened.repeat(2, 1)
        rows = [torch.cat((text, start)) for text, start in zip(texts, opened, strict=True)]
        ids, padding = left_pad(rows, config.prompt_start_id, self.device)
        geometry = replace(geometry, given_rows=given.shape[1])
        condition = PromptCondition(ids, padding, geometry, given.to(self.device))
        self.check_length(condition)
        return condition

    def example_inputs(self, count: int) -> list[TokenPrompt]:
        """See `Generator.example_inputs`: prompts of 64 tokens."""
        return [TokenPrompt([0] * EXAMPLE_TOKENS)] * count

    def _given(self, prompts: Sequence[TokenPrompt], grid: tuple[int, int]) -> Tensor:
        """The lines of codes that the prompts bring along, int64 [B, k, w]."""
        h, w = grid
        none = torch.zeros(0, w, dtype=torch.int64)
        given = [none if prompt.given is None else prompt.given for prompt in prompts]
        if any(lines.dim() != 2 or lines.shape[1] != w or len(lines) >= h for lines in given):
            raise UserError(f"given codes must have shape [k, {w}] with k < {h}, got {list(given[0].shape)}")
        if len({len(lines) for lines in given}) > 1:
            raise UserError("all prompts of a batch must give as many lines of codes")
        return as_ids(torch.stack([lines.cpu() for lines in given]), "given codes", self.config.num_codes)

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """See `Generator.image_codes`; the lines that the prompts gave come first."""
        assert isinstance(condition, PromptCondition)
        return torch.cat((condition.given.flatten(1), super().image_codes(tokens, condition)), dim=1)
