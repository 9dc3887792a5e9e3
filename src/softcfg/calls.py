"""What a call of a `Pipeline` takes and gives: the words of this library, and those that users of diffusers know."""

from __future__ import annotations

import dataclasses
import inspect
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softcfg.decoding import Sampling
from softcfg.errors import UnexpectedArgumentError, UserError, quote, require_uint64, require_whole, user_errors
from softcfg.guidance import CFG, all_settings, as_guidance, compose, settings_of
from softcfg.guidance.composition import changed
from softcfg.prompts import Prompt

RequestT = TypeVar("RequestT")

OUTPUT_TYPES = ("pil", "np", "pt")
RANDOM_SEED_BITS = 32
# Words of other libraries, and what to write here.
FOREIGN = {
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "class_ids": "labels",
    "class_labels": "labels",
    "classes": "labels",
    "softcfg_strength": "strength",
    "text": "prompt",
    "texts": "prompts",
    "num_images": "num_images_per_prompt",
    "num_samples": "num_images_per_prompt",
    "images_per_prompt": "num_images_per_prompt",
    "num_return_sequences": "num_images_per_prompt",
    "negative_text": "negative_prompt",
    "callback": "callback_on_step_end",
    "manual_seed": "seed",
    "random_seed": "seed",
    "image": "prompts=[softcfg.prompts.Prompt(text, image=...)]",
    "preset": "guidance=SoftCFG.released()",
    "do_sample": "top_k=1 for the likeliest token at every step",
    "num_inference_steps": "none at all: there is a step for every token of an image",
}


@dataclass
class PipelineOutput:
    """B sampled images. `out[0]` is `out.images`, as in diffusers.

    Attributes:
        labels: int64 [B]; None where prompts were given.
        indices: the index n of each image; with the seed it fixes the image's random numbers.
        tokens: int64 [B, T], as the generator drew them.
        codes: int64 [B, h w], what the tokenizer decoded: the tokens without line ends and other structure.
        pixels: uint8 [B, H, W, 3].
        prompts: the B prompts, with the size that was drawn; None where labels were given.
        passes: of the generator, over all batches: T per batch, fewer with speculative Jacobi decoding.
        seed: what the images were drawn with, also where none was given.
        output_type: what `images` gives: "pil", "np" or "pt".
    """

    labels: Tensor | None
    indices: list[int]
    tokens: Tensor
    codes: Tensor
    pixels: np.ndarray
    prompts: list[Prompt] | None = None
    passes: int = 0
    seed: int = 0
    output_type: str = "pil"

    @property
    def images(self) -> Any:
        """The images: a list of PIL images; float32 [B, H, W, 3] in [0, 1] ("np"); or [B, 3, H, W] ("pt")."""
        if self.output_type == "pil":
            return [Image.fromarray(image) for image in self.pixels]
        values = self.pixels.astype(np.float32) / 255
        return values if self.output_type == "np" else torch.from_numpy(values.transpose(0, 3, 1, 2).copy())

    def to_tuple(self) -> tuple[Any, ...]:
        """The images alone, as calls with `return_dict=False` give them."""
        return (self.images,)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key != "images" and key not in {field.name for field in dataclasses.fields(self)}:
            raise KeyError(key)
        return getattr(self, key)


def sorted_settings(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of guidance and those of sampling among the further keywords of a call.

    Args:
        function: what was called, whose keywords are suggested as well.

    Raises:
        UnexpectedArgumentError: a keyword is neither.
    """
    guidance, sampling = all_settings(), settings_of(Sampling)
    for name in given:
        if name not in guidance and name not in sampling:
            known = {*guidance, *sampling, *inspect.signature(function).parameters} - {"self", "settings"}
            raise UnexpectedArgumentError("the pipeline", name, known, FOREIGN)
    return (
        {name: value for name, value in given.items() if name in guidance},
        {name: value for name, value in given.items() if name not in guidance},
    )


def guidance_of(default: Callable[..., CFG], guidance: CFG | float | None, settings: Mapping[str, Any]) -> CFG:
    """The guidance of a call: the given one, or the default at the given scale, with `settings` in place of its own.

    Args:
        default: `Pipeline.default_guidance`, for calls without one.

    Raises:
        UserError: a setting is out of its range or of something that is not chosen, or `guidance` is none.
    """
    with user_errors():
        guidance = None if guidance is None else as_guidance(guidance, default)
        if guidance is None:
            return default(compose, **settings) if settings else default()
        if settings.keys() <= {field.name for field in dataclasses.fields(guidance)}:
            return dataclasses.replace(guidance, **settings)
        return changed(guidance, settings)


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call: the given one, the next number of a `torch.Generator`, or with None a new one each time.

    Raises:
        UserError: both are given, or one is something else.
    """
    if generator is None:
        return secrets.randbits(RANDOM_SEED_BITS) if seed is None else seed
    if not isinstance(generator, torch.Generator):
        raise UserError(
            f"generator must be one torch.Generator, got {quote(generator)}; image n draws from the stream (seed, n)"
        )
    if seed is not None:
        require_uint64(seed, "seed")
    if seed:
        raise UserError("give seed or generator, not both")
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def repeated(requests: Sequence[RequestT], times: int) -> list[RequestT]:
    """Every request `times` times, those of one prompt side by side.

    Raises:
        UserError: `times` is no number of images.
    """
    times = require_whole(times, "num_images_per_prompt", 1)
    return [request for request in requests for _ in range(times)]


def check_output_type(output_type: str) -> None:
    """Raise `UserError` unless `PipelineOutput` has this type of images."""
    if output_type not in OUTPUT_TYPES:
        hint = "; tokens and codes are in every output" if output_type == "latent" else ""
        raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {quote(output_type)}{hint}")


def check_callbacks(**callbacks: object) -> None:
    """Raise `UserError` unless each of them can be called, or is None."""
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise UserError(f"{name} must be a function, got {quote(callback)}")


def step_callback(pipeline: object, callback: Callable[..., Any]) -> Callable[[int, Tensor], None]:
    """What calls `callback_on_step_end` after a step, with the number of steps done and the tokens so far.

    A callback of four arguments gets those of diffusers: the pipeline, the step (0-based) twice and a dict, here with
    "tokens"; one of a single argument gets the number of steps done, as `on_step` does.
    """
    try:
        inspect.signature(callback).bind(pipeline, 0, 0, {})
    except (TypeError, ValueError):  # some functions of C do not say what they take
        return lambda done, tokens: callback(done)
    return lambda done, tokens: callback(pipeline, done - 1, done - 1, {"tokens": tokens})


def progress_bar(steps: int, options: Mapping[str, Any], shown: bool) -> Any:
    """A tqdm bar over the steps of a call, on the error stream."""
    from tqdm import tqdm

    usual = {"mininterval": 0.2 if sys.stderr.isatty() else 30.0, "unit": "step", "disable": not shown}
    return tqdm(total=steps, **{**usual, **options})
