"""The settings of a run, the content of run.json: what decides its images, and what they were made with."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcfg.decoding import Sampling
from softcfg.guidance import CFG
from softcfg.models.conditioning import Conditioning
from softcfg.pipeline import Pipeline
from softcfg.runs.plan import Prompts
from softcfg.version import __version__
from softcfg.zoo.files import require_file
from softcfg.zoo.reading import hash_weights
from softcfg.zoo.registry import Component, ModelEntry


def run_settings(
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

    A model of the zoo is identified by its families, configurations and the hashes of its files. A pipeline that was
    built from its halves, such as one around a model of transformers, is identified by its name, its classes and the
    hashes of the weights in memory.

    Args:
        labels: class ids, or numbers of prompts, that the images take in turn; or "random".
        prompts: what labels stand for, for text-to-image models.
        batch_size: images in a shard; None for that of a run that goes on.
        command: the words that draw the run.
        generator_checkpoint, tokenizer_checkpoint: files that were read in place of the model's own.
    """
    entry = pipeline.entry
    if entry is None:
        model = pipeline.name or type(pipeline.generator).__name__
        generator, tokenizer = _in_memory(pipeline.generator), _in_memory(pipeline.tokenizer)
    else:
        model = entry.name if entry.folder is None or entry.bundled else str(entry.folder.resolve())
        generator = _of_zoo(entry, entry.generator, generator_checkpoint)
        tokenizer = _of_zoo(entry, entry.tokenizer, tokenizer_checkpoint)
    cache_dtype = pipeline.generator.cache_dtype
    return {
        "model": model,
        "generator": generator,
        "tokenizer": tokenizer,
        **_of_texts(pipeline.conditioning),
        "guidance": {"method": type(guidance).__name__, **dataclasses.asdict(guidance)},
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


def _of_zoo(entry: ModelEntry, component: Component, given: str | Path | None) -> dict[str, Any]:
    path = given or require_file(component.file, entry)
    return {"family": component.family.name, "config": dict(component.config), "sha256": hash_weights(path)}


def _in_memory(module: nn.Module) -> dict[str, Any]:
    """The class, configuration and weights of a module; the hash is over names, dtypes, shapes and values."""
    config = getattr(module, "config", None)
    is_dataclass = dataclasses.is_dataclass(config) and not isinstance(config, type)
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(values.numpy().data)
    return {
        "family": type(module).__name__,
        "config": dataclasses.asdict(config) if is_dataclass else {},
        "sha256": digest.hexdigest(),
    }


def _of_texts(conditioning: Conditioning) -> dict[str, Any]:
    """How texts are read: the settings and, of the files, the hash (of several, that of their hashes in order)."""
    if not conditioning.files:
        return {}
    hashes = [hash_weights(path) for path in conditioning.files.values()]
    together = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"text": {**conditioning.settings, "sha256": together}}


def _environment(pipeline: Pipeline) -> dict[str, Any]:
    device = pipeline.generator.device
    where = (
        {"device": torch.cuda.get_device_name(device)}
        if device.type == "cuda"
        else {"device": f"{device.type}, {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}
    )
    return {"softcfg": __version__, "torch": torch.__version__, "python": platform.python_version(), **where}
