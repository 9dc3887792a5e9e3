"""Norms in fewer operations than PyTorch's own take on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension: on a CPU, without a gradient, six operations instead of thirteen."""

    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = torch.addcmul(length.new_full((1,), self.eps), length, length, value=1 / x.shape[-1])
        return (x * mean.rsqrt_()).mul_(self.weight)
