"""Seconds of every metric for features of Inception's width: ours against NumPy and SciPy, whole matrices at once.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation

The other side is written as the ADM evaluator computes it, in float64 for the moments (numpy.cov, scipy.linalg.sqrtm)
and in float32 for the distances, but with all of them in memory. OMP_NUM_THREADS sets the threads of both sides. On a
CPU the seconds are those of the processor, of all threads together, so that other load does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.timing import machine, table
from softcfg.evaluation import (
    frechet_distance,
    inception_score,
    precision_recall,
    statistics,
)
from softcfg.evaluation.inception import InceptionV3

CLASSES = 1008
NEIGHBOUR = 3

Array = NDArray[Any]


def features(count: int, width: int, seed: int) -> Tensor:
    """Rectified normal features with a spectrum that decays, as those of a network."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(width)  # of all sets alike
    scales = torch.arange(1, width + 1) ** -0.5
    directions = torch.randn(width, width, generator=mixing) * scales[:, None]
    return (torch.randn(count, width, generator=draw) @ directions * (1 + 0.02 * seed) + 0.2).relu()


def numpy_statistics(x: Array) -> tuple[Array, Array]:
    return x.mean(axis=0), np.cov(x, rowvar=False)


def numpy_frechet(one: tuple[Array, Array], other: tuple[Array, Array]) -> float:
    root = scipy.linalg.sqrtm(one[1] @ other[1])
    shift = np.square(one[0].astype(np.float64) - other[0]).sum()
    return float((shift + np.trace(one[1]) + np.trace(other[1]) - 2 * np.trace(root)).real)


def numpy_inception_score(logits: Array) -> float:
    scores = []
    for start in range(0, len(logits), 5000):
        split = logits[start : start + 5000]
        p = np.exp(split - split.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores))


def numpy_precision_recall(reference: Array, samples: Array) -> tuple[float, float]:
    def distances(one: Array, other: Array) -> Array:
        norms = np.square(one).sum(axis=1)[:, None] - 2 * (one @ other.T)
        return np.maximum(norms + np.square(other).sum(axis=1), 0)

    def radii(x: Array) -> Array:
        return np.partition(distances(x, x), NEIGHBOUR, axis=1)[:, NEIGHBOUR]

    reach = radii(reference), radii(samples)
    cross = distances(reference, samples)
    precision = (cross <= reach[0][:, None]).any(axis=0).mean()
    return float(precision), float((cross <= reach[1]).any(axis=1).mean())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and its seconds."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    result = run()
    return result, clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ours-only", action="store_true", help="for sizes whose whole matrices do not fit")
    parser.add_argument("--images", type=int, default=16, help="through the Inception network")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples, reference = features(args.samples, args.width, 1), features(args.reference, args.width, 2)
    logits = samples @ torch.randn(args.width, CLASSES, generator=torch.Generator().manual_seed(0)) / 20
    print(f"{args.samples:,} samples, {args.reference:,} references, {args.width:,} features, {machine()}\n")

    def ours(run: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
        moved = [each.to(device) for each in inputs]
        return lambda: run(*moved)

    moments: dict[str, Any] = {}

    def both_statistics() -> float:
        moments["ours"] = [statistics(each.to(device)) for each in (samples, reference)]
        return float(moments["ours"][0].covariance.trace())

    def both_numpy_statistics() -> float:
        moments["numpy"] = [numpy_statistics(each.numpy()) for each in (samples, reference)]
        return float(np.trace(moments["numpy"][0][1]))

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "means and covariances": (both_statistics, both_numpy_statistics),
        "Frechet distance": (
            lambda: frechet_distance(*moments["ours"]),
            lambda: numpy_frechet(*moments["numpy"]),
        ),
        "Inception Score": (
            ours(inception_score, logits),
            lambda: numpy_inception_score(logits.numpy()),
        ),
        "precision and recall": (
            ours(precision_recall, reference, samples),
            lambda: numpy_precision_recall(reference.numpy(), samples.numpy()),
        ),
    }
    rows: list[list[object]] = []
    for name, (our_side, numpy_side) in sides.items():
        value, seconds = timed(our_side)
        if args.ours_only:
            rows.append([name, seconds, "", "", np.array2string(np.array(value), precision=6), ""])
            continue
        other, other_seconds = timed(numpy_side)
        gap = float(np.abs(np.array(value) - np.array(other)).max())
        shown = np.array2string(np.array(value), precision=6)
        rows.append([name, seconds, other_seconds, other_seconds / seconds, shown, f"{gap:.1e}"])
    print(table(["", "ours, s", "NumPy and SciPy, s", "times as fast", "value", "difference"], rows))

    network = InceptionV3().eval().to(device)
    pixels = torch.randint(256, (args.images, 3, 256, 256), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        network(pixels[:1])
        _, seconds = timed(lambda: network(pixels).pooled.cpu())
    print(f"\nInception network, 256 x 256 pixels, float32: {args.images / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
