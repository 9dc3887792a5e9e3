"""The evaluation protocol of ImageNet papers: samples against a reference, in one call."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from softcfg.errors import UserError, quote, require_name, require_whole
from softcfg.evaluation import metrics as formulas
from softcfg.evaluation.extractors import load_extractor
from softcfg.evaluation.features import Extractor, Features, extract
from softcfg.evaluation.metrics import Statistics
from softcfg.evaluation.report import TITLES, Report
from softcfg.evaluation.sources import ImageSource, ResizedSource, files_read, open_source
from softcfg.evaluation.statistics_file import ARRAYS, StatisticsFile, read_statistics, save_statistics
from softcfg.files import FileStates, as_path, file_states, hash_file, is_file, refuse_overwriting
from softcfg.images import checked_size
from softcfg.nn.precision import as_device, as_dtype, dtype_name, has_float64
from softcfg.version import __version__

if TYPE_CHECKING:
    from softcfg.evaluation.sources import Images

# What a prompt says, by the metric that counts the images which show it.
AGREEMENT = {"agreement": "all", "name_agreement": "name", "style_agreement": "style", "colour_agreement": "colour"}
METRICS = tuple(TITLES)
SAMPLES_ALONE = ("inception_score", "class_accuracy", *AGREEMENT)  # they need no reference
FRECHET = {"fid": "pooled", "sfid": "spatial"}  # the features they compare


def evaluate(
    samples: Images,
    reference: Images | None = None,
    extractor: str | Extractor = "inception",
    metrics: Sequence[str] | str | None = None,
    *,
    labels: ArrayLike | Tensor | None = None,
    prompts: Sequence[str] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    batch_size: int = 64,
    cache: str | Path | None = None,
    save_stats: str | Path | None = None,
    progress: bool = False,
    image_size_eval: int | None = None,
) -> Report:
    """Measure samples.

    Args:
        samples: an .npz file with `arr_0`, a folder of images, a run folder, uint8 images `[N, H, W, 3]`, or a list of
            pictures of one size, such as images of PIL, also mixed; see `softcfg.images.read_picture`.
        reference: the same, or an .npz file of statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID);
            without it there are only the Inception Score, class accuracy and agreement. As in the ADM protocol,
            statistics in a file take the place of its images in FID and sFID, on both sides.
        extractor: a registered name, "package.module:factory", or an `Extractor`.
        metrics: some of "fid", "sfid", "inception_score", "precision", "recall", "class_accuracy", "agreement" with the
            prompts, "name_agreement", "style_agreement", "colour_agreement"; by default all that the input and the
            extractor allow, with a note on the others.
        labels: the class of every sample, for class accuracy; by default those that a run folder, or `arr_1` of an
            .npz file, holds.
        prompts: what every sample was drawn from, for agreement; by default those that a run folder holds.
        weights: of the extractor, instead of its own.
        device: where features and metrics are computed; CUDA where there is one.
        dtype: of the extractor, float32 or float64; also by its name.
        batch_size: images described at once.
        cache: folder for features, so that the same images are described only once.
        save_stats: write the statistics of the samples to this .npz file, to serve as a reference.
        progress: show bars.
        image_size_eval: resize samples and reference to squares of this side first, where they are of another size:
            bicubic, without antialiasing, from 8-bit pixels to 8-bit pixels. Images that `softcfg sample` or `decode`
            resized themselves, before they were rounded, are closer to those of published figures.

    Raises:
        UserError: images or weights cannot be used, or were replaced meanwhile, or a metric that was asked for cannot
            be computed.
    """
    started = time.perf_counter()
    metrics = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(metrics, (Sequence, set, frozenset, type(None))):
        raise UserError(f"metrics must be a list of names, got {quote(metrics)}")
    wanted = [require_name(str(name), METRICS, "there is no metric named") for name in metrics or METRICS]
    batch_size = require_whole(batch_size, "the batch size", 1)
    computed_in = as_dtype(dtype) or torch.float32
    if computed_in not in (torch.float32, torch.float64):
        raise UserError(f"dtype must be float32 or float64, got {dtype_name(computed_in)}")
    if not isinstance(extractor, (str, Extractor)):
        raise UserError(f"the extractor must be a name or an Extractor, got {quote(extractor)}")
    for name, path in (("weights", weights), ("cache", cache), ("save_stats", save_stats)):
        if path is not None and (path == "" or not isinstance(path, (str, os.PathLike))):
            raise UserError(f"{name} must be a path, got {quote(path)}")
    refuse_overwriting_images({"save_stats": save_stats}, {"the samples": samples, "the reference": reference}, weights)
    device = as_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)

    # What can be refused is refused before anything takes time.
    inputs = [_Input.open(given) for given in ((samples,) if reference is None else (samples, reference))]
    if image_size_eval is not None:
        inputs = [given.resized(checked_size(image_size_eval)) for given in inputs]
    _require_equal_sizes(inputs)
    classes = inputs[0].labels if labels is None else _as_labels(labels)
    texts = inputs[0].prompts if prompts is None else _as_prompts(prompts)
    obstacles = {name: obstacle for name in wanted if (obstacle := _obstacle(name, inputs, classes, texts))}
    if metrics and obstacles:
        raise UserError("; ".join(f"{TITLES[name]} cannot be computed: {why}" for name, why in obstacles.items()))
    if save_stats and inputs[0].source is None:
        raise UserError(f"{inputs[0].name} holds no images of which statistics could be saved")
    if not isinstance(extractor, Extractor):
        extractor = load_extractor(extractor, weights, device, computed_in)
    if not metrics:
        suits = {"class_accuracy": extractor.classifies, **dict.fromkeys(AGREEMENT, extractor.agreement is not None)}
        wanted = [name for name in wanted if suits.get(name, True)]
    for given in inputs:
        given.require_made_with(extractor)

    options = {"batch_size": batch_size, "cache": cache, "progress": progress}
    sides = [_Side(given, extractor, device, options) for given in inputs]
    comparison = _Comparison(*sides, labels=classes, prompts=texts)
    values: dict[str, float] = {}
    for name in wanted:
        if name not in obstacles:
            try:
                values[name] = comparison.share(AGREEMENT[name]) if name in AGREEMENT else getattr(comparison, name)()
            except _UnavailableError as error:
                if metrics:
                    raise UserError(f"{TITLES[name]} cannot be computed: {error}") from error
                obstacles[name] = str(error)
    described = [side.describe() for side in sides]
    for given in inputs:
        given.require_unchanged()
    if save_stats:
        sides[0].save_statistics(save_stats)

    settings = {
        "samples": described[0],
        "reference": described[1] if reference is not None else None,
        "extractor": {
            "name": extractor.name,
            "identity": extractor.identity,
            "dtype": dtype_name(extractor.dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
        "parameters": {
            "split_size": formulas.SPLIT_SIZE,
            "neighbour": formulas.NEIGHBOUR,
            "batch_size": batch_size,
        },
        "versions": {
            "softcfg": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    notes = [
        f"no {TITLES[name]}: {obstacle}"
        for name, obstacle in obstacles.items()
        if name in wanted and AGREEMENT.get(name, "all") == "all"
    ]
    notes += [extractor.note] if extractor.note else []
    notes += [
        f"the images of {given.name} were resized from {given.source.original.size[0]} to {image_size_eval} pixels "
        "a side"
        for given in inputs
        if isinstance(given.source, ResizedSource)
    ]
    if values.keys() & FRECHET.keys():
        if inputs[0].file and inputs[0].source:
            notes.append(f"FID and sFID use the statistics in {inputs[0].name}, not its images")
        notes += [note for side in sides if (note := side.note())]
    return Report(values, settings, notes)


def refuse_overwriting_images(
    written: Mapping[str, str | Path | None], images: Mapping[str, Images | None], weights: str | Path | None = None
) -> None:
    """Raise `UserError` if a file to be written is one of `images`, or `weights`; see `softcfg.files`."""
    for name, path in written.items():
        if path:
            read = [(what, file) for what, given in images.items() for file in files_read(given, path)]
            refuse_overwriting({name: path}, [*read, ("the weights of the extractor", weights)])
    refuse_overwriting(written)


def _as_labels(labels: ArrayLike | Tensor) -> Tensor:
    """Labels as a tensor of whole numbers."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels must be the class of every sample, got {quote(labels)}") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UserError(f"labels must be whole numbers, got {dtype_name(found.dtype)}")
    return found


