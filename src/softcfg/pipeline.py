"""From labels or prompts to images: a generator, a tokenizer and their default settings in one object."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softcfg.decoding import ImageStreams, Sampling, decode, jacobi_decode
from softcfg.decoding.filtering import one_sampling
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
from softcfg.zoo.source import ModelSource


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
        sampling_defaults: temperature, guidance_scale, guidance_scale_pow, schedule, rule and top_k that suit the
            model.
        conditioning: turns labels or prompts into what the generator is conditioned on; by default that of the
            generator's family, without the files that reading texts may need.
        source: where the model was loaded from, which runs write down; None if it was made in memory.

    Raises:
        UserError: the tokenizer does not decode what the generator draws, or the generator does not say what it is
            conditioned on.
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
    ) -> Pipeline:
        """Load a model of the zoo by name ("fashion", "alitok-xl"), or a model folder by its path.

        Args:
            device: "cuda" where there is one, else "cpu", by default.
            dtype: of the generator; by default what suits the model, float32 for most. The tokenizer stays in float32.
            generator_checkpoint, tokenizer_checkpoint: files to read in place of the model's own.
            quantize: "int8" or "int4", the weights of the linear layers of the generator, and of the text encoder where
                it has one (see `zoo.placement.quantize`).
            kv_cache_dtype: torch.int8 keeps keys and values in a quarter of the memory of float32, rounded; by default
                they have the dtype of the generator.
            device_map, max_memory, offload_folder: spread the generator over several devices (see
                `zoo.placement.spread`).

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
        return cls._of_entry(entry, generator, tokenizer, source)

    @classmethod
    def _of_entry(
        cls, entry: ModelEntry, generator: Generator, tokenizer: Tokenizer, source: ModelSource | None = None
    ) -> Pipeline:
        kind = None if source is None else source.quantize
        place = None if kind is None else partial(placement.quantize, kind=kind, device=generator.device)
        return cls(
            generator,
            tokenizer,
            name=entry.name,
            classes=entry.classes,
            sampling_defaults=entry.sampling,
            conditioning=load_conditioning(
                entry, generator, tokenizer, with_files=source is not None, quantize=kind, place=place
            ),
            source=source,
        )

    @classmethod
    def with_random_weights(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> Pipeline:
        """The architecture of a model without its files, to measure speed and memory; its images are noise."""
        entry = resolve(model)
        device = _device(device)
        _check_cache_dtype(kv_cache_dtype)
        dtype = getattr(torch, entry.generator.dtype) if dtype is None else dtype
        generator: Generator = random_weights(entry.generator, device=device, dtype=dtype)
        generator.cache_dtype = kv_cache_dtype
        return cls._of_entry(entry, generator, random_weights(entry.tokenizer, device=device))

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
        """`method` with the scale, power, schedule and rule that suit the model, and `settings` on top."""
        suited: dict[str, Any] = {
            name: self.sampling_defaults[name]
            for name in ("guidance_scale", "guidance_scale_pow", "schedule", "rule")
            if name in self.sampling_defaults
        }
        return method(**{**suited, **settings})

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


def _check_cache_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in CACHES:
        raise UserError(f"kv_cache_dtype must be None or one of {', '.join(map(str, CACHES))}, got {dtype}")


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _rows(values: Any, rows: list[int]) -> Tensor | None:
    return None if values is None else torch.as_tensor(values)[rows]


def _shifted(on_step: Callable[[int], None] | None, offset: int) -> Callable[[int], None] | None:
    return None if on_step is None else lambda done: on_step(offset + done)
