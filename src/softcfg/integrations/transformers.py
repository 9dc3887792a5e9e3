"""CFG and SoftCFG for image-token models of Hugging Face transformers, without changing their code.

Importing this module registers the attention implementation "softcfg": the model's usual `sdpa`, and weighted
attention wherever a forward call passes `value_weights`, `key_weights` or `attention_weights`. Three ways to draw with
it:

    model.set_attn_implementation("softcfg")
    tokens = decode(model, input_ids, SoftCFG(), num_tokens=..., unconditional_ids=...)
    sequences = model.generate(input_ids, custom_generate=generate, guidance=SoftCFG(), unconditional_ids=..., ...)
    images = Pipeline(ImageGenerator(model, ImageTokens(...), encode), tokenizer, name=...)(prompts=[...]).images
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.decoding import Sampling, image_uniforms
from softcfg.decoding.filtering import one_sampling
from softcfg.decoding.randomness import image_indices, on_device
from softcfg.decoding.sequential import Decoder
from softcfg.errors import UserError, how_to_install, quote, require_whole
from softcfg.guidance import CFG, SoftCFG, as_guidance
from softcfg.models.base import Condition, Generator
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.geometry import Geometry
from softcfg.models.ids import as_ids
from softcfg.nn.attention import weighted_attention
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype
from softcfg.nn.settings import holding
from softcfg.prompts import PROMPT_OPTIONS, Prompt

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Cache,
        DynamicCache,
        JanusForConditionalGeneration,
        QuantizedCache,
        StaticCache,
    )
    from transformers.generation import EosTokenCriteria, GenerationMode
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise UserError(f"this needs transformers 5.6 or later: {how_to_install('transformers')}") from error

ATTENTION = "softcfg"  # its name for `attn_implementation`
JANUS_SCALE = 5.0  # of its image mode, where its configuration has none
IMAGE_HEADS = (
    "generation_head",
    "gen_head",
    "image_head",
    "img_head",
    "vision_head",
    "visual_head",
)  # their usual names
LARGEST_ID = (1 << 63) - 1
NOTED_SLOTS = "softcfg_filled_slots"  # an attribute of a mask

# Whether each call of `attention` in this pass brought weights: a layer that loses them would draw plain CFG.
_brought_weights: ContextVar[list[bool] | None] = ContextVar("brought_weights", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    attention_weights: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: `sdpa`, with weights where the forward call gives some.

    Args:
        query: [rows, heads, n, head_dim]. key, value: [rows, key_heads, S, head_dim].
        attention_mask: bool [rows or 1, 1, n, S], as `sdpa` takes it; None: causal.
        value_weights, key_weights: factors on the cached values or keys of the slots filled so far, [rows, filled] or
            [rows, n, filled]. S is smaller where a layer keeps a window, and larger in a static cache.
        attention_weights: factors on the attention to these slots, which is renormalised; shaped likewise.

    Returns:
        [rows, n, heads, head_dim], and None for the attention probabilities.

    Raises:
        UserError: the layer has sinks; or weights are given and it is not causal or has anything else but queries,
            keys, values and a boolean mask; or they are not of the slots filled so far.
    """
    weighted = any(weights is not None for weights in (value_weights, key_weights, attention_weights))
    if (calls := _brought_weights.get()) is not None:
        calls.append(weighted)
    with_weights = ("s_aux", "softcap", "position_bias", "dropout", "cache")
    for name in with_weights if weighted else ("s_aux",):  # sdpa drops sinks
        if isinstance(kwargs.get(name), Tensor) or kwargs.get(name):
            raise UserError(f"{type(module).__name__} has {name}, which the attention {ATTENTION!r} cannot do")
    if not weighted:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    new, mask = query.shape[2], None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
            raise UserError("attention with weights needs a boolean mask that all heads share")
        mask = attention_mask[:, 0]
    elif new > 1:  # sdpa's causal rule: the first pass, the rest of a static cache is empty
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise UserError(f"{type(module).__name__} is not causal: its attention cannot have weights")
        key, value = key[:, :, :new], value[:, :, :new]
    given = {"value_weights": value_weights, "key_weights": key_weights, "attention_weights": attention_weights}
    if calls is None:  # not in a pass of `TransformersGenerator`, which cuts the weights to the slots itself
        for name, weights in given.items():
            if weights is not None:
                _check_weights(name, weights, query, key, attention_mask)
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    out = weighted_attention(
        query,
        key,
        value,
        mask=mask,
        **{name: _fitted(weights, key) for name, weights in given.items()},
    )
    return out.transpose(1, 2).contiguous(), None


