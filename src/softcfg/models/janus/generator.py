"""The Janus-Pro generator: a Llama decoder with an embedding and a head of its own for image codes.

Janus-Pro (https://arxiv.org/abs/2501.17811, https://github.com/deepseek-ai/Janus). Parameter names are those of the
original files, `deepseek-ai/Janus-Pro-1B` and `-7B`; files of the transformers library hold the same tensors under
other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.errors import UserError
from softcfg.layouts import rename
from softcfg.models.geometry import Geometry
from softcfg.models.janus.prompts import JanusPrompts
from softcfg.models.llama import LlamaConfig, LlamaGenerator, PromptIds, left_pad, make_decoder, precise, prompt_ids
from softcfg.nn.fused import gelu, products
from softcfg.nn.linear import Linear
from softcfg.nn.llama import LlamaDecoder

EXAMPLE_TOKENS = 64
GENERATOR_PREFIXES = ("language_model.model.", "gen_embed.", "gen_aligner.", "gen_head.")


@dataclass(frozen=True, kw_only=True)
class JanusConfig(LlamaConfig):
    """Sizes and token ids of a Janus-Pro generator; the defaults are those of the 1B model.

    Attributes:
        code_count, code_dim: rows and width of the table of image codes, which is not the tokenizer's.
        grid_size: image tokens along a side.
        special_ids: "bos" and "boi", the first and the last token of a prompt, and "pad".
    """

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    code_count: int = 16384
    code_dim: int = 8
    grid_size: int = 24
    special_ids: dict[str, int] = field(default_factory=lambda: {"bos": 100000, "pad": 100002, "boi": 100003})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "code_count", "code_dim", "grid_size")
        self.check_ids(self.special_ids, ("bos", "boi", "pad"), self.vocab_size)

    @property
    def geometry(self) -> Geometry:
        """The layout of an image."""
        return Geometry(self.grid_size, self.grid_size)


class Aligner(nn.Module):
    """Rows of the table of codes to inputs of the decoder."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(inputs, width), nn.GELU(), Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., width]."""
        return self.layers(x)


class Head(nn.Module):
    """What leaves the decoder to logits of image codes."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.output_mlp_projector = Linear(width, width)
        self.vision_head = Linear(width, codes)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Of norm(x), [..., width] -> [..., codes]."""
        (hidden,) = products(x, self.output_mlp_projector, norm=norm)
        return products(gelu(hidden), self.vision_head)[0]


class Janus(LlamaGenerator):
    """The Janus-Pro generator.

    A row is: prompt, from begin of sentence to begin of image, and image codes in raster order. In an unconditional row
    all tokens of the prompt but the first and the last are pads; unlike the padding of shorter prompts, they are
    visible and take positions.
    """

    config: JanusConfig
    conditioning_type = JanusPrompts

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        self.num_tokens = config.grid_size**2
        self.vocab_size = config.code_count
        self.language_model = nn.ModuleDict({"model": make_decoder(config)})
        self.gen_embed = nn.Embedding(config.code_count, config.code_dim)
        self.gen_aligner = Aligner(config.code_dim, config.hidden_size)
        self.gen_head = Head(config.hidden_size, config.code_count)

    @property
    def decoder(self) -> LlamaDecoder:
        """See `LlamaGenerator.decoder`."""
        return cast(LlamaDecoder, self.language_model["model"])

    def condition(self, prompts: Sequence[Sequence[int] | Tensor], *, guided: bool) -> PromptIds:
        """The condition of a batch; see `Generator.condition`.

        Args:
            prompts: token ids, from the begin of the sentence to the begin of the image.

        Raises:
            UserError: no prompts, ids outside of the vocabulary, or a prompt that is too long.
        """
        if not len(prompts):
            raise UserError("prompts must be a list of at least one prompt")
        ids = [prompt_ids(prompt, self.config.vocab_size) for prompt in prompts]
        if guided:
            ids += [self._unconditional(prompt) for prompt in ids]
        condition = PromptIds(*left_pad(ids, self.config.special_ids["pad"], self.device), self.config.geometry)
        self.check_length(condition)
        return condition

    def example_inputs(self, count: int) -> list[list[int]]:
        """See `Generator.example_inputs`: prompts of 64 tokens."""
        special = self.config.special_ids
        return [[special["bos"], *[0] * (EXAMPLE_TOKENS - 2), special["boi"]]] * count

    def _unconditional(self, prompt: Tensor) -> Tensor:
        hidden = torch.full_like(prompt, self.config.special_ids["pad"])
        hidden[0], hidden[-1] = prompt[0], prompt[-1]
        return hidden

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """See `Generator.embed_tokens`."""
        return self.gen_aligner(self.gen_embed(tokens))

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`; they are float32 or better."""
        return precise(self.gen_head(x, self.decoder.norm))


def from_published(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a `Janus`, of a whole checkpoint of either layout."""
    renamed = rename(
        tensors,
        patterns=[
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.generation_embeddings\.", "gen_embed."),
            (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
            (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
            (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
            (r"^model\.generation_head\.", "gen_head."),
        ],
    )
    return {name: tensor for name, tensor in renamed.items() if name.startswith(GENERATOR_PREFIXES)}
