"""Token by token decoding, once for all generators and guidance methods."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.finite import FiniteLogits, branches_of
from softcfg.decoding.graphs import repeat
from softcfg.decoding.randomness import on_device
from softcfg.decoding.threads import step_threads
from softcfg.errors import UserError
from softcfg.guidance import CFG, Perturbation
from softcfg.models.base import Condition, Generator, as_ids
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype


@torch.inference_mode()
@own_dtype()
def decode(
    generator: Generator,
    labels: Any,
    guidance: CFG,
    *,
    uniforms: Tensor,
    sampling: Sampling | None = None,
    forced_tokens: Tensor | None = None,
    forced_mask: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    static: bool | None = None,
) -> Tensor:
    """Draw the image tokens of a batch.

    Args:
        labels: B class ids, or what else the generator is conditioned on.
        guidance: `CFG`, `SoftCFG` or one of another rule; inactive (scale 0 or 1) it skips the unconditional rows.
        uniforms: [B, T] in [0, 1), one number per token (see `image_uniforms`).
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
        forced_tokens: int64 [B, T]; these tokens take the place of drawn ones (teacher forcing).
        forced_mask: bool [B, T], where `forced_tokens` is used; everywhere if None.
        on_step: called with the number of tokens drawn so far after every step.
        on_tokens: called with the tokens drawn so far, int64 [B, n], after every step; what it raises ends the
            decoding.
        static: run every step with the same shapes, the position being a tensor; on a GPU, where this is the
            default for generators that can, one CUDA graph then serves all steps. On CPUs shorter attention pays more.

    Returns:
        int64 [B, T].

    Raises:
        UserError: labels, uniforms or forced tokens do not fit the generator; or the logits hold NaN or infinity, which
            other devices than the CPU report after the last step.
    """
    if isinstance(labels, Sized) and not len(labels):
        raise UserError("labels must name at least one class or prompt")
    condition = generator.condition(labels, guided=guidance.is_active)
    decoder = Decoder(generator, condition, guidance, sampling or Sampling())
    batch, total = decoder.batch, condition.num_tokens
    forced, mask = _forcing(generator, (batch, total), forced_tokens, forced_mask)
    if uniforms.shape != (batch, total):
        raise UserError(f"uniforms must have shape [{batch}, {total}], got {list(uniforms.shape)}")

    device = generator.device
    uniforms = on_device(uniforms, device)
    tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)

    def advance(step: Step) -> None:
        decoder.advance(step, tokens, uniforms, forced, mask)

    if static is None:
        static = steps_are_static(generator)
    with prepared_linear_layers(generator, condition.rows), step_threads(generator) as run:
        advance(decoder.step(0))
        if static:
            steps = repeat(lambda index: advance(Step(index)), range(1, total), device)
        else:
            steps = (run(partial(advance, decoder.step(index))) for index in range(1, total))
        for done, _ in enumerate(chain([None], steps), start=1):
            if device.type == "cpu":
                decoder.finite.check(done - 1)
            if on_step is not None:
                on_step(done)
            if on_tokens is not None:
                on_tokens(tokens[:, :done])
    if device.type != "cpu":
        decoder.finite.check()
    return tokens


def steps_are_static(generator: Generator) -> bool:
    """Whether `decode` runs steps of constant shapes by default: on a GPU, for generators that can."""
    return generator.device.type == "cuda" and generator.supports_row_positions and generator.layer_devices is None


@dataclass(frozen=True)
class Step:
    """The step that draws one token of every image.

    Attributes:
        index: int64 [1], the index of the token, on the device.
        number: the same as a number. None if the device alone knows it: no shape may depend on it then, and it is
            above 0.
    """

    index: Tensor
    number: int | None = None

    def inputs(self, tokens: Tensor) -> Tensor:
        """What is fed of `tokens` int64 [B, T]: the token before, [B, 1]; for the first step none, [B, 0]."""
        if self.number is None:
            return tokens[:, self.index - 1]
        return tokens[:, max(self.number - 1, 0) : self.number]

    def position(self, condition: Condition) -> Position:
        """Where the pass starts that feeds these inputs; the first step feeds the condition."""
        if self.number is None:
            return Position.by_row((condition.slots - 1 + self.index).expand(condition.rows))
        return Position.shared(condition.slots - 1 + self.number) if self.number else Position.start()


class Decoder:
    """A batch that is decoded token by token: its key/value cache, the guidance's state, and one step.

    Attributes:
        batch: B, images.
        cache: keys and values of all rows.
        third: the condition of the third branch, which has a cache of its own; None where there is none.
        confidence: float32 [B, T], zero for tokens that are not drawn yet or are not image codes.
        rule_state: what the guidance's rule keeps over the steps, [B, *]; None before the first step, and for rules
            that keep nothing.
        finite: whether the logits so far were numbers; `predict` notes it, and whoever steps must read it.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        guidance: CFG,
        sampling: Sampling,
        cache: KVCache | None = None,
    ) -> None:
        self.generator = generator
        self.condition = condition
        self.guidance = guidance
        self.sampling = sampling
        self._copies = 2 if guidance.is_active else 1
        self.batch = condition.rows // self._copies
        self.cache = generator.new_cache(condition) if cache is None else cache
        total, device = condition.num_tokens, generator.device
        self.confidence = torch.zeros(self.batch, total, dtype=torch.float32, device=device)
        self.rule_state: Tensor | None = None
        self.third = condition[: self.batch] if guidance.has_third_branch else None
        self._third_cache = None if self.third is None else generator.new_cache(self.third)
        rows = condition.rows if self.third is None else self.third.rows
        self._weights = torch.ones(rows, condition.slots + total, dtype=torch.float32, device=device)
        self._scales = guidance.scales(total, condition.num_codes).to(device)
        self._steps = torch.arange(total, device=device)
        self._codes = generator.is_code(self._steps, condition)
        self.finite = FiniteLogits(self.batch, branches_of(guidance), total, generator.dtype, device)

    def step(self, number: int) -> Step:
        """The step that draws token `number`."""
        return Step(self._steps[number : number + 1], number)

    def advance(
        self,
        step: Step,
        tokens: Tensor,
        uniforms: Tensor,
        forced: Tensor | None = None,
        forced_mask: Tensor | None = None,
    ) -> None:
        """Draw the token of a step and write it into `tokens`.

        Args:
            tokens: int64 [B, T].
            uniforms: [B, T] in [0, 1).
            forced, forced_mask: int64 and bool [B, T], tokens that take the place of drawn ones, and where.
        """
        at = step.index
        drawn = draw(self.predict(step, tokens), uniforms[:, at].squeeze(1))
        if forced is not None and forced_mask is not None:
            drawn = torch.where(forced_mask[:, at].squeeze(1), forced[:, at].squeeze(1), drawn)
        self.record(step, drawn)
        tokens[:, at] = drawn[:, None]

    def predict(self, step: Step, tokens: Tensor) -> Tensor:
        """Feed the token before that of the step, of `tokens` int64 [B, T]; return what to draw from, [B, V]."""
        at = step.index
        inputs = weak = step.inputs(tokens)
        weights = self._row_weights(at)
        if self.guidance.perturbs and step.number != 0:
            weak = weak_inputs(self.guidance.weak_branch, tokens, at - 1, self._codes)
        if self.third is None:
            rows = torch.cat((inputs, weak)) if self.guidance.is_active else inputs
            logits = self._forward(self.condition, rows, self.cache, step, weights)
        else:
            logits = self._forward(self.condition, inputs.repeat(self._copies, 1), self.cache, step, {})
            perturbed = self._forward(self.third, weak, self._third_cache, step, weights)
        guided = self._cond_logits = logits[: self.batch]
        if self.guidance.is_active:
            branches = guided[:, None], logits[self.batch :, None]
            guided, states = guided_logits(
                self.generator, self.condition, self.guidance, *branches, self._scales[at], at, self.rule_state
            )
            self._keep(None if states is None else states[:, -1])
        else:
            guided = self.generator.constrain(guided[:, None], at, self.condition)
        seen = [logits[:, None]]
        if self.third is not None:
            seen.append(perturbed[:, None])
            guided = self.guidance.push_away(guided, self._cond_logits[:, None], seen[1], at)
        probabilities = self.sampling.probabilities(guided[:, 0])
        # All probabilities of a row are NaN if one of its logits is.
        self.finite.note(at, tuple(seen), probabilities[:, :1])
        return probabilities

    def _forward(
        self, condition: Condition, rows: Tensor, cache: KVCache | None, step: Step, weights: dict[str, Tensor]
    ) -> Tensor:
        """Feed int64 [rows, 0 or 1] and return the logits of the step, float32 [rows, V]."""
        logits = self.generator(condition, rows, cache=cache, slot=step.position(condition), **weights)
        return logits[:, -1].float()

    def record(self, step: Step, tokens: Tensor) -> None:
        """Keep the confidence in `tokens` [B], which were taken for the prediction of `step`."""
        if self.guidance.perturbs:
            at = step.index
            confidence = self.guidance.weak_branch.token_confidence(
                self._cond_logits, tokens, self.sampling.temperature
            )
            if self._codes is not None:
                confidence = confidence * self._codes[..., at].squeeze(-1)
            self.confidence[:, at] = confidence[:, None]

    def _row_weights(self, at: Tensor) -> dict[str, Tensor]:
        """Keyword arguments for the generator: weights [rows, slots], one but for the tokens of the perturbed rows."""
        if not self.guidance.perturbs:
            return {}
        perturbation = self.guidance.weak_branch
        self._weights[-self.batch :, self.condition.slots :] = perturbation.weights_at(self.confidence, at)
        return attention_weights(perturbation, self._weights)

    def _keep(self, state: Tensor | None) -> None:
        """Keep the rule's state in the same memory: a CUDA graph writes where it read."""
        if state is not None and self.rule_state is not None:
            self.rule_state.copy_(state)
        elif state is not None:
            self.rule_state = state.clone()


