"""Statistics of features in .npz files, as ADM reference batches hold them."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcfg.errors import UserError
from softcfg.evaluation.metrics import Statistics
from softcfg.files import write_atomically

ARRAYS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ORIGIN = ("extractor", "identity", "count", "size", "fingerprint")


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
        height, _, width = self.origin.get("size", "").partition(" ")
        return (int(height), int(width)) if width else None

    def get(self, kind: str) -> Statistics | None:
        """The statistics of "pooled" or "spatial" features."""
        return self.pooled if kind == "pooled" else self.spatial


def read_statistics(path: str | Path) -> StatisticsFile | None:
    """Read the statistics in an .npz file; None if it is no .npz file or holds no `mu`.

    Raises:
        UserError: they are incomplete, misshapen or not finite.
    """
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file:
                return None
            names = [name for pair in ARRAYS.values() for name in pair if name in file]
            arrays = {name: file[name] for name in names}
            origin = {name: str(file[name]) for name in ORIGIN if name in file}
            has_images = "arr_0" in file
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the statistics in {path} cannot be read ({error})") from error

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
