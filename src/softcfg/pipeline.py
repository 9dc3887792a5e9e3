"""From labels or prompts to images: a generator, a tokenizer and their default settings in one object."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softcfg.decoding import ImageStreams, Sampling, decode, jacobi_decode
from softcfg.decoding.filtering import one_sampling
from softcfg.decoding.weak import check_weak
from softcfg.errors import UserError
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Generator, LabelsLike
from softcfg.models.conditioning import Conditioning
from softcfg.nn.kv_cache import CACHES
from softcfg.nn.precision import own_dtype
from softcfg.prompts import Prompt
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo import placement
from softcfg.zoo.loading import load_conditioning, load_generator, load_tokenizer, random_weights
from softcfg.zoo.registry import ModelEntry, resolve
from softcfg.zoo.source import ModelSource, hash_files


@dataclass
class PipelineOutput:
    """B sampled images.

    Attributes:
        labels: int64 [B]; None where prompts were given.
        indices: the index n of each image; with the seed it fixes the image's random numbers.
        tokens: int64 [B, T], as the generator drew them.
        codes: int64 [B, h w], what the tokenizer decoded: the same, or what is left of them without structure.
        pixels: uint8 [B, H, W, 3].
        prompts: the B prompts, with the size that was drawn; None where labels were given.
        passes: of the generator, over all batches: T a batch, fewer with speculative Jacobi decoding.
    """

    labels: Tensor | None
    indices: list[int]
    tokens: Tensor
    codes: Tensor
    pixels: np.ndarray
    prompts: list[Prompt] | None = None
    passes: int = 0

    @property
    def images(self) -> list[Image.Image]:
        """The images as PIL images."""
        return [Image.fromarray(image) for image in self.pixels]


class Pipeline:
    """Draws images of given classes, or from given prompts.

    Attributes:
        generator, tokenizer: the two halves of the model.
        name: the name of the model.
        classes: names of the classes, where the model has them.
        sampling_defaults: temperature, guidance_scale, guidance_scale_pow, schedule and top_k that suit the model.
        conditioning: turns labels or prompts into what the generator is conditioned on; by default that of the
            generator's family, without the files that reading texts may need.
        source: where the model was loaded from, which runs write down; None if it was made in memory.
        weak: the pipeline of a weak model, which guidance with a `weak_share` leads away from (autoguidance); of the
            same image tokenizer and conditions. None for none.

    Raises:
        UserError: the tokenizer does not decode what the generator draws, the generator does not say what it is
            conditioned on, or the weak model does not draw what this one draws.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        classes: Sequence[str] = (),
        sampling_defaults: Mapping[str, Any] | None = None,
        conditioning: Conditioning | None = None,
        source: ModelSource | None = None,
        weak: Pipeline | None = None,
        prompt_reader: Any = None,
    ) -> None:
        if conditioning is None:
            if generator.conditioning_type is None:
                raise UserError(f"{type(generator).__name__} does not say what it is conditioned on: give conditioning")
            read: dict[str, Any] = {}
            if prompt_reader is not None:
                warnings.warn(
                    "prompt_reader is deprecated: give conditioning, such as softcfg.models.lumina.LuminaPrompts",
                    DeprecationWarning,
                    stacklevel=2,
                )
                read = {
                    "files": {"tokenizer": prompt_reader.path},
                    "settings": {"template": prompt_reader.template},
                }
            conditioning = generator.conditioning_type(
                generator, tokenizer, name=name or "this model", classes=classes, **read
            )
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.classes = tuple(classes)
        self.sampling_defaults = dict(sampling_defaults or {})
        self.conditioning = conditioning
        self.source = source
        self.weak = weak
        if weak is not None:
            self._check_weak(weak)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator_checkpoint: str | Path | None = None,
        tokenizer_checkpoint: str | Path | None = None,
        quantize: str | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | None = None,
        weak: str | Path | Pipeline | None = None,
    ) -> Pipeline:
        """Load a model of the zoo by name ("fashion", "alitok-xl"), or a model folder by its path.

        Args:
            device: "cuda" where there is one, else "cpu", by default.
            dtype: of the generator; by default what suits the model, float32 for most. The tokenizer stays in float32.
            generator_checkpoint, tokenizer_checkpoint: files to read in place of the model's own.
            quantize: "int8" or "int4", the weights of the generator's linear layers (see `zoo.placement.quantize`).
            kv_cache_dtype: torch.int8 keeps keys and values in a quarter of the memory of float32, rounded; by default
                they have the dtype of the generator.
            device_map, max_memory, offload_folder: spread the generator over several devices (see
                `zoo.placement.spread`).
            weak: the weak model, loaded with the same dtypes, as in "rar-xl" with "rar-b"; or the pipeline of one.

        Raises:
            UserError: no such model, or its files are missing or do not fit (`CheckpointError`).
        """
        entry = resolve(model)
        device = _device(device)
        _check_cache_dtype(kv_cache_dtype)
        if quantize is not None and device_map is not None:
            raise UserError("quantize and device_map do not go together: give one of them")
        moves = quantize is not None or device_map is not None
        generator = load_generator(
            entry, checkpoint=generator_checkpoint, device="cpu" if moves else device, dtype=dtype
        )
        if quantize is not None:
            generator = placement.quantize(generator, quantize, device)
        if device_map is not None:
            generator = placement.spread(generator, device_map, max_memory=max_memory, offload_folder=offload_folder)
        generator.cache_dtype = kv_cache_dtype
        tokenizer = load_tokenizer(entry, checkpoint=tokenizer_checkpoint, device=device)
        source = ModelSource(entry, generator_checkpoint, tokenizer_checkpoint, quantize)
        if isinstance(weak, (str, Path)):
            weak = cls.from_pretrained(
                weak, device=generator.device, dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype
            )
        return cls._of_entry(entry, generator, tokenizer, source, weak)

    @classmethod
    def _of_entry(
        cls,
        entry: ModelEntry,
        generator: Generator,
        tokenizer: Tokenizer,
        source: ModelSource | None = None,
        weak: Pipeline | None = None,
    ) -> Pipeline:
        return cls(
            generator,
            tokenizer,
            name=entry.name,
            classes=entry.classes,
            sampling_defaults=entry.sampling,
            conditioning=load_conditioning(entry, generator, tokenizer, with_files=source is not None),
            source=source,
            weak=weak,
        )

    @classmethod
    def with_random_weights(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        weak: str | Path | None = None,
    ) -> Pipeline:
        """The architecture of a model without its files, to measure speed and memory; its images are noise."""
        entry = resolve(model)
        device = _device(device)
        _check_cache_dtype(kv_cache_dtype)
        dtype = getattr(torch, entry.generator.dtype) if dtype is None else dtype
        generator: Generator = random_weights(entry.generator, device=device, dtype=dtype)
        generator.cache_dtype = kv_cache_dtype
        tokenizer = random_weights(entry.tokenizer, device=device)
        weaker = None
        if weak is not None:
            weaker = cls.with_random_weights(weak, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
            weaker.tokenizer = tokenizer
        return cls._of_entry(entry, generator, tokenizer, weak=weaker)

    @property
    def entry(self) -> ModelEntry | None:
        """The entry of the zoo that the model was loaded from; None if it was made in memory."""
        return None if self.source is None else self.source.entry

    @property
    def prompt_reader(self) -> Conditioning | None:
        """Deprecated: `conditioning`, which says whether it takes prompts; None for models that draw classes."""
        warnings.warn("prompt_reader is deprecated: ask conditioning", DeprecationWarning, stacklevel=2)
        return self.conditioning if self.conditioning.takes_prompts else None

    def default_guidance(self, method: Callable[..., CFG] = SoftCFG, **settings: Any) -> CFG:
        """`method` with the scale, power and schedule that suit the model, and `settings` on top.

        Where there is a weak model, it takes the place of the unconditional branch (`weak_share` 1).
        """
        suited: dict[str, Any] = {
            name: self.sampling_defaults[name]
            for name in ("guidance_scale", "guidance_scale_pow", "schedule")
            if name in self.sampling_defaults
        }
        if self.weak is not None:
            suited["weak_share"] = 1.0
        return method(**{**suited, **settings})

    def check_guidance(self, guidance: CFG) -> None:
        """Raise `UserError` for guidance away from a weak model where there is none."""
        if guidance.has_weak_model and self.weak is None:
            raise UserError(
                f"weak_share {guidance.weak_share:g} takes a weak model, and {self.name or 'this model'} has none: "
                "give one (--weak-model NAME, or Pipeline(..., weak=...)), or a weak_share of 0"
            )

    @property
    def weak_generator(self) -> Generator | None:
        """The generator of the weak model; None where there is none."""
        return None if self.weak is None else self.weak.generator

    def sampling(
        self, temperature: float | None = None, top_k: int | None = None, top_p: float = 1.0, **settings: Any
    ) -> Sampling:
        """Sampling settings, with the model's temperature and top-k by default; `settings` are those of `Sampling`."""
        if temperature is None:
            temperature = self.sampling_defaults.get("temperature", 1.0)
        if top_k is None:
            top_k = self.sampling_defaults.get("top_k", 0)
        return Sampling(temperature, top_k, top_p, **settings)

    def num_tokens(self, width: int | None = None, height: int | None = None) -> int:
        """T, the tokens drawn for an image; of text-to-image models for one of this size, by default the model's.

        Raises:
            UserError: the model does not draw images of this size.
        """
        return self.conditioning.geometry(width, height).num_tokens

    @own_dtype()
    def __call__(
        self,
        labels: LabelsLike = None,
        guidance: CFG | None = None,
        *,
        prompts: Any = None,
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        speculative_jacobi: int = 0,
        forced_tokens: Any = None,
        forced_mask: Any = None,
        on_step: Callable[[int], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> PipelineOutput:
        """Draw one image per label, or one per prompt.

        Args:
            labels: B class ids. In their place, prompts may be given here too.
            guidance: `CFG` or `SoftCFG`; by default the paper's SoftCFG at the model's own scale and power.
            prompts: B texts or `Prompt`s, for images of one size.
            width, height: of the images of prompts that do not say, in pixels; the model's by default.
            seed, indices: image n of a seed draws from the random stream (seed, n), whatever the batch; the
                indices are 0 .. B - 1 by default.
            sampling: temperature, top-k and top-p; by default those of the model.
            temperature, top_k, top_p: the same one by one, in place of `sampling`; what is not given is the model's.
            batch_size: images drawn at once; by default all. The last batch is padded to the same shape, so with
                one batch size an image is the same to the last bit in whatever batch it is drawn.
            speculative_jacobi: the window of speculative Jacobi decoding, which takes fewer passes through the
                generator; 0 draws token by token. Another window draws other images, of the same distribution.
            forced_tokens, forced_mask: [B, T] tokens to use in place of drawn ones, where the mask is True.
            on_step: called with (batches so far) x T + (tokens drawn in the current batch) after every step.
            on_tokens: called with the tokens of the current batch so far, int64 [batch_size, n], after every step;
                what it raises ends the drawing.

        Raises:
            UserError: labels out of range, prompts for a model that draws classes or the other way round, or arguments
                that do not fit together.
        """
        guidance = guidance or self.default_guidance()
        self.check_guidance(guidance)
        sampling = one_sampling(sampling, temperature, top_k, top_p, self.sampling)
        requests = self.conditioning.requests(labels, prompts, width, height)
        inputs = self.conditioning.inputs(requests)
        from_prompts = self.conditioning.takes_prompts
        count = len(inputs)
        indices = list(range(count)) if indices is None else [int(index) for index in indices]
        if len(indices) != count:
            raise UserError(
                f"indices must be as many as {'prompts' if from_prompts else 'labels'}, {count}, got {len(indices)}"
            )
        batch_size = count if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if speculative_jacobi and forced_tokens is not None:
            raise UserError("forced_tokens are for drawing token by token: leave out speculative_jacobi")
        total = self.generator.condition(inputs, guided=False).num_tokens

        tokens, codes, pixels, passes = [], [], [], 0
        for batch, start in enumerate(range(0, count, batch_size)):
            # A partial batch is filled up with its last image.
            rows = [min(start + i, count - 1) for i in range(batch_size)]
            kept = min(batch_size, count - start)
            chosen = [inputs[row] for row in rows]
            streams = ImageStreams(seed, [indices[row] for row in rows])
            report = _shifted(on_step, batch * total)
            if speculative_jacobi:
                drawn, taken = jacobi_decode(
                    self.generator,
                    chosen,
                    guidance,
                    streams=streams,
                    window=speculative_jacobi,
                    sampling=sampling,
                    on_step=report,
                    on_tokens=on_tokens,
                    weak=self.weak_generator,
                )
            else:
                taken = total
                drawn = decode(
                    self.generator,
                    chosen,
                    guidance,
                    uniforms=streams.uniforms(total),
                    sampling=sampling,
                    forced_tokens=_rows(forced_tokens, rows),
                    forced_mask=_rows(forced_mask, rows),
                    on_step=report,
                    on_tokens=on_tokens,
                    weak=self.weak_generator,
                )
            passes += taken
            tokens.append(drawn[:kept].cpu())
            condition = self.generator.condition(chosen, guided=False)
            decoded = self.generator.image_codes(drawn, condition)
            codes.append(decoded[:kept].cpu())
            image = self.tokenizer.decode(decoded, condition.grid)
            pixels.append(self.tokenizer.to_uint8(image)[:kept].cpu().numpy())
        return PipelineOutput(
            labels=None if from_prompts else torch.tensor(requests),
            indices=indices,
            tokens=torch.cat(tokens),
            codes=torch.cat(codes),
            pixels=np.concatenate(pixels),
            prompts=requests if from_prompts else None,
            passes=passes,
        )

    def _check_weak(self, weak: Pipeline) -> None:
        """Raise `UserError` unless the weak model draws the same codes under the same conditions."""
        check_weak(self.generator, weak.generator)
        one, other = self.tokenizer, weak.tokenizer
        if one is not other and not (type(one) is type(other) and _same_weights(one, other)):
            raise UserError(
                f"{weak.name or 'the weak model'} and {self.name or 'this model'} have different image tokenizers, so "
                "their codes do not mean the same: take a weak model with the same one"
            )
        if _read_with(self) != _read_with(weak) or (self.classes and weak.classes and self.classes != weak.classes):
            raise UserError(
                f"{weak.name or 'the weak model'} and {self.name or 'this model'} are conditioned on different things: "
                "take a weak model with the same classes, or one that reads prompts in the same way"
            )


def _read_with(pipeline: Pipeline) -> tuple[Any, ...]:
    """What decides which inputs of a generator stand for a label or a prompt."""
    conditioning = pipeline.conditioning
    return (
        type(conditioning),
        conditioning.settings,
        hash_files(conditioning.files.values()) if conditioning.files else None,
    )


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)


def _check_cache_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in CACHES:
        raise UserError(f"kv_cache_dtype must be None or one of {', '.join(map(str, CACHES))}, got {dtype}")


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _rows(values: Any, rows: list[int]) -> Tensor | None:
    return None if values is None else torch.as_tensor(values)[rows]


def _shifted(on_step: Callable[[int], None] | None, offset: int) -> Callable[[int], None] | None:
    return None if on_step is None else lambda done: on_step(offset + done)