def _check_weights(name: str, weights: Tensor, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Raise a `UserError` unless there is a weight for every slot filled so far; see `attention`."""
    if not isinstance(weights, Tensor):
        raise UserError(f"{name} must be a tensor, got {quote(weights)}")
    rows, new, length = query.shape[0], query.shape[2], weights.shape[-1] if weights.dim() else 0
    filled = _filled(key, mask, length)
    if weights.shape not in ((rows, filled), (rows, new, filled)):
        raise UserError(
            f"{name} must have a factor for each of the {filled} slots filled so far, the new ones included: shape "
            f"[{rows}, {filled}] or [{rows}, {new}, {filled}], got {list(weights.shape)}"
        )


def _filled(key: Tensor, mask: Tensor | None, length: int) -> int:
    """The number of slots filled so far, the new ones included; `length` where a window hides it.

    The mask of `sdpa_mask_noting_slots` says it. One that was made elsewhere shows the last slot that is seen; a layer
    that sees all its S slots has S, or is a window on the last S of more.
    """
    slots = key.shape[2]
    if mask is None:
        return slots
    noted = getattr(mask, NOTED_SLOTS, None)
    if noted is not None:
        filled = int(noted)  # which a static cache counts on the device: wait for it once, for all layers
        setattr(mask, NOTED_SLOTS, filled)
        return filled
    seen = mask[:, 0, -1].any(dim=0).nonzero()
    last = int(seen[-1]) + 1 if len(seen) else slots
    return max(slots, length) if last == slots else last


def _fitted(weights: Tensor | None, key: Tensor) -> Tensor | None:
    """The weights of the slots [..., filled] for the S slots of `key`: the last S, or ones for those still empty."""
    if weights is None:
        return None
    slots, filled = key.shape[2], weights.shape[-1]
    weights = weights[..., -slots:] if filled > slots else F.pad(weights, (0, slots - filled), value=1.0)
    return weights.to(key.device)


def sdpa_mask_noting_slots(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any) -> Any:
    """What transformers calls a mask function: `sdpa_mask`, which keeps how many slots are filled with the mask.

    Keys do not tell: a static cache has more slots, and a window fewer.
    """
    mask = sdpa_mask(batch_size, q_length, kv_length, q_offset, **kwargs)
    if mask is not None and not torch.compiler.is_compiling():
        setattr(mask, NOTED_SLOTS, q_offset + q_length)
    return mask


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask_noting_slots)


@dataclass(frozen=True)
class ImageHead:
    """How image tokens go through a model that keeps them apart from its text vocabulary.

    Attributes:
        embed: image tokens int64 [rows, n] -> [rows, n, width].
        backbone: takes `inputs_embeds`, `attention_mask`, `position_ids`, `past_key_values`, `use_cache` and what
            it passes on to its attention layers; returns an object with `last_hidden_state` [rows, n, width].
        logits: [rows, n, width] -> [rows, n, V], the logits of the image codes.
        vocab_size: V.
    """

    embed: Callable[[Tensor], Tensor]
    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> ImageHead | None:
        """The image head of a model that has one; None for a model whose image tokens are in its vocabulary.

        Raises:
            UserError: there is an image head, of a kind that is not known here.
        """
        if isinstance(model, JanusForConditionalGeneration):
            return cls.janus(model)
        heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in IMAGE_HEADS]
        if heads:
            raise UserError(
                f"{type(model).__name__} has an image head, {heads[0]}, of a kind that is not known here: give "
                "head=ImageHead(embed=..., backbone=..., logits=..., vocab_size=...)"
            )
        return None

    @classmethod
    def janus(cls, model: Any) -> ImageHead:
        """The image head of a `JanusForConditionalGeneration`."""
        return cls(
            embed=model.prepare_embeddings_for_image_generation,
            backbone=model.model.language_model,
            logits=model.model.generation_head,
            vocab_size=model.config.vq_config.num_embeddings,
        )


@dataclass(frozen=True)
class Prompts:
    """What a batch is conditioned on.

    Attributes:
        input_ids: int64 [B, L], the conditional prompts, left-padded where `attention_mask` [B, L] is 0. Without a
            mask, padding tokens of the model (unless they end texts too) in front of a prompt are its padding, as in
            transformers.
        unconditional_ids: int64 [1 or B, U], one for all or one per prompt, of any length, left-padded where
            `unconditional_mask` is 0. Needed where guidance is active.
    """

    input_ids: Tensor
    unconditional_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    unconditional_mask: Tensor | None = None

    @classmethod
    def batch(cls, prompts: Sequence[Prompts], pad_token_id: int) -> Prompts:
        """One batch of prompts of one row each, padded on the left to one length; what is hidden in one is left out.

        Raises:
            UserError: one is no `Prompts`, or of several rows, or its mask does not fit.
        """
        for p in prompts:
            if not isinstance(p, Prompts):
                raise UserError(f"a prompt must be Prompts(input_ids, ...) of one row, got {quote(p)}")
        conditional = [_seen("input_ids", p.input_ids, p.attention_mask) for p in prompts]
        input_ids, attention_mask = _padded(conditional, pad_token_id)
        unconditional = [
            _seen("unconditional_ids", p.unconditional_ids, p.unconditional_mask)
            for p in prompts
            if p.unconditional_ids is not None
        ]
        if len(unconditional) < len(prompts):
            return cls(input_ids, attention_mask=attention_mask)
        unconditional_ids, unconditional_mask = _padded(unconditional, pad_token_id)
        return cls(input_ids, unconditional_ids, attention_mask, unconditional_mask)


def _seen(name: str, ids: Any, mask: Any) -> Tensor:
    """The ids [L] or [1, L] of one row that its mask does not hide."""
    ids = as_ids(ids, name, LARGEST_ID)
    visible = torch.ones_like(ids) if mask is None else _as_mask(name, mask)
    length = ids.numel()
    if not {ids.shape, visible.shape} <= {(length,), (1, length)}:
        raise UserError(
            f"{name} of a prompt and their mask must be one row, [L] or [1, L], got {list(ids.shape)} and "
            f"{list(visible.shape)}"
        )
    return ids.flatten()[visible.flatten().bool()]


def _as_mask(name: str, mask: Any) -> Tensor:
    """The mask of the ids that go by `name`, int64; raise a `UserError` unless it holds zeros and ones alone."""
    try:
        visible = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the mask of {name} must be 0 and 1, got {quote(mask)}") from error
    if not ((visible == 0) | (visible == 1)).all():
        raise UserError(f"the mask of {name} must be 0 for padding and 1 elsewhere, got {quote(visible.tolist())}")
    return visible.long()


def _functions(name: str, given: Iterable[Any] | None) -> list[Any]:
    """The functions of a list, such as those of transformers; raise a `UserError` for anything else."""
    functions = list(given) if isinstance(given, Iterable) else [None] * (given is not None)
    if not all(map(callable, functions)):
        raise UserError(f"{name} must be a list of functions, got {quote(given)}")
    return functions


def _padded(ids: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids [L] of several rows as one batch [B, L], padded on the left, and its mask."""
    longest = max(map(len, ids))
    padded = torch.stack([F.pad(row, (longest - len(row), 0), value=pad_token_id) for row in ids])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids])
    return padded, mask


