"""MoVQGAN: a convolutional autoencoder whose decoder's norms are modulated by the codes.

MoVQ (https://arxiv.org/abs/2209.09002), as released in https://github.com/ai-forever/MoVQGAN; Lumina-mGPT 2.0 draws its
codes. Parameter names are those of the released `movqgan_270M.ckpt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
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

GROUPS = 32
EPS = 1e-6
PIXELS_AT_ONCE = 2**20  # decoded at a time; the widest layer has 512 channels for each


@dataclass(frozen=True)
class MoVQConfig:
    """Sizes of a `MoVQ`, under the names of the released configurations; the defaults are the 270M model.

    Level i works on 1 / 2^i of the resolution with `ch * ch_mult[i]` channels.

    Attributes:
        n_embed, embed_dim: the codebook.
        resolution: H and W of the images, unless given otherwise with them; it also says which levels have attention.
        attn_resolutions: levels with attention, by their resolution in images of the size `resolution`.
        z_channels: of the latents before `quant_conv`.
        in_channels, out_ch, double_z: 3, 3 and False.
    """

    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (32,)
    resolution: int = 256
    z_channels: int = 4
    n_embed: int = 16384
    embed_dim: int = 4
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "ch", "num_res_blocks", "resolution", "z_channels", "n_embed", "embed_dim")
        check_levels(self, "ch_mult", "ch", GROUPS)
        check_size(self, "resolution", self.patch_size)
        if (self.in_channels, self.out_ch, self.double_z) != (3, 3, False):
            raise ValueError("in_channels and out_ch must be 3 and double_z false")

    @property
    def patch_size(self) -> int:
        """Width of a code in pixels."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, the full resolution first."""
        return [self.ch * factor for factor in self.ch_mult]

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of `level` are followed by attention."""
        return self.resolution // 2**level in self.attn_resolutions


class MoVQ(Tokenizer):
    """MoVQGAN: codes in raster order, for images of any size whose sides are multiples of `patch_size`."""

    rounds = True
    any_size = True

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        self.config = config
        self.set_size(config.resolution, config.patch_size)
        self.codebook_size = config.n_embed
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, embed_dim, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        return self.quant_conv(self.encoder(2 * pixels.contiguous() - 1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W], nominally in [0, 1], of latents [B, embed_dim, h, w]; a few images at a time."""

        def decode(codes: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(codes), codes)

        return (decode_in_pieces(decode, latents, self.patch_size) + 1) / 2


def decode_in_pieces(decode: Callable[[Tensor], Tensor], latents: Tensor, patch_size: int) -> Tensor:
    """Return `decode` of latents [B, channels, h, w], of a few images at a time: as many as memory should hold."""
    pixels = latents.shape[2] * latents.shape[3] * patch_size**2
    pieces = latents.contiguous().split(max(1, PIXELS_AT_ONCE // pixels))
    return torch.cat([decode(codes) for codes in pieces])


class Encoder(nn.Module):
    """Pixels to latents; level 0 is the full resolution."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        channels = [config.ch, *config.level_channels]
        last = len(config.ch_mult) - 1
        self.conv_in = conv(3, config.ch)
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(channels)):
            level = Level(inputs, outputs, config.num_res_blocks, group_norm, attention=config.has_attention(i))
            level.downsample = Downsample(outputs) if i != last else None
            self.down.append(level)
        self.mid = Middle(channels[-1], group_norm)
        self.norm_out = group_norm(channels[-1])
        self.conv_out = conv(channels[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, z_channels, h, w]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels; level 0 is the full resolution and comes last."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        channels = config.level_channels

        def norm(width: int) -> SpatialNorm:
            return SpatialNorm(width, config.embed_dim)

        self.conv_in = conv(config.z_channels, channels[-1])
        self.mid = Middle(channels[-1], norm)
        self.up = nn.ModuleList()
        for i, (outputs, inputs) in enumerate(pairwise([*channels, channels[-1]])):
            level = Level(inputs, outputs, config.num_res_blocks + 1, norm, attention=config.has_attention(i))
            level.upsample = Upsample(outputs) if i else None
            self.up.append(level)
        self.norm_out = norm(channels[0])
        self.conv_out = conv(channels[0], 3)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """[B, z_channels, h, w] and the codes [B, embed_dim, h, w] -> [B, 3, H, W], nominally in [-1, 1]."""
        x = self.mid(self.conv_in(x), codes)
        for level in reversed(self.up):
            x = level(x, codes)
        return self.conv_out(F.silu(self.norm_out(x, codes)))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the encoder's normalisation."""
    return nn.GroupNorm(GROUPS, channels, EPS)


class SpatialNorm(nn.Module):
    """The decoder's normalisation: scaled and shifted by what 1 x 1 convolutions make of the code at each place."""

    def __init__(self, channels: int, code_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = nn.Conv2d(code_channels, channels, 1)
        self.conv_b = nn.Conv2d(code_channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """[B, channels, k h, k w] and codes [B, code_channels, h, w] -> the shape of `x`."""
        # All k x k pixels of a code share its scale and shift: they are computed once and broadcast.
        h, w = codes.shape[2:]
        places = self.norm_layer(x).unflatten(3, (w, -1)).unflatten(2, (h, -1))
        scale, shift = (project(codes)[:, :, :, None, :, None] for project in (self.conv_y, self.conv_b))
        return (places * scale + shift).view_as(x)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any, and the step to the next."""

    def __init__(
        self, inputs: int, outputs: int, count: int, norm: Callable[[int], nn.Module], *, attention: bool
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, norm) for i in range(count))
        self.attn = nn.ModuleList(AttentionBlock(outputs, norm) for _ in range(count if attention else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w], or half or twice the size after a step."""
        for i, block in enumerate(self.block):
            x = block(x, *codes)
            if self.attn:
                x = self.attn[i](x, *codes)
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution, between levels and latents."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm)
        self.attn_1 = AttentionBlock(channels, norm)
        self.block_2 = ResidualBlock(channels, channels, norm)

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, *codes), *codes), *codes)
