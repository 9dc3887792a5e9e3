"""Pictures moved, mirrored and disguised a little, so that a network does not learn each of them by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """Bounds of what moves, drawn uniformly: degrees, and shares of the size; how many of the pictures are mirrored."""

    turn: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    mirrored: float = 0.0


def moved(pixels: Tensor, moves: Moves, numbers: torch.Generator, mirror: Tensor | None = None) -> Tensor:
    """Move each picture of [B, 3, S, S] in [0, 1] at random; white comes in from outside.

    Args:
        pixels: the pictures.
        moves: how far.
        numbers: a generator of the CPU, for whatever device the pictures are on.
        mirror: bool [B], which pictures may be mirrored; all by default.
    """
    turn, scale, across, down, flip = torch.rand(5, len(pixels), generator=numbers).mul(2).sub(1)
    turn, scale = torch.deg2rad(moves.turn * turn), 1 + moves.scale * scale
    flipped = flip.add(1).div(2) < moves.mirrored
    if mirror is not None:
        flipped &= mirror
    side = 1 - 2 * flipped.float()
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack([side * cosine, -sine, 2 * moves.shift * across, side * sine, cosine, 2 * moves.shift * down], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3).to(pixels.device), list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


TURNED, GREY, OUTLINED, BLURRED, COVERED = 0.3, 0.12, 0.08, 0.4, 0.5  # shares of the pictures, see `disguised`


def disguised(pixels: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Change what does not make a thing what it is: hue, light, sharpness; cover a part.

    Args:
        pixels: [B, 3, S, S] in [0, 1].
        numbers: as for `moved`.

    Returns:
        The pictures, and bool [B] whether style and colour are as they were.
    """
    batch, size, device = len(pixels), pixels.shape[2], pixels.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=numbers).mul(high - low).add(low).to(device).view(-1, 1, 1, 1)

    what = uniform(0, 1)
    turned, grey = what < TURNED, (what >= TURNED) & (what < TURNED + GREY)
    outlined = what > 1 - OUTLINED
    light = pixels.mean(1, keepdim=True)
    # A turn of the colours about the grey axis.
    angle = torch.pi * uniform(0.2, 1.8)
    others = (pixels.roll(1, 1) - pixels.roll(2, 1)) / 3**0.5
    found = torch.where(turned, light + (pixels - light) * angle.cos() + others * angle.sin(), pixels)
    found = torch.where(grey, light.expand_as(found), found)
    edges = F.pad(light.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(light.diff(dim=3).abs(), (0, 1))
    found = torch.where(outlined, (1 - 4 * F.max_pool2d(edges, 3, 1, 1)).expand_as(found), found)
    found = 1 - (1 - found) * uniform(0.8, 1.2)
    coarse = F.interpolate(found, scale_factor=0.5, mode="bilinear", antialias=True)
    found = torch.where(uniform(0, 1) < BLURRED, F.interpolate(coarse, size=(size, size), mode="bilinear"), found)
    # A rectangle of one colour.
    places = torch.arange(size, device=device)
    across, down = ((places - size * uniform(0, 1)).abs() < size * uniform(0.05, 0.25) for _ in range(2))
    covered = across.view(batch, 1, 1, size) & down.view(batch, 1, size, 1) & (uniform(0, 1) < COVERED)
    found = torch.where(covered, uniform(0, 1), found).clamp(0, 1)
    same_style = ~outlined.flatten()
    return found, same_style, same_style & ~(turned | grey).flatten()
