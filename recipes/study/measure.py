"""Drawing and measuring a point."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Mapping
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
from softcfg.inspection import measures
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
        start = time.monotonic()
        kinds = {"images": self.images, "trace": self.trace, "real": self.bound, "reconstructed": self.bound}
        values = kinds[point.measure](point)
        return {
            **point.settings(),
            "model": self.model,
            "values": values,
            "seconds": round(time.monotonic() - start, 1),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "versions": {"softcfg": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

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
        precision, recall = evaluation.precision_recall(self.reference.pooled, features.pooled)
        tenth = torch.arange(len(labels)) * TENTHS // len(labels)
        return {
            "fid": self.fid(features.pooled),
            "fid_without": [self.fid(features.pooled[tenth != left_out]) for left_out in range(TENTHS)],
            "inception_score": evaluation.inception_score(features.logits),
            "precision": precision,
            "recall": recall,
            "class_accuracy": evaluation.class_accuracy(features.logits, labels),
        }

    def fid(self, features: Tensor) -> float:
        """The Frechet distance of features [N, D] from the test images."""
        return evaluation.frechet_distance(evaluation.statistics(features), self.reference_statistics)

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
            found["entropy_gap"].append(measures.entropy_gap(trace))
            found["branch_distance"].append(measures.branch_distance(trace))
            found["budget"].append(measures.perturbation_budget(trace, step_norm=True))
            found["budget_without"].append(measures.perturbation_budget(trace, step_norm=False))
            found["confidence"].append(trace.confidence)
            gray = torch.from_numpy(drawn.pixels[..., 0]).float() / 255
            found["brightness"].append(brightness(gray, self.pipeline.tokenizer.latent_size))
        values: Row = {}
        for name, parts in found.items():
            every = torch.cat(parts).double().cpu()
            values[name] = _short(every.mean(dim=0))
            values[f"{name}_error"] = _short(every.std(dim=0) / len(every) ** 0.5)
        confidence, black = torch.cat(found["confidence"]).cpu(), torch.cat(found["brightness"]) < BLACK
        for name, chosen in (("background", black), ("object", ~black)):
            values[f"{name}_confidence"] = float((confidence * chosen).sum() / chosen.sum().clamp(min=1))
        values["background_share"] = float((confidence * black).sum() / confidence.sum())
        return values


def _colours(gray: Tensor) -> Tensor:
    """[N, H, W] -> [N, H, W, 3]."""
    return gray[..., None].expand(-1, -1, -1, 3)


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
