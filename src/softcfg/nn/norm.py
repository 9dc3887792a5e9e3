"""Norms in fewer operations than PyTorch's own take on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, which on a CPU is thirteen operations; here it is six, for what has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., normalized_shape] -> the same shape."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or self.eps is None:
            return super().forward(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = torch.addcmul(length.new_full((1,), self.eps), length, length, value=1 / x.shape[-1])
        return (x * mean.rsqrt_()).mul_(self.weight)
