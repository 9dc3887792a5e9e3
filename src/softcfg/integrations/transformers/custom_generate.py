"""The decoding loop for `model.generate(..., custom_generate=generate)`, in the image mode of Janus too."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, JanusForConditionalGeneration, QuantizedCache, StaticCache
from transformers.generation import EosTokenCriteria, GenerationMode

from softcfg.decoding import Sampling
from softcfg.errors import UserError, quote
from softcfg.guidance import CFG, SoftCFG
from softcfg.integrations.transformers.decoding import as_codes, checked_guidance, decode
from softcfg.integrations.transformers.image_head import ImageHead
from softcfg.integrations.transformers.prompts import as_mask, behind_padding
from softcfg.models.ids import LARGEST_ID, as_ids

JANUS_SCALE = 5.0  # of its image mode, where its configuration has none


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    guidance: CFG | float | None = None,
    unconditional_ids: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    image_codes: Tensor | Sequence[int] | None = None,
    head: ImageHead | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop for `model.generate(..., custom_generate=generate, guidance=..., unconditional_ids=...)`.

    Length, temperature, top-k, top-p and all other processors of logits, greedy decoding (`do_sample=False`), stopping,
    the streamer and the cache (`cache_implementation`, `past_key_values`) are those of the `generate` call; the rest is
    as in `decode`. An end token that is an image code does not end a sequence. With Janus's `generation_mode="image"`
    there are as many tokens as an image has; `guidance` and `unconditional_ids` default to those of Janus, and a number
    is a scale that holds at every step.

    Returns:
        int64 [B, L + T], the prompts and the drawn tokens after them.

    Raises:
        UserError: as `decode`; or the call asks for something else than one sequence of ids a row, or gives what would
            not be used, such as `negative_prompt_ids`.
    """
    config, call = generation_config, _call()
    _check_call(config, call)
    attention_mask = model_kwargs.pop("attention_mask", None)
    cache = _cache(model_kwargs.pop("past_key_values", None), config, call)
    _check_inputs(model_kwargs)
    if attention_mask is None:  # `generate` leaves out one that hides nothing
        attention_mask = torch.ones_like(input_ids)
    if streamer is None:
        streamer = call.get("streamer")  # which `generate` hands to its own loops alone
    if unconditional_ids is not None:
        if unconditional_mask is None and config.pad_token_id is not None:  # which may be of this call alone
            ids = as_ids(unconditional_ids, "unconditional_ids", LARGEST_ID)
            unconditional_mask = behind_padding(ids, config.pad_token_id, config.eos_token_id)
        copies = config.num_return_sequences or 1
        unconditional_ids, unconditional_mask = _repeated(unconditional_ids, unconditional_mask, copies)
    head = ImageHead.of(model) if head is None else head
    image_codes = None if image_codes is None else as_codes(image_codes)
    prompt_length = input_ids.shape[1]
    tokens = decode(
        model,
        input_ids,
        guidance,
        num_tokens=config.max_length - prompt_length,
        unconditional_ids=unconditional_ids,
        attention_mask=attention_mask,
        unconditional_mask=unconditional_mask,
        image_codes=image_codes,
        head=head,
        sampling=_Processed(config.temperature or 1.0) if config.do_sample else _Processed(greedy=True),
        seed=seed,
        indices=indices,
        logits_processor=logits_processor,
        stopping_criteria=_outside_of_images(stopping_criteria, head, image_codes, prompt_length),
        pad_token_id=_padding(config),
        cache=cache,
        on_tokens=None if streamer is None else lambda tokens: streamer.put(tokens[:, -1].cpu()),
    )
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, tokens.to(input_ids.device)), dim=1)


def _call() -> Mapping[str, Any]:
    """The variables of the `generate` of transformers around this call, which keeps some of its arguments to itself.

    Functions of the user's may stand in between.
    """
    frame, of_transformers = sys._getframe(1), inspect.unwrap(GenerationMixin.generate).__code__
    while frame.f_code is not of_transformers:
        if frame.f_back is None:
            raise UserError("this is for model.generate(..., custom_generate=generate): call that, or decode(...)")
        frame = frame.f_back
    return frame.f_locals


