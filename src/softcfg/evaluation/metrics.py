"""The metrics of the ADM evaluation protocol, as functions of features.

Results are exact to float64, on the device of the features. Definitions and sources: `docs/evaluation.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcfg.errors import UserError, quote, require_whole
from softcfg.evaluation.arithmetic import full_float32

SPLIT_SIZE = 5000
NEIGHBOUR = 3
BLOCK = 2048  # rows at once; a block of distances takes 16 MiB
COLUMNS_AT_ONCE = 512  # columns of a covariance at once
NUMBERS_IN_CACHE = 1 << 17  # float64 numbers that stay in a processor's cache
DISTANCE_ERROR = 1e-5  # bound of the error of a squared distance in float32, relative to the squared norms
EXTRA_NEIGHBOURS = 4  # rows kept beyond the k nearest, since float32 may order nearly equal distances otherwise
ROUNDING = 1e-12  # two float64 sums of the same numbers may differ by this


@dataclass(frozen=True)
class Statistics:
    """Mean `[D]` and covariance `[D, D]` of features, float64."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device) -> Statistics:
        """The same on `device`."""
        return Statistics(self.mean.to(device), self.covariance.to(device))


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance (divided by N - 1) of features `[N, D]`, N at least 2."""
    count = len(_checked(features, "features"))
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, got {count}")
    mean = torch.stack([part.double().sum(dim=0) for part in features.split(BLOCK)]).sum(dim=0) / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        centred = part.double() - mean
        for panel in _blocks(len(mean), COLUMNS_AT_ONCE):  # the part above the diagonal: half the work
            covariance[panel, panel.start :].addmm_(centred[:, panel].T, centred[:, panel.start :])
    return Statistics(mean, (covariance.triu() + covariance.triu(1).T) / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The squared Frechet distance of two normal distributions (FID, sFID): symmetric, never below 0.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2); the last trace is the sum of the singular values of
    S1^(1/2) S2^(1/2), which exists for every covariance, of full rank or not.

    Raises:
        UserError: the widths differ, a number is not finite or too large, or a matrix is not a covariance.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(f"features of width {len(one.mean)} and {len(other.mean)} cannot be compared")
    roots = [_root(each) for each in (one, other)]
    traces = [each.covariance.double().diagonal().sum() for each in (one, other)]
    shift = (one.mean.double() - other.mean.double()).square().sum()
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = float(shift + traces[0] + traces[1] - 2 * overlap)
    if not math.isfinite(distance):
        raise UserError("the mean or the covariance holds numbers too large for a distance: the statistics are damaged")
    return max(0.0, distance)


def _root(given: Statistics) -> Tensor:
    """R `[D, rank]` with R R^T = S."""
    width = len(given.mean)
    covariance = given.covariance.double()
    if covariance.shape != (width, width):
        raise UserError(f"a covariance of {width} features must be [{width}, {width}], got {list(covariance.shape)}")
    if not (given.mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError("the mean or the covariance holds numbers that are not finite")
    scale = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > 1e-6 * scale:
        raise UserError("the covariance is not symmetric: the statistics are damaged")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = float(values[-1])
    if float(values[0]) < -1e-6 * scale:
        raise UserError(
            f"the covariance has a negative eigenvalue ({float(values[0]):.3g}), so the statistics are damaged"
        )
    # What is below the rounding of eigh stands for 0; its square root would be far above it.
    kept = values > width * torch.finfo(torch.float64).eps * largest
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Mean over splits of exp(mean of KL(p(y|x) || p(y))), for class logits `[N, C]`.

    Splits are `split_size` rows in their order; a shorter last one counts as much as the others.
    """
    if not len(_checked(logits, "logits")):
        raise UserError("the Inception Score needs at least 1 image")
    scores = []
    for split in logits.split(require_whole(split_size, "split_size", 1)):
        log_p = split.double().log_softmax(dim=1)
        p = log_p.exp()
        # Where a class has no probability at all, log_p is still finite (or p * log_p is 0).
        divergence = (p * log_p).sum(dim=1).mean() - torch.special.xlogy(p.mean(dim=0), p.mean(dim=0)).sum()
        scores.append(divergence.exp())
    return float(torch.stack(scores).mean())


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of N images whose largest logit, of `logits` `[N, C]`, is that of their class in `labels` int64 `[N]`.

    Raises:
        UserError: there are not as many labels as images, or a label is none of the C classes.
    """
    count, classes = _checked(logits, "logits").shape
    if labels.shape != (count,) or not count:
        raise UserError(f"class accuracy needs one label per image, got {list(labels.shape)} for {count} images")
    least, most = (int(bound) for bound in labels.aminmax())
    if least < 0 or most >= classes:
        raise UserError(f"labels must be classes in 0..{classes - 1}, found {least if least < 0 else most}")
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


@full_float32()
def precision_recall(reference: Tensor, samples: Tensor, k: int = NEIGHBOUR, block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall of `samples` `[N, D]` against `reference` `[M, D]`.

    Precision is the share of samples that lie in the ball of some reference, recall the share of references in
    the ball of some sample; a ball reaches to the k-th nearest neighbour within the own set, and includes its rim.

    Args:
        block: rows and columns of distances held at once.

    Raises:
        UserError: fewer than k + 1 rows, or other widths; k or block is no number from 1 on.
    """
    for each in (reference, samples):
        _checked(each, "features")
    if reference.shape[1:] != samples.shape[1:]:
        raise UserError(f"features of width {reference.shape[1]} and {samples.shape[1]} cannot be compared")
    reach = [radii(each, k, block) * (1 + ROUNDING) for each in (reference, samples)]
    fast = _FastDistances(reference, samples)
    sample_hit = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_hit = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows in _blocks(len(reference), block):
        for columns in _blocks(len(samples), block):
            squared, slack = fast.distances(rows, columns)
            for dim, hit, limit in (
                (0, sample_hit[columns], reach[0][rows, None]),
                (1, reference_hit[rows], reach[1][columns]),
            ):
                rim = (limit / fast.unit).to(squared)
                hit |= (squared <= rim - slack).any(dim=dim)
                unsure = ((squared - rim).abs() <= slack) & ~hit.unsqueeze(dim)
                for pairs in unsure.nonzero().split(block):
                    i, j = pairs.T
                    inside = _exact(reference[rows][i], samples[columns][j]) <= limit.expand(squared.shape)[i, j]
                    hit[(j, i)[dim][inside]] = True
    return float(sample_hit.double().mean()), float(reference_hit.double().mean())


