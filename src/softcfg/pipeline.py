"""From labels or prompts to images: a generator, a tokenizer and their default settings in one object."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcfg import calls
from softcfg.calls import PipelineOutput
from softcfg.decoding import ImageStreams, Sampling, decode, jacobi_decode
from softcfg.decoding.batch import check_interval
from softcfg.decoding.filtering import one_sampling
from softcfg.decoding.forced import check_forced
from softcfg.decoding.randomness import image_indices
from softcfg.decoding.threads import fitting_threads
from softcfg.decoding.weak import check_weak
from softcfg.errors import UnexpectedArgumentError, UserError, quote, require_whole, user_errors
from softcfg.guidance import CFG, SoftCFG, settings_of
from softcfg.images import checked_size
from softcfg.models.base import Generator
from softcfg.models.conditioning import Conditioning
from softcfg.nn.kv_cache import CACHES
from softcfg.nn.linear import parameter_count, weights_at_rest, weights_in_use
from softcfg.nn.precision import as_device, as_dtype, dtype_name, own_dtype, wanted_dtype
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo import placement, saving
from softcfg.zoo.fetching import fetch
from softcfg.zoo.files import require_files
from softcfg.zoo.loading import load_conditioning, load_generator, load_tokenizer, random_weights
from softcfg.zoo.registry import GUIDANCE_DEFAULTS, ModelEntry, check_defaults, is_repository, resolve
from softcfg.zoo.source import ModelSource, hash_files


class Pipeline:
    """Draws images of given classes, or from given prompts.

    Attributes:
        generator, tokenizer: the two halves of the model.
        name: the name of the model.
        classes: names of the classes, where the model has them.
        sampling_defaults: settings that suit the model, by name (see `zoo.registry.default_settings`).
        conditioning: turns labels or prompts into what the generator is conditioned on; by default that of the
            generator's family, without the files that reading texts may need.
        source: where the model was loaded from, which runs write down; None if it was made in memory.
        weak: the pipeline of a weak model, which guidance with a `weak_share` leads away from (autoguidance); of the
            same image tokenizer and conditions. None for none.

    Raises:
        UserError: the tokenizer does not decode what the generator draws, the generator does not say what it is
            conditioned on, a default setting is not known or out of its range, or the weak model does not draw what
            this one draws.
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
    ) -> None:
        if conditioning is None:
            if generator.conditioning_type is None:
                raise UserError(f"{type(generator).__name__} does not say what it is conditioned on: give conditioning")
            conditioning = generator.conditioning_type(generator, tokenizer, name=name or "this model", classes=classes)
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.classes = tuple(classes) or conditioning.classes
        self.sampling_defaults = dict(sampling_defaults or {})
        check_defaults(self.sampling_defaults, "sampling_defaults: ")
        self.conditioning = conditioning
        self.source = source
        self.weak = weak
        if weak is not None:
            self._check_weak(weak)
        self._bar: dict[str, Any] = {}

    def __repr__(self) -> str:
        what = "texts" if self.conditioning.takes_prompts else f"{self.generator.num_classes} classes"
        width, height = self.conditioning.image_size()
        millions = parameter_count(self.generator) / 1e6
        halves = type(self.generator).__name__, type(self.tokenizer).__name__
        return (
            f"<Pipeline {self.name or 'without a name'}: {halves[0]} of {millions:,.3g} M parameters "
            f"({dtype_name(self.dtype)} on {self.device}) with {halves[1]}, "
            f"draws {what}, {width} x {height} pixels in {self.num_tokens()} tokens>"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        generator_checkpoint: str | Path | None = None,
        tokenizer_checkpoint: str | Path | None = None,
        quantize: str | None = None,
        kv_cache_dtype: torch.dtype | str | None = None,
        tokenizer_dtype: torch.dtype | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | None = None,
        weak: str | Path | Pipeline | None = None,
        image_size_eval: int | None = None,
        **unknown: Any,
    ) -> Pipeline:
        """Load a model of the zoo by name ("fashion", "alitok-xl"), or a model folder.

        A model folder is given by its path; or by the name "user/repository" of one on Hugging Face, which is
        downloaded (see `save_pretrained` and `push_to_hub`).

        Args:
            device: "cuda" where there is one, else "cpu", by default.
            dtype: of the generator, such as "bfloat16" or torch.bfloat16; by default what suits the model, float32 for
                most. "fastest" is float32 or bfloat16, whichever a short measurement on this machine finds faster.
            torch_dtype: the same, by its name in diffusers and transformers.
            generator_checkpoint, tokenizer_checkpoint: files to read in place of the model's own.
            quantize: "int8" or "int4", the weights of the linear layers of the generator, and of the text encoder where
                it has one (see `zoo.placement.quantize`).
            kv_cache_dtype: torch.int8 keeps keys and values in a quarter of the memory of float32, rounded; by default
                they have the dtype of the generator.
            tokenizer_dtype: of the image tokenizer, float32 by default; in torch.bfloat16 pixels take less time where
                the device has instructions for it, and differ by about one of 255 levels.
            device_map, max_memory, offload_folder: spread the generator over several devices (see
                `zoo.placement.spread`).
            weak: the weak model, loaded with the same dtypes, as in "rar-xl" with "rar-b"; or the pipeline of one.
            image_size_eval: H and W that images are resized to (see `with_image_size`); by default they are not.

        Raises:
            UserError: no such model, or its files are missing or do not fit (`CheckpointError`).
        """
        for name in unknown:
            known = inspect.signature(cls.from_pretrained).parameters.keys() - {"model", "unknown"}
            raise UnexpectedArgumentError("from_pretrained", name, known)
        if dtype is not None and torch_dtype is not None:
            raise UserError("dtype and torch_dtype are one setting: give one of them")
        if not isinstance(weak, (str, Path, Pipeline, type(None))):
            raise UserError(f"weak must be a model or the pipeline of one, got {quote(weak)}")
        dtype = wanted_dtype(torch_dtype, "torch_dtype") if dtype is None else wanted_dtype(dtype)
        kv_cache_dtype, tokenizer_dtype = _cache_dtype(kv_cache_dtype), as_dtype(tokenizer_dtype, "tokenizer_dtype")
        checkpoints = {"generator_checkpoint": generator_checkpoint, "tokenizer_checkpoint": tokenizer_checkpoint}
        for name, path in checkpoints.items():
            if not isinstance(path, (str, os.PathLike, type(None))):
                raise UserError(f"{name} must be the path of a file, got {quote(path)}")
        if isinstance(model, str) and is_repository(model):
            fetch(model)
        entry = resolve(model)
        require_files(entry, generator_checkpoint, tokenizer_checkpoint)
        device = _device(device)
        size = None if image_size_eval is None else checked_size(image_size_eval)
        if quantize is not None and device_map is not None:
            raise UserError("quantize and device_map do not go together: give one of them")
        moves = quantize is not None or device_map is not None
        if moves and dtype == "fastest":
            raise UserError("dtype 'fastest' does not go with quantize or device_map: name a dtype")
        source = ModelSource(entry, generator_checkpoint, tokenizer_checkpoint, quantize)
        generator = load_generator(
            entry, checkpoint=generator_checkpoint, device="cpu" if moves else device, dtype=dtype
        )
        if quantize is not None:
            generator = placement.quantize(generator, quantize, device)
        if device_map is not None:
            generator = placement.spread(generator, device_map, max_memory=max_memory, offload_folder=offload_folder)
        generator.cache_dtype = kv_cache_dtype
        tokenizer = load_tokenizer(entry, checkpoint=tokenizer_checkpoint, device=device, dtype=tokenizer_dtype)
        if isinstance(weak, (str, Path)):
            weak = cls.from_pretrained(
                weak,
                device=generator.device,
                dtype=generator.dtype if dtype else None,
                quantize=quantize,
                kv_cache_dtype=kv_cache_dtype,
            )
        pipeline = cls._of_entry(entry, generator, tokenizer, source, weak)
        return pipeline if size is None else pipeline.with_image_size(size)

    @classmethod
    def _of_entry(
        cls,
        entry: ModelEntry,
        generator: Generator,
        tokenizer: Tokenizer,
        source: ModelSource | None = None,
        weak: Pipeline | None = None,
    ) -> Pipeline:
        kind = None if source is None else source.quantize
        place = None if kind is None else functools.partial(placement.quantize, kind=kind, device=generator.device)
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
            weak=weak,
        )

    @classmethod
    def with_random_weights(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        kv_cache_dtype: torch.dtype | str | None = None,
        tokenizer_dtype: torch.dtype | str | None = None,
        weak: str | Path | None = None,
    ) -> Pipeline:
        """The architecture of a model without its files, to measure speed and memory; its images are noise."""
        entry = resolve(model)
        device = _device(device)
        dtype = wanted_dtype(entry.generator.dtype if dtype is None else dtype)
        generator: Generator = random_weights(entry.generator, device=device, dtype=dtype)
        generator.cache_dtype = _cache_dtype(kv_cache_dtype)
        tokenizer = random_weights(entry.tokenizer, device=device, dtype=as_dtype(tokenizer_dtype, "tokenizer_dtype"))
        weaker = None
        if weak is not None:
            weaker = cls.with_random_weights(weak, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
            weaker.tokenizer = tokenizer
        return cls._of_entry(entry, generator, tokenizer, weak=weaker)

    @property
    def device(self) -> torch.device:
        """Where the generator computes; where it is spread over several devices, the first."""
        return self.generator.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the generator's weights; that of the tokenizer's is its own."""
        return self.generator.dtype

    def to(
        self,
        *where: torch.device | torch.dtype | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Pipeline:
        """Move both halves to a device, give the generator a dtype, or both: `pipe.to("cuda", torch.bfloat16)`.

        Returns the pipeline itself. The tokenizer keeps its dtype.

        Raises:
            UserError: there is no such device or dtype, or the generator is quantized, spread over several devices, or
                draws at the moment.
        """
        quantized = None if self.source is None else self.source.quantize
        with weights_at_rest(*self._generators):
            placement.move(self.generator, self.tokenizer, where, device, dtype, quantized)
            if self.weak is not None:
                self.weak.to(*where, device=device, dtype=dtype)
        return self

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context for many calls: what one has prepared serves the next one with as many images at once.

        That is the layout of the weights and, on a CPU, the key/value cache. The weights must not change inside, and
        what is meant to change them says so (`UserError`).
        """
        with fitting_threads(), weights_in_use(*self._generators):
            yield

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a model folder, which `from_pretrained` and all commands read; return its path.

        The weights are written in the dtype that they have, as safetensors.

        Raises:
            UserError: the model cannot be saved (see `zoo.saving.write_model_folder`), or the folder not be written.
        """
        return saving.write_model_folder(
            folder,
            self.generator,
            self.tokenizer,
            self.conditioning,
            name=self.name,
            description=self._description,
            sampling=self.sampling_defaults,
            classes=self.classes,
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a model of softcfg",
    ) -> str:
        """Save the model in the repository "user/name" on Hugging Face, which is made if need be; return its address.

        `from_pretrained("user/name")` then loads it anywhere.

        Raises:
            UserError: the model cannot be saved, or the Hub refused it or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(folder)
            prompts = self.conditioning.takes_prompts
            saving.write_card(path, repository, name=self.name, description=self._description, takes_prompts=prompts)
            return saving.push_folder(path, repository, private=private, token=token, commit_message=commit_message)

    @property
    def _description(self) -> str:
        return "" if self.entry is None else self.entry.description

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar that calls show, such as `disable=True`."""
        self._bar = options

    @property
    def entry(self) -> ModelEntry | None:
        """The entry of the zoo that the model was loaded from; None if it was made in memory."""
        return None if self.source is None else self.source.entry

    def with_image_size(self, size: int) -> Pipeline:
        """The same pipeline, whose images are resized to `size` x `size` pixels before they are clamped and rounded.

        LlamaGen's released sampler does this as --image-size-eval: the published figures of its models of 384 pixels
        are of images of 256. See `softcfg.images.resize`.

        Raises:
            UserError: no such size.
        """
        resized = copy.copy(self)
        resized.tokenizer = copy.copy(self.tokenizer)  # of the same weights
        resized.tokenizer.output_size = checked_size(size)
        return resized

    def default_guidance(self, method: Callable[..., CFG] = SoftCFG, **settings: Any) -> CFG:
        """`method` with the scale, power, schedule and rule that suit the model, and `settings` on top.

        Where there is a weak model, it takes the place of the unconditional branch (`weak_share` 1).

        Raises:
            UserError: a setting is out of its range.
        """
        suited: dict[str, Any] = {
            name: self.sampling_defaults[name] for name in GUIDANCE_DEFAULTS if name in self.sampling_defaults
        }
        if self.weak is not None:
            suited["weak_share"] = 1.0
        with user_errors():
            return method(**{**suited, **settings})

    def check_guidance(self, guidance: CFG, tokens: int | None = None) -> None:
        """Raise `UserError` for guidance away from a weak model where there is none, or with no effect by its interval.

        Args:
            tokens: of an image, see `num_tokens`; None where they are not known yet.
        """
        if tokens is not None:
            check_interval(guidance, tokens)
        if guidance.has_weak_model and self.weak is None:
            raise UserError(
                f"weak_share {guidance.weak_share:g} takes a weak model, and {self.name or 'this model'} has none: "
                "give one (--weak-model NAME, or Pipeline(..., weak=...)), or a weak_share of 0"
            )

    @property
    def weak_generator(self) -> Generator | None:
        """The generator of the weak model; None where there is none."""
        return None if self.weak is None else self.weak.generator

    @property
    def _generators(self) -> list[Generator]:
        return [self.generator] if self.weak is None else [self.generator, self.weak.generator]

    def sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **settings: Any,
    ) -> Sampling:
        """Sampling settings, those of the model where they are not given; `settings` are further ones of `Sampling`.

        Raises:
            UserError: a setting is out of its range.
        """
        suited = {name: value for name, value in self.sampling_defaults.items() if name in settings_of(Sampling)}
        default = functools.partial(Sampling, **{**suited, **settings})
        return one_sampling(None, temperature, top_k, top_p, default)

    def num_tokens(self, width: int | None = None, height: int | None = None) -> int:
        """T, the tokens drawn for an image; of text-to-image models for one of this size, by default the model's.

        Raises:
            UserError: the model does not draw images of this size.
        """
        return self.conditioning.geometry(width, height).num_tokens

    @own_dtype()
    def __call__(
        self,
        labels: Any = None,
        guidance: CFG | float | None = None,
        *,
        prompt: Any = None,
        prompts: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = 0,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        pad_batches: bool = False,
        speculative_jacobi: int = 0,
        forced_tokens: Any = None,
        forced_mask: Any = None,
        on_step: Callable[[int], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        progress: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """Draw one image per label, or one per prompt.

        Args:
            labels: B class ids or names of classes. In their place, prompts may be given here too.
            guidance: `CFG` or `SoftCFG`; by default the paper's SoftCFG at the model's own scale and power. A
                number is that at this scale.
            prompts, prompt: B texts or `Prompt`s, for images of one size; or one text.
            negative_prompt: what the unconditional branch reads, of models where it reads a text; or one per prompt.
            num_images_per_prompt: images of each prompt or label, side by side.
            width, height: of the images of prompts that do not say, in pixels; the model's by default.
            seed, indices: image n of a seed draws from the random stream (seed, n), whatever the batch; the
                indices are 0 .. B - 1 by default. A seed of None is a new one each time, which the output tells.
            generator: takes the seed from the next number of a `torch.Generator`.
            sampling: temperature, top-k and top-p; by default those of the model.
            temperature, top_k, top_p: the same one by one, in place of `sampling`; what is not given is the model's.
            batch_size: images drawn at once; by default all.
            pad_batches: draw a last batch that is not full in the shape of a full one, as runs do: with one batch size
                an image is then the same to the last bit in whatever batch it is drawn.
            speculative_jacobi: the window of speculative Jacobi decoding, which takes fewer passes through the
                generator; 0 draws token by token. Another window draws other images, of the same distribution.
            forced_tokens, forced_mask: [B, T] tokens to use in place of drawn ones, where the mask is True.
            on_step: called with (batches so far) x T + (tokens drawn in the current batch) for every step; those of a
                small model are run several at once, and called for after some 20 ms of them.
            on_tokens: called with the tokens of the current batch so far, int64 [B of the batch, n], after every step;
                what it raises ends the drawing.
            callback_on_step_end: as in diffusers, called after every step with the pipeline, the number of the step
                (twice) and {"tokens": as of `on_tokens`}; or, if it takes one argument, as `on_step`.
            progress: whether to show a bar on the error stream; by default unless `on_step` or `on_tokens` is given.
                `set_progress_bar_config(disable=True)` switches it off for good.
            output_type: of `images`: "pil", "np" (float32 [B, H, W, 3] in [0, 1]) or "pt" ([B, 3, H, W]).
            return_dict: False gives the tuple (images,), as in diffusers.
            settings: of guidance (`softcfg.guidance.all_settings`), such as guidance_scale=4.0, strength=0.5 or
                rule="apg": on top of the model's own, or of `guidance`; and further ones of `Sampling`.

        Returns:
            A `PipelineOutput`.

        Raises:
            UserError: labels out of range, prompts for a model that draws classes or the other way round, or arguments
                that do not fit together or are not known (`UnexpectedArgumentError`).
        """
        of_guidance, of_sampling = calls.sorted_settings(self.__call__, settings)
        calls.check_output_type(output_type)
        calls.check_callbacks(on_step=on_step, on_tokens=on_tokens, callback_on_step_end=callback_on_step_end)
        guidance = calls.guidance_of(self.default_guidance, guidance, of_guidance)
        self.check_guidance(guidance)
        if sampling is not None and of_sampling:
            raise UserError(f"give sampling or {', '.join(of_sampling)}, not both")
        default = functools.partial(self.sampling, **of_sampling)
        sampling = one_sampling(sampling, temperature, top_k, top_p, default)
        seed = calls.seed_of(seed, generator)
        if prompt is not None and prompts is not None:
            raise UserError("give prompt or prompts, not both")
        prompts = prompt if prompts is None else prompts
        negative = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        requests = self.conditioning.requests(labels, prompts, width, height, **negative)
        inputs = calls.repeated(self.conditioning.inputs(requests), num_images_per_prompt)
        requests = calls.repeated(requests, num_images_per_prompt)
        from_prompts = self.conditioning.takes_prompts
        count = len(inputs)
        indices = image_indices(indices, count, "prompts" if from_prompts else "labels")
        batch_size = count if batch_size is None else batch_size
        require_whole(batch_size, "batch_size", 1)
        require_whole(speculative_jacobi, "speculative_jacobi", 0)
        if speculative_jacobi and forced_tokens is not None:
            raise UserError("forced_tokens are for drawing token by token: leave out speculative_jacobi")
        condition = self.generator.condition(inputs, guided=False)
        total = condition.num_tokens
        self.check_guidance(guidance, total)
        forced = check_forced(self.generator, condition, count, forced_tokens, forced_mask)
        self.tokenizer.checked_grid(condition.grid)  # before anything is drawn
        after_step = None if callback_on_step_end is None else calls.step_callback(self, callback_on_step_end)
        shown = (on_step is None and on_tokens is None) if progress is None else progress

        batches: list[list[Tensor]] = []
        passes = 0
        bar = calls.progress_bar(-(-count // batch_size) * total, self._bar, shown)
        with self.in_use(), bar:

            def step(done: int) -> None:
                before = len(batches) * total
                bar.update(before + done - bar.n)
                if on_step is not None:
                    on_step(before + done)

            def look(drawn: Tensor) -> None:
                if on_tokens is not None:
                    on_tokens(drawn)
                if after_step is not None:
                    after_step(len(batches) * total + drawn.shape[1], drawn)

            for start in range(0, count, batch_size):
                kept = min(batch_size, count - start)
                # A partial batch is filled up with its last image.
                rows = [min(start + i, count - 1) for i in range(batch_size if pad_batches else kept)]
                drawn, taken = self._draw_batch(
                    [inputs[row] for row in rows],
                    guidance,
                    ImageStreams(seed, [indices[row] for row in rows]),
                    speculative_jacobi,
                    (_rows(forced[0], rows), _rows(forced[1], rows)),
                    sampling=sampling,
                    on_step=step,
                    on_tokens=None if on_tokens is None and after_step is None else look,
                )
                batches.append([part[:kept].cpu() for part in drawn])
                passes += taken
        tokens, codes, pixels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        output = PipelineOutput(
            labels=None if from_prompts else torch.tensor(requests),
            indices=indices,
            tokens=tokens,
            codes=codes,
            pixels=pixels.numpy(),
            prompts=requests if from_prompts else None,
            passes=passes,
            seed=seed,
            output_type=output_type,
        )
        return output if return_dict else output.to_tuple()

    def _draw_batch(
        self,
        inputs: list[Any],
        guidance: CFG,
        streams: ImageStreams,
        window: int,
        forced: tuple[Tensor | None, Tensor | None],
        **watched: Any,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Draw and decode one batch: tokens, codes and pixels; and the passes that it took."""
        condition = self.generator.condition(inputs, guided=False)
        watched["weak"] = self.weak_generator
        if window:
            tokens, taken = jacobi_decode(self.generator, inputs, guidance, streams=streams, window=window, **watched)
        else:
            taken = condition.num_tokens
            tokens = decode(
                self.generator,
                inputs,
                guidance,
                uniforms=streams.uniforms(taken),
                forced_tokens=forced[0],
                forced_mask=forced[1],
                **watched,
            )
        codes = self.generator.image_codes(tokens, condition)
        pixels = self.tokenizer.to_uint8(self.tokenizer.decode(codes, condition.grid))
        return (tokens, codes, pixels), taken

    def _check_weak(self, weak: Pipeline) -> None:
        """Raise `UserError` unless the weak model draws the same codes under the same conditions."""
        if not isinstance(weak, Pipeline):
            raise UserError(f"weak must be the pipeline of a weak model, got {quote(weak)}")
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


def _cache_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtype = as_dtype(dtype, "kv_cache_dtype", floating=False)
    if dtype is not None and dtype not in CACHES:
        raise UserError(f"kv_cache_dtype must be None or one of {', '.join(map(str, CACHES))}, got {dtype}")
    return dtype


def _device(device: torch.device | str | None) -> torch.device:
    return as_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def _rows(values: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if values is None else values[rows]