def _as_prompts(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"prompts must be a list of texts, one per sample, got {quote(prompts)}")
    return prompts


class _UnavailableError(UserError):
    """A metric cannot be computed with this extractor."""


class _Comparison:
    """The metrics by their names; what two of them share is computed once."""

    def __init__(
        self,
        samples: _Side,
        reference: _Side | None = None,
        *,
        labels: Tensor | None,
        prompts: Sequence[str] | None,
    ) -> None:
        self.samples = samples
        self.reference = reference
        self.labels = labels
        self.prompts = prompts

    def fid(self) -> float:
        return self._frechet("pooled")

    def sfid(self) -> float:
        return self._frechet("spatial")

    def inception_score(self) -> float:
        return formulas.inception_score(self.samples.tensor("logits"))

    def precision(self) -> float:
        return self._precision_recall[0]

    def recall(self) -> float:
        return self._precision_recall[1]

    def class_accuracy(self) -> float:
        extractor = self.samples.extractor
        if not extractor.classifies:
            raise _UnavailableError(f"the extractor {extractor.name} does not know the classes of the samples")
        assert self.labels is not None
        return formulas.class_accuracy(self.samples.tensor("logits"), self.labels)

    def share(self, part: str) -> float:
        """The share of the samples that show this part of their prompts."""
        if part not in self._agreement:
            raise _UnavailableError(f"no prompt says a {part}")
        return self._agreement[part]

    @cached_property
    def _agreement(self) -> dict[str, float]:
        extractor = self.samples.extractor
        if extractor.agreement is None:
            raise _UnavailableError(f"the extractor {extractor.name} does not read prompts")
        assert self.prompts is not None
        answers = self.samples.tensor("answers").cpu()
        if len(self.prompts) != len(answers):
            raise UserError(f"agreement needs one prompt per sample, got {len(self.prompts)} for {len(answers)}")
        try:
            return extractor.agreement(answers, self.prompts)
        except UserError as error:
            raise _UnavailableError(str(error)) from error

    def _frechet(self, kind: str) -> float:
        assert self.reference is not None
        moments = self.samples.statistics(kind), self.reference.statistics(kind)
        try:
            return formulas.frechet_distance(*moments)
        except UserError as error:
            raise UserError(f"{self.samples.given.name} against {self.reference.given.name}: {error}") from error

    @cached_property
    def _precision_recall(self) -> tuple[float, float]:
        assert self.reference is not None
        return formulas.precision_recall(self.reference.tensor("pooled"), self.samples.tensor("pooled"))


