"""Words for colours, and pictures whose main colour is another."""

from __future__ import annotations

import numpy as np

HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 212, "purple": 270, "pink": 325}  # degrees
COLOURS = (*HUES, "brown", "black", "gray", "white")
_SAME = 35  # degrees of hue around an object's main colour that move with it


def main_colour(pixels: np.ndarray, content: np.ndarray, share: float = 0.45) -> str:
    """Return the word for the colour that at least `share` of the content has; "" if none has.

    Args:
        pixels: uint8 [H, W, 3].
        content: bool [H, W].
    """
    if not content.any():
        return ""
    words = colour_of(pixels[content])
    counts = np.bincount(words, minlength=len(COLOURS))
    return COLOURS[counts.argmax()] if counts.max() >= share * len(words) else ""


def colour_of(colours: np.ndarray) -> np.ndarray:
    """Return the index into `COLOURS` of each uint8 colour [N, 3]."""
    hue, saturation, value = _hsv(colours)
    word = np.select(
        [hue < 14, hue < 43, hue < 68, hue < 165, hue < 252, hue < 300, hue < 345],
        [COLOURS.index(name) for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink")],
        COLOURS.index("red"),
    )
    light = (word == COLOURS.index("red")) & (saturation < 0.5) & (value > 0.8)
    dark = np.isin(word, [COLOURS.index(name) for name in ("red", "orange", "yellow")]) & (value < 0.7) & (hue < 60)
    dark &= (word != COLOURS.index("red")) | (value < 0.5) | (saturation < 0.6)
    word = np.where(light, COLOURS.index("pink"), np.where(dark, COLOURS.index("brown"), word))
    faint = saturation < np.where(value > 0.5, 0.15, 0.25)
    word = np.where(faint, np.where(value > 0.88, COLOURS.index("white"), COLOURS.index("gray")), word)
    return np.where(value < np.where(faint, 0.4, 0.2), COLOURS.index("black"), word)


def turn_hue(pixels: np.ndarray, content: np.ndarray, colour: str, wanted: str) -> np.ndarray:
    """Move the hues near that of the main colour to another.

    Args:
        pixels: uint8 [H, W, 3].
        content: bool [H, W].
        colour: the word for the main colour.
        wanted: one of `HUES`.
    """
    flat = pixels.reshape(-1, 3)
    hue, saturation, value = _hsv(flat)
    inside = content.flatten() & (saturation > 0.2) & (value > 0.15)
    main = inside & (colour_of(flat) == COLOURS.index(colour))
    if not main.any():
        return pixels
    angles = np.deg2rad(hue[main])
    centre = np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())) % 360
    moved = np.abs((hue - centre + 180) % 360 - 180) < _SAME
    turned = np.where(moved, (hue + HUES[wanted] - centre) % 360, hue)
    return _rgb(turned, saturation, value).reshape(pixels.shape)


def _hsv(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value of uint8 colours [N, 3]."""
    rgb = colours.astype(np.float32) / 255
    value = rgb.max(1)
    spread = value - rgb.min(1)
    safe = np.where(spread > 0, spread, 1)
    red, green, blue = rgb.T
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60, spread / np.where(value > 0, value, 1), value


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The uint8 colours [N, 3] of hue in degrees, saturation and value."""
    steps = (np.array([5, 3, 1], np.float32) + hue[:, None] / 60) % 6
    part = np.clip(np.minimum(steps, 4 - steps), 0, 1)
    return np.round(255 * value[:, None] * (1 - saturation[:, None] * part)).astype(np.uint8)
