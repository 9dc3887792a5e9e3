"""How image tokens go through a model that has an embedding and a head of their own for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from softcfg.errors import UserError

IMAGE_HEADS = (
    "generation_head",
    "gen_head",
    "image_head",
    "img_head",
    "vision_head",
    "visual_head",
)  # their usual names


@dataclass(frozen=True)
class ImageHead:
    """How image tokens go through a model that keeps them apart from its text vocabulary.

    Attributes:
        embed: image tokens int64 [rows, n] -> [rows, n, width].
        backbone: takes `inputs_embeds`, `attention_mask`, `position_ids`, `past_key_values`, `use_cache` and what
            it passes on to its attention layers; returns an object with `last_hidden_state` [rows, n, width].
        logits: [rows, n, width] -> [rows, n, V], the logits of the image codes.
        vocab_size: V.
    """

    embed: Callable[[Tensor], Tensor]
    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> ImageHead | None:
        """The image head of a model that has one; None for a model whose image tokens are in its vocabulary.

        Raises:
            UserError: there is an image head, of a kind that is not known here.
        """
        if isinstance(model, JanusForConditionalGeneration):
            return cls.janus(model)
        heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in IMAGE_HEADS]
        if heads:
            raise UserError(
                f"{type(model).__name__} has an image head, {heads[0]}, of a kind that is not known here: give "
                "head=ImageHead(embed=..., backbone=..., logits=..., vocab_size=...)"
            )
        return None

    @classmethod
    def janus(cls, model: Any) -> ImageHead:
        """The image head of a `JanusForConditionalGeneration`."""
        return cls(
            embed=model.prepare_embeddings_for_image_generation,
            backbone=model.model.language_model,
            logits=model.model.generation_head,
            vocab_size=model.config.vq_config.num_embeddings,
        )