class PromptCondition(Condition):
    """Prompts of all rows in one left-padded batch, followed by the tokens that were fed.

    Attributes:
        sequence: int64 [rows, slots + T]; a pass writes the tokens that it feeds.
        prompt_slots: L, what the conditional prompts took before they were padded to the length of the others.
    """

    padding: Tensor

    def __init__(
        self, ids: Tensor, padding: Tensor, prompt_slots: int, num_tokens: int, geometry: Geometry | None = None
    ) -> None:
        super().__init__(len(ids), ids.shape[1], num_tokens, padding, geometry)
        self.padded = bool(padding.any())
        self.prompt_slots = prompt_slots
        self.sequence = F.pad(ids, (0, num_tokens))

    def __getitem__(self, rows: slice) -> PromptCondition:
        """See `Condition.__getitem__`; no token was fed yet."""
        ids, geometry = self.sequence[rows, : self.slots], self.geometry if self.grid else None
        return PromptCondition(ids, self.padding[rows], self.prompt_slots, self.num_tokens, geometry)

    def conditional(self, batch: int, fed: int = 0) -> Tensor:
        """The conditional prompts as they were given and the first `fed` tokens after them, [batch, L + fed]."""
        return self.sequence[:batch, self.slots - self.prompt_slots : self.slots + fed]


