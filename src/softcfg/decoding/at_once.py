"""Steps on a CPU as one launch: what guidance and sampling do, by the kernels beside those of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcfg.nn.kernels import available
from softcfg.nn.replay import Launches, StepInputs, Surroundings


@dataclass(eq=False)
class DrawnAtOnce(Surroundings):
    """SoftCFG's weights and the embedding of tokens before the blocks, after the logits their draw and the confidence.

    What is drawn and noted is written where the batch keeps it. All tensors stay where they are.

    Attributes:
        tokens: int64 [B, T], contiguous.
        uniforms: float64 [B, T] in [0, 1), contiguous.
        scales: float32 [T].
        temperature: of the draw.
        allowed: of each step the first token that may be drawn and the one after the last; None: all.
        guided: whether there are unconditional rows.
        seen: float32 [branches and the outcome, B, T], the largest logits, as of `fused.draw`.
        confidence: float32 [B, T]; None if nobody needs it.
        codes: bool [T], where it is kept; None: everywhere.
        of_drawn: whether it is that in the drawn token; else in the likeliest one.
        weights: float32 [B, T], those that the next step puts on the tokens; None for none.
        settings: of the weights, as of `fused.write_weights`.
        write: writes the weights of a step in another way.
        embedding: float32 [tokens, width], contiguous, of whose rows the inputs of steps are copies; None where they
            are more than that.
        number, inputs: see `Surroundings`.
    """

    tokens: Tensor
    uniforms: Tensor
    scales: Tensor
    temperature: float
    allowed: Sequence[tuple[int, int]] | None
    guided: bool
    seen: Tensor
    confidence: Tensor | None
    codes: Tensor | None
    of_drawn: bool
    weights: Tensor | None
    settings: dict[str, Any] | None
    write: Callable[[int], object]
    embedding: Tensor | None = None
    number: int = 1
    inputs: StepInputs | None = None

    def launches(self, fed: Tensor, logits: Tensor) -> tuple[Launches, Launches]:
        """See `Surroundings.launches`.

        Raises:
            ValueError: `allowed` names no tokens of the vocabulary, or the logits are of other rows.
        """
        kernels, at, batch = available.cpu_kernels(), self.number, len(self.tokens)
        rows, drawn, count = logits[:, -1], self.tokens[:, at], logits.shape[-1]
        allowed = self.allowed or [(0, count)]
        for start, stop in set(allowed):
            kernels.check_allowed(start, stop, count)
        if len(rows) != batch * (1 + self.guided):
            raise ValueError(f"there are logits of {len(rows)} rows for {batch} images")
        if self.embedding is not None and (len(self.embedding) < count or fed.shape[2] != self.embedding.shape[1]):
            raise ValueError(
                f"the table {list(self.embedding.shape)} does not feed {list(fed.shape)} all {count} tokens"
            )
        cond, other = rows[:batch], rows[batch:] if self.guided else None
        self._guided = torch.empty(cond.shape, dtype=torch.float32, device="cpu")
        before, after = [], [
            kernels.drawing(
                cond, other, self.scales[at], self.temperature, self.uniforms[:, at], allowed[0], self._guided, drawn,
                self.seen[:, :, at],
            )
        ]  # fmt: skip
        if self.confidence is not None and self.weights is not None:
            before.append(kernels.weights_written(self.confidence, self.weights, **(self.settings or {})))
        if self.embedding is not None:
            before.append(kernels.embedded(self.tokens[:, at - 1], self.embedding, fed))
        if self.confidence is not None:
            of = drawn if self.of_drawn else None
            after.append(kernels.confidence_written(cond, self.confidence, at, self.temperature, self.codes, of))
        return [kernels.as_recorded(*each) for each in before], [kernels.as_recorded(*each) for each in after]

    def move(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> None:
        """See `Surroundings.move`."""
        kernels, at = available.cpu_kernels(), self.number
        drawn, draw = self.tokens.data_ptr() + 8 * at, after[0]
        if self.embedding is not None:
            before[-1][kernels.TOKENS_FED] = drawn - 8
        draw[kernels.GUIDANCE_SCALE] = self.scales.data_ptr() + 4 * at
        if self.allowed is not None:
            draw[kernels.START], draw[kernels.STOP] = self.allowed[at]
        draw[kernels.UNIFORM] = self.uniforms.data_ptr() + 8 * at
        draw[kernels.DRAWN] = drawn
        draw[kernels.SEEN] = self.seen.data_ptr() + 4 * at
        if self.confidence is not None:
            after[1][kernels.COLUMN] = at
            if self.of_drawn:
                after[1][kernels.TOKENS] = drawn

    def alike(self) -> int:
        """See `Surroundings.alike`."""
        left = self.tokens.shape[1] - self.number
        if self.allowed is None:
            return left
        return len(list(takewhile(self.allowed[self.number].__eq__, islice(self.allowed, self.number, None))))

    def missed(self) -> None:
        """See `Surroundings.missed`."""
        self.write(self.number)
