"""The folder of a run: its settings, its shards, and what is missing or damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softcfg.errors import UserError
from softcfg.files import make_folder, remove_temporary, write_atomically
from softcfg.runs.plan import Plan, check_growth, differences, fingerprint
from softcfg.runs.shards import DamagedShardError, Shard, glance, read_shard

SETTINGS = "run.json"
SHARDS = "shards"
PICTURES = ("grid.png", "comparison.png")  # besides one PNG per image


def image_name(index: int) -> str:
    """The PNG file of an image."""
    return f"{index:06d}.png"


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
        self.plan = Plan.of(settings)
        self.fingerprint = fingerprint(settings)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in a folder.

        Raises:
            UserError: there is none, or its settings cannot be read.
        """
        path = Path(path)
        settings = _read_settings(path)
        if settings is None:
            raise UserError(f"{path} holds no run: there is no {SETTINGS}")
        try:
            return cls(path, settings)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / SETTINGS} is not the settings of a run") from error

    @classmethod
    def claim(cls, path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> RunFolder:
        """Make the folder ready for a run: a new one, or one that goes on.

        Args:
            settings: the run's settings. A `batch_size` of None takes that of the run that goes on.
            overwrite: discard what another run left there.

        Raises:
            UserError: the folder holds a run with other settings, which are named; or it cannot be written.
        """
        make_folder(path / SHARDS)
        remove_temporary(path)
        remove_temporary(path / SHARDS)
        if overwrite:
            _discard_run(path)
        advice = "give another --output-dir, or --overwrite to replace it"
        try:
            found = _read_settings(path)
            if found is not None:
                Plan.of(found)
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / SETTINGS} is not readable; {advice}") from error
        settings = dict(settings)
        if settings["batch_size"] is None:
            settings["batch_size"] = found["batch_size"] if found else min(settings["num_samples"], 100)
        settings = json.loads(json.dumps(settings))
        if found is not None:
            if differing := differences(found, settings):
                raise UserError(f"{path} holds a run with another {', '.join(differing)}; {advice}")
            check_growth(found, settings)
            environments = found.get("environment", [])
            settings["environment"] = [
                *environments,
                *(environment for environment in settings["environment"] if environment not in environments),
            ]
        _write_settings(path, settings)
        return cls(path, settings)

    def shard_path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.path / SHARDS / f"shard-{number:06d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there, torn, shorter than planned or of another run; only headers are read."""
        return [number for number in range(self.plan.num_shards) if not self.is_whole(number)]

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
            raise UserError(f"{problem}; 'softcfg runs verify {self.path}' tells more") from problem

    def discard(self, number: int) -> None:
        """Remove a shard and its images, so that the run draws them again."""
        images = (self.path / image_name(index) for index in self.plan.indices(number))
        for path in (self.shard_path(number), *images):
            path.unlink(missing_ok=True)


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not the settings of a run")
    return content


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write one line per field, so that a list of a thousand labels takes one line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in settings.items())
    write_atomically(folder / SETTINGS, f"{{\n{lines}\n}}\n".encode())


def _discard_run(folder: Path) -> None:
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    (folder / SHARDS).mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if path.stem.isdigit():
            path.unlink()
    for name in (SETTINGS, *PICTURES):
        (folder / name).unlink(missing_ok=True)
