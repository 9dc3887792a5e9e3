"""Features of images: computed by a network, kept in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from softcfg.errors import UserError, require_whole
from softcfg.evaluation.arithmetic import full_float32
from softcfg.evaluation.sources import ImageSource
from softcfg.files import as_path
from softcfg.kept import read_kept, write_kept

Item = TypeVar("Item")

CACHE_VARIABLE = "SOFTCFG_FEATURES"


@dataclass(frozen=True)
class Features:
    """The output of a network for N images; which metrics can be computed depends on what it has.

    Attributes:
        pooled: float `[N, D]`, for FID, precision and recall.
        spatial: float `[N, S]`, for sFID; or None.
        logits: float `[N, C]` of classes, for the Inception Score; or None.
        answers: `[N, A]`, what `Extractor.agreement` compares with prompts; or None.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    answers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Extractor:
    """A network that describes images.

    Attributes:
        name: what reports call it.
        describe: uint8 `[B, 3, H, W]` on `device` -> `Features` of B images.
        identity: tells apart networks of the same name; best the SHA-256 of the weights.
        note: what a reader of figures made with it has to know, or "".
        classifies: whether logit c is that of class c as the labels of the samples count; then class accuracy is known.
        agreement: `answers`, float32 `[N, A]`, and N prompts -> shares of the images, in [0, 1], that show what their
            prompts say: "all" of it, and of those whose prompts say it the "name", "style" and "colour".
    """

    name: str
    describe: Callable[[Tensor], Features]
    identity: str
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    note: str = ""
    classifies: bool = False
    agreement: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None


def extract(
    extractor: Extractor,
    source: ImageSource,
    *,
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Features:
    """Describe all images of `source`, as float32 on the CPU.

    Args:
        cache: folder where features are kept, under a name made of the content of the images and the identity
            of the extractor; None keeps nothing.
        progress: show a bar.

    Raises:
        UserError: an image cannot be read or was replaced meanwhile, or the extractor returns something unusable.
    """
    batch_size = require_whole(batch_size, "batch_size", 1)
    path = None
    if cache is not None:
        key = "\n".join((extractor.name, extractor.identity, str(extractor.dtype), source.fingerprint))
        name = re.sub(r"[^\w.-]", "-", extractor.name)[:100]
        path = as_path(cache) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if (known := _read_cached(path, len(source))) is not None:
            return known
    features = _extract(extractor, source, batch_size, progress)
    source.require_unchanged()
    if path is not None:
        _write_cached(path, features)
    return features


def cache_folder() -> Path:
    """Where features are kept: $SOFTCFG_FEATURES, or a folder in the user's cache."""
    return as_path(os.environ.get(CACHE_VARIABLE) or "~/.cache/softcfg/features")


@torch.inference_mode()
def _extract(extractor: Extractor, source: ImageSource, batch_size: int, progress: bool) -> Features:
    from tqdm import tqdm

    collected: dict[str, Tensor] = {}
    done = 0
    with (
        full_float32(),
        tqdm(total=len(source), desc=source.name, unit="image", disable=None if progress else True) as bar,
    ):
        for pixels in _prefetched(source.batches(batch_size)):
            batch = extractor.describe(pixels.to(extractor.device).permute(0, 3, 1, 2).contiguous())
            for name, tensor in batch.tensors().items():
                if tensor.ndim != 2 or len(tensor) != len(pixels):
                    raise UserError(
                        f"extractor {extractor.name} must return {name} of shape [{len(pixels)}, width] "
                        f"for {len(pixels)} images, got {list(tensor.shape)}"
                    )
                if name not in collected:
                    collected[name] = torch.empty(len(source), tensor.shape[1], dtype=torch.float32)
                collected[name][done : done + len(tensor)] = tensor
            done += len(pixels)
            bar.update(len(pixels))
    for name, tensor in collected.items():
        if not tensor.sum(dtype=torch.float64).isfinite():
            bad = int((~tensor.isfinite().all(dim=1)).nonzero()[0])
            raise UserError(f"extractor {extractor.name} returned {name} that are not finite, first for image {bad}")
    return Features(**collected)


def _prefetched(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each fetched while the one before it is in use."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = worker.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def _read_cached(path: Path, count: int) -> Features | None:
    """The features at `path`; None if they are absent, damaged or of another number of images."""
    try:
        features = Features(**(read_kept(path) or {}))
    except TypeError:  # no features, or of another version
        return None
    return features if len(features) == count else None


def _write_cached(path: Path, features: Features) -> None:
    try:
        write_kept(path, features.tensors())
    except UserError as error:
        warnings.warn(f"features are not kept: {error}; $SOFTCFG_FEATURES names another folder", stacklevel=2)
