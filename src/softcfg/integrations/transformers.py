"""CFG and SoftCFG for image-token models of Hugging Face transformers, without changing their code.

Importing this module registers the attention implementation "softcfg": the model's usual `sdpa`, and weighted
attention wherever a forward call passes `value_weights` or `key_weights`. Two ways to draw with it:

    model.set_attn_implementation("softcfg")
    tokens = decode(model, input_ids, SoftCFG(), num_tokens=..., unconditional_ids=...)
    sequences = model.generate(input_ids, custom_generate=generate, guidance=SoftCFG(), unconditional_ids=..., ...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.decoding import Sampling, draw, image_uniforms
from softcfg.decoding.sequential import Perturbation
from softcfg.errors import UserError
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import as_ids
from softcfg.nn.attention import weighted_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
    from transformers.generation import (
        EosTokenCriteria,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise UserError("this needs transformers 5 or later: pip install 'softcfg[transformers]'") from error

ATTENTION = "softcfg"  # its name for `attn_implementation`

# How many attention layers have applied weights so far: a model that loses them on the way would draw plain CFG.
_weighted_layers: ContextVar[int] = ContextVar("weighted_layers", default=0)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: `sdpa`, with weights where the forward call gives some.

    Args:
        query: [rows, heads, n, head_dim]. key, value: [rows, key_heads, S, head_dim].
        attention_mask: bool [rows or 1, 1, n, S], as `sdpa` takes it; None: causal.
        value_weights, key_weights: factors on the cached values or keys of the slots filled so far, [rows, filled] or
            [rows, n, filled]. S is smaller where a layer keeps a window, and larger in a static cache.

    Returns:
        [rows, n, heads, head_dim], and None for the attention probabilities.

    Raises:
        UserError: weights are given to a layer whose attention is more than queries, keys, values and a boolean mask.
    """
    if value_weights is None and key_weights is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in ("dropout", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name):
            raise UserError(f"{type(module).__name__} has {name}, which attention with weights does not do")
    new, mask = query.shape[2], None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
            raise UserError("attention with weights needs a boolean mask that all heads share")
        mask = attention_mask[:, 0]
    elif new > 1:  # sdpa's causal rule: the first pass, the rest of a static cache is empty
        key, value = key[:, :, :new], value[:, :, :new]
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    out = weighted_attention(
        query,
        key,
        value,
        value_weights=_fitted(value_weights, key),
        key_weights=_fitted(key_weights, key),
        mask=mask,
    )
    _weighted_layers.set(_weighted_layers.get() + 1)
    return out.transpose(1, 2).contiguous(), None


def _fitted(weights: Tensor | None, key: Tensor) -> Tensor | None:
    """The weights of the slots [..., filled] for the S slots of `key`: the last S, or ones for those still empty."""
    if weights is None:
        return None
    slots, filled = key.shape[2], weights.shape[-1]
    weights = weights[..., -slots:] if filled > slots else F.pad(weights, (0, slots - filled), value=1.0)
    return weights.to(key.device)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class ImageHead:
    """The way of image tokens through a model that keeps them apart from its text vocabulary.

    Attributes:
        embed: image tokens int64 [rows, 1] -> [rows, 1, width].
        backbone: takes `inputs_embeds`, `attention_mask`, `position_ids`, `past_key_values`, `use_cache` and what
            else it hands to its attention layers; returns an object with `last_hidden_state` [rows, n, width].
        logits: [rows, width] -> [rows, V], the logits of the image codes.
    """

    embed: Callable[[Tensor], Tensor]
    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]

    @classmethod
    def janus(cls, model: Any) -> ImageHead:
        """The image head of a `JanusForConditionalGeneration`."""
        inner = model.model
        return cls(model.prepare_embeddings_for_image_generation, inner.language_model, inner.generation_head)


