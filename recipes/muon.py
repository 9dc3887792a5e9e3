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
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.reshape(matrix.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of a matrix near 1, by a Newton-Schulz iteration of degree five."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(torch.bfloat16 if training.fast_bfloat16() else matrix.dtype)
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
