"""Drawing and measuring a point."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import softcfg
from recipes.fashion_mnist.data import Split, load
from recipes.study.patches import BLACK, PatchSoftCFG, brightness, find_black_codes
from recipes.study.points import Point, Row
from softcfg import CFG, Pipeline, evaluation
from softcfg.evaluation import Extractor, Features
from softcfg.images import grid
from softcfg.inspection import Trace, measures
from softcfg.version import __version__

CLASSES = 10
TRACED_AT_ONCE = 100
TENTHS = 10


class Laboratory:
    """A model, a classifier, and the test images that samples are compared with."""

    def __init__(self, model: str, data: Path, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.pipeline = Pipeline.from_pretrained(model)
        self.device = self.pipeline.generator.device
        self.extractor: Extractor = evaluation.load_extractor("fashion", device=self.device)
        self.data = data
        self.reference = self.features(_colours(load(data, "test").images))
        self.reference_statistics = evaluation.statistics(self.reference.pooled)

    @cached_property
    def train(self) -> Split:
        """The training images."""
        return load(self.data, "train")

    @cached_property
    def black_codes(self) -> Tensor:
        """The codes of black patches, bool [V]."""
        return find_black_codes(self.pipeline.tokenizer, self.train)

    def features(self, images: Tensor) -> Features:
        """What the classifier says of uint8 images [N, H, W, 3]."""
        source = evaluation.open_source(images.contiguous())
        return evaluation.extract(self.extractor, source, batch_size=self.batch_size)

    def run(self, point: Point) -> Row:
        """The row of a point for the results."""
        kinds = {"images": self.images, "trace": self.trace, "real": self.bound, "reconstructed": self.bound}
        return row_of(point, kinds[point.measure], self.model, self.device)

    def images(self, point: Point) -> Row:
        """The metrics of images drawn with the point's settings, classes in turn."""
        labels = torch.arange(point.samples) % CLASSES
        if isinstance(point.guidance, PatchSoftCFG):
            PatchSoftCFG.black_codes = self.black_codes
        out = self.pipeline(labels, point.guidance, seed=point.seed, batch_size=self.batch_size)
        return self.metrics(torch.from_numpy(out.pixels), labels)

    def bound(self, point: Point) -> Row:
        """The metrics of training images, as they are or as the tokenizer gives them back."""
        chosen = slice(point.samples)
        images = _colours(self.train.images[chosen])
        if point.measure == "reconstructed":
            tokenizer = self.pipeline.tokenizer
            parts = self.train.pixels(chosen).split(self.batch_size)
            images = torch.cat([tokenizer.to_uint8(tokenizer.decode(tokenizer.encode(part))).cpu() for part in parts])
        return self.metrics(images, self.train.labels[chosen])

    def picture(self, settings: Mapping[str, CFG]) -> Image.Image:
        """Two rows of images for each setting, the classes in turn, with the same random numbers."""
        labels = torch.arange(2 * CLASSES) % CLASSES
        drawn = [self.pipeline(labels, guidance, seed=0, progress=False).images for guidance in settings.values()]
        names = [name for name in settings for _ in (0, CLASSES)]
        rows = [images[i : i + CLASSES] for images in drawn for i in (0, CLASSES)]
        return grid(rows, row_labels=names)

    def metrics(self, images: Tensor, labels: Tensor) -> Row:
        """The metrics of images uint8 [N, H, W, 3] of classes [N]; the extractor has no spatial features for sFID.

        `fid_without` are the FIDs without each tenth of the images, from which its error is estimated.
        """
        features = self.features(images)
        assert features.logits is not None
        return {
            **distances(self.reference.pooled, self.reference_statistics, features.pooled),
            "inception_score": evaluation.inception_score(features.logits),
            "class_accuracy": evaluation.class_accuracy(features.logits, labels),
        }

    def trace(self, point: Point) -> Row:
        """What guidance does at every step, means over the images.

        `budget` and `budget_without` are the sums of 1 - w with and without Step Normalisation, `brightness` is the
        mean gray value of the token's patch. Every quantity has its standard error beside it. `background_confidence`
        and `object_confidence` are the mean confidences in black patches and in all others, `background_share` is the
        part of all confidence, and so of the perturbation, that lies on black patches.
        """
        found: dict[str, list[Tensor]] = defaultdict(list)
        for part in torch.arange(point.samples).split(TRACED_AT_ONCE):
            labels = part % CLASSES
            drawn = self.pipeline(labels, point.guidance, seed=point.seed, indices=part.tolist())
            trace = softcfg.trace(
                self.pipeline.generator,
                labels=labels,
                tokens=drawn.tokens,
                guidance=point.guidance,
                sampling=self.pipeline.sampling(),
                value_weights=False,
            )
            for name, values in per_step(trace).items():
                found[name].append(values)
            gray = torch.from_numpy(drawn.pixels[..., 0]).float() / 255
            found["brightness"].append(brightness(gray, self.pipeline.tokenizer.latent_size))
        background = torch.cat(found["brightness"]) < BLACK
        return {**means(found), **on_background(torch.cat(found["confidence"]), background)}


