"""Rotary position embedding, over adjacent channel pairs or over the two halves of the channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotations of the positions of a pass, and which channels form a pair.

    Attributes:
        cos, sin: float32 [n, head_dim / 2], or [rows, n, head_dim / 2] if rows have positions of their own.
        halves: pairs are (i, head_dim / 2 + i), as in `rotate_halves`, rather than (2i, 2i+1), as in `rotate`.
    """

    cos: Tensor
    sin: Tensor
    halves: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [rows, heads, n, head_dim]."""
        if self.halves:
            return rotate_halves(x, self.cos, self.sin)
        if {x.dtype, self.cos.dtype} != {torch.float32} or x.stride(-1) != 1 or torch.is_grad_enabled():
            return rotate(x, self.cos, self.sin)
        # As `rotate` to the bit, in fewer operations.
        return (x.view(torch.complex64) * self._turns).view(torch.float32)

    @cached_property
    def first_cos(self) -> Tensor:
        """`cos` of the first slot, [rows or 1, head_dim / 2]."""
        return self.cos[:1] if self.cos.dim() == 2 else self.cos[:, 0]

    @cached_property
    def first_sin(self) -> Tensor:
        """`sin` of the first slot, [rows or 1, head_dim / 2]."""
        return self.sin[:1] if self.sin.dim() == 2 else self.sin[:, 0]

    @cached_property
    def _turns(self) -> Tensor:
        turns = torch.complex(self.cos, self.sin)
        return turns if turns.dim() == 2 else turns[:, None]

    def later(self, by: int) -> Rotary:
        """The rotations without those of the first `by` positions."""
        return Rotary(self.cos[..., by:, :], self.sin[..., by:, :], self.halves)

    def on(self, device: torch.device) -> Rotary:
        """The same rotations on `device`."""
        return Rotary(self.cos.to(device), self.sin.to(device), self.halves)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i+1) of `x` [..., n, head_dim] by the angles of each position.

    Args:
        cos, sin: [n, head_dim / 2], or [rows, n, head_dim / 2] for `x` [rows, heads, n, head_dim] whose rows have
            positions of their own, float32. Inputs (and tables) of lower precision are rotated in float32.
    """
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    dtype = _at_least_float32(x, cos)
    # As complex numbers, (a + ib)(cos + i sin), it is one operation rather than six.
    pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))
    rotated = pairs * torch.complex(cos.to(dtype), sin.to(dtype))
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like `rotate`, for the channel pairs (i, head_dim / 2 + i)."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(_at_least_float32(x, cos)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _at_least_float32(x: Tensor, cos: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)


def tables_after_condition(angles: Tensor, slots: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and sines [slots + T, pairs] of the angles [T, pairs] of the tokens, after the slots of the condition.

    The rows of the condition are zero in both, which makes zero vectors of its queries and keys.
    """
    cos, sin = (F.pad(table, (0, 0, slots, 0)) for table in (angles.cos(), angles.sin()))
    return cos, sin


def angles_1d(positions: Tensor, pairs: int, base: float) -> Tensor:
    """Angles [len(positions), pairs] with frequencies base^(-i / pairs), i = 0 .. pairs - 1, in float32."""
    frequencies = base ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    return (positions.double()[:, None] * frequencies).float()


def angles_2d(rows: Tensor, columns: Tensor, pairs: int, base: float) -> Tensor:
    """Angles [len(rows), pairs]: the first half of the pairs rotate with the row, the second half with the column."""
    half = pairs // 2
    return torch.cat((angles_1d(rows, half, base), angles_1d(columns, half, base)), dim=1)
