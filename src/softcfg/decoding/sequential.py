"""Token by token decoding, once for all generators and guidance methods."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from softcfg.decoding.at_once import DrawnAtOnce
from softcfg.decoding.batch import GuidedBatch, Part, finished_logits, ruled_logits
from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.forced import check_forced
from softcfg.decoding.graphs import repeat
from softcfg.decoding.perturbed import (
    above_zero,
    attention_weights,
    confidence_in,
    sources,
    taken,
    weak_inputs,
    weight_settings,
)
from softcfg.decoding.randomness import on_device
from softcfg.decoding.threads import step_threads
from softcfg.decoding.weak import WeakModel, weak_model
from softcfg.errors import UserError, require_kind
from softcfg.guidance import CFG, Perturbation
from softcfg.models.base import Condition, Generator, overrides
from softcfg.nn import fused
from softcfg.nn.context import AttentionContext
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.launches import linked_launches
from softcfg.nn.linear import PREPARED, prepared_linear_layers
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype
from softcfg.nn.replay import StepInputs, keeps_tables, surroundings
from softcfg.nn.settings import holding


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
        on_step: called with the number of tokens drawn so far for every step; where steps are so small that some are
            run at once (`decoding.threads`), after these.
        on_tokens: called with the tokens drawn so far, int64 [B, n], after every step; what it raises ends the
            decoding.
        static: run every step with the same shapes, the position being a tensor; on a GPU, where this is the
            default for generators that can, one CUDA graph then serves all steps. On CPUs shorter attention pays more.

    Returns:
        int64 [B, T].

    Raises:
        UserError: labels, uniforms, forced tokens or the weak model do not fit the generator; the guidance acts in no
            step; or the logits hold NaN or infinity, which other devices than the CPU report after the last step.
    """
    require_kind(guidance, "guidance", CFG)
    require_kind(uniforms, "uniforms", Tensor)
    if isinstance(labels, Sized) and not len(labels):
        raise UserError("labels must name at least one class or prompt")
    condition = generator.condition(labels, guided=guidance.has_unconditional_branch)
    weaker = weak_model(guidance, generator, condition, weak, labels)
    decoder = Decoder(generator, condition, guidance, sampling or Sampling(), weak=weaker)
    batch, total = decoder.batch, condition.num_tokens
    forced, mask = check_forced(generator, condition, batch, forced_tokens, forced_mask)
    if uniforms.shape != (batch, total):
        raise UserError(f"uniforms must have shape [{batch}, {total}], got {list(uniforms.shape)}")

    device = generator.device
    uniforms = on_device(uniforms, device)
    tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)

    def advance(step: Step) -> None:
        decoder.advance(step, tokens, uniforms, forced, mask)

    def advance_from(number: int, most: int) -> int:
        return decoder.advance_from(number, most if on_tokens is None else 1, tokens, uniforms, forced, mask)

    if static is None:
        static = all(steps_are_static(each) for each in decoder.generators)
    with decoder.prepared_linear_layers(), step_threads(*decoder.generators) as run:

        def numbers_drawn() -> Iterator[int]:
            """How many tokens there are, whenever there are more."""
            advance(decoder.step(0))
            yield 1
            if static:
                for index, _ in enumerate(repeat(lambda at: advance(Step(at)), range(1, total), device)):
                    yield 2 + index
                return
            done = 1
            while done < total:
                done += run(partial(advance_from, done))
                yield done

        before = 0
        for done in numbers_drawn():
            if device.type == "cpu":
                decoder.check(before, done)
            if on_step is not None:
                for number in range(before, done):
                    on_step(number + 1)
            if on_tokens is not None:
                on_tokens(tokens[:, :done])
            before = done
    if device.type != "cpu":
        decoder.check()
    decoder.leave_caches()
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