def _check_call(config: Any, call: Mapping[str, Any]) -> None:
    """Raise a `UserError` for what the loop cannot do, and for what is in the variables of `generate` alone."""
    for name, usual in (("num_beams", 1), ("guidance_scale", 1), ("return_dict_in_generate", False)):
        if getattr(config, name) not in (None, usual):
            raise UserError(f"{name}={getattr(config, name)} is not supported by softcfg's decoding")
    mode = config.get_generation_mode(call.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"{mode.value.replace('_', ' ')} is not supported by softcfg's decoding")
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if call.get(name) is not None:
            own = "unconditional_ids" if name.endswith("ids") else "unconditional_mask"
            raise UserError(f"softcfg's decoding takes no {name}: give {own} in its place")
    if call.get("kwargs", {}).get("position_ids") is not None:  # `generate` makes its own otherwise
        raise UserError("softcfg's decoding takes token ids alone, not position_ids")


def _cache(cache: Any, config: Any, call: Mapping[str, Any]) -> Any:
    """What `decode` takes as its cache: that of the caller, or the kind of the one that `generate` made.

    Raises:
        UserError: there is none, or it is of a kind that the loop cannot use.
    """
    if cache is None:
        raise UserError("softcfg's decoding needs the cache: leave use_cache on")
    if cache is call.get("kwargs", {}).get("past_key_values"):
        return cache
    # `generate` made this one, for the conditional rows alone.
    if isinstance(cache, QuantizedCache) or getattr(cache, "offloading", False):
        raise UserError(f"cache_implementation={config.cache_implementation} is not supported by softcfg's decoding")
    return "static" if isinstance(cache, StaticCache) else "dynamic"


def _check_inputs(model_kwargs: Mapping[str, Any]) -> None:
    """Raise a `UserError` for inputs of the model beside the ids, unless `generate` derives them from the ids."""
    derived = ("position_ids", "logits_to_keep", "use_cache")
    given = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) or value]
    unknown = [name for name in given if name not in derived]
    if unknown:
        raise UserError(f"softcfg's decoding takes token ids alone, not {', '.join(unknown)}")


def _repeated(ids: Any, mask: Any, copies: int) -> tuple[Tensor, Tensor | None]:
    """Unconditional prompts and their mask for `copies` sequences of each prompt; one for all stays one."""
    ids = as_ids(ids, "unconditional_ids", LARGEST_ID)
    mask = None if mask is None else as_mask("unconditional_ids", mask)
    if ids.dim() != 2 or len(ids) <= 1:
        return ids, mask
    return ids.repeat_interleave(copies, dim=0), None if mask is None else mask.repeat_interleave(copies, dim=0)


def _outside_of_images(criteria: Any, head: ImageHead | None, codes: Tensor | None, prompt_length: int) -> list[Any]:
    """The stopping criteria, without end tokens that would end something inside of an image."""
    if head is not None and not head.ends:
        return [criterion for criterion in criteria if not isinstance(criterion, EosTokenCriteria)]
    if codes is None:
        return list(criteria)
    return [
        _EndOutsideOfImages(criterion, codes, prompt_length) if isinstance(criterion, EosTokenCriteria) else criterion
        for criterion in criteria
    ]


def _padding(config: Any) -> int:
    """The token that follows an ended sequence: the one for padding, else the first end token, else 0."""
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return next((token for token in (config.pad_token_id, end) if token is not None and token >= 0), 0)


@dataclass(frozen=True)
class _Processed(Sampling):
    """Drawing from logits that the processors of transformers have finished, temperature included.

    Attributes:
        temperature: that of the confidences.
        greedy: take the first of the most likely tokens.
    """

    greedy: bool = False

    def probabilities(self, logits: Tensor) -> Tensor:
        """See `Sampling.probabilities`."""
        logits = logits.float()
        if not self.greedy:
            return logits.softmax(dim=-1)
        most, token = logits.max(dim=-1, keepdim=True)
        one = most - most + 1  # NaN where there is nothing to choose from
        return one * (torch.arange(logits.shape[-1], device=logits.device) == token)


