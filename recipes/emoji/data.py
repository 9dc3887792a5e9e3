"""Captioned pictures of 96 x 96 pixels: emoji in the hands of nine artists, as they drew them and recoloured.

Whole pairs of name and style are held out, and whole pairs of colour and name, to see whether the model combines what
it has seen apart. No picture of a held-out pair is trained on, recoloured or not.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from recipes.emoji.colours import COLOURS, HUES, main_colour, turn_hue
from recipes.emoji.sources import NAMES, STYLES, Drawings, Emoji, emoji, find, pictures_folder
from softcfg.errors import UserError
from softcfg.files import make_folder, open_atomically

SIZE = 96
VERSION = 1  # of the rendering: another one makes the cache anew
HELD_OUT = 0.1  # of the pairs of name and style, and of those of colour and name
LEAST_STYLES = 8  # that have drawn a name
LEAST_STYLES_OF_FLAGS = 5
RECOLOURINGS = 3  # of a picture whose object has a main colour
ALIKE, ALIKE_STYLES = 0.3, 3  # names are alike if their pictures are nearer than this in as many styles

GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects")
RECOLOURED = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
# Signs and their like, of which one is hardly told from another.
LEFT_OUT = ("family", "person-symbol", "person-gesture", "place-map")
KEPT = ("geometric", "flag")
# Names that some artist draws like another name.
TWINS = (
    "two hump camel", "spouting whale", "ox", "water buffalo", "ewe", "e mail", "incoming envelope", "page facing up",
    "sun behind small cloud", "sun behind large cloud", "black medium square", "black medium small square",
    "black small square", "small orange diamond", "tear off calendar", "spiral calendar", "waxing gibbous moon",
    "waning gibbous moon", "light rail", "trolleybus", "tram car", "mountain railway", "high speed train",
    "railway car", "love hotel", "hotel", "department store", "japanese post office", "card index",
    "card index dividers", "pager",
    "locked with pen", "green book", "ledger", "notebook", "crayon", "black nib", "round pushpin", "film projector",
    "horizontal traffic light", "oncoming police car", "oncoming bus", "oncoming taxi", "articulated lorry",
    "sunrise over mountains", "japanese castle", "old key", "speaker low volume", "person with skullcap", "rat",
    "backhand index pointing up", "oncoming fist", "raised hand", "radio button", "black square button", "label",
    "admission tickets", "hourglass not done", "foggy", "moon viewing ceremony", "mahjong red dragon",
    "clinking glasses",
)  # fmt: skip
MONOCHROME = "ink"
COUNTRIES = (
    "argentina", "australia", "austria", "belgium", "brazil", "canada", "chile", "china", "colombia", "cuba", "denmark",
    "egypt", "finland", "france", "germany", "greece", "india", "indonesia", "ireland", "israel", "italy", "jamaica",
    "japan", "kenya", "mexico", "netherlands", "new zealand", "nigeria", "norway", "poland", "portugal", "south africa",
    "south korea", "spain", "sweden", "switzerland", "thailand", "ukraine", "united kingdom", "united states",
    "vietnam",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An emoji as an artist drew it, or recoloured.

    Attributes:
        name: lower case, without punctuation, without the colour that it was given: "red apple", "octopus".
        keywords: further words for it.
        style: the word for the style.
        colour: the word for its main colour, "" where there is none.
        recoloured: whether it has this colour by recolouring.
        held_out: "", or the pair that keeps it from training: "style" (name and style) or "colour" (colour and name).
        subject: number of the name.
    """

    name: str
    keywords: tuple[str, ...]
    style: str
    colour: str
    recoloured: bool
    held_out: str
    subject: int

    @property
    def subject_words(self) -> str:
        """The name, with the colour in front if it is recoloured: "blue apple"."""
        return f"{self.colour} {bare(self.name)}" if self.recoloured else self.name

    @property
    def caption(self) -> str:
        """The plain caption: "blue apple, flat style"."""
        return f"{self.subject_words}, {self.style} style"


@dataclass(frozen=True)
class Collection:
    """Pictures and their pixels, uint8 [N, 96, 96, 3] on white; the names, of which `Picture.subject` counts."""

    pictures: list[Picture]
    pixels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, *, held_out: str | None = "", recoloured: bool | None = None) -> list[int]:
        """Return the pictures held out for a reason ("": those trained on), recoloured or not, or either."""
        return [
            i
            for i, picture in enumerate(self.pictures)
            if picture.held_out == held_out and recoloured in (None, picture.recoloured)
        ]


COLUMNS = ("emoji", "style", "colour", "recoloured", "pixels")  # of the cache


class Gallery(NamedTuple):
    """All that was drawn, of which names are chosen.

    Attributes:
        found: what `emoji` counts.
        emoji, style, colour: int64 [N]; a colour of -1 is none.
        recoloured: bool [N].
        pixels: uint8 [N, S, S, 3].
    """

    found: Sequence[Emoji]
    emoji: np.ndarray
    style: np.ndarray
    colour: np.ndarray
    recoloured: np.ndarray
    pixels: np.ndarray

    def artists(self) -> dict[int, int]:
        """How many artists drew each emoji, by its number."""
        return dict(sorted(Counter(self.emoji[~self.recoloured].tolist()).items()))


