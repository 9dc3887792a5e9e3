"""The metrics of the ADM evaluation protocol, as functions of features.

All arithmetic is float64, on the device of the features. Definitions and sources: `docs/evaluation.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcfg.errors import UserError

SPLIT_SIZE = 5000
NEIGHBOUR = 3
BLOCK = 2048  # rows; a block of distances takes 32 MiB

# Two computations of one distance may differ by this, relatively; the rounding of float32 features is far larger.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Statistics:
    """Mean ``[D]`` and covariance ``[D, D]`` of features, float64."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device) -> Statistics:
        """The same on `device`."""
        return Statistics(self.mean.to(device), self.covariance.to(device))


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance (divided by N - 1) of features ``[N, D]``, N at least 2."""
    count = len(_checked(features, "features"))
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, got {count}")
    mean = torch.stack([part.double().sum(dim=0) for part in features.split(BLOCK)]).sum(dim=0) / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred)
    return Statistics(mean, covariance / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The squared Frechet distance of two normal distributions (FID, sFID): symmetric, never below 0.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2); the last trace is the sum of the singular values of
    S1^(1/2) S2^(1/2), which exists for every covariance, of full rank or not.

    Raises:
        UserError: the widths differ, a number is not finite, or a matrix is no covariance.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(f"features of width {len(one.mean)} and {len(other.mean)} cannot be compared")
    roots = [_root(each) for each in (one, other)]
    traces = [each.covariance.double().diagonal().sum() for each in (one, other)]
    shift = (one.mean.double() - other.mean.double()).square().sum()
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return max(0.0, float(shift + traces[0] + traces[1] - 2 * overlap))


def _root(given: Statistics) -> Tensor:
    """R ``[D, rank]`` with R R^T = S."""
    width = len(given.mean)
    covariance = given.covariance.double()
    if covariance.shape != (width, width):
        raise UserError(f"a covariance of {width} features must be [{width}, {width}], got {list(covariance.shape)}")
    if not (given.mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError("the mean or the covariance holds numbers that are not finite")
    scale = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > 1e-6 * scale:
        raise UserError("the covariance is not symmetric, so it is none")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = float(values[-1])
    if float(values[0]) < -1e-6 * scale:
        raise UserError(f"the covariance has a negative eigenvalue ({float(values[0]):.3g}), so it is none")
    # What is below the rounding of eigh stands for 0; its square root would be far above it.
    kept = values > width * torch.finfo(torch.float64).eps * largest
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Mean over splits of exp(mean of KL(p(y|x) || p(y))), for class logits ``[N, C]``.

    Splits are `split_size` rows in their order; a shorter last one counts as much as the others.
    """
    if not len(_checked(logits, "logits")):
        raise UserError("the Inception Score needs at least 1 image")
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(dim=1)
        p = log_p.exp()
        # Where a class has no probability at all, log_p is still finite (or p * log_p is 0).
        divergence = (p * log_p).sum(dim=1).mean() - torch.special.xlogy(p.mean(dim=0), p.mean(dim=0)).sum()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def precision_recall(reference: Tensor, samples: Tensor, k: int = NEIGHBOUR, block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall of `samples` ``[N, D]`` against `reference` ``[M, D]``.

    Precision is the share of samples that lie in the ball of some reference, recall the share of references in
    the ball of some sample; a ball reaches to the k-th nearest neighbour within the own set, and includes its rim.

    Args:
        block: rows and columns of distances held at once.

    Raises:
        UserError: fewer than k + 1 rows, or other widths.
    """
    if reference.shape[1:] != samples.shape[1:]:
        raise UserError(f"features of width {reference.shape[1]} and {samples.shape[1]} cannot be compared")
    reach = [radii(each, k, block) * (1 + ROUNDING) for each in (reference, samples)]
    sample_hit = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_hit = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows in _blocks(len(reference), block):
        for columns in _blocks(len(samples), block):
            squared = _squared_distances(reference[rows], samples[columns])
            sample_hit[columns] |= (squared <= reach[0][rows, None]).any(dim=0)
            reference_hit[rows] |= (squared <= reach[1][columns]).any(dim=1)
    return float(sample_hit.double().mean()), float(reference_hit.double().mean())


def radii(features: Tensor, k: int = NEIGHBOUR, block: int = BLOCK) -> Tensor:
    """Squared distance of each of N rows to its k-th nearest neighbour among the others, float64 ``[N]``."""
    count = len(_checked(features, "features"))
    if count < k + 1:
        raise UserError(f"precision and recall with k = {k} need at least {k + 1} images on both sides, got {count}")
    # Each row's k + 1 least distances so far, the one to itself included. Each pair of blocks is computed once.
    nearest = torch.full((count, k + 1), torch.inf, dtype=torch.float64, device=features.device)

    def update(rows: slice, squared: Tensor) -> None:
        least = squared.topk(min(k + 1, squared.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], least], dim=1).topk(k + 1, largest=False).values

    for rows in _blocks(count, block):
        for columns in _blocks(count, block):
            if columns.start < rows.start:
                continue
            squared = _squared_distances(features[rows], features[columns])
            update(rows, squared)
            if columns != rows:
                update(columns, squared.T)
    return nearest.amax(dim=1)


def _squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """``[n, D]``, ``[m, D]`` -> ``[n, m]``; equal rows have the distance 0 exactly."""
    one, other = one.double(), other.double()
    norms = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1)
    squared = torch.addmm(norms, one, other.T, alpha=-2)
    return torch.where(squared > 1e-13 * norms, squared, 0)


def _blocks(count: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, count)) for start in range(0, count, block))


def _checked(values: Tensor, what: str) -> Tensor:
    if values.ndim != 2:
        raise UserError(f"{what} must be [N, width], got {list(values.shape)}")
    if not values.is_floating_point():
        raise UserError(f"{what} must be floating-point numbers, got {values.dtype}")
    if not values.isfinite().all():
        raise UserError(f"{what} hold numbers that are not finite")
    return values
