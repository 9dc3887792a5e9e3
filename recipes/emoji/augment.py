"""Pictures moved, mirrored and disguised a little, so that a network does not learn each of them by heart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WEAKLY = 0.3  # how far those pictures move that are moved weakly, as a share of how far the others do
WARPED = 0.6  # share of the pictures that are warped, if any are


@dataclass(frozen=True)
class Moves:
    """Bounds of what moves, drawn uniformly, and the shares of the pictures that are mirrored and moved weakly.

    Attributes:
        turn: degrees.
        scale, shift: shares of the size.
        mirrored: share of the pictures.
        shear: how much further across a picture's lower edge is moved than its middle, as a share of half the size.
        aspect: natural logarithm of how much wider a picture gets, and lower.
        warp: share of half the size, by which each of 4 x 4 points moves for itself, and what is between them smoothly.
        weak: share of the pictures.
    """

    turn: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    mirrored: float = 0.0
    shear: float = 0.0
    aspect: float = 0.0
    warp: float = 0.0
    weak: float = 0.0


def moved(pixels: Tensor, moves: Moves, numbers: torch.Generator, mirror: Tensor | None = None) -> Tensor:
    """Move each picture of [B, 3, S, S] in [0, 1] at random; white comes in from outside.

    Args:
        pixels: the pictures.
        moves: how far.
        numbers: a generator of the CPU, for whatever device the pictures are on.
        mirror: bool [B], which pictures may be mirrored; all by default.
    """
    batch, size = len(pixels), pixels.shape[-1]
    flip, weak, warp = torch.rand(3, batch, generator=numbers)
    far = torch.where(weak < moves.weak, WEAKLY, 1.0)
    turn, scale, across, down, shear, aspect = far * torch.rand(6, batch, generator=numbers).mul(2).sub(1)
    turn, scale, aspect = torch.deg2rad(moves.turn * turn), 1 + moves.scale * scale, (moves.aspect * aspect).exp()
    flipped = flip < moves.mirrored
    if mirror is not None:
        flipped &= mirror
    side = 1 - 2 * flipped.float()
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    rows = [
        side * cosine * aspect, moves.shear * shear - sine, 2 * moves.shift * across,
        side * sine, cosine / aspect, 2 * moves.shift * down,
    ]  # fmt: skip
    places = torch.stack(rows, 1).view(-1, 2, 3).to(pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 is a fifth of a pixel off
        grid = F.affine_grid(places, list(pixels.shape), align_corners=False)
    if moves.warp:
        points = torch.rand(batch, 2, 4, 4, generator=numbers).mul(2).sub(1)
        points *= (moves.warp * far * (1 - warp / WARPED).clamp(min=0)).view(-1, 1, 1, 1)
        field = F.interpolate(points.to(pixels.device), size=(size, size), mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
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
