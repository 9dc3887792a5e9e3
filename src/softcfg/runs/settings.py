"""The settings of a run, the content of run.json: what decides its images, and what they were made with."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softcfg.decoding import Sampling
from softcfg.errors import UserError
from softcfg.guidance import CFG, describe
from softcfg.pipeline import Pipeline
from softcfg.runs.plan import Prompts
from softcfg.version import __version__
from softcfg.zoo.checkpoints import hash_weights, require_file
from softcfg.zoo.registry import Part, resolve


def run_settings(
    model: str | Path,
    pipeline: Pipeline,
    guidance: CFG,
    sampling: Sampling,
    *,
    labels: Sequence[int] | str,
    num_samples: int,
    prompts: Prompts | None = None,
    batch_size: int | None,
    seed: int = 0,
    dtype: str = "float32",
    command: str = "",
    generator_checkpoint: str | Path | None = None,
    tokenizer_checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Describe a run for `RunFolder.claim`.

    Args:
        model: name or folder, of which `pipeline` was loaded.
        labels: class ids, or numbers of prompts, that the images take in turn; or "random".
        prompts: what labels stand for, for text-to-image models.
        batch_size: images in a shard; None for that of a run that goes on.
        command: the words that draw the run.
        generator_checkpoint, tokenizer_checkpoint: files that were read in place of the model's own.
    """
    entry = resolve(model)

    def half(part: Part, given: str | Path | None) -> dict[str, Any]:
        path = given or require_file(part.file, entry)
        return {"family": part.family.name, "config": dict(part.config), "sha256": hash_weights(path)}

    cache_dtype = pipeline.generator.cache_dtype
    text: dict[str, Any] = {}
    if entry.text is not None:
        text["text"] = {"template": entry.text.template, "sha256": hash_weights(require_file(entry.text.file, entry))}
    return {
        "model": entry.name if entry.folder is None or entry.bundled else str(entry.folder.resolve()),
        "generator": half(entry.generator, generator_checkpoint),
        "tokenizer": half(entry.tokenizer, tokenizer_checkpoint),
        **text,
        "guidance": guidance_settings(guidance),
        "sampling": dataclasses.asdict(sampling),
        "seed": seed,
        "dtype": dtype,
        **({} if cache_dtype is None else {"kv_cache_dtype": str(cache_dtype).removeprefix("torch.")}),
        "labels": labels if isinstance(labels, str) else list(labels),
        "num_classes": pipeline.generator.num_classes if prompts is None else len(prompts.texts),
        "num_samples": num_samples,
        **({} if prompts is None else prompts.facts()),
        "batch_size": batch_size,
        "command": command,
        "environment": [_environment(pipeline)],
    }


def guidance_settings(guidance: CFG) -> dict[str, Any]:
    """The settings of guidance as run.json holds them; raises `UserError` if a part of it is not registered."""
    try:
        return describe(guidance)
    except ValueError as error:
        raise UserError(str(error)) from error


def _environment(pipeline: Pipeline) -> dict[str, Any]:
    device = pipeline.generator.device
    where = (
        {"device": torch.cuda.get_device_name(device)}
        if device.type == "cuda"
        else {"device": f"{device.type}, {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}
    )
    return {"softcfg": __version__, "torch": torch.__version__, "python": platform.python_version(), **where}