def row_of(point: Point, work: Callable[[Point], Row], model: str, device: torch.device) -> Row:
    """The row of a point for the results, of the values that `work` finds."""
    start = time.monotonic()
    values = work(point)
    return {
        **point.settings(),
        "model": model,
        "values": values,
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"softcfg": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def distances(reference: Tensor, statistics: evaluation.Statistics, features: Tensor) -> Row:
    """FID, precision and recall of features [N, D] against those of real images and their statistics.

    `fid_without` are the FIDs without each tenth of the images, from which its error is estimated.
    """

    def fid(chosen: Tensor) -> float:
        return evaluation.frechet_distance(evaluation.statistics(chosen).to(statistics.mean.device), statistics)

    precision, recall = evaluation.precision_recall(reference, features)
    tenth = torch.arange(len(features), device=features.device) * TENTHS // len(features)
    return {
        "fid": fid(features),
        "fid_without": [fid(features[tenth != left_out]) for left_out in range(TENTHS)],
        "precision": precision,
        "recall": recall,
    }


def per_step(trace: Trace) -> dict[str, Tensor]:
    """What guidance does at every step of every image, [B, T] each."""
    return {
        "entropy_gap": measures.entropy_gap(trace),
        "branch_distance": measures.branch_distance(trace),
        "budget": measures.perturbation_budget(trace, step_norm=True),
        "budget_without": measures.perturbation_budget(trace, step_norm=False),
        "confidence": trace.confidence,
    }


def means(found: Mapping[str, Sequence[Tensor]]) -> Row:
    """Means over the images, and beside each its standard error, of quantities [B, T] in parts."""
    values: Row = {}
    for name, parts in found.items():
        every = torch.cat(list(parts)).double().cpu()
        values[name] = short(every.mean(dim=0))
        values[f"{name}_error"] = short(every.std(dim=0) / len(every) ** 0.5)
    return values


def on_background(confidence: Tensor, background: Tensor) -> Row:
    """Mean confidences [B, T] on the background, bool [B, T], and on the object; and the background's share of all."""
    confidence, background = confidence.cpu(), background.cpu()
    values = {
        f"{name}_confidence": float((confidence * chosen).sum() / chosen.sum().clamp(min=1))
        for name, chosen in (("background", background), ("object", ~background))
    }
    return {**values, "background_share": float((confidence * background).sum() / confidence.sum())}


def _colours(gray: Tensor) -> Tensor:
    """[N, H, W] -> [N, H, W, 3]."""
    return gray[..., None].expand(-1, -1, -1, 3)


def short(values: Tensor) -> list[float]:
    """Four digits of each."""
    return [float(f"{value:.4g}") for value in values.tolist()]