def _obstacle(
    metric: str, inputs: Sequence[_Input], labels: Tensor | None, prompts: Sequence[str] | None
) -> str | None:
    """Why `metric` cannot be computed of these inputs, whatever the extractor."""
    if metric in SAMPLES_ALONE:
        inputs = inputs[:1]
    elif len(inputs) < 2:
        return "it needs a reference"
    for given in inputs:
        kind = FRECHET.get(metric)
        if kind and given.file:
            if given.file.get(kind) is None:
                return f"{given.name} holds statistics for FID, but not those for sFID, {' and '.join(ARRAYS[kind])}"
        elif given.source is None:
            return f"{given.name} holds statistics, but no images"
    if metric == "class_accuracy" and labels is None:
        return f"{inputs[0].name} does not say of which classes its images are"
    if metric in AGREEMENT and prompts is None:
        return f"{inputs[0].name} does not say from which prompts its images were drawn"
    return None


@dataclass(frozen=True)
class _Input:
    """The samples or the reference as given: images, statistics in a file, or both."""

    name: str
    source: ImageSource | None
    file: StatisticsFile | None
    path: Path | None = None  # of the file, and its state before it was read
    states: FileStates = ()

    @classmethod
    def open(cls, given: Images) -> _Input:
        path = as_path(given) if isinstance(given, (str, os.PathLike)) else None
        path = path if path is not None and is_file(path) else None
        states = file_states([path]) if path is not None else ()
        file = read_statistics(path) if path is not None else None
        source = open_source(given) if file is None or file.has_images else None
        return cls(str(given) if source is None else source.name, source, file, path, states)

    def require_unchanged(self) -> None:
        """Raise a `UserError` if a file was written or replaced since it was first read."""
        if self.source is not None:
            self.source.require_unchanged()
        if self.path is not None and file_states([self.path]) != self.states:
            raise UserError(f"{self.name} changed while it was read; measure it again")

    def resized(self, size: int) -> _Input:
        """The same with images of `size` x `size` pixels."""
        if self.source is None or self.source.size == (size, size):
            return self
        if self.file is not None:
            raise UserError(f"{self.name} holds statistics of images of another size than image_size_eval {size}")
        return replace(self, source=ResizedSource(self.source, size))

    @property
    def labels(self) -> Tensor | None:
        """The classes of the images, as far as known."""
        return self.source.labels if self.source else None

    @property
    def prompts(self) -> Sequence[str] | None:
        """The prompts of the images, as far as known."""
        return self.source.prompts if self.source else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images, as far as known."""
        return self.source.size if self.source else self.file.size if self.file else None

    def require_made_with(self, extractor: Extractor) -> None:
        """Raise a `UserError` if the statistics are known to come from another extractor."""
        if self.file and (name := self.file.origin.get("extractor")):
            if name != extractor.name:
                raise UserError(f"{self.name} holds statistics of the extractor {name}, not of {extractor.name}")
            if self.file.origin.get("identity") != extractor.identity:
                raise UserError(f"{self.name} was made with other weights of the extractor {name}")


class _Side:
    """The samples or the reference with their features, each computed when it is first needed."""

    def __init__(self, given: _Input, extractor: Extractor, device: torch.device, options: dict[str, Any]) -> None:
        self.given = given
        self.extractor = extractor
        self.device = device if has_float64(device) else torch.device("cpu")
        self.options = options
        self.known: dict[str, Statistics] = {}

    @cached_property
    def features(self) -> Features:
        assert self.given.source is not None
        return extract(self.extractor, self.given.source, **self.options)

    def tensor(self, kind: str) -> Tensor:
        """The "pooled", "spatial" or "logits" features."""
        found = self.features.tensors().get(kind)
        if found is None:
            what = kind if kind == "answers" else f"{kind} features"
            raise _UnavailableError(f"the extractor {self.extractor.name} gives no {what}")
        return found.to(self.device)

    def statistics(self, kind: str) -> Statistics:
        """Those of the file, or else those of the images."""
        if self.given.file and (found := self.given.file.get(kind)):
            return found.to(self.device)
        return self.image_statistics(kind)

    def image_statistics(self, kind: str) -> Statistics:
        if kind not in self.known:
            self.known[kind] = formulas.statistics(self.tensor(kind))
        return self.known[kind]

    def save_statistics(self, path: str | Path) -> None:
        source = self.given.source
        assert source is not None
        origin = {
            "extractor": self.extractor.name,
            "identity": self.extractor.identity,
            "count": str(source.count),
            "size": "{} {}".format(*source.size),
            "fingerprint": source.fingerprint,
        }
        spatial = self.image_statistics("spatial") if self.features.spatial is not None else None
        save_statistics(path, self.image_statistics("pooled"), spatial, origin)

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        source, file = self.given.source, self.given.file
        images = source.original if isinstance(source, ResizedSource) else source
        return {
            "name": self.given.name,
            "count": source.count if source else None,
            "size": list(self.given.size) if self.given.size else None,
            "sha256": images.fingerprint if images else hash_file(self.given.path),  # type: ignore[arg-type]
            "statistics": "from the file" if file else "of the images",
            **({"resized_from": list(images.size)} if images and images is not source else {}),
            **({"statistics_of": file.origin} if file and file.origin else {}),
        }

    def note(self) -> str:
        """What bends FID and sFID, or ""."""
        if self.given.file:
            return ""
        count, width = len(self.features), self.features.pooled.shape[1]
        if count > width:
            return ""
        return (
            f"{self.given.name} has {count:,} images for {width:,} features: FID is far above its value for many "
            "images, and compares only with figures of as many"
        )


def _require_equal_sizes(inputs: Sequence[_Input]) -> None:
    sizes = [given.size for given in inputs]
    if None not in sizes and len(set(sizes)) > 1:
        (height, width), (other_height, other_width) = sizes  # type: ignore[misc]
        raise UserError(
            f"the samples are {height} x {width} and the reference images {other_height} x {other_width}; "
            "figures mean something only for images of one size"
        )
