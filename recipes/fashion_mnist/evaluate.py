"""Measure a trained model folder: the tokenizer's reconstructions, then samples at several guidance settings.

Class accuracy is the share of images that the classifier assigns to the class they were drawn for. The feature distance
is the Fréchet distance to the test images between the classifier's features: it also sees quality and variety.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from recipes.commands import run_command
from recipes.fashion_mnist.data import DEFAULT_FOLDER, load
from softcfg import CFG, Pipeline, SoftCFG, evaluation
from softcfg.errors import UserError
from softcfg.evaluation.fashion_classifier import FashionClassifier
from softcfg.images import grid
from softcfg.zoo import resolve
from softcfg.zoo.registry import BUNDLED


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="the model folder, or the name of a bundled model")
    parser.add_argument(
        "--classifier", type=Path, help="weights of the classifier; by default the model folder's, or the bundled ones"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the IDX files")
    parser.add_argument("--images", type=int, default=1000, help="images for each row of the table")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, help="folder for a picture of 100 images of each row")
    run_command(parser, measure)


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    pipeline = Pipeline.from_pretrained(given.model)
    folders = [folder for folder in (resolve(given.model).folder, BUNDLED / "fashion") if folder]
    known = [path for folder in folders if (path := folder / "classifier.safetensors").is_file()]
    weights = given.classifier or known[0]
    if not weights.is_file():
        raise UserError(f"{weights} does not exist; name the classifier's weights with --classifier")
    classifier = FashionClassifier().eval()
    classifier.load_state_dict(load_file(weights))

    test = load(given.data, "test")
    pixels = test.pixels(slice(None))
    reference = features(classifier, pixels)
    decoded = torch.cat(
        [pipeline.tokenizer.decode(pipeline.tokenizer.encode(part)) for part in pixels[:1000].split(50)]
    )
    error = -10 * (decoded - pixels[:1000]).square().mean().log10().item()
    print(f"test images: accuracy {classifier.accuracy(pixels, test.labels):.4f}")
    print(
        f"first 1000 test images: accuracy {classifier.accuracy(pixels[:1000], test.labels[:1000]):.4f}; reconstructed "
        f"{classifier.accuracy(decoded, test.labels[:1000]):.4f}, PSNR {error:.2f} dB, feature distance "
        f"{frechet_distance(features(classifier, decoded), reference):.3f} (as they are: "
        f"{frechet_distance(reference[:1000], reference):.3f})"
    )
    labels = torch.arange(given.images) % 10
    print("guidance             accuracy  feature distance  seconds")
    for name, guidance in guidances(given.scales, given.powers):
        start = time.monotonic()
        out = pipeline(labels, guidance, seed=given.seed, batch_size=given.batch_size)
        images = torch.from_numpy(out.pixels).permute(0, 3, 1, 2).float() / 255
        accuracy = classifier.accuracy(images, labels)
        distance = frechet_distance(features(classifier, images), reference)
        print(f"{name:20} {accuracy:8.4f}  {distance:16.3f}  {time.monotonic() - start:7.1f}", flush=True)
        if given.grids:
            given.grids.mkdir(parents=True, exist_ok=True)
            rows = [out.images[i : i + 10] for i in range(0, min(100, given.images), 10)]
            grid(rows).save(given.grids / f"{name.replace(' ', '-')}.png")


def guidances(scales: list[float], powers: list[float]) -> Iterator[tuple[str, CFG]]:
    """Return names and guidance settings: none, and CFG and SoftCFG at every scale and power."""
    for scale in scales:
        if scale == 1:
            yield "none", CFG(guidance_scale=1.0)
            continue
        for power in powers:
            for method in (CFG, SoftCFG):
                guidance = method(guidance_scale=scale, guidance_scale_pow=power)
                yield f"{method.__name__} {scale:g} pow {power:g}", guidance


@torch.inference_mode()
def features(classifier: FashionClassifier, pixels: Tensor) -> np.ndarray:
    """Return the classifier's features float64 [N, 128] of images."""
    return torch.cat([classifier.features(part) for part in pixels.split(500)]).double().numpy()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features [N, D]."""
    one, other = (evaluation.statistics(torch.from_numpy(features)) for features in (first, second))
    return evaluation.frechet_distance(one, other)


if __name__ == "__main__":
    main()
