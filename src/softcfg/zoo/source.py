"""Where a loaded model came from, as runs record it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import CheckpointError, UserError
from softcfg.files import FileStates, as_path, file_states
from softcfg.zoo.files import require_file
from softcfg.zoo.loading import find_config_file, with_config_file
from softcfg.zoo.reading import hash_weights, is_index, shards_of
from softcfg.zoo.registry import Component, ModelEntry

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ComponentSource:
    """One half of a model and its files; made before they are read, and hashed when a run asks for it.

    Attributes:
        checkpoint: the weights file that is read in place of the model's own.
    """

    component: Component
    entry: ModelEntry
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        """Note the state of the files."""
        self._states  # noqa: B018

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Family, configuration and SHA-256 of the weights; the files are read once.

        Raises:
            UserError: one was written or replaced since this was made.
        """
        facts = {"family": self.component.family.name, "config": self.config, "sha256": hash_weights(self._path)}
        for path, states in self._states.items():
            if _states(path) != states:
                raise UserError(f"{path} changed since it was loaded; load it again")
        return facts

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the model's entry and, of its `config.json`, the fields that the family has."""
        component = self.component
        if self._config_file is None:
            return dict(component.config)
        known = {field.name for field in dataclasses.fields(component.family.classes()[1])}
        found = with_config_file(component, self._config_file)
        return {name: value for name, value in found.items() if name in known or name in component.config}

    @cached_property
    def _path(self) -> Path:
        return as_path(require_file(self.component.file, self.entry) if self.checkpoint is None else self.checkpoint)

    @cached_property
    def _config_file(self) -> Path | None:
        return find_config_file(self.component)

    @cached_property
    def _states(self) -> dict[Path, FileStates]:
        return {path: _states(path) for path in (self._path, self._config_file) if path is not None}


@dataclass(frozen=True)
class ModelSource:
    """The entry and the files of which a pipeline is loaded.

    Attributes:
        generator_checkpoint, tokenizer_checkpoint: files that are read in place of the model's own.
        quantize: the integers that the generator's weights are rounded to, if any.
    """

    entry: ModelEntry
    generator_checkpoint: str | Path | None = None
    tokenizer_checkpoint: str | Path | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        """Note the state of the files."""
        self._halves  # noqa: B018

    @property
    def model(self) -> str:
        """The name of a published or bundled model, the absolute path of a model folder."""
        entry = self.entry
        return entry.name if entry.folder is None or entry.bundled else str(entry.folder.resolve())

    @property
    def facts(self) -> dict[str, Any]:
        """Those of the "generator" and the "tokenizer", see `ComponentSource`."""
        return {half: source.facts for half, source in self._halves.items()}

    @cached_property
    def _halves(self) -> dict[str, ComponentSource]:
        entry = self.entry
        return {
            "generator": ComponentSource(entry.generator, entry, self.generator_checkpoint),
            "tokenizer": ComponentSource(entry.tokenizer, entry, self.tokenizer_checkpoint),
        }


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
def _hash_of(path: Path, states: FileStates) -> str:
    return hash_weights(path)


def _states(path: Path) -> FileStates:
    """Those of a file, and of those that it lists."""
    return file_states((path, *shards_of(path)) if is_index(path) else (path,), CheckpointError)