def bare(name: str) -> str:
    """Return a name without the words for colours."""
    return " ".join(word for word in name.split() if word not in COLOURS)


def mirrors(name: str) -> bool:
    """Whether a mirrored picture still shows what its name says."""
    return not {"left", "right", "waxing", "waning", "quarter", "crescent", "flag"} & set(name.split())


def load(folder: Path | None = None, *, names: int | None = None) -> Collection:
    """Return the collection; fetch and render what is not in the cache.

    Args:
        folder: the cache, by default that of `pictures_folder`.
        names: take this many names only, spread evenly.

    Raises:
        UserError: a package cannot be fetched or is damaged, or the renderer is not installed.
    """
    return assemble(_gallery(folder), names=names)


def load_others(collection: Collection, folder: Path | None = None) -> Collection:
    """Return the pictures of names that the collection has not, see `others`."""
    return others(_gallery(folder), collection)


def joined(collection: Collection, others: Collection) -> Collection:
    """Return both, the names of the second after those of the first."""
    first = len(collection.names)
    more = [replace(picture, subject=first + picture.subject) for picture in others.pictures]
    return Collection(
        [*collection.pictures, *more],
        np.concatenate([collection.pixels, others.pixels]),
        [*collection.names, *others.names],
    )


def _gallery(folder: Path | None) -> Gallery:
    folder = pictures_folder() if folder is None else folder
    found = list(wanted(emoji(NAMES.fetch(folder))))
    path = folder / f"drawn-{_fingerprint()}.npz"
    try:
        return Gallery(found, *_drawn(path))
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        print(f"{path} is damaged: the pictures are drawn anew", flush=True)
    _draw_all(path, found, [Drawings(style.package.fetch(folder)) for style in STYLES])
    return Gallery(found, *_drawn(path))


def _drawn(path: Path) -> list[np.ndarray]:
    """What `_draw_all` wrote; the archive has checksums."""
    with np.load(path) as stored:
        return [stored[name] for name in COLUMNS]


def wanted(all_emoji: Sequence[Emoji]) -> Iterator[Emoji]:
    """Yield the emoji that look like something: no letters, arrows, signs, clocks, families, one of each role."""
    for one in all_emoji:
        first = one.name.split()[0]
        person = one.group == "people-body" and (
            first in ("man", "men", "woman", "women") and len(one.name.split()) > 1
        )
        joined = one.group == "people-body" and "200d" in one.code
        clock = one.name.endswith((" oclock", " thirty")) or one.name in ("twelve thirty",)
        if one.subgroup == "country-flag":
            if one.name.removeprefix("flag of ") in COUNTRIES:
                yield one
        elif one.subgroup in KEPT or (
            one.group in GROUPS and one.subgroup not in LEFT_OUT and not (person or joined or clock)
        ):
            yield one


