"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from softcfg.nn.fused import add_gated_products, gelu, products
from softcfg.nn.linear import Linear


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        (hidden,) = products(x, self.fc1)
        return products(gelu(hidden), self.fc2)[0]


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    together = ("w1", "w3")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.w2(self.hidden(x)[1])

    def hidden(self, x: Tensor, added: Tensor | None = None, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream x + added, and of its norm [..., width] -> [..., hidden]."""
        return add_gated_products(x, self.w1, self.w3, added=added, norm=norm)
