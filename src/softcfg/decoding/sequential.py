"""Token by token decoding, once for all generators and guidance methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.finite import FiniteLogits, branches_of
from softcfg.decoding.graphs import repeat
from softcfg.decoding.randomness import on_device
from softcfg.decoding.threads import step_threads
from softcfg.decoding.weak import WeakModel, weak_model
from softcfg.errors import UserError
from softcfg.guidance import CFG, ConfidenceWeights, Perturbation
from softcfg.guidance.confidence import CONFIDENCES, max_probability, sampled_probability
from softcfg.models.base import Condition, Generator, as_ids
from softcfg.nn import fused
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.launches import linked_launches
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype

ROUNDING = 1e-5  # by which the sum of probabilities may exceed 1


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
    weak: Generator | None = None,
) -> Tensor:
    """Draw the image tokens of a batch.

    Args:
        labels: B class ids, or what else the generator is conditioned on.
        guidance: `CFG`, `SoftCFG` or one of another rule; inactive (scale 0 or 1) it skips the unconditional rows.
        weak: the weak model of guidance with a `weak_share`; it is conditioned on the same labels.
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
        UserError: labels, uniforms, forced tokens or the weak model do not fit the generator; or the logits hold NaN or
            infinity, which other devices than the CPU report after the last step.
    """
    if isinstance(labels, Sized) and not len(labels):
        raise UserError("labels must name at least one class or prompt")
    condition = generator.condition(labels, guided=guidance.has_unconditional_branch)
    weaker = weak_model(guidance, generator, condition, weak, labels)
    decoder = Decoder(generator, condition, guidance, sampling or Sampling(), weak=weaker)
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
        static = all(steps_are_static(each) for each in decoder.generators)
    with decoder.prepared_linear_layers(), step_threads(*decoder.generators) as run:
        advance(decoder.step(0))
        if static:
            steps: Iterator[object] = repeat(lambda index: advance(Step(index)), range(1, total), device)
        else:
            steps = (run(partial(advance, decoder.step(index))) for index in range(1, total))
        for done, _ in enumerate(chain([None], steps), start=1):
            if device.type == "cpu":
                decoder.check(done - 1)
            if on_step is not None:
                on_step(done)
            if on_tokens is not None:
                on_tokens(tokens[:, :done])
    if device.type != "cpu":
        decoder.check()
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

    @cached_property
    def at(self) -> Tensor | slice:
        """Index of the step along a dimension of T entries; a slice, which costs less, if the number is known."""
        return self.index if self.number is None else slice(self.number, self.number + 1)

    def inputs(self, tokens: Tensor) -> Tensor:
        """What is fed of `tokens` int64 [B, T]: the token before, [B, 1]; for the first step none, [B, 0]."""
        if self.number is None:
            return tokens[:, self.index - 1]
        return tokens[:, max(self.number - 1, 0) : self.number]

    def position(self, condition: Condition) -> Position:
        """Where the pass starts that feeds these inputs; the first step feeds the condition."""
        if self.number is None:
            return Position.by_row(self.index.expand(condition.rows) + (condition.slots - 1))
        return Position.shared(condition.slots - 1 + self.number) if self.number else Position.start()


class GuidedBatch:
    """A batch that is decoded, in whatever order.

    Attributes:
        batch: B, images.
        confidence: float32 [B, T], zero for tokens that are not drawn yet or are not image codes.
        finite: whether the logits so far were numbers; whoever steps must call `check`, which reads it.
    """

    def __init__(self, generator: Generator, condition: Condition, guidance: CFG, sampling: Sampling) -> None:
        self.generator = generator
        self.condition = condition
        self.guidance = guidance
        self.sampling = sampling
        self.batch = condition.rows // 2 if guidance.has_unconditional_branch else condition.rows
        total, device = condition.num_tokens, generator.device
        self.confidence = torch.zeros(self.batch, total, dtype=torch.float32, device=device)
        self._away = guidance.perturbs and not guidance.has_third_branch  # what the rule guides away from is perturbed
        self._scales = step_scales(guidance, condition).to(device)
        self._steps = torch.arange(total, device=device)
        codes = generator.is_code(self._steps, condition)
        self._codes = None if codes is None else codes.bool()
        self._probability_of = _probability_of(guidance.weak_branch)
        self.finite = FiniteLogits(self.batch, branches_of(guidance), total, generator.dtype, device)

    def check(self, step: int | None = None) -> None:
        """Raise a `UserError` for logits that make no distribution and confidences that are none, of a step or of all.

        It waits for the device.
        """
        self.finite.check(step)
        if self.guidance.perturbs and self._probability_of is None:
            require_confidence(self.guidance.weak_branch, self.confidence if step is None else self.confidence[:, step])

    def sides(self, others: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What the rule guides away from, and the third branch, of all branches but the conditional one."""
        third = others.pop() if self.guidance.has_third_branch else None
        if not self.guidance.is_active:
            return None, third
        weak = others.pop() if self.guidance.has_weak_model else None
        return self.guidance.away_from(others.pop() if others else None, weak), third