def guided_logits(
    generator: Generator,
    condition: Condition,
    guidance: CFG,
    cond_logits: Tensor,
    uncond_logits: Tensor,
    scales: Tensor,
    steps: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Guide n neighbouring steps and rule out tokens that are not allowed there, before or after the rule as it needs.

    Args:
        cond_logits, uncond_logits: [B, n, V].
        scales, steps, state: as of `CFG.guide_steps`.

    Returns:
        Guided logits [B, n, V], -inf for tokens that are ruled out, and the states as of `CFG.guide_steps`.
    """
    branches = branches_for_rule(generator, condition, guidance, cond_logits, uncond_logits, steps)
    guided, states = guidance.guide_steps(*branches, scales, steps, state)
    return guided if guidance.rule.constrained else generator.constrain(guided, steps, condition), states


def branches_for_rule(
    generator: Generator, condition: Condition, guidance: CFG, cond_logits: Tensor, uncond_logits: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """The branches' logits [B, n, V] as the rule takes them, with disallowed tokens at -inf if it asks for that.

    In a vocabulary of text and image codes the norm of all logits would say little about the codes.
    """
    if not guidance.rule.constrained:
        return cond_logits, uncond_logits
    cond_logits = generator.constrain(cond_logits, steps, condition)
    return cond_logits, generator.constrain(uncond_logits, steps, condition)


def step_weights(confidence: Tensor, perturbation: Perturbation, steps: Tensor) -> Tensor:
    """Weights [B, n, T] that the given steps (0-based) put on every token, from those before it.

    Args:
        confidence: [B, T], of all tokens.
        steps: int64 [n] or [B, n].
    """
    token = torch.arange(confidence.shape[1], device=confidence.device)
    step = steps.to(confidence.device)[..., None]
    return perturbation.weights_at(confidence[:, None] * (token < step), step)


def weak_inputs(perturbation: Perturbation, tokens: Tensor, index: Tensor, codes: Tensor | None) -> Tensor:
    """What the unconditional rows are fed in the slots of the tokens `index`, int64 [B, n].

    Args:
        tokens: int64 [B, T].
        index: int64 [n] or [B, n].
        codes: bool [T] or [B, T], which tokens are image codes; None: all.
    """
    source = perturbation.source(index)
    if codes is not None and source is not index:
        swapped = _taken(codes, index) & _taken(codes, source)
        source = source.where(swapped, index)
    return _taken(tokens, source)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """The entries of `values` [T] or [B, T] at `index` [n] or [B, n]."""
    if index.dim() == 1:
        return values[..., index]
    return values[index] if values.dim() == 1 else values.gather(1, index)


def query_weights(
    perturbation: Perturbation, step_weights: Tensor, condition: Condition, *, from_start: bool
) -> dict[str, Tensor]:
    """Keyword arguments for a pass of the unconditional rows that predicts several tokens.

    Args:
        step_weights: [rows, n, T], of the steps that the pass predicts.
        from_start: the pass starts with the condition, whose slots, as queries and as keys, are not weighted.
    """
    leading = condition.slots - 1 if from_start else 0
    return attention_weights(perturbation, F.pad(step_weights, (condition.slots, 0, leading, 0), value=1.0))


def attention_weights(perturbation: Perturbation, weights: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that hand `weights` to what the target of the perturbation names."""
    target = perturbation.target
    names = {"both": ("value", "key"), "none": ()}.get(target, (target,))
    return {f"{name}_weights": weights for name in names}


def _forcing(
    generator: Generator, shape: tuple[int, int], tokens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if tokens is None:
        if mask is not None:
            raise UserError("forced_mask says where to use forced_tokens, which are missing")
        return None, None
    forced = as_ids(tokens, "forced_tokens", generator.vocab_size).to(generator.device)
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    for name, value in (("forced_tokens", forced), ("forced_mask", mask)):
        if value.shape != shape:
            raise UserError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if mask.dtype != torch.bool:
        raise UserError(f"forced_mask must be boolean, got {mask.dtype}")
    return forced, mask.to(generator.device)
