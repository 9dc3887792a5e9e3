"""Speculative Jacobi decoding: several tokens per pass, with the same distribution as token by token decoding.

A window of n positions after the settled tokens holds drafts. A pass feeds them and gives the distribution p_i of
every position given the drafts before it. Each draft d_i is then kept with probability min(1, p_i(d_i) / q_i(d_i)),
where q_i is what it was drawn from, or else replaced by a draw from max(p_i - q_i, 0): either way, what stands at i now
is a draw from p_i. After settled tokens p_i is the true distribution, so everything up to the first replaced draft is
settled, and its replacement too. What follows are the drafts of the next pass, with q_i = p_i; most of them
are the old ones, so the distributions after them change little and the next pass keeps more.

What happens at a position depends on the positions before it and on random numbers of its own alone. A draft is thus
a draw from its q_i whatever stands before it, and sequences have exactly the distribution of sequential decoding.

Sources: Speculative Jacobi Decoding (arXiv 2410.01699), with the redrawing rule of speculative sampling (2302.01318);
drafts after a replaced one are kept where possible, as in Maximal Coupling Speculative Jacobi Decoding (2510.24211).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softcfg.decoding.batch import GuidedBatch, Part, finished_logits, ruled_logits
from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.perturbed import confidence_in, query_weights, step_weights, weak_inputs
from softcfg.decoding.randomness import ImageStreams, as_fractions, on_device
from softcfg.decoding.threads import step_threads
from softcfg.decoding.weak import WeakModel, weak_model
from softcfg.errors import UserError
from softcfg.guidance import CFG
from softcfg.models.base import Condition, Generator
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.position import Position
from softcfg.nn.precision import own_dtype


@torch.inference_mode()
@own_dtype()
def jacobi_decode(
    generator: Generator,
    labels: Any,
    guidance: CFG,
    *,
    streams: ImageStreams,
    window: int,
    sampling: Sampling | None = None,
    on_step: Callable[[int], None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    weak: Generator | None = None,
) -> tuple[Tensor, int]:
    """Draw the image tokens of a batch, up to `window` per pass.

    An image depends on its stream, the window and the settings, not on the others of the batch (up to floating-point
    noise). It is another image than `decode` draws from the same stream, of the same distribution.

    Args:
        labels: B class ids, or what else the generator is conditioned on.
        guidance: `CFG`, `SoftCFG` or one of another rule.
        streams: of the B images.
        window: n >= 1, positions in a pass; 1 is token by token.
        sampling: temperature, top-k and top-p; by default temperature 1 alone.
        on_step: called after every pass with the number of tokens that all images have so far.
        on_tokens: called with these tokens, int64 [B, n], after every pass; what it raises ends the decoding.
        weak: the weak model of guidance with a `weak_share`; it is conditioned on the same labels.

    Returns:
        int64 [B, T], and the number of passes until the last image was done.

    Raises:
        UserError: labels, streams or the weak model do not fit the generator, the window is less than 1, or the logits
            hold NaN or infinity.
    """
    if window < 1:
        raise UserError(f"the window of speculative Jacobi decoding must be at least 1, got {window}")
    condition = generator.condition(labels, guided=guidance.has_unconditional_branch)
    weaker = weak_model(guidance, generator, condition, weak, labels)
    decoder = JacobiDecoder(generator, condition, guidance, sampling or Sampling(), window, weaker)
    if len(streams) != decoder.batch:
        raise UserError(f"streams must be as many as images, {decoder.batch}, got {len(streams)}")
    total, done, passes = condition.num_tokens, 0, 0
    rows = decoder.rows_at_once * decoder.window
    with contextlib.ExitStack() as held:
        held.enter_context(prepared_linear_layers(generator, rows))
        if weaker is not None and weaker.generator is not generator:
            held.enter_context(prepared_linear_layers(weaker.generator, weaker.condition.rows * decoder.window))
        run = held.enter_context(step_threads(generator, *(weaker or ())[:1]))

        def advance(uniforms: Tensor, most: int) -> int:
            decoder.advance(uniforms)
            return 1

        while done < total:
            uniforms = on_device(streams.uniforms(3 * decoder.window), generator.device)
            run(partial(advance, uniforms))
            done, passes = decoder.done(), passes + 1
            if on_step is not None:
                on_step(done)
            if on_tokens is not None:
                on_tokens(decoder.tokens[:, :done])
    decoder.check()
    decoder.leave_caches()
    return decoder.tokens, passes


class JacobiDecoder(GuidedBatch):
    """A batch that is decoded by speculative Jacobi decoding; each row settles as many tokens per pass as it can.

    Attributes:
        window: n, positions in a pass.
        rows_at_once: rows of a pass through the generator; with a perturbation each branch has a pass of its own.
        tokens: int64 [B, T], the settled tokens, then the drafts.
        settled: int64 [B], how many tokens of each row are settled.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        guidance: CFG,
        sampling: Sampling,
        window: int,
        weak: WeakModel | None = None,
    ) -> None:
        super().__init__(generator, condition, guidance, sampling)
        total, device = condition.num_tokens, generator.device
        # From the second pass on, the window starts after token 0 and ends with the last token at the latest.
        self.window = max(1, min(window, total - 1))
        self.tokens = torch.zeros(self.batch, total, dtype=torch.int64, device=device)
        self.settled = torch.zeros(self.batch, dtype=torch.int64, device=device)

        self.parts: list[_Part] = [_Part(generator, condition[: self.batch] if self._away else condition)]
        if self._away and guidance.has_unconditional_branch:
            self.parts.append(_Part(generator, condition[self.batch :], perturbed=True))
        if weak is not None:
            self.parts.append(_Part(*weak, perturbed=self._away))
        if guidance.has_third_branch:
            self.parts.append(_Part(generator, condition[: self.batch], perturbed=True))
        self.rows_at_once = self.parts[0].condition.rows
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._codes = None if self._codes is None else self._codes.expand(self.batch, -1)

        self._passes = 0
        self._done, self._sound = 0, True
        self._end = self.window  # of the farthest window
        self._offsets = torch.arange(self.window, device=device)
        # As if a window before the sequence had been decoded, with equal logits at its end.
        self._start = self.settled - self.window
        self._probabilities = torch.zeros(self.batch, self.window, generator.vocab_size, **kind)
        self._last_logits = torch.zeros(self.batch, 1, generator.vocab_size, **kind)
        # What the guidance's rule keeps over the steps, before the window and after each of its positions.
        self._rule_states: Tensor | None = None

    def advance(self, uniforms: Tensor) -> None:
        """Settle at least one more token of every row that is not done.

        Args:
            uniforms: [B, 3 n] in [0, 1), see `randomness.on_device`.
        """
        keeping, redrawing, drafting = uniforms.unflatten(1, (3, self.window)).unbind(1)
        # A row that is nearly done goes over its last n tokens; what is settled among them stays.
        start = self.settled.clamp(max=self.condition.num_tokens - self.window)
        state = None
        if self._rule_states is not None:
            state = self._rule_states[torch.arange(self.batch, device=start.device), start - self._start]
        steps = start[:, None] + self._offsets
        drawn_from, drafts = self._drafts(start, steps, drafting)
        self.tokens.scatter_(1, steps, drafts)

        branches, guided = self._logits(steps, state)
        probabilities = self.sampling.probabilities(finished_logits(self.generator, self.condition, guided, steps))
        self.finite.note(steps, branches, probabilities[..., 0])
        kept, redrawn = keep_or_redraw(drafts, drawn_from, probabilities, keeping, redrawing)
        kept |= steps < self.settled[:, None]
        tokens = torch.where(kept, drafts, redrawn)
        self.tokens.scatter_(1, steps, tokens)
        self._record(steps, branches[0], tokens)

        first_replaced = kept.cumprod(dim=1).sum(dim=1)
        self.settled = start + (first_replaced + 1).clamp(max=self.window)
        self._start, self._probabilities = start, probabilities
        # Drafts may be drawn from anything; what is ruled out at one step need not be at the next.
        self._last_logits = (branches[0] if self.guidance.rule.constrained else guided)[:, -1:]
        self._passes += 1
        # The one time in a pass that waits for the device.
        read = torch.stack((*self.settled.aminmax(), self.finite.sound().long()))
        self._done, farthest, self._sound = read.tolist()
        self._end = min(farthest + self.window, self.condition.num_tokens)

    def done(self) -> int:
        """How many tokens all rows have settled.

        Raises:
            UserError: the logits hold NaN or infinity.
        """
        if not self._sound:
            self.check()
        return self._done

    def _drafts(self, start: Tensor, steps: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts [B, n] of the window at `steps`, and what they were drawn from, [B, n, V].

        Positions that the last window held have theirs. New ones get a draft from the prediction of the last position
        before them: neighbours are alike.
        """
        before = self._offsets + (start - self._start)[:, None]  # the same positions in the last window
        is_new = before >= self.window
        last = self._last_logits.expand(-1, self.window, -1)
        new = self.sampling.probabilities(self.generator.constrain(last, steps, self.condition))
        index = before.clamp(max=self.window - 1)[..., None].expand_as(new)
        drawn_from = torch.where(is_new[..., None], new, self._probabilities.gather(1, index))
        return drawn_from, torch.where(is_new, draw(new, uniforms), self.tokens.gather(1, steps))

    def _logits(self, steps: Tensor, state: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Logits [B, n, V] of the branches and guided ones of the window; `state` is the rule's before it."""
        fed = steps - 1 if self._passes else steps[:, 1:] - 1
        inputs = perturbed = self.tokens.gather(1, fed)
        weights = None
        cond, *others = self._forward(self.parts[0], inputs, steps).split(self.batch)
        if self.guidance.perturbs:
            self._record(steps, cond, self.tokens.gather(1, steps))
            perturbed = weak_inputs(self.guidance.weak_branch, self.tokens, fed, self._codes)
            # Each position of the window counts the tokens before it.
            weights = step_weights(self.confidence, self.guidance.weak_branch, steps)
        for part in self.parts[1:]:
            others.append(
                self._forward(part, perturbed, steps, weights) if part.perturbed else self._forward(part, inputs, steps)
            )
        branches = (cond, *others)
        guided, self._rule_states = ruled_logits(
            self.generator,
            self.condition,
            self.guidance,
            cond,
            *self.sides(others),
            self._scales[steps],
            steps,
            state,
        )
        return branches, guided

    def _forward(self, part: _Part, inputs: Tensor, steps: Tensor, weights: Tensor | None = None) -> Tensor:
        """The logits [rows, n, V] of a part that is fed int64 [B, n], with weights [B, n, T] if it is perturbed."""
        condition, from_start = part.condition, self._passes == 0
        copies = condition.rows // self.batch
        # What is fed last stands before the last position of the window; attention need not look further.
        cache = part.cache.up_to(condition.slots - 1 + self._end)
        position = Position.start() if from_start else Position.by_row(condition.slots - 1 + steps[:, 0])
        rows, slot = inputs.repeat(copies, 1), position.repeated(copies)
        named = (
            {}
            if weights is None
            else query_weights(self.guidance.weak_branch, weights, condition, from_start=from_start)
        )
        return part.generator(condition, rows, cache=cache, slot=slot, **named).float()

    def _record(self, steps: Tensor, cond_logits: Tensor, tokens: Tensor) -> None:
        """Keep the confidence in `tokens` at `steps`, both [B, n]."""
        if self.guidance.perturbs:
            confidence = confidence_in(self.guidance.weak_branch, cond_logits, tokens, self.sampling.temperature)
            if self._codes is not None:
                confidence = confidence * self._codes.gather(1, steps)
            self.confidence.scatter_(1, steps, confidence)


class _Part(Part):
    """A part of a batch of which all rows are perturbed, or none."""

    def __init__(self, generator: Generator, condition: Condition, perturbed: bool = False) -> None:
        super().__init__(generator, condition)
        self.perturbed = perturbed


def keep_or_redraw(
    drafts: Tensor, drawn_from: Tensor, probabilities: Tensor, keeping: Tensor, redrawing: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn draws from q into draws from p that are the same as often as can be (arXiv 2302.01318).

    Args:
        drafts: int64 [...], drawn from `drawn_from`.
        drawn_from, probabilities: q and p, [..., V].
        keeping, redrawing: uniform numbers [...] in [0, 1), see `randomness.on_device`.

    Returns:
        Bool [...], which drafts are kept, and int64 [...], what takes the place of the others.
    """
    q, p = (of.gather(-1, drafts[..., None]).squeeze(-1) for of in (drawn_from, probabilities))
    rest = (probabilities - drawn_from).clamp_min(0)
    # Where rounding leaves no rest, p and q are the same.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, probabilities)
    return as_fractions(keeping) * q < p, draw(rest, redrawing)