class Decoder(GuidedBatch):
    """A batch that is decoded token by token: its key/value cache, the guidance's state, and one step.

    Attributes:
        cache: keys and values of all rows.
        rule_state: what the guidance's rule keeps over the steps, [B, *]; None before the first step, and for rules
            that keep nothing.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        guidance: CFG,
        sampling: Sampling,
        cache: KVCache | None = None,
        weak: WeakModel | None = None,
    ) -> None:
        super().__init__(generator, condition, guidance, sampling)
        self.cache = generator.new_cache(condition) if cache is None else cache
        self.rule_state: Tensor | None = None
        perturbs_rows = self._away and guidance.has_unconditional_branch
        self._passes = [_Pass(generator, condition, self.cache, self.batch if perturbs_rows else 0)]
        if weak is not None:
            self._passes.append(_Pass(*weak, weak.generator.new_cache(weak.condition), self.batch if self._away else 0))
        if guidance.has_third_branch:
            third = condition[: self.batch]
            self._passes.append(_Pass(generator, third, generator.new_cache(third), self.batch))
        branch = guidance.weak_branch
        self._sources = _sources(branch, self._steps, self._codes) if guidance.perturbs else None
        # What has a kernel of its own where kernels run.
        self._weight_settings = _weight_settings(branch)
        self._allowed = generator.allowed(self._steps, condition)
        self._draws_at_once = (
            len(self._passes) == 1
            and guidance.is_linear
            and sampling == Sampling(sampling.temperature)
            and type(generator).constrain is Generator.constrain
        )

    @property
    def generators(self) -> list[Generator]:
        """The generators that a step runs: that of the model, and that of the weak one."""
        return list(dict.fromkeys(each.generator for each in self._passes))

    def prepared_linear_layers(self) -> contextlib.AbstractContextManager[object]:
        """Context in which the linear layers are laid out for a step."""
        with contextlib.ExitStack() as prepared:
            for generator in self.generators:
                rows = next(each.condition.rows for each in self._passes if each.generator is generator)
                prepared.enter_context(prepared_linear_layers(generator, rows))
            return prepared.pop_all()

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
        at = step.at
        with linked_launches():
            drawn = self.draw(step, tokens, uniforms[:, at].squeeze(1))
        if forced is not None and forced_mask is not None:
            drawn = torch.where(forced_mask[:, at].squeeze(1), forced[:, at].squeeze(1), drawn)
        self.record(step, drawn)
        tokens[:, at] = drawn[:, None]

    def draw(self, step: Step, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """Feed the token before that of the step, of `tokens` int64 [B, T], and draw the next one, int64 [B].

        Args:
            uniforms: [B] in [0, 1).
        """
        seen = self._feed(step, tokens)
        cond, *others = (branch for logits in seen for branch in logits.chunk(logits.size(0) // self.batch))
        self._cond_logits = cond[:, 0]
        if self._draws_at_once:
            other = others[0][:, 0] if others else None
            scale, temperature = self._scales[step.at], self.sampling.temperature
            allowed = None if self._allowed is None else self._allowed[step.at]
            found = fused.draw(self._cond_logits, other, scale, temperature, uniforms, allowed)
            if found is not None:
                drawn, largest = found
                self.finite.keep(step.at, largest.reshape(-1, 1))
                return drawn
        probabilities = self.sampling.probabilities(self._guided(step, cond, others))
        # All probabilities of a row are NaN if one of its logits is.
        self.finite.note(step.at, tuple(seen), probabilities[:, :1])
        return draw(probabilities, uniforms)

    def _feed(self, step: Step, tokens: Tensor) -> list[Tensor]:
        """The logits [rows, 1, V] of all passes."""
        inputs = perturbed = step.inputs(tokens)
        write_weights = None
        if self.guidance.perturbs:
            write_weights = partial(self._write_weights, step)
            if self._sources is not None and step.number != 0:
                perturbed = _taken(tokens, self._sources[..., step.index - 1])
        branch = self.guidance.weak_branch
        return [each.run(step, inputs, perturbed, branch, write_weights) for each in self._passes]

    def _guided(self, step: Step, cond: Tensor, others: list[Tensor]) -> Tensor:
        """The guided logits [B, V] from those of the branches, [B, 1, V]."""
        index, guidance = step.index, self.guidance
        other, third = self.sides(others)
        if other is not None:
            guided, states = guided_logits(
                self.generator, self.condition, guidance, cond, other, self._scales[step.at], index, self.rule_state
            )
            self._keep(None if states is None else states[:, -1])
        else:
            guided = self.generator.constrain(cond, index, self.condition)
        if third is not None:
            guided = guidance.push_away(guided, cond, third, index)
        return guided[:, 0]

    def record(self, step: Step, tokens: Tensor) -> None:
        """Keep the confidence in `tokens` [B], which were taken for the prediction of `step`."""
        if not self.guidance.perturbs:
            return
        logits, temperature, confidence = self._cond_logits, self.sampling.temperature, self.confidence
        of = tokens if self._probability_of == "drawn" else None
        if self._probability_of is None or not fused.write_confidence(
            logits, confidence, step.index, temperature, self._codes, of
        ):
            found = confidence_in(self.guidance.weak_branch, logits, tokens, temperature)
            found = found if self._codes is None else found * self._codes[..., step.at].squeeze(-1)
            confidence[:, step.at] = found[:, None]

    def _write_weights(self, step: Step, weights: Tensor) -> None:
        """Write `Perturbation.weights_at` into `weights` [B, T]."""
        settings = self._weight_settings
        if settings is None or not fused.write_weights(self.confidence, weights, **settings):
            weights.copy_(self.guidance.weak_branch.weights_at(self.confidence, step.index))

    def _keep(self, state: Tensor | None) -> None:
        """Keep the rule's state in the same memory: a CUDA graph writes where it read."""
        if state is not None and self.rule_state is not None:
            self.rule_state.copy_(state)
        elif state is not None:
            self.rule_state = state.clone()