class TransformersGenerator(Generator):
    """A causal language model of transformers as a generator, for `softcfg.trace` and for `decode` below.

    Args:
        model: of transformers; for SoftCFG with `model.set_attn_implementation("softcfg")`.
        num_tokens: T, tokens to draw after a prompt.
        head: for models whose image tokens have an embedding and a head of their own; that of Janus is found by
            itself. Without one, token ids go in and `logits` come out.
        code_steps: bool [T], the steps that draw an image code; None: all. The slots of other tokens (line ends,
            end of image) are never weighted.
        logits_processor: called in turn with the prompts and tokens so far [B, L + t] and the guided logits [B, V]
            before temperature, top-k and top-p; returns what takes their place.
        cache: "dynamic" or "static".
        pad_token_id: fills the shorter prompts on the left; no query sees it.

    Raises:
        UserError: an argument is none of these, or the model has an image head that is not known here.
    """

    supports_row_positions = False
    geometry: Geometry | None = None

    def __init__(
        self,
        model: Any,
        num_tokens: int,
        *,
        head: ImageHead | None = None,
        code_steps: Tensor | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
        cache: str = "dynamic",
        pad_token_id: int = 0,
    ) -> None:
        super().__init__()
        num_tokens = require_whole(num_tokens, "num_tokens", 1)
        if cache not in ("dynamic", "static"):
            raise UserError(f"cache must be 'dynamic' or 'static', got {quote(cache)}")
        if code_steps is not None:
            code_steps = torch.as_tensor(code_steps)
            if code_steps.dtype != torch.bool or code_steps.shape != (num_tokens,):
                raise UserError(f"the steps that draw image codes must be bool [{num_tokens}]")
        if not (hasattr(model, "config") and hasattr(model, "forward")):
            raise UserError(f"model must be a model of transformers, got {quote(model)}")
        head = ImageHead.of(model) if head is None else head
        if head is not None and not isinstance(head, ImageHead):
            raise UserError(f"head must be ImageHead(...), got {quote(head)}")
        self.model = model
        self.num_tokens = num_tokens
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size if head is None else head.vocab_size
        self.head = head
        self.code_steps = code_steps
        self.logits_processor = _functions("logits_processor", logits_processor)
        self.cache = cache
        self.pad_token_id = require_whole(pad_token_id, "pad_token_id", 0)
        module = model if head is None else head.backbone
        parameters = inspect.signature(module.forward).parameters.values()
        self._arguments = {parameter.name for parameter in parameters}
        self._takes_weights = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def condition(self, inputs: Any, *, guided: bool) -> PromptCondition:
        """See `Generator.condition`; `inputs` are `Prompts`, of all rows.

        Raises:
            UserError: ids or masks do not fit, or the unconditional prompts are missing.
        """
        if not isinstance(inputs, Prompts):
            raise UserError(f"prompts must be Prompts(input_ids, ...), got {quote(inputs)}")
        if inputs.unconditional_ids is None and inputs.unconditional_mask is not None:
            raise UserError("unconditional_mask says what is padding in unconditional_ids, which are missing")
        branches = [self._prompts("input_ids", inputs.input_ids, inputs.attention_mask)]
        batch, prompt_slots = branches[0][0].shape
        if guided:
            if inputs.unconditional_ids is None:
                raise UserError("guidance needs unconditional_ids")
            branches.append(self._prompts("unconditional_ids", inputs.unconditional_ids, inputs.unconditional_mask))
            if len(branches[1][0]) not in (1, batch):
                raise UserError(
                    f"unconditional_ids must have 1 row or {batch}, one per prompt, got {len(branches[1][0])}"
                )
        slots = max(ids.shape[1] for ids, _ in branches)
        if any(ids.shape[1] < slots for ids, _ in branches):
            as_ids([self.pad_token_id], "pad_token_id", self.model.get_input_embeddings().num_embeddings)
        rows, padding = [], []
        for ids, leading in branches:
            short = slots - ids.shape[1]
            rows.append(F.pad(ids, (short, 0), value=self.pad_token_id).expand(batch, -1))
            padding.append((leading + short).expand(batch))
        return PromptCondition(torch.cat(rows), torch.cat(padding), prompt_slots, self.num_tokens, self.geometry)

    def forward(
        self,
        condition: Condition,
        tokens: Tensor,
        *,
        cache: Any = None,
        slot: Position | int = 0,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """See `Generator.forward`. A pass goes on where the cache ends.

        Raises:
            UserError: no attention layer sees the weights, they are not of all slots, or rows have slots of their own.
        """
        assert isinstance(condition, PromptCondition)
        position = Position.of(slot)
        start = position.slot
        if start is None:
            raise UserError(
                "caches of transformers have one length for all rows: steps cannot be static or speculative"
            )
        first = max(start, condition.slots)  # slot of the first token
        filled = first + tokens.shape[1]
        condition.sequence[:, first:filled] = tokens
        weights = {}
        if tokens.shape[1]:  # prompts are never weighted
            given = {"value_weights": value_weights, "key_weights": key_weights, "attention_weights": attention_weights}
            weights = {name: weight[..., :filled] for name, weight in given.items() if weight is not None}
        for name, weight in weights.items():
            if weight.shape[-1] < filled:
                raise UserError(f"{name} must be of at least the {filled} slots filled so far, got {weight.shape[-1]}")

        inputs: dict[str, Any] = dict(weights) if self._takes_weights else {}
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        if condition.padded:
            slots = torch.arange(filled, device=tokens.device)
            inputs["attention_mask"] = (slots >= condition.padding[:, None]).long()
        if "position_ids" in self._arguments:
            inputs["position_ids"] = position.index(filled - start, condition.padding)
        predicting = position.first_predicting(condition.slots)
        calls: list[bool] = []
        with holding(_brought_weights, calls):
            logits = self._logits(condition.sequence[:, start:first], tokens, predicting, inputs)
        if weights:
            self._require_weighted(calls, cache)
        return logits.to(tokens.device)

    def _require_weighted(self, calls: list[bool], cache: Any) -> None:
        """Raise a `UserError` unless every attention layer took the weights: all calls, and as many as keep keys."""
        cached = sum(getattr(layer, "keys", None) is not None for layer in getattr(cache, "layers", ()))
        layers = max(len(calls), cached)
        if not any(calls):
            raise UserError(
                f"no attention layer of {type(self.model).__name__} saw the weights of SoftCFG: call "
                f"model.set_attn_implementation({ATTENTION!r}) first; if that was done, its layers do not hand "
                "keyword arguments to transformers' AttentionInterface"
            )
        if sum(calls) < layers:
            raise UserError(
                f"{layers - sum(calls)} of the {layers} attention layers of {type(self.model).__name__} did not see "
                "the weights of SoftCFG: they do not hand keyword arguments to transformers' AttentionInterface"
            )

    def new_cache(self, condition: Condition) -> Any:
        """An empty cache of transformers for the rows of `condition`."""
        if self.cache == "static":
            return StaticCache(config=self.model.config, max_cache_len=condition.cache_slots)
        return DynamicCache(config=self.model.config)

    def constrain(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        """Let `logits_processor` act on guided logits [B, n, V] of `steps` [n], after the tokens that were fed."""
        assert isinstance(condition, PromptCondition)
        logits = super().constrain(logits, steps, condition)
        if not self.logits_processor:
            return logits
        processed = []
        for step, scores in zip(steps.tolist(), logits.unbind(1), strict=True):
            for processor in self.logits_processor:
                scores = processor(condition.conditional(len(logits), step), scores)
            if not isinstance(scores, Tensor) or scores.shape != (len(logits), logits.shape[-1]):
                got = list(scores.shape) if isinstance(scores, Tensor) else quote(scores)
                raise UserError(
                    f"logits_processor must return logits [{len(logits)}, {logits.shape[-1]}], as they came, got {got}"
                )
            processed.append(scores)
        return torch.stack(processed, dim=1)

    def is_code(self, steps: Tensor, condition: Condition) -> Tensor | None:
        """See `Generator.is_code`."""
        if self.code_steps is None:
            return super().is_code(steps, condition)
        return self.code_steps.to(steps.device)[steps]

    def _prompts(self, name: str, ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
        """Checked ids [B, L] on the device of the model, and the number of leading slots [B] that are padding."""
        ids = as_ids(ids, name, self.model.get_input_embeddings().num_embeddings).to(self.device)
        visible = self._behind_padding(ids) if mask is None else _as_mask(name, mask).to(self.device)
        if ids.dim() != 2 or not ids.numel() or visible.shape != ids.shape:
            raise UserError(f"{name} and their mask must be [B, L], got {list(ids.shape)} and {list(visible.shape)}")
        if not visible[:, -1].all() or (visible.diff(dim=1) < 0).any():
            raise UserError(f"{name} must be padded on the left")
        return ids, (visible == 0).sum(dim=1)

    def _behind_padding(self, ids: Tensor) -> Tensor:
        """The mask of prompts that came without: 0 for padding tokens in front of others."""
        configs = (getattr(self.model, "generation_config", None), self.model.config.get_text_config(decoder=True))
        pad, end = (
            next((found for c in configs if (found := getattr(c, name, None)) is not None), None)
            for name in ("pad_token_id", "eos_token_id")
        )
        if ids.dim() != 2 or pad is None or pad in (end if isinstance(end, list) else [end]):
            return torch.ones_like(ids)
        text = ids != pad
        return ((text.cumsum(dim=1) > 0) | ~text.any(dim=1, keepdim=True)).long()

    def _logits(self, prompt: Tensor, tokens: Tensor, first: int, inputs: dict[str, Any]) -> Tensor:
        """Logits after the inputs from index `first` on; `prompt` is [rows, 0] if it was fed before."""
        if self.head is None:
            ids = torch.cat((prompt, tokens), dim=1)
            if "logits_to_keep" in self._arguments:
                inputs["logits_to_keep"] = ids.shape[1] - first
                return self.model(input_ids=ids, **inputs).logits
            return self.model(input_ids=ids, **inputs).logits[:, first:]
        parts = [self.model.get_input_embeddings()(prompt)] if prompt.shape[1] else []
        parts += [self.head.embed(tokens)] if tokens.shape[1] else []
        hidden = self.head.backbone(inputs_embeds=torch.cat(parts, dim=1), **inputs).last_hidden_state
        return self.head.logits(hidden[:, first:])


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in the vocabulary of a model: rows of codes, which may end with structure tokens.

    Attributes:
        rows, columns: (h, w), the grid of codes.
        num_codes: the number of image codes.
        first_code_id: image code c is the token `first_code_id` + c.
        row_end: ids of the tokens after each row, such as the end of a line.
        tail: ids of the tokens after the last row, such as the end of the image.

    Raises:
        UserError: a field is something else, such as a grid without rows.
    """

    rows: int
    columns: int
    num_codes: int
    first_code_id: int = 0
    row_end: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("columns", 1), ("num_codes", 1), ("first_code_id", 0)):
            require_whole(getattr(self, name), name, least)
        for name in ("row_end", "tail"):
            if as_ids(getattr(self, name), name, LARGEST_ID).dim() != 1:
                raise UserError(f"{name} must be a tuple of ids, got {quote(getattr(self, name))}")

    @property
    def geometry(self) -> Geometry:
        """Where the tokens stand."""
        return Geometry(self.rows, self.columns, row_end=len(self.row_end), tail=len(self.tail))

    @property
    def structure(self) -> Tensor:
        """The id of each structure token, int64 [T]; -1 where a code is drawn."""
        return torch.tensor((*(*[-1] * self.columns, *self.row_end) * self.rows, *self.tail))


class TextPrompts(PromptConditioning):
    """Prompts of an `ImageGenerator`, which its `encode` turns into ids; images have one size."""

    generator: ImageGenerator

    @property
    def options(self) -> Sequence[str]:  # type: ignore[override]
        """See `PromptConditioning`."""
        return self.generator.options

    def check_tokenizer(self) -> None:
        """See `Conditioning.check_tokenizer`."""
        config, tokenizer = self.generator.config, self.tokenizer
        codes = config.rows * config.columns
        if config.num_codes != tokenizer.codebook_size or not (tokenizer.any_size or codes == tokenizer.num_tokens):
            raise UserError(
                f"the model draws {codes} codes out of {config.num_codes} for an image, but the tokenizer reads "
                f"{tokenizer.num_tokens} out of {tokenizer.codebook_size}"
            )

    def inputs(self, requests: Sequence[Prompt]) -> list[Prompts]:
        """See `Conditioning.inputs`."""
        return [self.generator.encode(prompt) for prompt in requests]

    @property
    def default_size(self) -> tuple[int, int]:
        """See `PromptConditioning.default_size`."""
        if not self.tokenizer.any_size:
            return super().default_size
        config, pixels = self.generator.config, self.tokenizer.patch_size
        return config.columns * pixels, config.rows * pixels

    def geometry(self, width: int | None = None, height: int | None = None) -> Geometry:
        """See `Conditioning.geometry`."""
        super().geometry(width, height)  # refuses other sizes
        return self.generator.config.geometry


class ImageGenerator(TransformersGenerator):
    """A model of transformers as the generator of a `softcfg.Pipeline`, and so of runs, traces and the web page.

    Its inputs are `Prompts` of one row each. Codes are allowed in the rows only, structure tokens elsewhere only.
    A run identifies it by the name of the pipeline, by `tokens` and by the hash of its weights; keeping `encode` the
    same is up to the user.

    Args:
        model, head, cache, pad_token_id: see `TransformersGenerator`.
        tokens: the tokens of an image.
        encode: turns a `softcfg.prompts.Prompt` into `Prompts` of one row: the ids of its text, with the template and
            the special tokens of the model, and those of the unconditional branch.
        options: which of the `softcfg.prompts.PROMPT_OPTIONS` `encode` reads; prompts with others are refused.

    Raises:
        UserError: tokens outside of the model's vocabulary, or an argument of another kind.
    """

    conditioning_type = TextPrompts
    config: ImageTokens

    def __init__(
        self,
        model: Any,
        tokens: ImageTokens,
        encode: Callable[[Prompt], Prompts],
        *,
        head: ImageHead | None = None,
        options: Sequence[str] = (),
        cache: str = "dynamic",
        pad_token_id: int = 0,
    ) -> None:
        if not isinstance(tokens, ImageTokens):
            raise UserError(f"tokens must be ImageTokens(...), got {quote(tokens)}")
        if not callable(encode):
            raise UserError(f"encode must be a function of a Prompt, got {quote(encode)}")
        if isinstance(options, str) or not set(options) <= set(PROMPT_OPTIONS):
            raise UserError(f"options must be a list of {', '.join(PROMPT_OPTIONS)}, got {quote(options)}")
        super().__init__(model, tokens.geometry.num_tokens, head=head, cache=cache, pad_token_id=pad_token_id)
        ends = (tokens.first_code_id + tokens.num_codes - 1, tokens.first_code_id, *tokens.row_end, *tokens.tail)
        as_ids(ends, "image tokens", self.vocab_size)
        self.config = tokens
        self.geometry = tokens.geometry
        self.encode = encode
        self.options = tuple(options)
        self.requires_grad_(False).eval()

    def condition(self, inputs: Any, *, guided: bool) -> PromptCondition:
        """See `Generator.condition`; `inputs` are `Prompts` of one row each."""
        if not isinstance(inputs, Sequence):
            raise UserError(f"prompts must be a list of Prompts(input_ids, ...), got {quote(inputs)}")
        if not inputs:
            raise UserError("there must be at least one prompt")
        return super().condition(Prompts.batch(inputs, self.pad_token_id), guided=guided)

    def allowed(self, steps: Tensor, condition: Condition) -> Tensor:
        """See `Generator.allowed`."""
        config = self.config
        structure = config.structure.to(steps.device)[steps]
        first = structure.where(structure >= 0, config.first_code_id)
        stop = (structure + 1).where(structure >= 0, config.first_code_id + config.num_codes)
        return torch.stack((first, stop), dim=-1)

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """See `Generator.image_codes`."""
        return self.config.geometry.on_grid(tokens).flatten(1) - self.config.first_code_id


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
        image_codes: which tokens get a confidence: their ids, or bool [T], the steps that draw one. None: all.
            The slots of other tokens (line ends, end of image) are never weighted.
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
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
            weights do not reach every attention layer, or the logits hold NaN or infinity.
    """
    guidance = _guidance(guidance)
    if guidance.has_weak_model:
        raise UserError("a weak model is not for this function: leave out weak_share, or use a Pipeline with weak=")
    sampling = one_sampling(sampling, None, None, None)
    criteria = _functions("stopping_criteria", stopping_criteria)
    codes = None if image_codes is None else _as_codes(image_codes)
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
    if codes is not None and not by_step:
        codes = as_ids(codes, "image_codes", generator.vocab_size).to(generator.device)
    prompts = Prompts(input_ids, unconditional_ids, attention_mask, unconditional_mask)
    num_tokens = generator.num_tokens
    condition = generator.condition(prompts, guided=guidance.is_active)
    own = None if isinstance(cache, str) else cache
    if own is not None:
        _check_cache(own, model, condition)
    decoder = Decoder(generator, condition, guidance, sampling, own)

    batch = decoder.batch
    uniforms = on_device(image_uniforms(seed, image_indices(indices, batch, "rows"), num_tokens), generator.device)
    done = torch.zeros(batch, dtype=torch.bool, device=generator.device)
    tokens = torch.zeros(batch, num_tokens, dtype=torch.int64, device=generator.device)
    for step in range(num_tokens):
        at = decoder.step(step)
        drawn = decoder.draw(at, tokens, uniforms[:, step]).masked_fill(done, pad_token_id)
        if generator.device.type == "cpu":
            decoder.check(step)
        decoder.record(at, drawn)
        if codes is not None and not by_step:
            decoder.confidence[:, step] *= torch.isin(drawn, codes)
        tokens[:, step] = drawn
        if on_tokens is not None:
            on_tokens(tokens[:, : step + 1])
        for criterion in criteria:
            so_far = torch.cat((condition.conditional(batch), tokens[:, : step + 1]), dim=1)
            ended = criterion(so_far, None)
            ended = torch.tensor(ended) if isinstance(ended, bool) else ended
            if not isinstance(ended, Tensor) or ended.shape not in ((), done.shape):
                got = list(ended.shape) if isinstance(ended, Tensor) else quote(ended)
                raise UserError(f"stopping_criteria must return bool [{batch}], one per row, got {got}")
            done = done | ended.to(done.device)
        if criteria and done.all():
            tokens = tokens[:, : step + 1]
            break
    if generator.device.type != "cpu":
        decoder.check()
    return tokens


def _guidance(guidance: CFG | float | None, default: Callable[..., CFG] = SoftCFG) -> CFG:
    """See `as_guidance`; what is no guidance is a `UserError`."""
    try:
        return as_guidance(guidance, default)
    except ValueError as error:
        raise UserError(error) from error


def _as_codes(image_codes: Any) -> Tensor:
    """Ids of tokens, or bool [T]; raise a `UserError` for what is neither, and for none."""
    try:
        codes = torch.as_tensor(image_codes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"image_codes must be ids of tokens, or one bool per step, got {quote(image_codes)}") from error
    if not codes.numel():
        raise UserError("image_codes must name at least one token")
    return codes


def _check_cache(cache: Cache, model: Any, condition: Condition) -> None:
    """Raise a `UserError` unless the cache is empty and has room for the rows and the slots of `condition`."""
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
class _OutsideOfImages:
    """An end token that ends nothing where it is an image code, by its id or by the step (see `decode`)."""

    criterion: EosTokenCriteria
    codes: Tensor
    prompt_length: int

    def __call__(self, ids: Tensor, scores: None) -> Tensor:
        codes = self.codes.to(ids.device)
        by_step = codes.dtype == torch.bool
        is_code = codes[ids.shape[1] - self.prompt_length - 1] if by_step else torch.isin(ids[:, -1], codes)
        return self.criterion(ids, scores) & ~is_code


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
    config = generation_config
    for name, usual in (("num_beams", 1), ("guidance_scale", 1), ("return_dict_in_generate", False)):
        if getattr(config, name) not in (None, usual):
            raise UserError(f"{name}={getattr(config, name)} is not supported by softcfg's decoding")
    caller = sys._getframe(1)
    call = caller.f_locals if caller.f_code.co_name == "generate" else {}
    mode = config.get_generation_mode(call.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"{mode.value.replace('_', ' ')} is not supported by softcfg's decoding")
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):  # which `generate` keeps to itself
        if call.get(name) is not None:
            own = "unconditional_ids" if name.endswith("ids") else "unconditional_mask"
            raise UserError(f"softcfg's decoding takes no {name}: give {own} in its place")
    given_to_call = call.get("kwargs", {})
    if given_to_call.get("position_ids") is not None:  # `generate` makes its own otherwise
        raise UserError("softcfg's decoding takes token ids alone, not position_ids")
    if streamer is None:
        streamer = call.get("streamer")  # which `generate` hands to its own loops alone
    attention_mask = model_kwargs.pop("attention_mask", None)
    if attention_mask is None:  # `generate` leaves out one that hides nothing
        attention_mask = torch.ones_like(input_ids)
    cache = model_kwargs.pop("past_key_values", None)
    if cache is None:
        raise UserError("softcfg's decoding needs the cache: leave use_cache on")
    if cache is not given_to_call.get("past_key_values"):  # made by `generate` for the conditional rows alone
        if isinstance(cache, QuantizedCache) or getattr(cache, "offloading", False):
            kind = config.cache_implementation
            raise UserError(f"cache_implementation={kind} is not supported by softcfg's decoding")
        cache = "static" if isinstance(cache, StaticCache) else "dynamic"
    derived = ("position_ids", "logits_to_keep", "use_cache")
    given = [name for name, value in model_kwargs.items() if isinstance(value, Tensor) or value]
    unknown = [name for name in given if name not in derived]
    if unknown:
        raise UserError(f"softcfg's decoding takes token ids alone, not {', '.join(unknown)}")

    copies = config.num_return_sequences or 1
    if unconditional_ids is not None:
        unconditional_ids = as_ids(unconditional_ids, "unconditional_ids", LARGEST_ID)
        if unconditional_mask is not None:
            unconditional_mask = _as_mask("unconditional_ids", unconditional_mask)
        if unconditional_ids.dim() == 2 and len(unconditional_ids) > 1:
            unconditional_ids = unconditional_ids.repeat_interleave(copies, dim=0)
            if unconditional_mask is not None:
                unconditional_mask = unconditional_mask.repeat_interleave(copies, dim=0)
    sampling = _Processed(config.temperature or 1.0) if config.do_sample else _Processed(greedy=True)
    head = ImageHead.of(model) if head is None else head
    # The tokens of an image head are not text, so none of them ends it.
    criteria = [c for c in stopping_criteria if head is None or not isinstance(c, EosTokenCriteria)]
    if image_codes is not None:
        image_codes, length = _as_codes(image_codes), input_ids.shape[1]
        criteria = [
            _OutsideOfImages(c, image_codes, length) if isinstance(c, EosTokenCriteria) else c for c in criteria
        ]
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = next((token for token in (config.pad_token_id, end) if token is not None and token >= 0), 0)
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
        logits_processor=logits_processor,
        stopping_criteria=criteria,
        pad_token_id=pad,
        cache=cache,
        on_tokens=None if streamer is None else lambda tokens: streamer.put(tokens[:, -1].cpu()),
    )
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, tokens.to(input_ids.device)), dim=1)