@torch.inference_mode()
def decode(
    model: Any,
    input_ids: Tensor,
    guidance: CFG,
    *,
    num_tokens: int,
    unconditional_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    image_codes: Tensor | Sequence[int] | None = None,
    head: ImageHead | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    stopping_criteria: Sequence[Callable[..., Tensor]] = (),
    pad_token_id: int = 0,
    cache: str | Any = "dynamic",
) -> Tensor:
    """Draw image tokens after prompts.

    Args:
        model: a causal language model of transformers. For SoftCFG, `model.set_attn_implementation("softcfg")`.
        input_ids: int64 [B, L], the conditional prompts, left-padded where `attention_mask` [B, L] is 0.
        guidance: `CFG` or `SoftCFG`; inactive guidance (scale 0 or 1) needs no unconditional prompt.
        num_tokens: T, tokens to draw; the guidance schedule runs over them.
        unconditional_ids: int64 [1 or B, U], one for all or one a prompt, of any length; left-padded where
            `unconditional_mask` is 0.
        image_codes: which tokens get a confidence: their ids, or bool [T], the steps that draw one. None: all.
            The slots of other tokens (line ends, end of image) are never weighted.
        head: for models whose image tokens have an embedding and a head of their own. None: token ids go in,
            `logits` come out.
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
        seed, indices: row b is image `indices[b]` (by default b) of `seed`; see `image_uniforms`.
        logits_processor: called in turn with the prompts and tokens so far [B, L + t] and the guided logits [B, V]
            before temperature, top-k and top-p; returns what takes their place.
        stopping_criteria: called with the same and with the processed logits after every step; rows for which one
            returns True (bool [B]) get `pad_token_id` from then on, and decoding ends when all rows are done.
        cache: "dynamic", "static", or an empty cache of transformers with room for both branches.

    Returns:
        int64 [B, T], or fewer columns where stopping criteria ended all rows.

    Raises:
        UserError: prompts, masks or image codes do not fit, or the model does not bring weights to its attention.
    """
    sampling = sampling or Sampling()
    ids, visible = _prompts(model, "input_ids", input_ids, attention_mask)
    batch, device = ids.shape[0], ids.device
    rows = ids
    if guidance.is_active:
        if unconditional_ids is None:
            raise UserError(f"guidance with scale {guidance.guidance_scale:g} needs unconditional_ids")
        unconditional = _prompts(model, "unconditional_ids", unconditional_ids, unconditional_mask)
        rows, visible = _both_branches((ids, visible), unconditional, pad_token_id)
    codes = None if image_codes is None else _image_codes(image_codes, num_tokens).to(device)
    perturbation = None
    if isinstance(guidance, SoftCFG) and guidance.is_active and guidance.perturbs:
        perturbation = Perturbation(guidance, batch, num_tokens, rows.shape[1], device)

    forward = _Passes(model, head, visible, num_tokens, cache)
    uniforms = image_uniforms(seed, range(batch) if indices is None else indices, num_tokens).to(device)
    scales = guidance.scales(num_tokens).tolist()
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(num_tokens):
        weights = perturbation.row_weights() if perturbation and step else {}
        logits = forward(rows, weights)
        cond = logits[:batch]
        guided = guidance.guide(cond, logits[batch:], scales[step]) if guidance.is_active else cond
        for processor in logits_processor:
            guided = processor(ids, guided)
        drawn = draw(sampling.probabilities(guided), uniforms[:, step]).masked_fill(done, pad_token_id)
        if perturbation:
            perturbation.record(step, cond, drawn, sampling.temperature)
            if codes is not None:
                is_code = codes[step] if codes.dtype == torch.bool else torch.isin(drawn, codes)
                perturbation.confidence[:, step] *= is_code
        ids = torch.cat((ids, drawn[:, None]), dim=1)
        for criterion in stopping_criteria:
            done = done | criterion(ids, guided).to(device)
        if done.all():
            break
        rows = drawn[:, None].repeat(2 if guidance.is_active else 1, 1)
    return ids[:, input_ids.shape[1] :]


class _Passes:
    """The forward passes of one decoding, first the prompts, then one token a row: cache, mask and positions."""

    def __init__(self, model: Any, head: ImageHead | None, visible: Tensor, num_tokens: int, cache: Any) -> None:
        self.model, self.head = model, head
        self.module = model if head is None else head.backbone
        parameters = inspect.signature(self.module.forward).parameters.values()
        self.names = {parameter.name for parameter in parameters}
        self.takes_weights = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.padded = not bool(visible.all())
        # The last token is drawn and never fed.
        self.visible = F.pad(visible, (0, num_tokens - 1), value=True)
        self.positions = (self.visible.cumsum(dim=1) - 1).clamp_min(0)
        self.filled = 0
        if cache == "dynamic":
            cache = DynamicCache(config=model.config)
        elif cache == "static":
            cache = StaticCache(config=model.config, max_cache_len=self.visible.shape[1])
        elif isinstance(cache, str) or cache.get_seq_length():
            raise UserError(f"cache must be 'dynamic', 'static' or an empty cache of transformers, got {cache!r}")
        self.cache = cache

    def __call__(self, tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Feed `tokens` [rows, n] and return the logits float32 [rows, V] after the last one."""
        start, self.filled = self.filled, self.filled + tokens.shape[1]
        inputs: dict[str, Any] = {name: weight[:, : self.filled] for name, weight in weights.items()}
        inputs |= {"past_key_values": self.cache, "use_cache": True}
        if self.padded:
            inputs["attention_mask"] = self.visible[:, : self.filled].long()
        if "position_ids" in self.names:
            inputs["position_ids"] = self.positions[:, start : self.filled]

        before = _weighted_layers.get()
        if self.takes_weights or not weights:
            logits = self._logits(tokens, start, inputs)
        if weights and _weighted_layers.get() == before:
            raise UserError(
                f"no attention layer of {type(self.module).__name__} saw the weights of SoftCFG: call "
                f"model.set_attn_implementation({ATTENTION!r}) first; if that was done, the model's attention does "
                "not go through transformers' AttentionInterface"
            )
        return logits.to(tokens.device).float()

    def _logits(self, tokens: Tensor, start: int, inputs: dict[str, Any]) -> Tensor:
        if self.head is None:
            if "logits_to_keep" in self.names:
                inputs["logits_to_keep"] = 1
            return self.module(input_ids=tokens, **inputs).logits[:, -1]
        embed = self.head.embed if start else self.model.get_input_embeddings()
        return self.head.logits(self.module(inputs_embeds=embed(tokens), **inputs).last_hidden_state[:, -1])


def _prompts(model: Any, name: str, ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Check prompts [B, L] and their mask -> int64 and bool, both [B, L], on the device of the model."""
    ids = as_ids(ids, name, model.get_input_embeddings().num_embeddings).to(model.device)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).to(ids.device).bool()
    if ids.dim() != 2 or not ids.numel() or visible.shape != ids.shape:
        raise UserError(f"{name} and their mask must be [B, L] each, got {list(ids.shape)} and {list(visible.shape)}")
    if not visible[:, -1].all() or (visible[:, :-1] & ~visible[:, 1:]).any():
        raise UserError(f"{name} must be padded on the left")
    return ids, visible


