"""Captioned pictures of 32x32 pixels: Noto Color Emoji, with names and keywords from Unicode and CLDR.

Beside the emoji as they are there are recoloured ones ("blue apple"): the pixels of an object's main colour move to
another hue. Some of these compositions are held out, to see whether the model combines words it knows.
"""

from __future__ import annotations

import colorsys
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from softcfg.errors import UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian package fonts-noto-color-emoji
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")  # Debian package unicode-data
KEYWORDS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")  # Debian package unicode-cldr-core

SIZE = 32
FONT_SIZE = 109  # the only size of the font's bitmaps, 136 x 128
GLYPH = (136, 128)

RECOLOURED = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 212, "purple": 270, "pink": 325}  # degrees
COLOURS = (*HUES, "brown", "black", "gray", "white")
HELD_OUT = 0.1  # of the recoloured pictures
_SAME = 35  # degrees of hue around an object's main colour that move with it


@dataclass(frozen=True)
class Picture:
    """An emoji, or a recoloured one.

    Attributes:
        name: lower case, without punctuation; "red apple".
        keywords: further words for it.
        colour: the word for its main colour, "" where there is none.
        recoloured: whether it is not as the font draws it.
        pixels: uint8 [32, 32, 3], on white.
    """

    name: str
    keywords: tuple[str, ...]
    colour: str
    recoloured: bool
    pixels: np.ndarray = field(repr=False, compare=False)

    @cached_property
    def held_out(self) -> bool:
        """Whether the picture is kept from training."""
        return self.recoloured and int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32


def load(font: Path = FONT, names: Path = NAMES, keywords: Path = KEYWORDS) -> list[Picture]:
    """Return all pictures, the emoji as they are in the order of Unicode, and the recoloured ones after them.

    Raises:
        UserError: a file is missing, or Pillow cannot shape sequences.
    """
    for path in (font, names, keywords):
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: install the Debian packages fonts-noto-color-emoji, unicode-data and "
                "unicode-cldr-core, or name the files"
            )
    if not features.check("raqm"):
        raise UserError("Pillow was built without raqm, which composes emoji of several characters")
    drawn = ImageFont.truetype(str(font), FONT_SIZE)
    known = _keywords(keywords)
    pictures: list[Picture] = []
    recoloured: list[Picture] = []
    for text, name, group in _emoji(names):
        image = render(drawn, text)
        pixels, content = _on_white(image)
        words = tuple(word for word in known.get(text.replace("\ufe0f", ""), ()) if word != name)
        colour = main_colour(pixels, content)
        pictures.append(Picture(name, words, colour, False, pixels))
        if group in RECOLOURED and colour in (*HUES, "brown"):
            recoloured.extend(_recoloured(pictures[-1], content))
    taken = {picture.name for picture in pictures}
    for picture in recoloured:
        if picture.name not in taken:
            taken.add(picture.name)
            pictures.append(picture)
    return pictures


def render(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Draw one emoji as RGBA of 136 x 128 pixels."""
    image = Image.new("RGBA", GLYPH, (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
    return image


def _on_white(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the 32 x 32 pixels on white, and which of them are content."""
    square = Image.new("RGBA", (GLYPH[0], GLYPH[0]), (255, 255, 255, 0))
    square.paste(image, (0, (GLYPH[0] - GLYPH[1]) // 2))
    white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    small = white.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    alpha = square.getchannel("A").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small), np.asarray(alpha) > 127


def _emoji(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield text, name and group of every emoji, without the many that differ in skin tone or gender sign only."""
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        elif found := re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)", line):
            text = "".join(chr(int(code, 16)) for code in found[1].split())
            tone = any("\U0001f3fb" <= character <= "\U0001f3ff" for character in text)
            joined = "\u200d" in text and (subgroup == "family" or text[-2] in "\u2640\u2642")
            if not tone and not joined:
                yield text, plain(found[2]), group


def _keywords(path: Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for entry in ElementTree.parse(path).getroot().iter("annotation"):
        if entry.get("type") != "tts" and entry.text:
            words = [plain(word) for word in entry.text.split("|")]
            found[entry.get("cp", "")] = tuple(word for word in words if re.search("[a-z]", word))
    return found


def plain(text: str) -> str:
    """Lower case, and spaces in place of punctuation: "flag: Åland Islands" is "flag åland islands"."""
    text = text.lower().replace("’", "").replace("'", "").replace("#", "hash").replace("*", "star")
    return " ".join(re.findall(r"[^\W_]+", text))


def main_colour(pixels: np.ndarray, content: np.ndarray, share: float = 0.45) -> str:
    """The word for the colour that at least `share` of the content has; "" if none has."""
    if not content.any():
        return ""
    words = colour_of(pixels[content])
    counts = np.bincount(words, minlength=len(COLOURS))
    return COLOURS[counts.argmax()] if counts.max() >= share * len(words) else ""


def colour_of(colours: np.ndarray) -> np.ndarray:
    """Index into `COLOURS` of each uint8 colour [N, 3]."""
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


def _recoloured(picture: Picture, content: np.ndarray) -> Iterator[Picture]:
    """The picture in every other colour, where the result has the colour that was aimed at."""
    bare = " ".join(word for word in picture.name.split() if word not in COLOURS)
    if not bare:
        return
    hue, saturation, value = _hsv(picture.pixels.reshape(-1, 3))
    inside = content.flatten() & (saturation > 0.2) & (value > 0.15)
    main = inside & (colour_of(picture.pixels.reshape(-1, 3)) == COLOURS.index(picture.colour))
    angles = np.deg2rad(hue[main])
    centre = np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())) % 360
    moved = np.abs((hue - centre + 180) % 360 - 180) < _SAME
    for colour, target in HUES.items():
        if colour == picture.colour:
            continue
        turned = np.where(moved, (hue + target - centre) % 360, hue)
        pixels = _rgb(turned, saturation, value).reshape(picture.pixels.shape)
        if main_colour(pixels, content) == colour:
            keywords = tuple(word for word in picture.keywords if word not in COLOURS)
            yield Picture(f"{colour} {bare}", keywords, colour, True, pixels)


def _hsv(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value of uint8 colours [N, 3]."""
    rgb = colours.astype(np.float64) / 255
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
    rgb = [colorsys.hsv_to_rgb(h / 360, s, v) for h, s, v in zip(hue, saturation, value, strict=True)]
    return np.round(np.array(rgb) * 255).astype(np.uint8)