@dataclass(frozen=True)
class _EndOutsideOfImages:
    """An end token that ends nothing where it is an image code, by its id or by the step (see `decode`)."""

    criterion: EosTokenCriteria
    codes: Tensor
    prompt_length: int

    def __call__(self, ids: Tensor, scores: None) -> Tensor:
        codes = self.codes.to(ids.device)
        by_step = codes.dtype == torch.bool
        is_code = codes[ids.shape[1] - self.prompt_length - 1] if by_step else torch.isin(ids[:, -1], codes)
        return self.criterion(ids, scores) & ~is_code


def _image_mode(usual: Callable[..., Any]) -> Callable[..., Any]:
    """The `generate` of Janus, whose image mode has a loop of its own and knows no `custom_generate`.

    Calls with the one of this module go to the loop here: by default with Janus's guidance scale at every step, and
    with its unconditional prompts, where padding that is seen stands for the text. Calls without one are left alone.
    """

    @functools.wraps(usual)
    def janus_generate(
        self: Any, inputs: Any = None, attention_mask: Any = None, logits_processor: Any = None, **kwargs: Any
    ) -> Any:
        own = kwargs.get("custom_generate")
        if kwargs.get("generation_mode") != "image" or not callable(own):
            return usual(self, inputs, attention_mask, logits_processor, **kwargs)
        if isinstance(own, functools.partial):
            kwargs = {**own.keywords, **kwargs, "custom_generate": own.func}
            own = own.func
        if own is not generate:
            raise UserError(
                "the image mode of Janus takes softcfg's generate as custom_generate, or a functools.partial of it, "
                f"got {quote(own)}"
            )
        del kwargs["generation_mode"]
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise UserError("give the prompts, as input_ids")
        config = copy.deepcopy(kwargs.get("generation_config") or self.generation_config)
        scale = kwargs.pop("guidance_scale", None)
        if scale is not None and kwargs.get("guidance") is not None:
            raise UserError("give guidance or guidance_scale, not both")
        scales = (kwargs.get("guidance"), scale, config.guidance_scale, JANUS_SCALE)
        guidance = next(scale for scale in scales if scale is not None)
        kwargs["guidance"] = checked_guidance(guidance, functools.partial(SoftCFG, schedule="constant"))
        if kwargs.get("unconditional_ids") is None:
            if kwargs.get("unconditional_mask") is not None:
                raise UserError("unconditional_mask says what is padding in unconditional_ids, which are missing")
            known = {**config.to_dict(), **(getattr(config, "generation_kwargs", None) or {}), **kwargs}
            if attention_mask is None:
                attention_mask = behind_padding(ids, known.get("pad_token_id"), known.get("eos_token_id"))
            kwargs.update(unconditional_ids=_without_text(ids, known), unconditional_mask=attention_mask)
        config.guidance_scale = config.max_length = None
        config.max_new_tokens = self.model.vision_model.config.num_image_tokens
        kwargs.update(generation_config=config, attention_mask=attention_mask, logits_processor=logits_processor)
        return super(JanusForConditionalGeneration, self).generate(ids, **kwargs)[:, ids.shape[1] :]

    return janus_generate


def _without_text(ids: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The unconditional prompts of Janus: the given ones with padding, which is seen, in place of the text."""
    needed = ("bos_token_id", "pad_token_id", "boi_token_id")
    bos, pad, boi = (settings.get(name) for name in needed)
    if bos is None or pad is None or boi is None:
        raise UserError(f"the generation config needs {', '.join(needed)}; or give unconditional_ids")
    return ids.where((ids == bos) | (ids == boi), pad)


JanusForConditionalGeneration.generate = _image_mode(JanusForConditionalGeneration.generate)
