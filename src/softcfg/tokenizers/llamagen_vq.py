"""The tokenizer of LlamaGen: a convolutional autoencoder with attention at its lowest resolution.

LlamaGen (https://arxiv.org/abs/2406.06525, https://github.com/FoundationVision/LlamaGen): VQ-16 and VQ-8, whose tokens
are 16 and 8 pixels wide. Parameter names are those of the released `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.tokenizers.base import Codebook, Tokenizer
from softcfg.tokenizers.convolution import Decoder, Encoder, PartNames, check_levels, check_size

NAMES = PartNames(levels=("conv_blocks", "conv_blocks"), blocks="res", middle=("0", "1", "2"), lowest_first=True)


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

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of `level` are followed by attention: those of the lowest resolution."""
        return level == len(self.ch_mult) - 1


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
        self.encoder = Encoder(config, self._norm, NAMES)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.quantize = Codebook(config.codebook_size, config.codebook_embed_dim, l2_norm=config.codebook_l2_norm)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config, self._norm, NAMES)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, codebook_embed_dim, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        # Channels-last order is faster on a CPU, but its group norm there is ten times less accurate.
        return self.quant_conv(self.encoder(2 * pixels.contiguous() - 1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels, nominally in [0, 1], of latents [B, codebook_embed_dim, h, w]."""
        return (self.decoder(self.post_quant_conv(latents.contiguous())) + 1) / 2

    def _norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.config.num_groups, channels, eps=self.config.norm_eps)
