"""Where a loaded model came from: what a run writes down of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from softcfg.zoo.files import require_file
from softcfg.zoo.reading import hash_weights
from softcfg.zoo.registry import ModelEntry, Part


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
        """Family, configuration and SHA-256 of each half, and of the text tokenizer; the files are read once."""
        entry = self.entry
        facts = {
            "generator": describe_part(entry.generator, entry, self.generator_checkpoint),
            "tokenizer": describe_part(entry.tokenizer, entry, self.tokenizer_checkpoint),
        }
        if entry.text is not None:
            path = require_file(entry.text.file, entry)
            facts["text"] = {"template": entry.text.template, "sha256": hash_weights(path)}
        return facts


def describe_part(part: Part, entry: ModelEntry, checkpoint: str | Path | None) -> dict[str, Any]:
    """Family, configuration and SHA-256 of one half of a model.

    Args:
        checkpoint: the file that was read in place of the model's own.
    """
    path = checkpoint or require_file(part.file, entry)
    return {"family": part.family.name, "config": dict(part.config), "sha256": hash_weights(path)}
