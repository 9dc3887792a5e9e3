"""The folder of a run: its settings, its shards, and what is missing or damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softcfg.errors import UserError, clean, quote
from softcfg.files import as_path, is_folder, make_folder, read_text, remove_file, remove_temporary, write_atomically
from softcfg.runs.plan import NOT_IN_IMAGES, Plan, check_growth, differences, fingerprint
from softcfg.runs.shards import DamagedShardError, Shard, glance, read_shard
from softcfg.version import __version__

SETTINGS = "run.json"
SHARDS = "shards"
PICTURES = ("grid.png", "comparison.png")  # besides one PNG per image
FORMAT = 1  # of the folder; a version that changes what is in it counts up
# What to do about a folder that holds another run.
ADVICE = "give another folder, or overwrite=True to replace it"
OTHER_FOLDER = "give another folder (--output-dir)"  # where nothing replaces it
LARGEST_SETTINGS = 1 << 25  # bytes of run.json


def image_name(index: int) -> str:
    """The PNG file of an image."""
    return f"{index:06d}.png"


def image_index(name: str) -> int | None:
    """The index of the image whose PNG file has this name, None for the name of another file."""
    match = re.fullmatch(r"([0-9]{6,20})\.png", name)
    return int(match[1]) if match and image_name(int(match[1])) == name else None


def is_own_file(folder: Path, path: Path) -> bool:
    """Whether a path leads to a place, behind links too, where the run in a folder puts a file of its own."""
    root = os.path.realpath(folder)
    for place in (os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(path)):
        if place.startswith(os.path.join(root, "")):
            first, *rest = Path(place).relative_to(root).parts
            if first == SHARDS or (not rest and (first in (SETTINGS, *PICTURES) or image_index(first) is not None)):
                return True
    return False


class RunFolder:
    """A run on disk.

    Attributes:
        path: the folder.
        settings: the content of run.json.
        plan: the partition of its images.
        fingerprint: of its settings; every shard carries it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        try:
            self.plan = Plan.of(settings)
        except UserError as error:
            raise UserError(f"{path / SETTINGS} is not readable as the settings of a run: {error}") from error
        self.fingerprint = fingerprint(settings)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in a folder.

        Raises:
            UserError: there is none, or its settings cannot be read.
        """
        path = as_path(path)
        settings = _read_settings(path)
        if settings is None:
            raise UserError(f"{path} holds no run: there is no {SETTINGS}")
        return cls(path, settings)

    @classmethod
    def claim(cls, path: Path, settings: dict[str, Any], *, overwrite: bool = False, advice: str = ADVICE) -> RunFolder:
        """Make the folder ready for a run: a new one, or one that goes on.

        Args:
            settings: the run's settings. A `batch_size` of None takes that of the run that goes on.
            overwrite: discard the run that is there, another one or this one itself. Where there is none, nothing is
                removed.
            advice: what to do about a run with other settings, for the message.

        Raises:
            UserError: the folder holds a run with other settings, which are named, or no run and a file that has the
                name of one of its pictures; or it cannot be written. Nothing was discarded.
        """
        make_folder(path / SHARDS)
        for folder in (path, path / SHARDS):
            remove_temporary(folder, alone=True)
        try:
            found = None if overwrite else _read_settings(path)
            before = None if found is None else cls(path, found)
        except UserError as error:
            raise UserError(f"{error}; {advice}") from error
        settings = dict(settings)
        if settings["batch_size"] is None:
            settings["batch_size"] = found["batch_size"] if found else min(settings["num_samples"], 100)
        settings = json.loads(json.dumps(settings))
        run = cls(path, settings)
        if found is None and not overwrite and run._has_only_foreign_shards():
            raise UserError(f"{path} holds shards of a run with other settings, and no {SETTINGS}; {advice}")
        if found is None and not overwrite and not run.present() and (taken := run._taken_name()):
            raise UserError(f"{path} holds {taken}, which no run there has made; {advice}")
        if found is not None and before is not None:
            before.require_own_shards()
            if differing := differences(found, settings):
                raise UserError(f"{path} holds a run with another {', '.join(differing)}; {advice}")
            check_growth(found, settings)
            # As they are written there: 3 and 3.0 are equal, but not as texts.
            settings |= {name: value for name, value in found.items() if name not in NOT_IN_IMAGES}
            environments = found.get("environment", [])
            settings["environment"] = [
                *environments,
                *(environment for environment in settings["environment"] if environment not in environments),
            ]
        content = _settings_text(settings)
        if overwrite:
            _discard_run(path)
        elif found is not None and settings["num_samples"] > found["num_samples"]:
            for name in PICTURES:  # of fewer images; who ends before they are made anew leaves none
                remove_file(path / name)
        write_atomically(path / SETTINGS, content, replace=True)
        return cls(path, settings)

    def require_own_shards(self) -> None:
        """Raise `UserError` if the settings cannot be those that the shards were drawn with.

        That is so where there are shards of other runs only, or with more images than are planned: then run.json was
        altered, and the shards are not to blame.
        """
        if self._has_only_foreign_shards():
            problem = "its shards are of a run with other settings"
        elif any(self._count(number) > len(self.plan.indices(number)) for number in self.present()):
            problem = f"its shards hold more than {self.plan.num_samples} images"
        else:
            return
        raise UserError(
            f"{self.path / SETTINGS} is not what the run was drawn with: {problem}; put back the {SETTINGS} that "
            f"belongs to the shards, which are left as they are{_newer(self.settings)}"
        )

    def _taken_name(self) -> str | None:
        """The first file that has the name of a picture of this run; None if there is none."""
        planned = self.plan.num_samples
        for name in sorted(os.listdir(self.path)):
            if name in PICTURES or ((index := image_index(name)) is not None and index < planned):
                return name
        return None

    def _has_only_foreign_shards(self) -> bool:
        """Whether there are whole shards, but none of this run."""
        runs = set()
        for number in self.present():
            with contextlib.suppress(DamagedShardError):
                runs.add(glance(self.shard_path(number))[0])
        return bool(runs) and self.fingerprint not in runs

    def _count(self, number: int) -> int:
        """The images in a shard, by its header; 0 where it is not whole."""
        try:
            return glance(self.shard_path(number))[1]
        except DamagedShardError:
            return 0

    def require_complete(self) -> None:
        """Raise `UserError` unless all shards are there as planned, by their headers."""
        self.require_own_shards()
        if missing := self.missing():
            raise UserError(
                f"{len(missing)} of {self.plan.num_shards} shards of {self.path} are missing; continue the run first"
            )

    def shard_path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.path / SHARDS / f"shard-{number:06d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there, torn, shorter than planned or of another run; only headers are read."""
        present = self.present()
        return [n for n in range(self.plan.num_shards) if n not in present or not self.is_whole(n)]

    def is_whole(self, number: int) -> bool:
        """Whether a shard is there as planned, by its header."""
        try:
            return glance(self.shard_path(number)) == (self.fingerprint, len(self.plan.indices(number)))
        except DamagedShardError:
            return False

    def present(self) -> set[int]:
        """The shards that there are files of, whole or not.

        Raises:
            UserError: the folder cannot be read (it vanished).
        """
        try:
            names = os.listdir(self.path / SHARDS)
        except FileNotFoundError as error:
            if is_folder(self.path):
                return set()
            raise UserError(f"cannot read {self.path / SHARDS}: {error.strerror}") from error
        except OSError as error:
            raise UserError(f"cannot read {self.path / SHARDS}: {error.strerror}") from error
        found = (re.fullmatch(r"shard-(\d+)\.safetensors", name) for name in names)
        return {int(match[1]) for match in found if match}

    def read(self, number: int) -> Shard:
        """Read a shard and check everything about it.

        Raises:
            DamagedShardError: the file is missing, torn or altered, or does not belong to this place of this run.
        """
        path = self.shard_path(number)
        shard = read_shard(path)
        indices = self.plan.indices(number)
        if shard.fingerprint != self.fingerprint or shard.number != number:
            raise DamagedShardError(f"{path} belongs to another run or place")
        if not np.array_equal(shard.indices, indices):
            raise DamagedShardError(f"{path} holds {len(shard.indices)} images of the {len(indices)} planned")
        if shard.labels.tolist() != self.plan.labels_of(indices) or {len(shard.codes), len(shard.pixels)} != {
            len(indices)
        }:
            raise DamagedShardError(f"{path} holds other labels than planned")
        return shard

    def verify(self) -> Iterator[tuple[int, Shard | DamagedShardError]]:
        """Read every shard of the plan in turn; a damaged one yields what is wrong with it."""
        for number in range(self.plan.num_shards):
            try:
                yield number, self.read(number)
            except DamagedShardError as problem:
                yield number, problem

    def shards(self) -> Iterator[Shard]:
        """Every shard in order, one in memory at a time.

        Raises:
            UserError: a shard is missing or damaged.
        """
        for number in range(self.plan.num_shards):
            yield self.require(number)

    def require(self, number: int) -> Shard:
        """Read a shard like `read`; the error says what to do."""
        try:
            return self.read(number)
        except DamagedShardError as problem:
            raise UserError(f"{problem}; 'softcfg runs verify {self.path}' says more") from problem

    def discard(self, number: int) -> None:
        """Remove a shard and its images, so that the run draws them again."""
        images = (self.path / image_name(index) for index in self.plan.indices(number))
        for path in (self.shard_path(number), *images):
            remove_file(path)


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """The content of run.json, without its checksum; None if there is no such file."""
    path = folder / SETTINGS
    try:
        settings = json.loads(read_text(path, LARGEST_SETTINGS))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable: it is damaged ({clean(error, 100)})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not readable: it is not the settings of a run")
    form, checksum = settings.pop("format", None), settings.pop("sha256", None)  # older runs have neither
    if isinstance(form, int) and form > FORMAT:
        raise UserError(f"{path} is of format {form}, that of a newer version of softcfg than this, {__version__}")
    if (form, checksum) != (None, None) and checksum != _checksum(settings):
        raise UserError(
            f"{path} was altered: its checksum is wrong; put back the one that the run was drawn with. The shards are "
            f"left as they are{_newer(settings)}"
        )
    texts: dict[str, type] = dict.fromkeys(("model", "command", "dtype", "task", "negative_text"), str)
    mappings: dict[str, type] = dict.fromkeys(("guidance", "sampling", "generator", "tokenizer", "image"), dict)
    kinds = {
        **texts,
        **mappings,
        "environment": list,
        "prompts": list,
        "width": int,
        "height": int,
        "image_size_eval": int,
    }
    for name, kind in kinds.items():
        if not isinstance(settings.get(name, kind()), kind):
            raise UserError(f"{path} is not the settings of a run: {name} is {quote(settings[name])}")
    return settings


