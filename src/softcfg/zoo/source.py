"""Where a loaded model came from, as runs record it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.files import reading
from softcfg.zoo.files import require_file
from softcfg.zoo.reading import hash_weights, is_index, shards_of
from softcfg.zoo.registry import Component, ModelEntry

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSource:
    """The entry and the files of which a pipeline was loaded.

    Attributes:
        generator_checkpoint, tokenizer_checkpoint: files that were read in place of the model's own.
        quantize: the integers that the generator's weights were rounded to, if any.
    """

    entry: ModelEntry
    generator_checkpoint: str | Path | None = None
    tokenizer_checkpoint: str | Path | None = None
    quantize: str | None = None

    @property
    def model(self) -> str:
        """The name of a published or bundled model, the absolute path of a model folder."""
        entry = self.entry
        return entry.name if entry.folder is None or entry.bundled else str(entry.folder.resolve())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Family, configuration and SHA-256 of each half; the files are read once."""
        entry = self.entry
        return {
            "generator": describe_component(entry.generator, entry, self.generator_checkpoint),
            "tokenizer": describe_component(entry.tokenizer, entry, self.tokenizer_checkpoint),
        }


def describe_component(component: Component, entry: ModelEntry, checkpoint: str | Path | None) -> dict[str, Any]:
    """Family, configuration and SHA-256 of one half of a model.

    Args:
        checkpoint: the file that was read in place of the model's own.
    """
    path = checkpoint or require_file(component.file, entry)
    return {"family": component.family.name, "config": dict(component.config), "sha256": hash_weights(path)}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, of what `torch.compile` makes of one."""
    return getattr(module, "_orig_mod", module)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Class, configuration and SHA-256 of one half of a model that was made in memory.

    The hash is over names, dtypes, shapes and values of the weights. Only a dataclass is kept as configuration.
    """
    import torch

    module = uncompiled(module)
    config: Any = getattr(module, "config", None)
    is_dataclass = dataclasses.is_dataclass(config) and not isinstance(config, type)
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "family": type(module).__name__,
        "config": dataclasses.asdict(config) if is_dataclass else {},
        "sha256": digest.hexdigest(),
    }


def hash_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of a file; of several, that of their hashes in order. Each file is read once, until it changes."""
    hashes = [_hash_of(path, _states(path)) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@cache
def _hash_of(path: Path, states: tuple[tuple[int, ...], ...]) -> str:
    return hash_weights(path)


def _states(path: Path) -> tuple[tuple[int, ...], ...]:
    """What tells that a file, or one of those that it lists, was written anew or replaced."""
    files = (path, *shards_of(path)) if is_index(path) else (path,)
    with reading(path):
        found = [os.stat(each) for each in files]
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)
