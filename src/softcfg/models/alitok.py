"""The AliTok generator: a Llama-style decoder over 17 prefix tokens and a 16 x 16 grid of image tokens.

Parameter names are those of the released checkpoints (`alitok_b.bin`, `alitok_l.bin`, `alitok_xl.bin`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.models.base import ClassCondition, ClassGenerator, Condition
from softcfg.nn.attention import SelfAttention
from softcfg.nn.context import AttentionContext
from softcfg.nn.fused import add_product, products
from softcfg.nn.linear import Linear
from softcfg.nn.mlp import SwiGLU
from softcfg.nn.norm import RMSNorm
from softcfg.nn.rotary import angles_1d, angles_2d, tables_after_condition


@dataclass(frozen=True)
class AliTokConfig:
    """Sizes of an AliTok generator, under the names of the released configurations.

    Attributes:
        codebook_size: V, image codes.
        image_seq_len: T, prefix and grid tokens together.
        grid_size: side of the square token grid.
        prefix_tokens: 1-D tokens in front of the grid; by default what `image_seq_len` leaves.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    codebook_size: int = 4096
    condition_num_classes: int = 1000
    image_seq_len: int = 273
    grid_size: int = 16
    prefix_tokens: int | None = None
    rms_norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        require_positive(
            self, "hidden_size", "num_hidden_layers", "num_attention_heads", "codebook_size",
            "condition_num_classes", "image_seq_len", "grid_size", "rms_norm_eps", "rope_base",
        )  # fmt: skip
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_attention_heads "
                f"({self.num_attention_heads}), for the 2-D rotary embedding"
            )
        if self.prefix < 0 or self.prefix + self.grid_size**2 != self.image_seq_len:
            raise ValueError(
                f"image_seq_len {self.image_seq_len} must be prefix_tokens + grid_size^2, "
                f"here {self.prefix} + {self.grid_size**2}"
            )

    @property
    def prefix(self) -> int:
        """Number of 1-D tokens in front of the grid."""
        return self.image_seq_len - self.grid_size**2 if self.prefix_tokens is None else self.prefix_tokens

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the SwiGLU: 8/3 of the hidden size, rounded up to a multiple of 256."""
        return -(-int(8 * self.hidden_size / 3) // 256) * 256


class AliTokBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        self.norm1 = RMSNorm(width, eps)
        self.attn = SelfAttention(
            width, heads, q_norm=RMSNorm(width // heads, eps), k_norm=RMSNorm(width // heads, eps)
        )
        self.norm2 = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, config.mlp_hidden_size)

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """[rows, n, hidden_size] -> the same shape."""
        attended = self.attn(x, layer, context, norm=self.norm1)
        x, hidden = self.mlp.hidden(x, attended, self.norm2)
        return add_product(x, self.mlp.w2, hidden)


class AliTok(ClassGenerator):
    """The AliTok generator.

    One table embeds image codes (rows 0 .. V - 1), classes (row V + 1 + class) and the null class (the last
    row); row V is not used in sampling.
    """

    condition_slots = 1
    steps_replay = True

    def __init__(self, config: AliTokConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.image_seq_len
        self.vocab_size = config.codebook_size
        self.num_classes = config.condition_num_classes
        head_dim = config.hidden_size // config.num_attention_heads
        self.cache_shape = (config.num_hidden_layers, config.num_attention_heads, head_dim)

        rows = config.codebook_size + config.condition_num_classes + 2
        self.embeddings = nn.Embedding(rows, config.hidden_size)
        self.blocks = nn.ModuleList(AliTokBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = Linear(config.hidden_size, config.codebook_size)
        self.keep_rotary(*rotary_tables(config))

    def embed_condition(self, condition: Condition) -> Tensor:
        """See `Generator.embed_condition`."""
        assert isinstance(condition, ClassCondition)
        return self.embeddings(condition.classes[:, None] + self.vocab_size + 1)

    @property
    def token_embedding(self) -> nn.Embedding:
        """See `Generator.token_embedding`."""
        return self.embeddings

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`."""
        return products(x, self.output, norm=self.norm)[0]


def rotary_tables(config: AliTokConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [1 + T, head_dim / 2], of the condition and the T tokens.

    Prefix tokens are rotated by their position; grid tokens by row and column, counted on from the last prefix
    position.
    """
    pairs = config.hidden_size // config.num_attention_heads // 2
    prefix, side = config.prefix, config.grid_size
    grid = torch.arange(side * side, device="cpu")
    angles = torch.cat(
        (
            angles_1d(torch.arange(prefix, device="cpu"), pairs, config.rope_base),
            angles_2d(prefix + grid // side, prefix + grid % side, pairs, config.rope_base),
        )
    )
    return tables_after_condition(angles)