def _settings_text(settings: Mapping[str, Any]) -> bytes:
    """The content of run.json: one line per field, so that a list of a thousand labels takes one line."""
    content = {**settings, "format": FORMAT, "sha256": _checksum(settings)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    text = f"{{\n{lines}\n}}\n".encode()
    if len(text) > LARGEST_SETTINGS:
        raise UserError(f"the settings of the run have {len(text):,} bytes; the limit is 32 MiB: take fewer prompts")
    return text


def _checksum(settings: Mapping[str, Any]) -> str:
    """SHA-256 over all settings but the checksum itself, however they are laid out."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _newer(settings: Mapping[str, Any]) -> str:
    """Words for a run that a newer version of softcfg worked on, "" for others."""
    environments = settings.get("environment")
    for entry in environments if isinstance(environments, list) else ():
        version = entry.get("softcfg") if isinstance(entry, dict) else None
        if isinstance(version, str) and _order(version) > _order(__version__):
            return f" (softcfg {version} worked on the run, which is newer than this, {__version__})"
    return ""


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d{1,9}", version)[:3]]


def _discard_run(folder: Path) -> None:
    """Remove the run's own files, also if the folder of shards is a link; others stay, and all where there is no run.

    run.json goes last, so that what is left when this is interrupted is still known as a run's.
    """
    shards = list((folder / SHARDS).glob("shard-*.safetensors"))
    if not shards and not os.path.lexists(folder / SETTINGS):
        return
    images = _images_of(folder)
    for path in shards:
        remove_file(path)
    for path in folder.glob("*.png"):
        if (index := image_index(path.name)) is not None and index < images:
            remove_file(path)
    for name in (*PICTURES, SETTINGS):
        remove_file(folder / name)


def _images_of(folder: Path) -> int:
    """How many images the run in a folder can have: as run.json plans, or, where it is unreadable, as shards show."""
    try:
        return RunFolder.open(folder).plan.num_samples
    except UserError:
        for path in sorted((folder / SHARDS).glob("shard-*.safetensors"), reverse=True):
            with contextlib.suppress(DamagedShardError):
                return int(read_shard(path).indices.max(initial=-1)) + 1
        return 0