@full_float32()
def radii(features: Tensor, k: int = NEIGHBOUR, block: int = BLOCK) -> Tensor:
    """Squared distance of each of N rows to its k-th nearest neighbour among the others, float64 `[N]`."""
    k, block = require_whole(k, "k", 1), require_whole(block, "block", 1)
    count = len(_checked(features, "features"))
    if count < k + 1:
        raise UserError(f"precision and recall with k = {k} need at least {k + 1} images on both sides, got {count}")
    fast = _FastDistances(features, features)
    # Of each row the nearest rows so far, itself included. Each pair of blocks is computed once.
    kept = min(k + 1 + EXTRA_NEIGHBOURS, count)
    least = torch.full((count, kept), torch.inf, dtype=torch.float32, device=features.device)
    nearest = torch.zeros(count, kept, dtype=torch.int64, device=features.device)

    def update(rows: slice, columns: slice, squared: Tensor) -> None:
        values, indices = squared.topk(min(kept, squared.shape[1]), largest=False)
        values, places = torch.cat([least[rows], values], dim=1).topk(kept, largest=False)
        nearest[rows] = torch.cat([nearest[rows], indices + columns.start], dim=1).gather(1, places)
        least[rows] = values

    for rows in _blocks(count, block):
        for columns in _blocks(count, block):
            if columns.start >= rows.start:
                squared, _ = fast.distances(rows, columns)
                update(rows, columns, squared)
                if columns != rows:
                    update(columns, rows, squared.T)
    step = max(1, NUMBERS_IN_CACHE // (kept * features.shape[1]))
    exact = [_exact(features[rows, None], features[nearest[rows]]) for rows in _blocks(count, step)]
    return torch.cat(exact).kthvalue(k + 1, dim=1).values


class _FastDistances:
    """Squared distances in float32, fast, with a bound of their error; closer calls are computed again in float64.

    They are those of the rows moved to the mean and divided by the largest number, so that neither an offset nor
    a scale costs accuracy. `unit` is the square of the divisor.
    """

    def __init__(self, one: Tensor, other: Tensor) -> None:
        mean = one.mean(dim=0, dtype=torch.float64).to(one.dtype)
        largest = max(float(each.abs().max()) + float(mean.abs().max()) for each in (one, other)) or 1.0
        self.one, self.other = (((each - mean) / largest).float() for each in (one, other))
        self.norms = [each.square().sum(dim=1) for each in (self.one, self.other)]
        self.unit = largest**2

    def distances(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """`[n, m]` of these rows of the one and the other set, and how far each may be off."""
        norms = self.norms[0][rows, None] + self.norms[1][columns]
        return torch.addmm(norms, self.one[rows], self.other[columns].T, alpha=-2), norms.mul_(DISTANCE_ERROR)


def _exact(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances along the last dimension, float64; 0 for equal rows."""
    return (one.double() - other.double()).square().sum(dim=-1)


def _blocks(count: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, count)) for start in range(0, count, block))


def _checked(values: Tensor, what: str) -> Tensor:
    if not isinstance(values, Tensor):
        raise UserError(f"{what} must be a tensor [N, width], got {quote(values)}")
    if values.ndim != 2:
        raise UserError(f"{what} must be [N, width], got {list(values.shape)}")
    if not values.is_floating_point():
        raise UserError(f"{what} must be floating-point numbers, got {values.dtype}")
    if not values.isfinite().all():
        raise UserError(f"{what} hold numbers that are not finite")
    return values
