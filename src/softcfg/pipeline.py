"""From labels to images: a generator, a tokenizer and their default settings in one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softcfg.decoding import Sampling, decode, image_uniforms
from softcfg.errors import UserError
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Generator, LabelsLike, as_ids
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo.checkpoints import load_generator, load_tokenizer, random_weights
from softcfg.zoo.registry import resolve


@dataclass
class PipelineOutput:
    """B sampled images.

    Attributes:
        labels: int64 [B].
        indices: the index n of each image; with the seed it fixes the image's random numbers.
        tokens: int64 [B, T].
        pixels: uint8 [B, H, W, 3].
    """

    labels: Tensor
    indices: list[int]
    tokens: Tensor
    pixels: np.ndarray

    @property
    def images(self) -> list[Image.Image]:
        """The images as PIL images."""
        return [Image.fromarray(image) for image in self.pixels]


class Pipeline:
    """Draws images of given classes.

    Attributes:
        generator, tokenizer: the two halves of the model.
        name: the name of the model.
        classes: names of the classes, where the model has them.
        sampling_defaults: temperature, guidance_scale, guidance_scale_pow and schedule that suit the model.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        classes: Sequence[str] = (),
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if (generator.num_tokens, generator.vocab_size) != (tokenizer.num_tokens, tokenizer.codebook_size):
            raise UserError(
                f"the generator draws {generator.num_tokens} tokens of {generator.vocab_size} codes, but the tokenizer "
                f"reads {tokenizer.num_tokens} tokens of {tokenizer.codebook_size} codes"
            )
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.classes = tuple(classes)
        self.sampling_defaults = dict(sampling_defaults or {})

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator_checkpoint: str | Path | None = None,
        tokenizer_checkpoint: str | Path | None = None,
    ) -> Pipeline:
        """Load a model of the zoo by name ("fashion", "alitok-xl"), or a model folder by its path.

        Args:
            device: "cuda" where there is one, else "cpu", by default.
            dtype: of the generator; the tokenizer stays in float32.
            generator_checkpoint, tokenizer_checkpoint: files to read in place of the model's own.

        Raises:
            UserError: no such model, or its files are missing or do not fit (`CheckpointError`).
        """
        entry = resolve(model)
        device = _device(device)
        return cls(
            load_generator(entry, checkpoint=generator_checkpoint, device=device, dtype=dtype),
            load_tokenizer(entry, checkpoint=tokenizer_checkpoint, device=device),
            name=entry.name,
            classes=entry.classes,
            sampling_defaults=entry.sampling,
        )

    @classmethod
    def with_random_weights(
        cls, model: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Pipeline:
        """The architecture of a model without its files, to measure speed and memory; its images are noise."""
        entry = resolve(model)
        device = _device(device)
        return cls(
            random_weights(entry.generator, device=device, dtype=dtype),
            random_weights(entry.tokenizer, device=device),
            name=entry.name,
            classes=entry.classes,
            sampling_defaults=entry.sampling,
        )

    def default_guidance(self, method: Callable[..., CFG] = SoftCFG, **settings: Any) -> CFG:
        """`method` with the scale, power and schedule that suit the model, and `settings` on top."""
        suited: dict[str, Any] = {
            name: self.sampling_defaults[name]
            for name in ("guidance_scale", "guidance_scale_pow", "schedule")
            if name in self.sampling_defaults
        }
        return method(**{**suited, **settings})

    def sampling(self, temperature: float | None = None, top_k: int = 0, top_p: float = 1.0) -> Sampling:
        """Sampling settings, with the model's temperature by default."""
        if temperature is None:
            temperature = self.sampling_defaults.get("temperature", 1.0)
        return Sampling(temperature, top_k, top_p)

    def __call__(
        self,
        labels: LabelsLike,
        guidance: CFG | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        forced_tokens: Any = None,
        forced_mask: Any = None,
        on_step: Callable[[int], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> PipelineOutput:
        """Draw one image a label.

        Args:
            labels: B class ids.
            guidance: `CFG` or `SoftCFG`; by default the paper's SoftCFG at the model's own scale and power.
            seed, indices: image n of a seed draws from the random stream (seed, n), whatever the batch; the
                indices are 0 .. B - 1 by default.
            temperature, top_k, top_p: see `Sampling`; the temperature is the model's by default.
            batch_size: images drawn at once; by default all. The last batch is padded to the same shape, so with
                one batch size an image is the same to the last bit in whatever batch it is drawn.
            forced_tokens, forced_mask: [B, T] tokens to use in place of drawn ones, where the mask is True.
            on_step: called with (batches so far) x T + (tokens drawn in the current batch) after every step.
            on_tokens: called with the tokens of the current batch so far, int64 [batch_size, n], after every step;
                what it raises ends the drawing.

        Raises:
            UserError: labels out of range, or arguments that do not fit together.
        """
        guidance = guidance or self.default_guidance()
        sampling = self.sampling(temperature, top_k, top_p)
        classes = as_ids(labels, "labels", self.generator.num_classes)
        if classes.dim() != 1 or not len(classes):
            raise UserError(f"labels must be a flat list of at least one class id, got shape {list(classes.shape)}")
        count = len(classes)
        indices = list(range(count)) if indices is None else [int(index) for index in indices]
        if len(indices) != count:
            raise UserError(f"indices must be as many as labels, {count}, got {len(indices)}")
        batch_size = count if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        total = self.generator.num_tokens

        tokens, pixels = [], []
        for batch, start in enumerate(range(0, count, batch_size)):
            # A partial batch is filled up with its last image.
            rows = [min(start + i, count - 1) for i in range(batch_size)]
            kept = min(batch_size, count - start)
            drawn = decode(
                self.generator,
                classes[rows],
                guidance,
                uniforms=image_uniforms(seed, [indices[row] for row in rows], total),
                sampling=sampling,
                forced_tokens=_rows(forced_tokens, rows),
                forced_mask=_rows(forced_mask, rows),
                on_step=_shifted(on_step, batch * total),
                on_tokens=on_tokens,
            )
            tokens.append(drawn[:kept].cpu())
            pixels.append(self.tokenizer.to_uint8(self.tokenizer.decode(drawn))[:kept].cpu().numpy())
        return PipelineOutput(classes, indices, torch.cat(tokens), np.concatenate(pixels))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _rows(values: Any, rows: list[int]) -> Tensor | None:
    return None if values is None else torch.as_tensor(values)[rows]


def _shifted(on_step: Callable[[int], None] | None, offset: int) -> Callable[[int], None] | None:
    return None if on_step is None else lambda done: on_step(offset + done)
