"""The tokenizer of LlamaGen: a convolutional autoencoder with attention at its lowest resolution.

LlamaGen (https://arxiv.org/abs/2406.06525, https://github.com/FoundationVision/LlamaGen): VQ-16 and VQ-8, whose tokens
are 16 and 8 pixels wide. Parameter names are those of the released `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.tokenizers.base import Codebook, Tokenizer
from softcfg.tokenizers.convolution import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    check_levels,
    check_size,
    conv,
)


@dataclass(frozen=True)
class LlamaGenVQConfig:
    """Sizes of a `LlamaGenVQ`; the defaults are the released VQ-16 at 256 px.

    Level i works on 1 / 2^i of the resolution with `ch * ch_mult[i]` channels.

    Attributes:
        image_size: H and W of the images, unless given otherwise with them; 256, 384 or 512 for the released
            generators.
        grid_size: tokens along a side of the images; if given, it says `image_size`.
        output_size: H and W that decoded images are resized to; None for `image_size`. See `Tokenizer.output_size`.
        codebook_l2_norm: compare and read codes at unit length.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    num_groups: int = 32
    norm_eps: float = 1e-6
    image_size: int = 256
    grid_size: int | None = None
    output_size: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_embed_dim", "num_groups", "norm_eps",
            "image_size",
        )  # fmt: skip
        for name in ("grid_size", "output_size"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        check_levels(self, "ch_mult", "ch", "num_groups")
        if self.grid_size is not None:
            object.__setattr__(self, "image_size", self.grid_size * self.downsampling)
        check_size(self, "image_size", self.downsampling)

    @property
    def downsampling(self) -> int:
        """Width of a token in pixels."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, the full resolution first."""
        return [self.ch * factor for factor in self.ch_mult]


class LlamaGenVQ(Tokenizer):
    """LlamaGen's tokenizer: tokens in raster order; decoding needs `decoder`, `post_quant_conv` and `quantize` only.

    It takes images of any size whose sides are multiples of `patch_size`.
    """

    rounds = True
    any_size = True

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        self.config = config
        self.set_size(config.image_size, config.downsampling)
        self.codebook_size = config.codebook_size
        self.output_size = config.output_size
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.quantize = Codebook(config.codebook_size, config.codebook_embed_dim, l2_norm=config.codebook_l2_norm)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, codebook_embed_dim, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        # Channels-last order is faster on a CPU, but its group norm there is ten times less accurate.
        return self.quant_conv(self.encoder(2 * pixels.contiguous() - 1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels, nominally in [0, 1], of latents [B, codebook_embed_dim, h, w]."""
        return (self.decoder(self.post_quant_conv(latents.contiguous())) + 1) / 2


class Encoder(nn.Module):
    """Pixels to latents; level 0 is the full resolution, the last one has attention."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        channels = [config.ch, *config.level_channels]
        last = len(config.ch_mult) - 1
        self.conv_in = conv(3, config.ch)
        self.conv_blocks = nn.ModuleList(
            Level(config, a, b, config.num_res_blocks, attention=i == last, downsample=i != last)
            for i, (a, b) in enumerate(pairwise(channels))
        )
        self.mid = middle(config)
        self.norm_out = group_norm(config, channels[-1])
        self.conv_out = conv(channels[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, z_channels, h, w]."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels; level 0 is the lowest resolution and has attention."""

    def __init__(self, config: LlamaGenVQConfig) -> None:
        super().__init__()
        channels = config.level_channels[::-1]
        last = len(channels) - 1
        self.conv_in = conv(config.z_channels, channels[0])
        self.mid = middle(config)
        self.conv_blocks = nn.ModuleList(
            Level(config, a, b, config.num_res_blocks + 1, attention=i == 0, upsample=i != last)
            for i, (a, b) in enumerate(pairwise([channels[0], *channels]))
        )
        self.norm_out = group_norm(config, channels[-1])
        self.conv_out = conv(channels[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, z_channels, h, w] -> [B, 3, H, W], nominally in [-1, 1]."""
        x = self.mid(self.conv_in(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any, and the step to the next."""

    def __init__(
        self,
        config: LlamaGenVQConfig,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        norm = functools.partial(group_norm, config)
        self.res = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, norm) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(outputs) if downsample else None
        self.upsample = Upsample(outputs) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w], or half or twice the size after a step."""
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


def middle(config: LlamaGenVQConfig) -> nn.Sequential:
    """Return the blocks at the lowest resolution that encoder and decoder have between levels and latents."""
    width, norm = config.level_channels[-1], functools.partial(group_norm, config)
    return nn.Sequential(
        ResidualBlock(width, width, norm), AttentionBlock(width, norm), ResidualBlock(width, width, norm)
    )


def group_norm(config: LlamaGenVQConfig, channels: int) -> nn.GroupNorm:
    """Return the normalisation used everywhere in the model."""
    return nn.GroupNorm(config.num_groups, channels, eps=config.norm_eps)
