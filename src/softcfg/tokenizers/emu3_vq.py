"""The image tokenizer of Emu3: MoVQGAN for video, used on pictures.

Emu3 (https://arxiv.org/abs/2409.18869, https://github.com/baaivision/Emu3). Parameter names are those of
`BAAI/Emu3-VisionTokenizer`; files of the transformers library hold the same tensors under other names.

The tokenizer makes one code grid of four frames. All convolutions in time are causal, and a picture is the first of the
four frames that a code grid decodes to, so decoding takes that frame alone through all layers: it depends on nothing of
the later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.layouts import rename
from softcfg.tokenizers.base import Codebook, Tokenizer
from softcfg.tokenizers.convolution import check_size
from softcfg.tokenizers.movq import EPS, GROUPS, Decoder, Encoder, MoVQConfig, decode_in_pieces

PAST_FRAMES = 2  # zero frames in front of every convolution in time


@dataclass(frozen=True)
class Emu3VQConfig:
    """Sizes of an `Emu3VQ`, under the names of the released configuration; the defaults are the released model's.

    Level i works on 1 / 2^i of the resolution with `ch * ch_mult[i]` channels.

    Attributes:
        codebook_size, embed_dim: the codebook.
        z_channels: of the latents; equal to `embed_dim`, as released.
        temporal_downsample_factor: frames that share a code grid, a power of 2.
        attn_resolutions: the levels, by their number, that have attention.
        image_size: H and W of the images, unless given otherwise with them.
        double_z, num_groups, norm_eps: False, 32 and 1e-6, as released.
    """

    codebook_size: int = 32768
    embed_dim: int = 4
    z_channels: int = 4
    double_z: bool = False
    temporal_downsample_factor: int = 4
    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (3,)
    num_groups: int = GROUPS
    norm_eps: float = EPS
    batch_norm_eps: float = 1e-5
    image_size: int = 720

    def __post_init__(self) -> None:
        require_positive(self, "codebook_size", "temporal_downsample_factor", "batch_norm_eps", "image_size")
        if self.temporal_downsample_factor & (self.temporal_downsample_factor - 1):
            raise ValueError(f"temporal_downsample_factor must be a power of 2, got {self.temporal_downsample_factor}")
        if self.z_channels != self.embed_dim:
            raise ValueError(f"z_channels {self.z_channels} must be equal to embed_dim ({self.embed_dim})")
        if (self.double_z, self.num_groups, self.norm_eps) != (False, GROUPS, EPS):
            raise ValueError(f"double_z must be false, num_groups {GROUPS} and norm_eps {EPS}")
        if not all(0 <= level < len(self.ch_mult) for level in self.attn_resolutions):
            levels = list(self.attn_resolutions)
            raise ValueError(f"attn_resolutions must list levels from 0 to {len(self.ch_mult) - 1}, got {levels}")
        check_size(self, "image_size", self.spatial.patch_size)

    @property
    def spatial(self) -> MoVQConfig:
        """The layers that work on single frames; they are those of a `MoVQ`."""
        side = 2 ** (len(self.ch_mult) - 1)
        return MoVQConfig(
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            attn_resolutions=tuple(side >> level for level in self.attn_resolutions),
            resolution=side,
            z_channels=self.z_channels,
            n_embed=self.codebook_size,
            embed_dim=self.embed_dim,
        )

    @property
    def time_steps(self) -> int:
        """How often the encoder halves, and the decoder doubles, the number of frames."""
        return self.temporal_downsample_factor.bit_length() - 1


class Emu3VQ(Tokenizer):
    """Emu3's tokenizer: codes in raster order, for images of any size whose sides are multiples of `patch_size`."""

    any_size = True

    def __init__(self, config: Emu3VQConfig) -> None:
        super().__init__()
        self.config = config
        self.set_size(config.image_size, config.spatial.patch_size)
        self.codebook_size = config.codebook_size
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)
        self.quantize = Codebook(config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv(config.z_channels, config.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv(config.embed_dim, config.z_channels, (3, 1, 1))

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, embed_dim, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        return self.quant_conv(self.encoder(2 * pixels.contiguous() - 1))[:, :, 0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W], nominally in [0, 1], of latents [B, embed_dim, h, w]; a few images at a time."""

        def decode(codes: Tensor) -> Tensor:
            frame = codes[:, :, None]
            return self.decoder(self.post_quant_conv(frame), frame)

        return (decode_in_pieces(decode, latents, self.patch_size) + 1) / 2


class VideoEncoder(Encoder):
    """A picture, as a clip in which nothing moves, to the latents of its one code grid."""

    def __init__(self, config: Emu3VQConfig) -> None:
        super().__init__(config.spatial)
        width = config.z_channels
        self.frames = config.temporal_downsample_factor
        self.time_conv = nn.ModuleList(TimeStep(width, frames=4, stride=2) for _ in range(config.time_steps))
        self.time_res_stack = residual_frames(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, z_channels, 1, h, w]."""
        x = super().forward(x)[:, :, None].expand(-1, -1, self.frames, -1, -1)
        for step in self.time_conv:
            x = F.silu(step(x))
        return self.time_res_stack(x)


class VideoDecoder(Decoder):
    """Latents of a code grid to the first of its frames."""

    def __init__(self, config: Emu3VQConfig) -> None:
        super().__init__(config.spatial)
        width = config.z_channels
        self.time_res_stack = residual_frames(config)
        self.time_conv = nn.ModuleList(TimeStep(width, frames=3, stride=1) for _ in range(config.time_steps))

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, z_channels, 1, h, w] and the codes [B, embed_dim, 1, h, w] -> [B, 3, H, W], nominally in [-1, 1]."""
        return super().forward(self._first_frame(x), *map(self._first_frame, codes))

    def _first_frame(self, x: Tensor) -> Tensor:
        x = self.time_res_stack(x)
        # A step doubles every frame and convolves; the new first frame is the convolution of the old one alone.
        for step in self.time_conv:
            x = F.silu(step(x))
        return x[:, :, 0]


class CausalConv(nn.Module):
    """Convolution of frames [B, channels, frames, h, w]: in time over the past, in space centred."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(stride, 1, 1), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, n, h, w] -> [B, outputs, n, h, w], or n / 2 frames with a kernel of 4 and stride 2."""
        return self.conv(F.pad(x, (0, 0, 0, 0, PAST_FRAMES, 0)))


class TimeStep(nn.Module):
    """The convolution of a step to half or twice the number of frames."""

    def __init__(self, width: int, *, frames: int, stride: int) -> None:
        super().__init__()
        self.conv = CausalConv(width, width, (frames, 3, 3), stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, n, h, w] -> [B, width, n / stride, h, w]."""
        return self.conv(x)


class ResidualFrames(nn.Module):
    """Two normalised convolutions in time and space and a shortcut."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(width, eps=eps)
        self.conv1 = CausalConv(width, width, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(width, eps=eps)
        self.conv2 = CausalConv(width, width, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, n, h, w] -> the same shape."""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


def residual_frames(config: Emu3VQConfig) -> nn.Sequential:
    """Return the blocks in time that encoder and decoder have next to the latents."""
    return nn.Sequential(
        *(ResidualFrames(config.z_channels, config.batch_norm_eps) for _ in range(config.num_res_blocks))
    )


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an `Emu3VQ`, of its own file or of a whole checkpoint of the transformers library."""
    renamed = rename(
        tensors,
        prefixes=("model.vqmodel.", "vqmodel."),
        patterns=[
            (r"\.down_block\.down\.", ".down."),
            (r"\.up_block\.up\.", ".up."),
            (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
            (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
            (r"\.middle_block\.", ".mid."),
            (r"\.([qkv])_proj\.", r".\1."),
            (r"\.out_proj\.", ".proj_out."),
        ],
    )
    # The library has linear layers where the original has 1 x 1 convolutions.
    projections = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {
        name: tensor[:, :, None, None] if name.endswith(projections) and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }
