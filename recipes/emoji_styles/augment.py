"""Pictures turned, scaled and shifted a little, so that a network does not learn each of them by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """Bounds of what moves, drawn uniformly: degrees, and shares of the size."""

    turn: float = 0.0
    scale: float = 0.0
    shift: float = 0.0


def moved(pixels: Tensor, moves: Moves, numbers: torch.Generator) -> Tensor:
    """Move each picture of [B, 3, S, S] in [0, 1] at random; white comes in from outside."""
    turn, scale, across, down = torch.rand(4, len(pixels), generator=numbers).mul(2).sub(1)
    turn, scale = torch.deg2rad(moves.turn * turn), 1 + moves.scale * scale
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack([cosine, -sine, 2 * moves.shift * across, sine, cosine, 2 * moves.shift * down], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)
