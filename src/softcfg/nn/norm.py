"""Norms in fewer operations than PyTorch's own take on a CPU, where each costs as much as a small step's arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, addcmul, nn
from torch.linalg import vector_norm

RMS, LAYER = 1, 2  # kinds of norm, as the kernels call them; 0 for none


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension: on a CPU, without a gradient, five operations instead of thirteen."""

    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self._share = 1 / width

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "eps":  # as the operations take it
            self._eps = torch.full((1,), value, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self.normalised(x).mul_(self.weight) if self.takes_five(x) else super().forward(x)

    def takes_five(self, x: Tensor) -> bool:
        """Whether the five operations serve `x`."""
        return x.is_cpu and x.dtype is torch.float32 and not torch.is_grad_enabled()

    def normalised(self, x: Tensor) -> Tensor:
        """What is multiplied with the weights, a new tensor [..., width]."""
        length = vector_norm(x, dim=-1, keepdim=True)
        return addcmul(self._eps, length, length, value=self._share).rsqrt_() * x