def _image_mode(usual: Callable[..., Any]) -> Callable[..., Any]:
    """The `generate` of Janus, whose image mode has a loop of its own and knows no `custom_generate`.

    Calls with the one of this module go to the loop here: by default with Janus's guidance scale at every step, and
    with its unconditional prompts, where padding that is seen stands for the text. All other calls are left alone.
    """

    @functools.wraps(usual)
    def janus_generate(self: Any, inputs: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not generate or kwargs.get("generation_mode") != "image":
            return usual(self, inputs, attention_mask, *args, **kwargs)
        del kwargs["generation_mode"]
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        config = copy.deepcopy(kwargs.get("generation_config") or self.generation_config)
        scale = kwargs.pop("guidance_scale", None)
        if scale is not None and kwargs.get("guidance") is not None:
            raise UserError("give guidance or guidance_scale, not both")
        scales = (kwargs.get("guidance"), scale, config.guidance_scale, JANUS_SCALE)
        guidance = next(scale for scale in scales if scale is not None)
        kwargs["guidance"] = _guidance(guidance, functools.partial(SoftCFG, schedule="constant"))
        if kwargs.get("unconditional_ids") is None:
            if kwargs.get("unconditional_mask") is not None:
                raise UserError("unconditional_mask says what is padding in unconditional_ids, which are missing")
            kept = ["bos_token_id", "pad_token_id", "boi_token_id"]
            known = {**config.to_dict(), **(getattr(config, "generation_kwargs", None) or {}), **kwargs}
            bos, pad, boi = (known.get(name) for name in kept)
            if None in (bos, pad, boi):
                raise UserError(f"the generation config needs {', '.join(kept)}; or give unconditional_ids")
            framing = (ids == bos) | (ids == boi)
            kwargs.update(unconditional_ids=ids.where(framing, pad), unconditional_mask=attention_mask)
        config.guidance_scale = config.max_length = None
        config.max_new_tokens = self.model.vision_model.config.num_image_tokens
        kwargs.update(generation_config=config, attention_mask=attention_mask)
        return super(JanusForConditionalGeneration, self).generate(ids, *args, **kwargs)[:, ids.shape[1] :]

    return janus_generate


JanusForConditionalGeneration.generate = _image_mode(JanusForConditionalGeneration.generate)