class _Pass:
    """One pass of a step through a generator, over rows with a cache of their own.

    Args:
        perturbed: how many of the rows, the last ones, are perturbed.
    """

    def __init__(self, generator: Generator, condition: Condition, cache: KVCache, perturbed: int = 0) -> None:
        self.generator = generator
        self.condition = condition
        self.cache = cache
        self.perturbed = perturbed
        slots = condition.slots + condition.num_tokens
        kind: dict[str, Any] = {"dtype": torch.float32, "device": generator.device}
        self._weights = torch.ones(condition.rows, slots, **kind) if perturbed else None

    def run(
        self,
        step: Step,
        inputs: Tensor,
        perturbed: Tensor,
        perturbation: Perturbation,
        write_weights: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """The logits of the step, float32 [rows, 1, V].

        Args:
            inputs, perturbed: int64 [B, 0 or 1], what rows are fed, and those that are perturbed.
            write_weights: writes those of the perturbation into [B, T].
        """
        named = {}
        if self._weights is not None and write_weights is not None:
            write_weights(self._weights[-self.perturbed :, self.condition.slots :])
            named = attention_weights(perturbation, self._weights)
        batch = len(inputs)
        plain = (self.condition.rows - self.perturbed) // batch
        rows = [inputs] * plain + [perturbed] * (self.perturbed // batch)
        logits = self.generator(
            self.condition,
            rows[0] if len(rows) == 1 else torch.cat(rows),
            cache=self.cache,
            slot=step.position(self.condition),
            **named,
        )
        return logits[:, -1:].float()


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


def _is_softcfg(perturbation: Perturbation, *methods: str) -> TypeGuard[ConfidenceWeights]:
    """Whether these methods of a perturbation are those of SoftCFG: `SoftCFG` itself, and others that keep them."""
    kind = type(perturbation)
    return issubclass(kind, ConfidenceWeights) and all(
        getattr(kind, name) is getattr(ConfidenceWeights, name) for name in methods
    )


def _weight_settings(perturbation: Perturbation) -> dict[str, Any] | None:
    """The settings with which `fused.write_weights` writes the weights of a perturbation; None if it has others."""
    if not _is_softcfg(perturbation, "weights", "weights_at"):
        return None
    settings = {name: getattr(perturbation, name) for name in ("step_norm", "strength", "floor", "eps")}
    return {**settings, "successor": perturbation.alignment == "successor"}


def _probability_of(perturbation: Perturbation) -> str | None:
    """Whose probability its confidence is: that of the "largest" or of the "drawn" token; None for another."""
    if not _is_softcfg(perturbation, "token_confidence"):
        return None
    return {max_probability: "largest", sampled_probability: "drawn"}.get(CONFIDENCES[perturbation.confidence])


def step_scales(guidance: CFG, condition: Condition) -> Tensor:
    """The guidance scale of every step, float32 [T].

    Raises:
        UserError: a schedule or guidance of somebody's own gives something else.
    """
    steps = condition.num_tokens
    scales = torch.as_tensor(guidance.scales(steps, condition.num_codes)).to("cpu", torch.float32)
    if scales.shape != (steps,):
        raise UserError(
            f"the schedule {guidance.schedule!r} of {type(guidance).__name__} must give {[steps]}, a guidance scale "
            f"for each step, got {list(scales.shape)}"
        )
    return scales


def confidence_in(perturbation: Perturbation, cond_logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`Perturbation.token_confidence` in `tokens` [...] for conditional logits [..., V].

    Raises:
        UserError: a confidence of somebody's own gives another shape.
    """
    found = torch.as_tensor(perturbation.token_confidence(cond_logits, tokens, temperature))
    if found.shape != tokens.shape:
        raise UserError(
            f"the confidence of {type(perturbation).__name__} must be {list(tokens.shape)}, one for each token, got "
            f"{list(found.shape)}"
        )
    return found


def require_confidence(perturbation: Perturbation, confidence: Tensor) -> None:
    """Raise a `UserError` for confidences outside of [0, 1], which a function of somebody's own may give."""
    outside = ~((confidence >= 0) & (confidence <= 1 + ROUNDING))
    if outside.any():
        raise UserError(
            f"the confidence of {type(perturbation).__name__} ({perturbation.confidence!r}) must lie in [0, 1], got "
            f"{float(confidence[outside][0])}"
        )


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
    source = _sources(perturbation, index, codes)
    return _taken(tokens, index if source is None else source)


def _sources(perturbation: Perturbation, index: Tensor, codes: Tensor | None) -> Tensor | None:
    """Which tokens are fed in the slots of the tokens `index`; None for those themselves."""
    source = perturbation.source(index)
    if source is index:
        return None
    return source if codes is None else source.where(_taken(codes, index) & _taken(codes, source), index)


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
