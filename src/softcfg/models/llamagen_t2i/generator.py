"""LlamaGen's text-to-image generator: the class-conditional one with features of a caption in place of the class.

LlamaGen (https://arxiv.org/abs/2406.06525, https://github.com/FoundationVision/LlamaGen). Parameter names are those of
the released `t2i_XL_stage1_256.pt` and `t2i_XL_stage2_512.pt`, which differ in their grid alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.errors import UserError
from softcfg.models.base import Condition
from softcfg.models.llamagen import LlamaGenBody, LlamaGenConfig
from softcfg.models.llamagen_t2i.captions import LlamaGenCaptions
from softcfg.nn.linear import Linear
from softcfg.nn.precision import own_dtype

EXAMPLE_TOKENS = 32


@dataclass(frozen=True)
class LlamaGenT2IConfig(LlamaGenConfig):
    """Sizes of a text-to-image LlamaGen generator, under the names of the released code; the defaults are the XL model.

    Attributes:
        cls_token_num: slots of the text, whatever the length of the caption.
        caption_dim: width of the text encoder's features.
        model_type: "t2i".
    """

    kind = "t2i"
    dim: int = 1280
    n_layer: int = 36
    n_head: int = 20
    cls_token_num: int = 120
    model_type: str = "t2i"
    caption_dim: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "caption_dim")


class CaptionCondition(Condition):
    """Captions, whose features stand at the end of the text's slots.

    Attributes:
        features: [rows, slots, caption_dim], zero in front of a caption.
    """

    def __init__(self, features: Tensor, padding: Tensor, num_tokens: int) -> None:
        super().__init__(len(features), features.shape[1], num_tokens, padding)
        self.features = features

    def __getitem__(self, rows: slice) -> CaptionCondition:
        """See `Condition.__getitem__`."""
        assert self.padding is not None
        return CaptionCondition(self.features[rows], self.padding[rows], self.num_tokens)


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1 x)) with the tanh form of GELU, without biases."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(inputs, width, bias=False)
        self.fc2 = Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """The projection of a caption's features, and the features that stand for no caption."""

    uncond_embedding: Tensor

    def __init__(self, slots: int, inputs: int, width: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(inputs, width)
        embedding = torch.empty(slots, inputs)
        nn.init.normal_(embedding, std=inputs**-0.5)
        self.register_buffer("uncond_embedding", embedding)


class LlamaGenT2I(LlamaGenBody):
    """The text-to-image LlamaGen generator.

    The sequence is: text, image tokens in raster order. A caption stands at the end of the text's slots and what is
    before it is hidden. An unconditional row has the features of no caption in as many slots as the caption has.
    """

    config: LlamaGenT2IConfig
    conditioning_type = LlamaGenCaptions

    def __init__(self, config: LlamaGenT2IConfig) -> None:
        super().__init__(config)
        self.cls_embedding = CaptionEmbedding(config.cls_token_num, config.caption_dim, config.dim)

    @own_dtype()
    def condition(self, captions: Sequence[Tensor], *, guided: bool) -> CaptionCondition:
        """The condition of a batch; see `Generator.condition`.

        Args:
            captions: the text encoder's features [n, caption_dim] of each caption, without padding.

        Raises:
            UserError: no captions, features of another width, or too many of them.
        """
        config = self.config
        if not len(captions):
            raise UserError("captions must be a list of at least one tensor of features")
        for caption in captions:
            fits = isinstance(caption, Tensor) and caption.dim() == 2 and caption.is_floating_point()
            if not fits or caption.shape[1] != config.caption_dim or not 0 < len(caption) <= config.cls_token_num:
                found = list(caption.shape) if isinstance(caption, Tensor) else type(caption).__name__
                raise UserError(
                    f"the features of a caption must be floats [n, {config.caption_dim}] with n in "
                    f"1..{config.cls_token_num}, got {found}"
                )
        padding = torch.tensor([config.cls_token_num - len(caption) for caption in captions], device=self.device)
        moved = [caption.to(self.device, self.dtype) for caption in captions]
        features = torch.stack([F.pad(each, (0, 0, config.cls_token_num - len(each), 0)) for each in moved])
        if guided:
            features = torch.cat((features, self.cls_embedding.uncond_embedding.to(features).expand_as(features)))
            padding = padding.repeat(2)
        return CaptionCondition(features, padding, self.num_tokens)

    def example_inputs(self, count: int) -> list[Tensor]:
        """See `Generator.example_inputs`: captions of 32 tokens."""
        length = min(EXAMPLE_TOKENS, self.config.cls_token_num)
        return [torch.zeros(length, self.config.caption_dim)] * count

    def embed_condition(self, condition: Condition) -> Tensor:
        """See `Generator.embed_condition`."""
        assert isinstance(condition, CaptionCondition)
        return self.cls_embedding.cap_proj(condition.features)
