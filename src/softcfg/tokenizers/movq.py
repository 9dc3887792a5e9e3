"""MoVQGAN: a convolutional autoencoder whose decoder's norms are modulated by the codes.

MoVQ (https://arxiv.org/abs/2209.09002), as released in https://github.com/ai-forever/MoVQGAN; Lumina-mGPT 2.0 draws its
codes. Parameter names are those of the released `movqgan_270M.ckpt`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.tokenizers import convolution
from softcfg.tokenizers.base import Codebook, Tokenizer
from softcfg.tokenizers.convolution import PartNames, check_levels, check_size

GROUPS = 32
EPS = 1e-6
NAMES = PartNames(levels=("down", "up"), blocks="block", middle=("block_1", "attn_1", "block_2"))
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


class Encoder(convolution.Encoder):
    """Pixels to latents."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__(config, group_norm, NAMES)


class Decoder(convolution.Decoder):
    """Latents and codes to pixels."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__(config, functools.partial(SpatialNorm, code_channels=config.embed_dim), NAMES)


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
