"""How image tokens go through a model that has an embedding and a head of their own for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import ChameleonForConditionalGeneration, JanusForConditionalGeneration

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
    """How image tokens go through a model whose forward call does not take them, or gives no logits for them.

    Attributes:
        embed: image tokens int64 [rows, n] -> [rows, n, width].
        backbone: takes `inputs_embeds`, `attention_mask`, `position_ids`, `past_key_values`, `use_cache` and what
            it passes on to its attention layers; returns an object with `last_hidden_state` [rows, n, width].
        logits: [rows, n, width] -> [rows, n, V], the logits of the image codes.
        vocab_size: V.
        ends: whether the tokens are those of the text vocabulary, so that an end token among them ends a sequence.
    """

    embed: Callable[[Tensor], Tensor]
    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    ends: bool = False

    @classmethod
    def of(cls, model: Any) -> ImageHead | None:
        """The image head of a model that needs one; None for a model whose own logits are those of image tokens too.

        Raises:
            UserError: there is an image head, of a kind that is not known here.
        """
        if isinstance(model, JanusForConditionalGeneration):
            return cls.janus(model)
        if isinstance(model, ChameleonForConditionalGeneration):
            return cls.chameleon(model)
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

    @classmethod
    def chameleon(cls, model: Any) -> ImageHead:
        """That of a `ChameleonForConditionalGeneration`, whose own forward call rules out its image tokens."""
        return cls(
            embed=model.get_input_embeddings(),
            backbone=model.model,
            logits=model.lm_head,
            vocab_size=model.config.vocab_size,
            ends=True,
        )