class Decoder(GuidedBatch):
    """A batch that is decoded token by token: its key/value cache, the guidance's state, and one step.

    Args:
        cache: keys and values of all rows; None for a new one.
        code_ids: int64 [n], the ids of the tokens that are image codes, wherever they are drawn; None: the steps that
            draw one are known beforehand, from the generator.

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
        code_ids: Tensor | None = None,
    ) -> None:
        super().__init__(generator, condition, guidance, sampling)
        self._code_ids = code_ids
        if code_ids is not None:  # of the tokens that are drawn, filled in by `record`
            self._codes = torch.zeros(self.batch, condition.num_tokens, dtype=torch.bool, device=generator.device)
        self.rule_state: Tensor | None = None
        perturbs_rows = self._away and guidance.has_unconditional_branch
        self.parts: list[_Pass] = [_Pass(generator, condition, self.batch if perturbs_rows else 0, cache)]
        self.cache = self.parts[0].cache
        if weak is not None:
            self.parts.append(_Pass(*weak, self.batch if self._away else 0))
        if guidance.has_third_branch:
            self.parts.append(_Pass(generator, condition[: self.batch], self.batch))
        branch = guidance.weak_branch
        self._sources = None  # of all steps, where they do not depend on what is drawn
        if guidance.perturbs and code_ids is None:
            self._sources = sources(branch, self._steps, self._codes)
        # What has a kernel of its own where kernels run.
        self._at_once: DrawnAtOnce | None = None
        self._weight_settings = weight_settings(branch)
        self._allowed = generator.allowed(self._steps, condition)
        self._draws_at_once = (
            len(self.parts) == 1
            and guidance.is_linear
            and sampling == Sampling(sampling.temperature)
            and not overrides(generator, "constrain", "processed")
        )
        # Beside these a step is the model's own kernels, and all of it is launched at once.
        kept = not guidance.perturbs or (
            self._weight_settings is not None
            and bool(self._weight_settings["strength"])
            and self._probability_of is not None
            and code_ids is None
            and branch.target != "attention"  # of these the logarithm is taken
        )
        self._steps_at_once = (
            self._draws_at_once
            and kept
            and generator.device.type == "cpu"
            and generator.steps_replay is True
            and not overrides(generator, "forward")
        )

    @property
    def generators(self) -> list[Generator]:
        """The generators that a step runs: that of the model, and that of the weak one."""
        return list(dict.fromkeys(each.generator for each in self.parts))

    @contextlib.contextmanager
    def prepared_linear_layers(self) -> Iterator[None]:
        """Context in which the linear layers are laid out for a step."""
        with contextlib.ExitStack() as prepared:
            for generator in self.generators:
                rows = next(each.condition.rows for each in self.parts if each.generator is generator)
                prepared.enter_context(prepared_linear_layers(generator, rows))
            try:
                yield
            finally:
                if self._at_once is not None:  # its program would keep what is laid out beside the weights
                    self._at_once.ahead = None
                self._at_once = None

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
        at, around = step.at, self._around(step.number, tokens, uniforms) if forced is None else None
        with linked_launches(), holding(surroundings, around):
            seen = self._feed(step, tokens)
        if around is not None and around.served:
            return
        if around is not None and not around.met:  # compiled code, say, that looks for nothing: no weights are written
            self._steps_at_once = False
            seen = self._feed(step, tokens)
        drawn = self._drawn(step, seen, uniforms[:, at].squeeze(1))
        if forced is not None and forced_mask is not None:
            drawn = torch.where(forced_mask[:, at].squeeze(1), forced[:, at].squeeze(1), drawn)
        self.record(step, drawn)
        tokens[:, at] = drawn[:, None]

    def advance_from(
        self,
        number: int,
        most: int,
        tokens: Tensor,
        uniforms: Tensor,
        forced: Tensor | None = None,
        forced_mask: Tensor | None = None,
    ) -> int:
        """Draw the token of step `number`, and at most so many in all where steps are nothing but a launch.

        Args:
            tokens, uniforms, forced, forced_mask: as of `advance`.

        Returns:
            How many were drawn.
        """
        around = self._around(number, tokens, uniforms) if forced is None else None
        ahead = 0 if around is None or around.ahead is None else around.ahead(most)
        if not ahead:
            self.advance(self.step(number), tokens, uniforms, forced, forced_mask)
        return ahead or 1

    def draw(self, step: Step, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """Feed the token before that of the step, of `tokens` int64 [B, T], and draw the next one, int64 [B].

        Args:
            uniforms: [B] in [0, 1).
        """
        return self._drawn(step, self._feed(step, tokens), uniforms)

    def _drawn(self, step: Step, seen: list[Tensor], uniforms: Tensor) -> Tensor:
        """Draw from the logits [rows, 1, V] of all passes, int64 [B]."""
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

    def _around(self, number: int | None, tokens: Tensor, uniforms: Tensor) -> DrawnAtOnce | None:
        """What is launched with the kernels of a step, if these are all that it is; None where there is more."""
        if not number or not self._steps_at_once or PREPARED not in vars(self.generator):
            return None
        if not available.may_use_cpu_kernels():  # as with the compiler of graphs, whose code might not look for it
            return None
        known = self._at_once
        if known is None or known.tokens is not tokens or known.uniforms is not uniforms:
            known = self._at_once = self._drawn_at_once(tokens, uniforms)
        if known is not None:
            known.number, known.met, known.served = number, False, False
        return known

    def _drawn_at_once(self, tokens: Tensor, uniforms: Tensor) -> DrawnAtOnce | None:
        """See `_around`; None where the kernels do not fit."""
        weights, codes = self.parts[0].weights, self._codes
        given = (tokens, torch.int64), (uniforms, torch.float64), (self._scales, torch.float32)
        if not all(each.is_contiguous() and each.dtype is dtype for each, dtype in given):
            return None
        if codes is not None and (codes.dim() != 1 or not codes.is_contiguous()):
            return None
        decoder = weakref.ref(self)  # which keeps this: in a circle, its cache would stay until Python looks for those

        def write(number: int) -> None:
            if weights is not None and (found := decoder()) is not None:
                found._write_weights(found.step(number), weights)

        embedding, inputs = self._step_inputs()
        return DrawnAtOnce(
            tokens=tokens,
            uniforms=uniforms,
            scales=self._scales,
            temperature=self.sampling.temperature,
            allowed=None if self._allowed is None else list(map(tuple, self._allowed.tolist())),
            guided=self.guidance.has_unconditional_branch,
            seen=self.finite.seen,
            confidence=self.confidence if self.guidance.perturbs else None,
            codes=codes,
            of_drawn=self._probability_of == "drawn",
            weights=weights,
            settings=self._weight_settings,
            write=write,
            embedding=embedding,
            inputs=inputs,
        )

    def _step_inputs(self) -> tuple[Tensor | None, StepInputs | None]:
        """The table of which the inputs of all steps are rows, and what else they are fed; Nones for more than that."""
        generator, condition, (only,) = self.generator, self.condition, self.parts
        table, total = generator.fed_rows_of, condition.num_tokens
        if table is None or self._sources is not None or total < 2:
            return None, None
        if table.dtype is not torch.float32 or table.device.type != "cpu":
            return None, None
        named: dict[str, Any] = {}
        if only.weights_of_slots is not None:
            named = attention_weights(self.guidance.weak_branch, only.weights_of_slots)
        last = self.step(total - 1).position(condition)
        context = AttentionContext.create(last, 1, only.cache, padding=condition.padding, rows=condition.rows, **named)
        if not keeps_tables(context):
            return None, None
        rotary = generator.rotary(condition, Position.shared(condition.slots), total - 1)
        return table, StepInputs(condition.slots, rotary, context)

    def _feed(self, step: Step, tokens: Tensor) -> list[Tensor]:
        """The logits [rows, 1, V] of all passes."""
        inputs, perturbed = self._inputs(step, tokens)
        write_weights = None
        if self.guidance.perturbs:
            around = surroundings.get()  # in which the weights are written just before the blocks
            write_weights = partial(self._write_weights, step) if around is None else _leave
        branch = self.guidance.weak_branch
        return [each.run(step, inputs, perturbed, branch, write_weights) for each in self.parts]

    def _inputs(self, step: Step, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What rows are fed of `tokens` int64 [B, T], and what perturbed ones are fed, [B, 0 or 1]."""
        inputs = step.inputs(tokens)
        if not self.guidance.perturbs or step.number == 0:
            return inputs, inputs
        if self._code_ids is not None:
            return inputs, weak_inputs(self.guidance.weak_branch, tokens, step.index - 1, self._codes)
        if self._sources is None:
            return inputs, inputs
        return inputs, taken(tokens, self._sources[..., step.index - 1])

    def _guided(self, step: Step, cond: Tensor, others: list[Tensor]) -> Tensor:
        """The guided logits [B, V] from those of the branches, [B, 1, V]."""
        guided, states = ruled_logits(
            self.generator,
            self.condition,
            self.guidance,
            cond,
            *self.sides(others),
            self._scales[step.at],
            step.index,
            self.rule_state,
        )
        self._keep(None if states is None else states[:, -1])
        return finished_logits(self.generator, self.condition, guided, step.index)[:, 0]

    def record(self, step: Step, tokens: Tensor) -> None:
        """Keep the confidence in `tokens` [B], which were taken for the prediction of `step`."""
        if not self.guidance.perturbs:
            return
        if self._code_ids is not None and self._codes is not None:
            self._codes[:, step.at] = torch.isin(tokens, self._code_ids)[:, None]
        logits, temperature, confidence = self._cond_logits, self.sampling.temperature, self.confidence
        of = tokens if self._probability_of == "drawn" else None
        if self._probability_of is None or not fused.write_confidence(
            logits, confidence, step.index, temperature, self._codes, of
        ):
            found = confidence_in(self.guidance.weak_branch, logits, tokens, temperature)
        elif self._weight_settings is None:
            found = above_zero(confidence[:, step.at].squeeze(1))
        else:
            return
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


