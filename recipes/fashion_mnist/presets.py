"""The models that the recipe makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recipes.fashion_mnist.data import CLASSES
from softcfg.models.alitok import AliTokConfig
from softcfg.tokenizers.maskgit_vq import MaskGITVQConfig


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its batches, the minutes that its training takes, and what part has which share of them.

    The card of the model says `description` and the default `sampling`.
    """

    description: str
    tokenizer: MaskGITVQConfig
    generator: AliTokConfig
    generator_batch: int
    minutes: float
    shares: Mapping[str, float]
    sampling: Mapping[str, float]


def _generator(width: int, layers: int, heads: int, tokenizer: MaskGITVQConfig) -> AliTokConfig:
    side = tokenizer.resolution // tokenizer.downsampling
    return AliTokConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        codebook_size=tokenizer.codebook_size,
        condition_num_classes=len(CLASSES),
        image_seq_len=side * side,
        grid_size=side,
        prefix_tokens=0,
    )


_TOKENIZER = MaskGITVQConfig(
    channel_mult=(1, 1), hidden_channels=32, num_res_blocks=1, resolution=32, z_channels=4, codebook_size=128
)
_SMALL_TOKENIZER = MaskGITVQConfig(
    channel_mult=(1, 1, 2), hidden_channels=32, num_res_blocks=1, resolution=32, z_channels=8, codebook_size=512
)

PRESETS = {
    "fashion": Preset(
        "Fashion-MNIST, 32 x 32 gray images in 10 classes, 256 tokens; small enough for a CPU",
        _TOKENIZER,
        _generator(128, 6, 4, _TOKENIZER),
        generator_batch=16,
        minutes=86,
        shares={"classifier": 0.12, "tokenizer": 0.09, "generator": 0.79},
        sampling={"temperature": 1.0, "guidance_scale": 3.0, "guidance_scale_pow": 1.0},
    ),
    # Its images are measured with the classifier of `fashion`.
    "fashion-small": Preset(
        "Fashion-MNIST, 32 x 32 gray images in 10 classes, 64 tokens; fast, for studies that need many images",
        _SMALL_TOKENIZER,
        _generator(96, 4, 3, _SMALL_TOKENIZER),
        generator_batch=64,
        minutes=35,
        shares={"tokenizer": 0.28, "generator": 0.72},
        sampling={"temperature": 1.0, "guidance_scale": 3.0, "guidance_scale_pow": 1.0},
    ),
}
