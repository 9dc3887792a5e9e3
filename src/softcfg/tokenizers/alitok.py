"""The AliTok tokenizer: a transformer autoencoder, 17 prefix and 256 grid tokens at 256 px.

AliTok (https://arxiv.org/abs/2506.05289, https://github.com/ali-vilab/alitok), the second stage with its
bidirectional decoder. Parameter names are those of the released `AliTok.pth`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_multiple, require_positive
from softcfg.nn.attention import FullAttention
from softcfg.tokenizers.base import Codebook, Tokenizer


@dataclass(frozen=True)
class AliTokTokenizerConfig:
    """Sizes of an `AliTokTokenizer`; the defaults are the released one (its YAML gives the first three only).

    Attributes:
        codebook_size, token_size: codes, and channels of a code.
        num_latent_tokens: T, the tokens of an image: the prefix, then one per patch.
        aux_tokens: tokens of the prefix; by default what `num_latent_tokens` leaves beside the patches.
        num_buffer_tokens: learned inputs of the decoder in front of the T tokens.
        use_l2_norm: compare and read codes at unit length.
    """

    codebook_size: int = 4096
    token_size: int = 32
    num_latent_tokens: int = 273
    image_size: int = 256
    patch_size: int = 16
    aux_tokens: int | None = None
    num_buffer_tokens: int = 32
    encoder_width: int = 768
    encoder_num_layers: int = 12
    encoder_num_heads: int = 12
    decoder_width: int = 1024
    decoder_num_layers: int = 24
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-5
    use_l2_norm: bool = False

    def __post_init__(self) -> None:
        require_positive(
            self, "codebook_size", "token_size", "num_latent_tokens", "image_size", "patch_size",
            "encoder_width", "encoder_num_layers", "encoder_num_heads",
            "decoder_width", "decoder_num_layers", "decoder_num_heads", "mlp_ratio", "layer_norm_eps",
        )  # fmt: skip
        if self.num_buffer_tokens < 0:
            raise ValueError(f"num_buffer_tokens must be 0 or more, got {self.num_buffer_tokens}")
        require_multiple(
            self,
            ("image_size", "patch_size"),
            ("encoder_width", "encoder_num_heads"),
            ("decoder_width", "decoder_num_heads"),
        )
        patches = self.grid_size**2
        prefix = self.num_latent_tokens - patches
        if prefix < 0 or self.aux_tokens not in (None, prefix):
            raise ValueError(
                f"num_latent_tokens {self.num_latent_tokens} must be aux_tokens plus one per patch, "
                f"here {self.aux_tokens or 0} + {patches}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


class AliTokTokenizer(Tokenizer):
    """The AliTok tokenizer: prefix tokens, then the patches in raster order.

    Latents are [B, token_size, 1, T]. Decoding needs `decoder` and `quantize` only.
    """

    def __init__(self, config: AliTokTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.num_latent_tokens
        self.latent_size = (1, config.num_latent_tokens)
        self.codebook_size = config.codebook_size
        self.image_size = config.image_size
        self.latent_tokens = table(config.num_latent_tokens, config.encoder_width)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.token_size, l2_norm=config.use_l2_norm)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, token_size, 1, T] of pixels [B, 3, H, W] in [0, 1]."""
        return self.encoder(pixels, self.latent_tokens)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W] of latents [B, token_size, 1, T]; a sigmoid keeps them in [0, 1]."""
        return self.decoder(latents)


class Encoder(nn.Module):
    """Pixels to latents: patches and learned latent tokens attend to all, the latent tokens are kept."""

    def __init__(self, config: AliTokTokenizerConfig) -> None:
        super().__init__()
        width, patch = config.encoder_width, config.patch_size
        self.patches = config.grid_size**2
        self.positional_embedding = table(self.patches, width)
        self.latent_token_positional_embedding = table(config.num_latent_tokens, width)
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.ln_pre = nn.LayerNorm(width, config.layer_norm_eps)
        self.transformer = transformer(width, config.encoder_num_layers, config.encoder_num_heads, config)
        self.ln_post = nn.LayerNorm(width, config.layer_norm_eps)
        self.conv_out = Pointwise(width, config.token_size)

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] and latent tokens [T, width] -> [B, token_size, 1, T]."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.positional_embedding
        latent_tokens = latent_tokens + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat((x, latent_tokens.expand(len(x), -1, -1)), dim=1))
        for layer in self.transformer:
            x = layer(x)
        return self.conv_out(self.ln_post(x[:, self.patches :])).transpose(1, 2).unsqueeze(2)


class Decoder(nn.Module):
    """Latents to pixels: buffer tokens in front, the last outputs are the patches of the image."""

    def __init__(self, config: AliTokTokenizerConfig) -> None:
        super().__init__()
        width, patch, buffer = config.decoder_width, config.patch_size, config.num_buffer_tokens
        self.grid, self.patch = config.grid_size, patch
        self.class_embedding = table(buffer, width)
        self.latent_token_positional_embedding = table(buffer + config.num_latent_tokens, width)
        self.decoder_embed = nn.Linear(config.token_size, width)
        self.ln_pre = nn.LayerNorm(width, config.layer_norm_eps)
        self.transformer = transformer(width, config.decoder_num_layers, config.decoder_num_heads, config)
        self.ln_post = nn.LayerNorm(width, config.layer_norm_eps)
        self.ffn = nn.Sequential(Pointwise(width, patch * patch * 3))
        self.conv_out = Pointwise(3, 3)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, token_size, 1, T] -> [B, 3, H, W] in [0, 1]."""
        x = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        x = torch.cat((self.class_embedding.expand(len(x), -1, -1), x), dim=1)
        x = self.ln_pre(x + self.latent_token_positional_embedding)
        for layer in self.transformer:
            x = layer(x)
        grid, patch = self.grid, self.patch
        x = self.ffn(self.ln_post(x[:, -grid * grid :]))
        x = x.view(len(x), grid, grid, patch, patch, 3)  # row, column, row in patch, column in patch, colour
        x = self.conv_out(x).sigmoid_()
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, grid * patch, grid * patch)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution whose inputs have their channels last, so a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class Layer(nn.Module):
    """Pre-norm transformer layer without a mask."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = FullAttention(width, heads, ("in_proj", "out_proj"))
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, width] -> the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self.c_proj(F.gelu(self.c_fc(x)))


def transformer(width: int, layers: int, heads: int, config: AliTokTokenizerConfig) -> nn.ModuleList:
    """Return the layers of the encoder or the decoder."""
    return nn.ModuleList(Layer(width, heads, config.mlp_ratio, config.layer_norm_eps) for _ in range(layers))


def table(rows: int, width: int) -> nn.Parameter:
    """Return a learned table [rows, width] with small initial values."""
    return nn.Parameter(nn.init.normal_(torch.empty(rows, width), std=width**-0.5))
