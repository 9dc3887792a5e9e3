"""Drawing image tokens after prompts, by softcfg's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from softcfg.decoding import Sampling, image_uniforms
from softcfg.decoding.filtering import one_sampling
from softcfg.decoding.randomness import image_indices, on_device
from softcfg.decoding.sequential import Decoder
from softcfg.errors import UserError, quote, user_errors
from softcfg.guidance import CFG, SoftCFG, as_guidance
from softcfg.integrations.transformers.generator import TransformersGenerator, as_functions, require_static_caches
from softcfg.integrations.transformers.image_head import ImageHead
from softcfg.integrations.transformers.prompts import Prompts
from softcfg.models.base import Condition
from softcfg.models.ids import as_ids
from softcfg.nn.precision import own_dtype


@torch.no_grad()  # not inference_mode: the tokens may go on into the caller's autograd
@own_dtype()
def decode(
    model: Any,
    input_ids: Tensor,
    guidance: CFG | float | None = None,
    *,
    num_tokens: int,
    unconditional_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    image_codes: Tensor | Sequence[int] | None = None,
    head: ImageHead | None = None,
    sampling: Sampling | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    stopping_criteria: Sequence[Callable[[Tensor, None], Tensor]] = (),
    pad_token_id: int = 0,
    cache: str | Any = "dynamic",
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Draw image tokens after prompts.

    Args:
        model, head, logits_processor: see `TransformersGenerator`.
        input_ids, unconditional_ids, attention_mask, unconditional_mask: see `Prompts`.
        guidance: `CFG` or `SoftCFG`; a number is `SoftCFG` at that scale, None the paper's `SoftCFG`. Inactive guidance
            (scale 0 or 1) needs no unconditional prompt.
        num_tokens: T, tokens to draw; the guidance schedule runs over them.
        image_codes: which tokens are image codes: their ids, or bool [T], the steps that draw one. None: all. Other
            tokens (line ends, end of image) get no confidence, so their slots are never weighted, and no perturbation
            replaces them or puts them in the place of others.
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
        temperature, top_k, top_p: the same one by one, in place of `sampling`.
        seed, indices: row b is image `indices[b]` (by default b) of `seed`, one index per row; see `image_uniforms`.
        stopping_criteria: called with the prompts and tokens so far and None after every step; rows for which one
            returns True (bool [B], or one for all) get `pad_token_id` from then on, and decoding ends when all rows are
            done.
        pad_token_id: also fills the shorter prompts on the left; no query sees it.
        cache: "dynamic", "static", or an empty cache of transformers with room for the rows of both branches.
        on_tokens: called with the tokens so far, int64 [B, n], after every step.

    Returns:
        int64 [B, T], or fewer columns where stopping criteria ended all rows.

    Raises:
        UserError: prompts, masks, indices, image codes or the cache do not fit, an argument is of another kind, the
            guidance acts in no step, the weights do not reach every attention layer, or the logits hold NaN or
            infinity.
    """
    guidance = checked_guidance(guidance)
    if guidance.has_weak_model:
        raise UserError("a weak model is not for this function: leave out weak_share, or use a Pipeline with weak=")
    sampling = one_sampling(sampling, temperature, top_k, top_p)
    criteria = as_functions("stopping_criteria", stopping_criteria)
    codes = None if image_codes is None else as_codes(image_codes)
    by_step = codes is not None and codes.dtype == torch.bool
    generator = TransformersGenerator(
        model,
        num_tokens,
        head=head,
        code_steps=codes if by_step else None,
        logits_processor=logits_processor,
        cache="dynamic" if isinstance(cache, Cache) else cache,
        pad_token_id=pad_token_id,
    )
    code_ids = None
    if codes is not None and not by_step:
        code_ids = as_ids(codes, "image_codes", generator.vocab_size).to(generator.device)
    prompts = Prompts(input_ids, unconditional_ids, attention_mask, unconditional_mask)
    num_tokens = generator.num_tokens
    condition = generator.condition(prompts, guided=guidance.is_active)
    own = None if isinstance(cache, str) else cache
    if own is not None:
        _check_cache(own, model, condition)
    decoder = Decoder(generator, condition, guidance, sampling, own, code_ids=code_ids)

    batch = decoder.batch
    uniforms = on_device(image_uniforms(seed, image_indices(indices, batch, "rows"), num_tokens), generator.device)
    done = torch.zeros(batch, dtype=torch.bool, device=generator.device)
    tokens = torch.zeros(batch, num_tokens, dtype=torch.int64, device=generator.device)
    fed = tokens.clone()  # without padding, which need not be a token that the head for images knows
    for step in range(num_tokens):
        at = decoder.step(step)
        drawn = decoder.draw(at, fed, uniforms[:, step])
        if generator.device.type == "cpu":
            decoder.check(step, step + 1)
        decoder.record(at, drawn)
        fed[:, step] = drawn
        tokens[:, step] = drawn.masked_fill(done, pad_token_id)
        if on_tokens is not None:
            on_tokens(tokens[:, : step + 1])
        if criteria:
            done = done | _ended(criteria, torch.cat((condition.conditional(batch), tokens[:, : step + 1]), dim=1))
            if done.all():
                tokens = tokens[:, : step + 1]
                break
    if generator.device.type != "cpu":
        decoder.check()
    return tokens


def _ended(criteria: Sequence[Callable[[Tensor, None], Any]], so_far: Tensor) -> Tensor:
    """The rows that at least one of the stopping criteria ends, bool [B]; `so_far` are prompts and tokens [B, n]."""
    done = torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)
    for criterion in criteria:
        ended = criterion(so_far, None)
        ended = torch.tensor(ended) if isinstance(ended, bool) else ended
        if not isinstance(ended, Tensor) or ended.shape not in ((), done.shape):
            got = list(ended.shape) if isinstance(ended, Tensor) else quote(ended)
            raise UserError(f"stopping_criteria must return bool [{len(so_far)}], one per row, got {got}")
        done = done | ended.to(done.device)
    return done


def checked_guidance(guidance: CFG | float | None, default: Callable[..., CFG] = SoftCFG) -> CFG:
    """See `as_guidance`; what is no guidance is a `UserError`."""
    with user_errors():
        return as_guidance(guidance, default)


def as_codes(image_codes: Any) -> Tensor:
    """Ids of tokens, or bool [T]; raise a `UserError` for what is neither, and for none."""
    try:
        codes = torch.as_tensor(image_codes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"image_codes must be ids of tokens, or one bool per step, got {quote(image_codes)}") from error
    if not codes.numel():
        raise UserError("image_codes must name at least one token")
    return codes


def _check_cache(cache: Cache, model: Any, condition: Condition) -> None:
    """Raise a `UserError` unless the cache has layers, is empty and has room for the rows and slots of `condition`."""
    if not hasattr(cache, "layers"):
        raise UserError(f"the cache must be one of a decoder, such as DynamicCache, got {type(cache).__name__}")
    if isinstance(cache, StaticCache):
        require_static_caches(model)
    if cache.get_seq_length():
        raise UserError("the cache must be empty")
    config, slots = model.config.get_text_config(decoder=True), condition.cache_slots
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or slots
    for layer in cache.layers:
        room = getattr(layer, "max_cache_len", slots)
        needed = min(window, slots) if getattr(layer, "is_sliding", False) else slots
        if room < needed:
            raise UserError(f"the cache must have room for {needed} slots, prompts and tokens, got {room}")
        keys, rows = getattr(layer, "keys", None), condition.rows
        if keys is not None and keys.numel() and len(keys) != rows:
            raise UserError(f"the cache must have room for {rows} rows, those of all branches, got {len(keys)}")
