"""The RobusTok tokenizer: two vision transformers around a codebook, 256 tokens in raster order at 256 px.

RobusTok (https://github.com/qiuk2/RobusTok), which trains its decoder on perturbed tokens. Parameter names are those of
the released `main-train.pt` and `post-train.pt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softcfg.configuration import require_multiple, require_positive
from softcfg.nn.attention import FullAttention
from softcfg.nn.mlp import MLP
from softcfg.tokenizers.base import Codebook, Tokenizer

EPS = 1e-6  # of every layer norm


@dataclass(frozen=True)
class RobusTokTokenizerConfig:
    """Sizes of a `RobusTokTokenizer`; the defaults are the released one.

    Attributes:
        codebook_size, codebook_embed_dim: codes, and channels of a code.
        codebook_l2_norm: compare and read codes at unit length.
        vit_embed_dim, vit_depth, vit_num_heads, mlp_ratio: of the encoder and of the decoder.
        num_latent_tokens: T, one per patch; by default what `image_size` and `patch_size` give.
    """

    codebook_size: int = 4096
    codebook_embed_dim: int = 64
    codebook_l2_norm: bool = True
    vit_embed_dim: int = 768
    vit_depth: int = 12
    vit_num_heads: int = 12
    mlp_ratio: float = 4.0
    image_size: int = 256
    patch_size: int = 16
    num_latent_tokens: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "codebook_size", "codebook_embed_dim", "vit_embed_dim", "vit_depth", "vit_num_heads", "mlp_ratio",
            "image_size", "patch_size",
        )  # fmt: skip
        require_multiple(self, ("image_size", "patch_size"), ("vit_embed_dim", "vit_num_heads"))
        if self.num_latent_tokens not in (None, self.grid_size**2):
            raise ValueError(
                f"num_latent_tokens {self.num_latent_tokens} must be one per patch, here {self.grid_size**2}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


class RobusTokTokenizer(Tokenizer):
    """The RobusTok tokenizer. Decoding needs `decoder`, `post_quant_conv` and `quantize` only."""

    rounds = True

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.set_size(config.image_size, config.patch_size)
        self.codebook_size = config.codebook_size
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.vit_embed_dim, config.codebook_embed_dim, 1)
        self.quantize = Codebook(config.codebook_size, config.codebook_embed_dim, l2_norm=config.codebook_l2_norm)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.vit_embed_dim, 1)
        self.decoder = Decoder(config)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, codebook_embed_dim, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        x = self.encoder(2 * pixels - 1)
        return self.quant_conv(x.transpose(1, 2).unflatten(2, self.latent_size))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W], nominally in [0, 1], of latents [B, codebook_embed_dim, h, w]."""
        x = self.post_quant_conv(latents).flatten(2).transpose(1, 2)
        return (self.decoder(x) + 1) / 2


class Encoder(nn.Module):
    """Pixels to latents: patches and learned latent tokens attend to all, the latent tokens are kept."""

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.model.patch_embed = PatchEmbedding(config)
        self.latent_tokens = table(1, config.grid_size**2, config.vit_embed_dim)
        self.lvl_embed = nn.Embedding(2, config.vit_embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> [B, T, vit_embed_dim]."""
        patches = self.model.place(self.model.patch_embed(pixels)) + self.lvl_embed.weight[0]
        latents = self.model.place(self.latent_tokens)[:, 1:] + self.lvl_embed.weight[1]  # without a class token
        x = self.model(torch.cat((patches, latents.expand(len(patches), -1, -1)), dim=1))
        return x[:, patches.shape[1] :]


class Decoder(nn.Module):
    """Codes to pixels: a mask token per patch and the codes attend to all, the mask tokens become the patches."""

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        self.grid, self.patch = config.grid_size, config.patch_size
        self.model = Trunk(config)
        self.mask_token = table(1, 1, config.vit_embed_dim)
        self.lvl_embed = nn.Embedding(2, config.vit_embed_dim)
        self.to_pixel = nn.ModuleDict({"model": nn.Linear(config.vit_embed_dim, 3 * config.patch_size**2)})

    def forward(self, codes: Tensor) -> Tensor:
        """[B, T, vit_embed_dim] -> pixels [B, 3, H, W], nominally in [-1, 1]."""
        batch, count, _ = codes.shape
        masks = self.model.place(self.mask_token.expand(batch, count, -1)) + self.lvl_embed.weight[0]
        codes = self.model.place(codes) + self.lvl_embed.weight[1]
        x = self.model(torch.cat((masks, codes), dim=1))[:, 1 : 1 + count]
        x = self.to_pixel["model"](x)
        # row, column, row in patch, column in patch, colour
        x = x.view(batch, self.grid, self.grid, self.patch, self.patch, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, self.grid * self.patch, self.grid * self.patch)


class Trunk(nn.Module):
    """A vision transformer as DINOv2 has it: class token, learned positions, layer-scaled blocks, final norm."""

    patch_embed: nn.Module  # in the encoder

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        width = config.vit_embed_dim
        self.cls_token = table(1, 1, width)
        self.pos_embed = table(1, 1 + config.grid_size**2, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vit_depth))
        self.norm = nn.LayerNorm(width, EPS)

    def place(self, tokens: Tensor) -> Tensor:
        """Put the class token in front of a grid of tokens [B, T, width] and add the positions."""
        return torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, width] -> the same shape."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PatchEmbedding(nn.Module):
    """One token per patch."""

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.vit_embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, vit_embed_dim]."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block without a mask, its branches scaled by learned vectors."""

    def __init__(self, config: RobusTokTokenizerConfig) -> None:
        super().__init__()
        width = config.vit_embed_dim
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = FullAttention(width, config.vit_num_heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, width] -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return x * self.gamma


def table(*shape: int) -> nn.Parameter:
    """Return a learned table with small initial values."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