def assemble(gallery: Gallery, names: int | None = None) -> Collection:
    """Name the pictures, and choose what is held out.

    Args:
        names: see `load`.
    """
    found = gallery.found
    subjects = [
        number
        for number, count in gallery.artists().items()
        if count >= (LEAST_STYLES_OF_FLAGS if found[number].group == "flags" else LEAST_STYLES)
        and found[number].name not in TWINS
    ]
    subjects = _distinct(gallery, subjects)
    if names is not None:
        subjects = [subjects[i * len(subjects) // names] for i in range(names)]
    return _of(gallery, subjects, _held_out_styles(gallery, subjects), HELD_OUT)


def others(gallery: Gallery, collection: Collection) -> Collection:
    """Choose as many names that the collection has not, for the judge to learn from. Mostly too few artists drew them.

    Names that may be those of the collection in other words, or in another colour, are not among them.
    """
    known = {*collection.names, *TWINS}
    bare_known = {bare(name) for name in collection.names} - {""}
    names = [one.name for one in gallery.found]
    subjects = [
        number
        for number, count in gallery.artists().items()
        if count > 1 and names[number] not in known and bare(names[number]) not in bare_known
    ]
    return _of(gallery, subjects[: len(collection.names)])


def _of(
    gallery: Gallery, subjects: Sequence[int], held_out: Container[tuple[int, int]] = (), share: float = 0.0
) -> Collection:
    """The pictures of `subjects`, some pairs of emoji and style held out, and a share of those of colour and name."""
    found, emoji, style, colour, recoloured, pixels = gallery
    place = {number: i for i, number in enumerate(subjects)}
    pictures: list[Picture] = []
    chosen = [i for i, number in enumerate(emoji.tolist()) if number in place]
    for i in chosen:
        one, word = found[emoji[i]], COLOURS[colour[i]] if colour[i] >= 0 else ""
        why = "style" if (emoji[i], style[i]) in held_out else ""
        if not why and recoloured[i] and _share(f"{word} {bare(one.name)}") < share:
            why = "colour"
        pictures.append(
            Picture(one.name, one.keywords, STYLES[style[i]].word, word, bool(recoloured[i]), why, place[emoji[i]])
        )
    return Collection(pictures, pixels[chosen], [found[number].name for number in subjects])


def _distinct(gallery: Gallery, subjects: Sequence[int]) -> list[int]:
    """Leave out names that nobody could tell from a shorter one.

    Their pictures look alike ("neutral face", "expressionless face"), or only a colour tells the names apart ("green
    apple", which is also a recoloured "red apple").
    """
    found, emoji, style, _, recoloured, pixels = gallery
    pictures = np.full((len(STYLES), len(subjects), 16 * 16 * 3), np.nan, np.float32)
    place = {number: i for i, number in enumerate(subjects)}
    side = pixels.shape[1] // 16
    for i in np.flatnonzero(~recoloured).tolist():
        if emoji[i] in place:
            tiles = 1 - pixels[i].reshape(16, side, 16, side, 3).mean((1, 3), dtype=np.float32) / 255
            pictures[style[i], place[emoji[i]]] = tiles.ravel()
    kept: list[int] = []
    words: set[str] = set()
    for i in sorted(range(len(subjects)), key=lambda i: len(found[subjects[i]].name)):
        word = bare(found[subjects[i]].name)
        # The distance of two pictures over their mean norm: 0 if they are equal, about 1 if they are unlike.
        norms = np.linalg.norm(pictures[:, i, None], axis=2) + np.linalg.norm(pictures[:, kept], axis=2)
        distances = 2 * np.linalg.norm(pictures[:, i, None] - pictures[:, kept], axis=2) / np.maximum(norms, 1e-6)
        alike = np.sort(distances, axis=0)[ALIKE_STYLES - 1] < ALIKE  # unknown ones come last
        if word not in words and not alike.any():
            kept.append(i)
            words |= {word} - {""}
    return [subjects[i] for i in sorted(kept)]


def _held_out_styles(gallery: Gallery, subjects: Sequence[int]) -> set[tuple[int, int]]:
    """Choose a tenth of the pairs of name and style, at most one in three of those of a name."""
    pairs = defaultdict(list)
    for number, kind in zip(gallery.emoji.tolist(), gallery.style.tolist(), strict=True):
        pairs[number].append(kind)
    chosen = set()
    for number in subjects:
        shares = {kind: _share(f"{gallery.found[number].name}, {STYLES[kind].word} style") for kind in pairs[number]}
        kinds = sorted(pairs[number], key=shares.__getitem__)
        lucky = [kind for kind in kinds if shares[kind] < HELD_OUT]
        chosen |= {(number, kind) for kind in lucky[: len(kinds) // 3]}
    return chosen


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


# ---- rendering


def _fingerprint() -> str:
    """What the rendered pictures depend on."""
    parts = [str(VERSION), str(SIZE), NAMES.sha256, *(style.package.sha256 for style in STYLES)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _draw_all(path: Path, found: Sequence[Emoji], sets: list[Drawings]) -> None:
    """Render all pictures and recolour some; write them to `path`."""
    rows: list[tuple[int, int, int, bool, np.ndarray]] = []
    for number, one in enumerate(found):
        for style, svg in enumerate(find(one, sets)):
            if svg is None:
                continue
            pixels, content = render(svg)
            colour = "" if STYLES[style].word == MONOCHROME else main_colour(pixels, content)
            rows.append((number, style, COLOURS.index(colour) if colour else -1, False, pixels))
            if one.group in RECOLOURED and colour in (*HUES, "brown") and bare(one.name):
                for other, turned in _recoloured(f"{one.name}, {style}", colour, pixels, content):
                    rows.append((number, style, COLOURS.index(other), True, turned))
        if number % 100 == 0:
            print(f"drawing the pictures: {number} of {len(found)} names", flush=True)
    make_folder(path.parent)
    stacked = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(COLUMNS)}
    with open_atomically(path) as file:
        np.savez_compressed(file, **stacked)  # type: ignore[arg-type]


def _recoloured(drawn: str, colour: str, pixels: np.ndarray, content: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the picture in some other colours, chosen by `drawn`, where the result has the colour aimed at."""
    made = 0
    for other in sorted(HUES, key=lambda word: _share(f"{drawn} {word}")):
        if made < RECOLOURINGS and other != colour:
            turned = turn_hue(pixels, content, colour, other)
            if main_colour(turned, content) == other:
                made += 1
                yield other, turned


def render(svg: str, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 [size, size, 3] on white, and bool [size, size] which of them are content."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("resvg-py is not installed: it renders the pictures; `pip install resvg-py`") from None
    png = bytes(svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return np.asarray(white), np.asarray(square.getchannel("A")) > 127