def _leave(weights: Tensor) -> None:
    """Leave the weights as they are."""


class _Pass(Part):
    """One pass of a step through a generator, over a part of the batch.

    Args:
        perturbed: how many of the rows, the last ones, are perturbed.

    Attributes:
        weights_of_slots: float32 [rows, slots], ones but for perturbed rows; None if there are no such rows.
    """

    def __init__(
        self, generator: Generator, condition: Condition, perturbed: int = 0, cache: KVCache | None = None
    ) -> None:
        super().__init__(generator, condition, cache)
        self.perturbed = perturbed
        slots = condition.slots + condition.num_tokens
        kind: dict[str, Any] = {"dtype": torch.float32, "device": generator.device}
        self.weights_of_slots = torch.ones(condition.rows, slots, **kind) if perturbed else None

    @property
    def weights(self) -> Tensor | None:
        """Those of the perturbed rows on the tokens, float32 [B, T], as a view; None if there are no such rows."""
        if self.weights_of_slots is None:
            return None
        return self.weights_of_slots[-self.perturbed :, self.condition.slots :]

    def rows(self, inputs: Tensor, perturbed: Tensor) -> Tensor:
        """What all rows are fed, int64 [rows, 0 or 1]."""
        batch = len(inputs)
        plain = (self.condition.rows - self.perturbed) // batch
        rows = [inputs] * plain + [perturbed] * (self.perturbed // batch)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

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
        if self.weights_of_slots is not None and self.weights is not None and write_weights is not None:
            write_weights(self.weights)
            named = attention_weights(perturbation, self.weights_of_slots)
        logits = self.generator(
            self.condition,
            self.rows(inputs, perturbed),
            cache=self.cache,
            slot=step.position(self.condition),
            **named,
        )
        return logits[:, -1:].float()
