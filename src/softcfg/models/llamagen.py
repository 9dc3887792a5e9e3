"""The LlamaGen generators: a Llama decoder over a square grid of image tokens.

LlamaGen (https://arxiv.org/abs/2406.06525, https://github.com/FoundationVision/LlamaGen). Parameter names are those of
the released checkpoints (`c2i_B_256.pt` to `c2i_3B_384.pt`); the models for 256 and 384 px differ in their grid alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.models.base import ClassCondition, ClassGenerator, Condition, Generator
from softcfg.nn.attention import attend, split_heads
from softcfg.nn.context import AttentionContext
from softcfg.nn.fused import add_product, products
from softcfg.nn.linear import Linear
from softcfg.nn.mlp import SwiGLU
from softcfg.nn.norm import RMSNorm
from softcfg.nn.rotary import angles_2d, tables_after_condition


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen generator, under the names of the released code.

    Attributes:
        vocab_size: V, image codes.
        block_size: T, image tokens of a square grid: 256 at 256 px, 576 at 384 px.
        ffn_hidden_dim: width of the SwiGLU; by default 8/3 of `dim`, rounded up to a multiple of `multiple_of`.
        cls_token_num: slots in front of the image, 1 for the class.
        model_type: "c2i", the class-conditional models.
    """

    kind: ClassVar[str] = "c2i"

    dim: int
    n_layer: int
    n_head: int
    num_classes: int = 1000
    vocab_size: int = 16384
    block_size: int = 256
    ffn_hidden_dim: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    cls_token_num: int = 1
    model_type: str = "c2i"

    def __post_init__(self) -> None:
        require_positive(
            self, "dim", "n_layer", "n_head", "num_classes", "vocab_size", "block_size", "multiple_of", "norm_eps",
            "rope_base",
        )  # fmt: skip
        if self.ffn_hidden_dim is not None:
            require_positive(self, "ffn_hidden_dim")
        if self.model_type != self.kind:
            other = {"c2i": "llamagen", "t2i": "llamagen-t2i"}.get(self.model_type, "another one")
            raise ValueError(f"model_type must be {self.kind}, got {self.model_type}, which is the family {other}")
        if self.kind == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"cls_token_num must be 1, the class, got {self.cls_token_num}")
        if self.dim % (4 * self.n_head):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 x n_head ({self.n_head}), for the rotary embedding"
            )
        if self.grid_size**2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} must be the square of a whole number")

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.block_size)

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        return -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of


class Attention(nn.Module):
    """Multi-head causal self-attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(width, 3 * width, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(self, x: Tensor, layer: int, context: AttentionContext, *, norm: nn.Module | None = None) -> Tensor:
        """Of norm(x) [rows, n, width] -> the same shape; writes the new keys and values into the cache."""
        query, key, value = split_heads(products(x, self.wqkv, norm=norm)[0], self.heads)
        return products(attend(query, key, value, layer, context), self.wo)[0]


class LlamaGenBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.n_head)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.ffn_width)

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """[rows, n, dim] -> the same shape."""
        attended = self.attention(x, layer, context, norm=self.attention_norm)
        x, hidden = self.feed_forward.hidden(x, attended, self.ffn_norm)
        return add_product(x, self.feed_forward.w2, hidden)


class LlamaGenBody(Generator):
    """What the LlamaGen generators share: all but the condition."""

    no_split_modules = ("LlamaGenBlock",)
    steps_replay = True

    config: LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.block_size
        self.vocab_size = config.vocab_size
        head_dim, side = config.dim // config.n_head, config.grid_size
        self.cache_shape = (config.n_layer, config.n_head, head_dim)

        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(LlamaGenBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        position = torch.arange(side * side, device="cpu")
        angles = angles_2d(position // side, position % side, head_dim // 2, config.rope_base)
        self.keep_rotary(*tables_after_condition(angles, config.cls_token_num))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, under the name of the released checkpoints."""
        return self.layers

    @property
    def token_embedding(self) -> nn.Embedding:
        """See `Generator.token_embedding`."""
        return self.tok_embeddings

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`."""
        return products(x, self.output, norm=self.norm)[0]


class LlamaGen(LlamaGenBody, ClassGenerator):
    """The class-conditional LlamaGen generator.

    The sequence is: class, image tokens in raster order. The table of classes ends with the null class.
    """

    condition_slots = 1

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.dim)})

    def embed_condition(self, condition: Condition) -> Tensor:
        """See `Generator.embed_condition`."""
        assert isinstance(condition, ClassCondition)
        return self.cls_embedding["embedding_table"](condition.classes)[:, None]
