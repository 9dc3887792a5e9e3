"""The decoder of Llama (https://arxiv.org/abs/2302.13971), under the parameter names of its published weights."""

from __future__ import annotations

from torch import Tensor, nn

from softcfg.nn.attention import attend
from softcfg.nn.context import AttentionContext
from softcfg.nn.fused import add_gated_products, add_product, products
from softcfg.nn.linear import Linear
from softcfg.nn.norm import RMSNorm


class LlamaAttention(nn.Module):
    """Causal self-attention without biases, in which `key_heads` serve neighbouring query heads each.

    `q_norm` and `k_norm` act on queries and keys [rows, heads, n, head_dim]; without them they stay as they are.
    """

    together = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self, width: int, heads: int, key_heads: int, q_norm: nn.Module | None = None, k_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, key_heads * self.head_dim, bias=False)
        self.v_proj = Linear(width, key_heads * self.head_dim, bias=False)
        self.o_proj = Linear(width, width, bias=False)
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm

    def forward(self, x: Tensor, layer: int, context: AttentionContext, *, norm: nn.Module | None = None) -> Tensor:
        """Of norm(x) [rows, n, width] -> the same shape; writes the new keys and values into the cache."""
        query, key, value = (
            product.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for product in products(x, self.q_proj, self.k_proj, self.v_proj, norm=norm)
        )
        return products(attend(query, key, value, layer, context, self.q_norm, self.k_norm), self.o_proj)[0]


class LlamaMLP(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    together = ("gate_proj", "up_proj")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.down_proj(self.hidden(x)[1])

    def hidden(self, x: Tensor, added: Tensor | None = None, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x + added, and of its norm [..., width] -> [..., hidden]."""
        return add_gated_products(x, self.gate_proj, self.up_proj, added=added, norm=norm)


class LlamaBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, attention: LlamaAttention, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(width, hidden)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """[rows, n, width] -> the same shape."""
        attended = self.self_attn(x, layer, context, norm=self.input_layernorm)
        x, hidden = self.mlp.hidden(x, attended, self.post_attention_layernorm)
        return add_product(x, self.mlp.down_proj, hidden)


class LlamaDecoder(nn.Module):
    """Token embedding, blocks and the last norm."""

    def __init__(self, vocab_size: int, width: int, blocks: list[LlamaBlock], eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(width, eps)