def _both_branches(
    conditional: tuple[Tensor, Tensor], unconditional: tuple[Tensor, Tensor], pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask of both branches in one batch, conditional rows first, padded on the left to the longer of them."""
    batch, given = conditional[0].shape[0], unconditional[0].shape[0]
    if given not in (1, batch):
        raise UserError(f"unconditional_ids must be one row or one for each of the {batch} prompts, got {given}")
    slots = max(conditional[0].shape[1], unconditional[0].shape[1])
    ids, visible = (
        torch.cat([F.pad(rows.expand(batch, -1), (slots - rows.shape[1], 0), value=value) for rows in branches])
        for branches, value in zip(zip(conditional, unconditional, strict=True), (pad_token_id, False), strict=True)
    )
    return ids, visible


def _image_codes(codes: Tensor | Sequence[int], num_tokens: int) -> Tensor:
    """Check `image_codes` -> ids, int64 [n], or the steps that draw codes, bool [T]."""
    codes = torch.as_tensor(codes)
    if codes.dim() != 1 or codes.is_floating_point() or (codes.dtype == torch.bool and len(codes) != num_tokens):
        raise UserError(
            f"image_codes must be a list of ids or bool [{num_tokens}], got {codes.dtype} {list(codes.shape)}"
        )
    return codes


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    guidance: CFG,
    unconditional_ids: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    image_codes: Tensor | Sequence[int] | None = None,
    head: ImageHead | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop for `model.generate(..., custom_generate=generate, guidance=..., unconditional_ids=...)`.

    Length, temperature, top-k, top-p, greedy decoding (`do_sample=False`), token rules, stopping and the cache
    (`cache_implementation`, `past_key_values`) are those of the `generate` call; the rest is as in `decode`.

    Returns:
        int64 [B, L + T], the prompts and the drawn tokens after them.

    Raises:
        UserError: as `decode`; or the call asks for something else than one sequence of ids a row.
    """
    config = generation_config
    for name, usual in (("num_beams", 1), ("guidance_scale", 1), ("return_dict_in_generate", False)):
        if getattr(config, name) not in (None, usual):
            raise UserError(f"{name}={getattr(config, name)} does not go with softcfg's decoding")
    attention_mask = model_kwargs.pop("attention_mask", None)
    cache = model_kwargs.pop("past_key_values", None)
    if cache is None:
        raise UserError("softcfg's decoding needs the cache: leave use_cache on")
    if not getattr(cache, "_is_user_defined", False):  # made by `generate` for the conditional rows alone
        cache = "static" if isinstance(cache, StaticCache) else "dynamic"
    derived = ("position_ids", "logits_to_keep", "use_cache")
    given = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) or value]
    unknown = [name for name in given if name not in derived]
    if unknown:
        raise UserError(f"softcfg's decoding takes token ids alone, not {', '.join(unknown)}")

    copies = config.num_return_sequences or 1
    if unconditional_ids is not None and len(unconditional_ids) > 1:
        unconditional_ids = unconditional_ids.repeat_interleave(copies, dim=0)
        if unconditional_mask is not None:
            unconditional_mask = unconditional_mask.repeat_interleave(copies, dim=0)
    if config.do_sample:
        sampling = Sampling(config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0)
    else:
        sampling = Sampling(top_k=1)
    # `Sampling` does what these do.
    warpers = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else end
    tokens = decode(
        model,
        input_ids,
        guidance,
        num_tokens=config.max_length - input_ids.shape[1],
        unconditional_ids=unconditional_ids,
        attention_mask=attention_mask,
        unconditional_mask=unconditional_mask,
        image_codes=image_codes,
        head=head,
        sampling=sampling,
        seed=seed,
        indices=indices,
        logits_processor=[processor for processor in logits_processor if not isinstance(processor, warpers)],
        # An image head's tokens are no text, and none of them is the end of it.
        stopping_criteria=[c for c in stopping_criteria if head is None or not isinstance(c, EosTokenCriteria)],
        pad_token_id=pad or 0,
        cache=cache,
    )
    return torch.cat((input_ids, tokens.to(input_ids.device)), dim=1)
