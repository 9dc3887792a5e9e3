"""Logits that are not finite: noted at every step without waiting for the device, reported in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softcfg.errors import UserError
from softcfg.guidance import CFG
from softcfg.nn.precision import dtype_name

BRANCHES = {"cond": "", "uncond": "unconditional ", "weak": "weak model's ", "perturbed": "perturbed "}


def branches_of(guidance: CFG) -> list[str]:
    """The branches that guidance has, in the order of their logits: the conditional one, which needs no name, first."""
    there = (True, guidance.has_unconditional_branch, guidance.has_weak_model, guidance.has_third_branch)
    return [name for name, is_there in zip(BRANCHES.values(), there, strict=True) if is_there]


class FiniteLogits:
    """Whether the logits of every step make a distribution; kept on the device until `check` reads it.

    The largest logit of a row is a finite number unless the row holds a NaN or an infinity, or nothing but minus
    infinity, which rules a code out. One reduction a step finds them all.

    Args:
        batch: B, images.
        branches: their names as adjectives, see `branches_of`.
        steps: T.
        dtype: of the model, for the message.
    """

    def __init__(
        self, batch: int, branches: Sequence[str], steps: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._batch = batch
        self._branches = branches
        self._dtype = dtype_name(dtype)
        # Of each branch, and last of what the tokens are drawn from.
        self._seen = torch.zeros((len(branches) + 1) * batch, steps, dtype=torch.float32, device=device)

    @property
    def seen(self) -> Tensor:
        """What is kept, float32 [branches and the outcome, B, T], as a view."""
        return self._seen.view(-1, self._batch, self._seen.shape[1])

    def note(self, steps: Tensor | slice, logits: tuple[Tensor, ...], outcome: Tensor) -> None:
        """Note the logits of some steps.

        Args:
            steps: int64 [n] or [B, n], 0-based, or a slice of n.
            logits: of the model, [B, n, V] of each branch or [rows, n, V] of all.
            outcome: [B, n], not finite where there is no distribution to draw from.
        """
        self.keep(steps, torch.cat((*(part.amax(dim=-1) for part in logits), outcome)).float())

    def keep(self, steps: Tensor | slice, seen: Tensor) -> None:
        """Keep numbers that are finite where all is well.

        Args:
            seen: float32 [rows, n], of each branch and last of the outcome, as of `note`.
        """
        if isinstance(steps, Tensor) and steps.dim() > 1:
            self._seen.scatter_(1, steps.repeat(len(seen) // self._batch, 1), seen)
        else:
            self._seen[:, steps] = seen

    def sound(self) -> Tensor:
        """Whether all steps so far are, bool [] on the device."""
        return self._seen.isfinite().all()

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Raise a `UserError` for the first step, of `first` up to `stop`, whose logits make no distribution."""
        seen = self._seen[:, first:stop].cpu()
        if math.isfinite(seen.sum()):
            return
        bad = ~seen.isfinite()
        if not bad.any():  # the sum alone was too large
            return
        column = int(bad.any(dim=0).nonzero()[0])
        line = int(bad[:, column].nonzero()[0])
        branch, row = divmod(line, self._batch)
        where = f"of row {row} at step {first + column}"
        if branch == len(self._branches):
            raise UserError(
                f"there is nothing to draw from in the guided logits {where}, though those of the model, computed in "
                f"{self._dtype}, are finite: guidance overflows, the temperature is too small or every code is ruled "
                "out; try a smaller guidance scale, a higher temperature or codes that the model itself allows"
            )
        value = float(seen[line, column])
        what = "hold NaN" if math.isnan(value) else "hold infinity" if value > 0 else "are minus infinity for all codes"
        advice = (
            "the weights are damaged or do not fit the model: get them again"
            if self._dtype in ("float32", "float64")
            else "try dtype=float32; if that does not help, the weights are damaged: get them again"
        )
        raise UserError(f"the {self._branches[branch]}logits {where} {what}, computed in {self._dtype}: {advice}")
