"""A causal language model of transformers as a generator of this library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

from softcfg.errors import UserError, quote, require_whole
from softcfg.guidance.rules import RULED_OUT
from softcfg.integrations.transformers.attention_function import ATTENTION, brought_weights
from softcfg.integrations.transformers.image_head import ImageHead
from softcfg.integrations.transformers.prompts import PromptCondition, Prompts, as_mask, behind_padding
from softcfg.integrations.transformers.wrapped import arguments, is_causal, longest_with_usual_rotation, unwrapped
from softcfg.models.base import Condition, Generator
from softcfg.models.geometry import Geometry
from softcfg.models.ids import as_ids
from softcfg.nn.memory import is_out_of_memory
from softcfg.nn.position import Position
from softcfg.nn.settings import holding

# Models without position_ids whose biases by distance do not count the padding: those of Bloom come from the mask, and
# those of MPT are the same after the softmax.
COUNT_FROM_THE_MASK = ("bloom", "mpt")

LEAST_ROUNDING = 0.01  # of logits that ought to be equal, as a share of their spread: products in TF32 round as much

# Models that read prompts in both directions, as they were trained to, and what comes after them in one.
READ_PROMPTS_BOTH_WAYS = ("paligemma",)


class TransformersGenerator(Generator):
    """A causal language model of transformers as a generator, for `softcfg.trace` and for `decode`.

    Args:
        model: of transformers; for SoftCFG with `model.set_attn_implementation("softcfg")`.
        num_tokens: T, tokens to draw after a prompt.
        head: for models whose image tokens need an embedding or a head of their own; those of Janus and Chameleon are
            found by themselves. Without one, token ids go in and `logits` come out. The least number of their dtype
            counts as minus infinity there: the model rules the token out.
        code_steps: bool [T], the steps that draw an image code; None: all. The slots of other tokens (line ends,
            end of image) are never weighted.
        logits_processor: called in turn, once a step, with the prompts and tokens so far [B, L + t] and the guided
            logits [B, V] before temperature, top-k and top-p; returns what takes their place. What they rule out is not
            known to the guidance's rule.
        cache: "dynamic" or "static", for models that say that they support static caches.
        pad_token_id: fills the shorter prompts on the left; no query sees it.

    Raises:
        UserError: an argument is none of these, or the model is not causal or has an image head that is not known here.
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
        if getattr(unwrapped(model).config, "is_encoder_decoder", False):
            raise UserError(
                f"{type(unwrapped(model)).__name__} has an encoder, which would read the prompts: use a causal "
                "language model"
            )
        head = ImageHead.of(model) if head is None else head
        if head is not None and not isinstance(head, ImageHead):
            raise UserError(f"head must be ImageHead(...), got {quote(head)}")
        self.model = model
        self.num_tokens = num_tokens
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size if head is None else head.vocab_size
        self.head = head
        self.code_steps = code_steps
        self.logits_processor = as_functions("logits_processor", logits_processor)
        self.cache = cache
        self.pad_token_id = require_whole(pad_token_id, "pad_token_id", 0)
        module = model if head is None else head.backbone
        self._arguments, self._takes_weights = arguments(module)
        kind = getattr(getattr(unwrapped(module), "config", None), "model_type", None)
        self._may_be_padded = "position_ids" in self._arguments or kind in COUNT_FROM_THE_MASK
        self._padding_matters: bool | None = None  # until it was tried
        self._is_causal = is_causal(module)
        if not self._is_causal and kind not in READ_PROMPTS_BOTH_WAYS:
            raise UserError(
                f"{type(unwrapped(module)).__name__} is not causal, so nothing can be drawn with it step by step: if "
                "it was trained to be, its configuration must say so (is_decoder=True in BERT's)"
            )

    def condition(self, inputs: Any, *, guided: bool) -> PromptCondition:
        """See `Generator.condition`; `inputs` are `Prompts`, of all rows.

        Raises:
            UserError: ids or masks do not fit, the unconditional prompts are missing, rows are padded and the model
                would draw something else from them, or it has dropout on.
        """
        self._require_no_dropout()
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
        made = PromptCondition(torch.cat(rows), torch.cat(padding), prompt_slots, self.num_tokens, self.geometry)
        if made.padded:
            self._require_equal_to_unpadded(made)
        return made

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
            UserError: no attention layer sees the weights, they are not of all slots, rows have slots of their own, or
                the model did not keep the slots of the pass in the cache.
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
        if not self._is_causal and tokens.shape[1] and filled - start > 1:
            raise UserError(
                f"{type(unwrapped(self.model)).__name__} reads all that it gets at once in both directions: it can be "
                "drawn from step by step, but not traced"
            )
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
        with holding(brought_weights, calls):
            try:
                logits = self._logits(condition.sequence[:, start:first], tokens, predicting, inputs)
            except (ValueError, RuntimeError) as error:
                if not start:
                    self._blame_cache(cache, error)
                raise
        if cache is not None:
            self._require_cached(cache, filled, is_first=not start)
        if weights:
            self._require_weighted(calls, cache)
        ruled_out = logits == torch.finfo(logits.dtype).min  # which would be drawn where nothing else is allowed
        return logits.masked_fill(ruled_out, RULED_OUT).to(tokens.device)

    def _blame_cache(self, cache: Any, error: Exception) -> None:
        """Raise a `UserError` for an error of the first pass that comes of the kind of cache."""
        is_static = isinstance(cache, StaticCache)
        if cache is None or isinstance(error, UserError) or is_out_of_memory(error):
            return
        if is_static or (isinstance(error, ValueError) and "cache" in str(error)):
            name, kind = type(unwrapped(self.model)).__name__, type(cache).__name__
            advice = ": leave it dynamic, or call model.eval() if the model is in training mode" if is_static else ""
            raise UserError(f"{name} failed with a {kind}{advice} ({str(error).partition(chr(10))[0]})") from error

    def _require_cached(self, cache: Any, filled: int, is_first: bool) -> None:
        """Raise a `UserError` unless the cache holds the slots so far: a model may go on without it and say nothing."""
        try:
            kept = cache.get_seq_length()
        except ValueError:  # there are no layers that keep keys
            return
        if isinstance(kept, Tensor) and not is_first:
            return  # a static cache counts on the device: wait for it once
        if int(kept) != filled:
            raise UserError(
                f"{type(unwrapped(self.model)).__name__} kept {int(kept)} of {filled} slots in its cache: call "
                "model.eval() if it is in training mode, where gradient checkpointing does without a cache"
            )

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

    @property
    def device(self) -> torch.device:
        """See `Generator.device`; of a model that accelerate moves in parts (offloading), where it computes."""
        for module in (self.model, self.model.get_input_embeddings()):
            found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if found is not None:
                return torch.device(found)
        for parameter in self.parameters():
            if not parameter.is_meta:
                return parameter.device
        raise UserError(f"the weights of {type(self.model).__name__} are on no device (meta): load them first")

    def new_cache(self, condition: Condition) -> Any:
        """An empty cache of transformers for the rows of `condition`.

        Raises:
            UserError: it is to be static, and the model does not say that it supports that.
        """
        if self.cache == "static":
            require_static_caches(self.model)
            return StaticCache(config=self.model.config, max_cache_len=condition.cache_slots)
        return DynamicCache(config=self.model.config)

    def processed(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        """Let `logits_processor` act on guided logits [B, n, V] of `steps` [n], after the tokens that were fed."""
        assert isinstance(condition, PromptCondition)
        if not self.logits_processor:
            return logits
        processed = []
        for step, scores in zip(steps.tolist(), logits.clone().unbind(1), strict=True):  # some write into what they get
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

    def _require_equal_to_unpadded(self, condition: PromptCondition) -> None:
        """Raise a `UserError` if padded rows would get other logits than without their padding."""
        name, longest = type(unwrapped(self.model)).__name__, condition.cache_slots - int(condition.padding.min())
        module = self.model if self.head is None else self.head.backbone
        if not self._may_be_padded:
            why = f"{name} does not say that it takes position_ids, and without them padding counts as text"
        elif (limit := longest_with_usual_rotation(module)) is not None and longest > limit:
            why = f"{name} rotates all rows by the longest of them where it passes {limit} tokens, as it does here"
        else:
            if self._padding_matters is None:
                self._padding_matters = self._does_padding_matter(condition)
            if not self._padding_matters:
                return
            why = f"{name} gives other logits after a prompt with padding than after the prompt alone"
        raise UserError(f"{why}: give prompts of one length, the unconditional ones too")

    @torch.no_grad()
    def _does_padding_matter(self, condition: PromptCondition) -> bool:
        """Whether the logits after the most padded prompt, run with and without its padding, differ beyond rounding."""
        row = int(condition.padding.argmax())
        ids = condition.sequence[row, : condition.slots].expand(min(2, condition.rows), -1)  # some skip it in one row

        def logits_without(cut: int) -> Tensor:
            padding = condition.padding[row].expand(len(ids)) - cut
            prompt = PromptCondition(ids[:, cut:], padding, condition.slots - cut, self.num_tokens)
            return self(prompt, ids[:, :0], cache=self.new_cache(prompt))

        padded, bare = logits_without(0), logits_without(int(condition.padding[row]))
        eps = max(torch.finfo(dtype).eps for dtype in (padded.dtype, self.dtype) if dtype.is_floating_point)
        finite = padded.isfinite() & bare.isfinite()
        padded, bare = padded[finite].float(), bare[finite].float()
        rounding = max(LEAST_ROUNDING, 2 * eps**0.5) * (bare - bare.mean()).norm() + eps * bare.norm()
        return bool((padded - bare).norm() > rounding)

    def _require_no_dropout(self) -> None:
        """Raise a `UserError` for modules in training mode that leave something out, or disturb it, at random."""
        for name, module in self.named_modules():
            for setting, value in vars(module).items() if module.training else ():
                called = f"{type(module).__name__}.{setting}".lower()
                if isinstance(value, float) and value > 0 and ("drop" in called or "jitter" in called):
                    raise UserError(
                        f"{name.removeprefix('model.')} of {type(self.model).__name__} has dropout on ({value}), with "
                        "which every call draws something else: call model.eval()"
                    )

    def _prompts(self, name: str, ids: Any, mask: Any) -> tuple[Tensor, Tensor]:
        """Checked ids [B, L] on the device of the model, and the number of leading slots [B] that are padding."""
        ids = as_ids(ids, name, self.model.get_input_embeddings().num_embeddings).to(self.device)
        visible = self._behind_padding(ids) if mask is None else as_mask(name, mask).to(self.device)
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
        return behind_padding(ids, pad, end)

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


def require_static_caches(model: Any) -> None:
    """Raise a `UserError` for a model that does not say that it supports static caches: it may draw from what is empty.

    What transformers calls compiling the whole graph is done with static caches alone.
    """
    found = unwrapped(model)
    if not getattr(found, "_can_compile_fullgraph", True):
        raise UserError(
            f"{type(found).__name__} does not say that it supports static caches (_can_compile_fullgraph): use a "
            "dynamic one"
        )


def as_functions(name: str, given: Iterable[Any] | None) -> list[Any]:
    """The functions of a list, such as those of transformers; raise a `UserError` for anything else."""
    functions = list(given) if isinstance(given, Iterable) else [None] * (given is not None)
    if not all(map(callable, functions)):
        raise UserError(f"{name} must be a list of functions, got {quote(given)}")
    return functions
