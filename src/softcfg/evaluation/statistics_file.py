"""Statistics of features in .npz files, as ADM reference batches hold them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcfg.errors import UserError, quote
from softcfg.evaluation.metrics import Statistics
from softcfg.evaluation.npz import is_npz, names, open_member, read_member
from softcfg.files import as_path, is_file, write_atomically

ARRAYS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ORIGIN = ("extractor", "identity", "count", "size", "fingerprint")
LARGEST_WIDTH = 4096  # features
LONGEST_TEXT = 1 << 16  # bytes


@dataclass(frozen=True)
class StatisticsFile:
    """Content of a statistics file.

    Attributes:
        pooled: statistics for FID, the arrays `mu` and `sigma`.
        spatial: statistics for sFID, the arrays `mu_s` and `sigma_s`, or None.
        origin: where they come from, as `softcfg eval --save-stats` notes it; empty for files of others.
        has_images: whether the file holds images as well, in `arr_0`.
    """

    pooled: Statistics
    spatial: Statistics | None
    origin: dict[str, str]
    has_images: bool

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images that the statistics are of, if noted."""
        sides = re.fullmatch(r"(\d{1,9}) (\d{1,9})", self.origin.get("size", ""))
        return (int(sides[1]), int(sides[2])) if sides else None

    def get(self, kind: str) -> Statistics | None:
        """The statistics of "pooled" or "spatial" features."""
        return self.pooled if kind == "pooled" else self.spatial


def read_statistics(path: str | Path) -> StatisticsFile | None:
    """Read the statistics in an .npz file; None if it is not an .npz file or has no `mu`.

    Raises:
        UserError: they are incomplete, misshapen or not finite.
    """
    path = as_path(path)
    if not is_file(path) or not is_npz(path):
        return None
    held = names(path)
    if "mu" not in held:
        return None

    def read(name: str) -> np.ndarray:
        with open_member(path, name) as member:
            if max(member.shape, default=0) > LARGEST_WIDTH:
                raise UserError(
                    f"{name} of {path} has the shape {quote(member.shape)}; the limit is {LARGEST_WIDTH:,} features"
                )
            return member.read(8 * LARGEST_WIDTH**2)

    arrays = {name: read(name) for pair in ARRAYS.values() for name in pair if name in held}
    origin = {name: str(read_member(path, name, LONGEST_TEXT)) for name in ORIGIN if name in held}
    has_images = "arr_0" in held

    def pair(kind: str) -> Statistics | None:
        mean_name, covariance_name = ARRAYS[kind]
        if mean_name not in arrays and covariance_name not in arrays:
            return None
        if mean_name not in arrays or covariance_name not in arrays:
            missing = mean_name if mean_name not in arrays else covariance_name
            raise UserError(f"{path} holds statistics without {missing}")
        mean, covariance = arrays[mean_name], arrays[covariance_name]
        for name, array in ((mean_name, mean), (covariance_name, covariance)):
            if array.dtype not in (np.float32, np.float64):
                raise UserError(f"{name} of {path} must be float32 or float64, got {array.dtype}")
            if not np.isfinite(array).all():
                raise UserError(f"{name} of {path} holds numbers that are not finite")
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{path}: {mean_name} must be [D] and {covariance_name} [D, D], "
                f"got {list(mean.shape)} and {list(covariance.shape)}"
            )
        return Statistics(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())

    pooled = pair("pooled")
    assert pooled is not None
    return StatisticsFile(pooled, pair("spatial"), origin, has_images)


def save_statistics(path: str | Path, pooled: Statistics, spatial: Statistics | None, origin: dict[str, str]) -> None:
    """Write an .npz file that `read_statistics` reads, and other programs that know ADM reference batches."""

    def numpy(tensor: Tensor) -> np.ndarray:
        return tensor.cpu().numpy()

    arrays: dict[str, Any] = {name: np.array(value) for name, value in origin.items()}
    for kind, given in (("pooled", pooled), ("spatial", spatial)):
        if given is not None:
            arrays.update(zip(ARRAYS[kind], (numpy(given.mean), numpy(given.covariance)), strict=True))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
