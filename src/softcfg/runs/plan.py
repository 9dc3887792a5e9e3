"""What image n of a run is: its label or prompt, its shard and the settings it is drawn with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.configuration import dotted
from softcfg.errors import UserError, quote, require_uint64
from softcfg.files import as_path, hash_file
from softcfg.prompts import Prompt

if TYPE_CHECKING:
    from softcfg.pipeline import Pipeline

RANDOM = "random"
# Fields that change no image.
NOT_IN_IMAGES = ("model", "num_samples", "command", "environment", "decoded_from", "format", "sha256")
MOST_IMAGES = 10_000_000  # of a run
MOST_LABELS = 1_000_000  # that images take in turn


@dataclass(frozen=True)
class Prompts:
    """What the labels of a run stand for where a text-to-image model draws: label l is `texts[l]`.

    Attributes:
        width, height: of the images, in pixels.
        task, image, negative_text: of all prompts; see `Prompt`. The image is the path of a file, from which the run
            goes on.

    Raises:
        UserError: an image that is no path.
    """

    texts: tuple[str, ...]
    width: int
    height: int
    task: str | None = None
    image: str | Path | None = None
    negative_text: str | None = None

    def __post_init__(self) -> None:
        if self.image is not None and not isinstance(self.image, (str, os.PathLike)):
            raise UserError(f"the image of a run must be the path of a file, got {quote(self.image)}; save it first")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Prompts | None:
        """The prompts in the settings of a run, None where classes are drawn.

        Raises:
            UserError: they are not prompts, or have no size.
        """
        if "prompts" not in settings:
            return None
        if not all(isinstance(text, str) for text in settings["prompts"]) or not {"width", "height"} <= set(settings):
            raise UserError("the settings of the run have prompts that are no texts, or of no size")
        return cls(
            tuple(settings["prompts"]),
            settings["width"],
            settings["height"],
            settings.get("task"),
            settings.get("image", {}).get("path"),
            settings.get("negative_text"),
        )

    def facts(self) -> dict[str, Any]:
        """The prompts as fields of the settings of a run."""
        facts: dict[str, Any] = {
            "prompts": list(self.texts),
            "width": int(self.width),
            "height": int(self.height),
        }
        if self.task is not None:
            facts["task"] = self.task
        if self.image is not None:
            facts["image"] = {"path": str(as_path(self.image).absolute()), "sha256": hash_file(self.image)}
        if self.negative_text is not None:
            facts["negative_text"] = self.negative_text
        return facts

    def check(self, pipeline: Pipeline) -> None:
        """Raise `UserError` for prompts that the model of `pipeline` cannot draw."""
        for label in range(len(self.texts)):
            pipeline.conditioning.check_inputs(pipeline.conditioning.requests(prompts=[self[label]]))

    def __getitem__(self, label: int) -> Prompt:
        """The prompt that a label stands for."""
        return Prompt(self.texts[label], self.width, self.height, self.task, self.image, self.negative_text)


@dataclass(frozen=True)
class Plan:
    """The fixed partition of a run's images.

    Attributes:
        num_samples: images 0 .. N - 1.
        batch_size: images in a shard; the last shard may hold fewer.
        labels: class ids, or numbers of prompts, that the images take in turn; or "random": uniform, from the seed and
            the image's index.
        num_classes: classes that random labels are drawn from.
    """

    num_samples: int
    batch_size: int
    labels: tuple[int, ...] | str
    num_classes: int
    seed: int

    def __post_init__(self) -> None:
        counts = {"num_samples": MOST_IMAGES, "batch_size": MOST_IMAGES, "num_classes": 1 << 31}
        for name, most in counts.items():
            if not _is_integer(value := getattr(self, name), 1, most):
                raise UserError(f"{name} must be a whole number from 1 to {most:,}, got {quote(value)}")
        require_uint64(self.seed, "seed")
        if self.labels == RANDOM:
            return
        if not self.labels or len(self.labels) > MOST_LABELS:
            raise UserError(f"a run takes 1 to {MOST_LABELS:,} labels in turn, got {len(self.labels):,}")
        for label in self.labels:
            if not _is_integer(label, 0, self.num_classes - 1):
                raise UserError(f"labels must be whole numbers from 0 to {self.num_classes - 1}, got {quote(label)}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Plan:
        """The plan in the settings of a run.

        Raises:
            UserError: a setting is missing or cannot be.
        """
        names = ("num_samples", "batch_size", "labels", "num_classes", "seed")
        if missing := [name for name in names if name not in settings]:
            raise UserError(f"there is no {', '.join(missing)}")
        labels = settings["labels"]
        if labels != RANDOM and not isinstance(labels, (list, tuple)):
            raise UserError(f"labels must be a list or {RANDOM!r}, got {quote(labels)}")
        return cls(
            settings["num_samples"],
            settings["batch_size"],
            labels if labels == RANDOM else tuple(labels),
            settings["num_classes"],
            settings["seed"],
        )

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-self.num_samples // self.batch_size)

    def indices(self, shard: int) -> range:
        """The indices of the images in a shard."""
        return range(shard * self.batch_size, min((shard + 1) * self.batch_size, self.num_samples))

    def labels_of(self, indices: Sequence[int]) -> list[int]:
        """The class of each image, or the number of its prompt."""
        if isinstance(self.labels, str):
            return [_random_label(self.seed, index, self.num_classes) for index in indices]
        return [self.labels[index % len(self.labels)] for index in indices]


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _random_label(seed: int, index: int, classes: int) -> int:
    """The upper bits of one word of the image's own stream, far after the words that its tokens use."""
    from softcfg.decoding.randomness import philox  # imports torch

    word = int(philox(seed, index, block=2**128).random_raw())
    return word * classes >> 64


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in which settings two runs differ that change images, one text per field; empty if in none.

    Of a part with other weights the configuration is left out.
    """
    one, other = (dotted(_images_of(settings)) for settings in (found, wanted))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    replaced = tuple(f"{name.removesuffix('sha256')}config." for name in names if name.endswith(".sha256"))
    return [f"{name}{_values(one.get(name), other.get(name))}" for name in names if not name.startswith(replaced)]


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A hash of all settings that change images; every shard carries it."""
    text = json.dumps(_images_of(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_growth(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `UserError` if fewer images are wanted than a run has: a run may grow, not shrink."""
    if wanted["num_samples"] < found["num_samples"]:
        raise UserError(
            f"the run has {found['num_samples']} images, more than --num-samples {wanted['num_samples']}; a run may "
            "grow, but not shrink"
        )


def _images_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_IN_IMAGES}


def _values(found: Any, wanted: Any) -> str:
    """The two values, where they are short."""
    text = f" ({quote(found)} there, {quote(wanted)} here)"
    return text if len(text) <= 40 else ""
