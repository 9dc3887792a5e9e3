"""The settings of a run, the content of run.json: what decides its images, and what they were made with."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcfg.decoding import Sampling
from softcfg.errors import UserError, user_errors
from softcfg.guidance import CFG, describe
from softcfg.guidance.composition import check_scale
from softcfg.models.base import Generator
from softcfg.models.conditioning import Conditioning
from softcfg.nn.precision import dtype_name
from softcfg.pipeline import Pipeline
from softcfg.runs.plan import Prompts
from softcfg.tokenizers.base import Tokenizer
from softcfg.version import __version__
from softcfg.zoo.files import require_file
from softcfg.zoo.loading import weights_for
from softcfg.zoo.mapped import MappedFiles
from softcfg.zoo.registry import Component, Family
from softcfg.zoo.source import describe_module, hash_files, uncompiled


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
    speculative_jacobi: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Describe a run for `RunFolder.claim`.

    A model that was loaded from files is identified by its families, configurations and the hashes of its files; a half
    of it whose weights are others by now (they were changed, or rounded to another dtype and back), by their hash. A
    pipeline that was made in memory, such as one around a model of transformers, is identified by the classes of its
    halves, their configurations and the hashes of their weights; its name stands for where it came from. A weak model
    is identified likewise, where guidance takes it.

    Args:
        labels: class ids, or numbers of prompts, that the images take in turn; or "random".
        prompts: what labels stand for, for text-to-image models.
        batch_size: images in a shard; None for that of a run that goes on.
        command: the words that draw the run.

    Raises:
        UserError: a file of the model is missing, there is no weak model where guidance takes one, or a part of the
            guidance has no name or no effect.
    """
    size = (None, None) if prompts is None else (prompts.width, prompts.height)
    pipeline.check_guidance(guidance, pipeline.num_tokens(*size))
    generator, weak = pipeline.generator, pipeline.weak if guidance.has_weak_model else None
    return {
        **_model_settings(pipeline),
        **_read_with(pipeline.conditioning),
        "guidance": guidance_settings(guidance),
        "sampling": sampling.describe(),
        "seed": seed,
        **_dtypes(pipeline),
        **pixel_dtype(pipeline.tokenizer),
        **({} if weak is None else {"weak": {"generator": _half(weak, "generator"), **_dtypes(weak)}}),
        "labels": labels if isinstance(labels, str) else list(labels),
        "num_classes": generator.num_classes if prompts is None else len(prompts.texts),
        "num_samples": num_samples,
        **({} if prompts is None else prompts.facts()),
        "batch_size": batch_size,
        "command": command,
        "environment": [_environment(pipeline)],
        **({"speculative_jacobi": speculative_jacobi} if speculative_jacobi else {}),
        **resizing(pipeline.tokenizer, prompts),
    }


def _model_settings(pipeline: Pipeline) -> dict[str, Any]:
    """The name of a model, and what identifies its halves."""
    source = pipeline.source
    in_memory = pipeline.name or type(uncompiled(pipeline.generator)).__name__
    return {
        "model": in_memory if source is None else source.model,
        "generator": _half(pipeline, "generator"),
        "tokenizer": _half(pipeline, "tokenizer"),
    }


def _half(pipeline: Pipeline, name: str) -> dict[str, Any]:
    """What identifies the "generator" or "tokenizer": its files, if they hold its weights, or the weights."""
    source = pipeline.source
    module: Any = uncompiled(getattr(pipeline, name))
    if source is None:
        return describe_module(module)
    component: Component = getattr(source.entry, name)
    checkpoint = getattr(source, f"{name}_checkpoint") or require_file(component.file, source.entry)
    facts: dict[str, Any] = source.facts[name]
    if _is_as_loaded(module, component.family, checkpoint):
        return facts
    try:
        return {**facts, "sha256": describe_module(module)["sha256"]}
    except (RuntimeError, NotImplementedError, TypeError) as error:  # of integers, or not in memory
        raise UserError(
            f"the weights of the {name} are not those of {checkpoint} any more, and in the form that they have no run "
            "can say which they are: load the model anew"
        ) from error


def _is_as_loaded(module: Generator | Tokenizer, family: Family, checkpoint: str | Path) -> bool:
    """Whether the weights of a module are those of its file in its dtype; they are compared one by one.

    No counter of PyTorch's tells: `weight.data.mul_(2)` changes none. Weights that were rounded to integers, or that
    Accelerate keeps out of memory, are taken for those that were loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the model was loaded
        state, _ = weights_for(module, family, checkpoint)
    mapped, weights = MappedFiles(), module.state_dict()
    lacking = state.keys() - weights.keys()
    if weights.keys() - state.keys() or (lacking and not family.extras):
        return False
    for name, weight in weights.items():
        read = state[name]
        if type(weight) is not Tensor or weight.is_meta:
            continue
        expected = read.to(module.dtype if read.is_floating_point() else weight.dtype)
        if weight.dtype != expected.dtype or not torch.equal(weight.cpu(), expected):
            return False
        mapped.forget(read)
    return True


def _dtypes(pipeline: Pipeline) -> dict[str, str]:
    """What the numbers of a generator and of its cache are."""
    quantize = None if pipeline.source is None else pipeline.source.quantize
    names = [dtype_name(pipeline.generator.dtype), *([] if quantize is None else [quantize])]
    cache_dtype = pipeline.generator.cache_dtype
    cached = {} if cache_dtype is None else {"kv_cache_dtype": dtype_name(cache_dtype)}
    return {"dtype": "/".join(names), **cached}


def pixel_dtype(tokenizer: Tokenizer) -> dict[str, str]:
    """What the numbers of an image tokenizer are, where they are not float32."""
    dtype = dtype_name(tokenizer.dtype)
    return {} if dtype == "float32" else {"tokenizer_dtype": dtype}


def resizing(tokenizer: Tokenizer, prompts: Prompts | None) -> dict[str, int]:
    """The size that images are resized to, where it is not the model's own.

    Raises:
        UserError: the prompts ask for images that are no squares.
    """
    size = tokenizer.output_size
    if size is None:
        return {}
    width, height = (tokenizer.image_size,) * 2 if prompts is None else (prompts.width, prompts.height)
    if width != height:
        raise UserError(f"image_size_eval {size} makes squares; the images asked for have {width} x {height} pixels")
    own = getattr(getattr(tokenizer, "config", None), "output_size", None) or width
    return {} if size == own else {"image_size_eval": size}


def guidance_settings(guidance: CFG) -> dict[str, Any]:
    """The settings of guidance as run.json holds them; raises `UserError` if a part of it has no name or no effect."""
    with user_errors():
        check_scale(guidance)
        return describe(guidance)


def _read_with(conditioning: Conditioning) -> dict[str, Any]:
    """What texts are read with, where they are."""
    if not conditioning.files:
        return {}
    digest = hash_files(conditioning.files.values())
    conditioning.require_unchanged()
    return {"text": {**conditioning.settings, "sha256": digest}}


def _environment(pipeline: Pipeline) -> dict[str, Any]:
    device = pipeline.generator.device
    where = (
        {"device": torch.cuda.get_device_name(device)}
        if device.type == "cuda"
        else {"device": f"{device.type}, {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}
    )
    return {"softcfg": __version__, "torch": torch.__version__, "python": platform.python_version(), **where}
