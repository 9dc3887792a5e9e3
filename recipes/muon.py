"""Muon for matrices and kernels: in bfloat16 where it is fast, else in the precision of the weights.

`torch.optim.Muon` always works in bfloat16, which most CPUs only emulate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recipes import training


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made (nearly) orthogonal; for the matrices inside a network.

    The kernel of a convolution counts as a matrix of [outputs, inputs x area].

    The update has the root mean square 0.2, as AdamW's does, so the learning rates of the two compare.
    Source: https://kellerjordan.github.io/posts/muon and https://arxiv.org/abs/2502.16982.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault((matrix.shape[0], matrix[0].numel()), []).append(matrix)
            for shape, matrices in alike.items():
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                momenta = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                wanted = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).flatten(2)
                updates = orthogonal(wanted).view(-1, *matrices[0].shape).unbind()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of matrices [..., m, n] near 1, by a Newton-Schulz iteration of degree five."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(
        torch.bfloat16 if training.fast_bfloat16() else matrices.dtype
    )
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
