"""An attention backend in one file outside of the package: importing it registers it."""

from __future__ import annotations

import torch
from torch import Tensor

from softcfg.nn import AttentionBackend, AttentionCall, register_backend


@register_backend
class Toy(AttentionBackend):
    """Attention query by query in float64; it knows no weights on keys."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.served = 0

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.context.key_weights is None else "it has no weights on keys"

    def attend(self, call: AttentionCall) -> Tensor:
        self.served += 1
        key, value = call.keys_and_values()
        shared = call.query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(shared, dim=1).double() for each in (key, value))
        visible, weights = call.visible(), call.context.value_weights
        outputs = []
        for i, query in enumerate(call.query.double().unbind(2)):
            scores = torch.einsum("rhd,rhsd->rhs", query, key) / query.shape[-1] ** 0.5
            if visible is not None:
                scores = scores.masked_fill(~visible[:, :, min(i, visible.shape[2] - 1)], float("-inf"))
            probabilities = scores.softmax(-1).nan_to_num(0.0)
            if weights is not None:
                probabilities = probabilities * (weights if weights.dim() == 2 else weights[:, i])[:, None]
            outputs.append(torch.einsum("rhs,rhsd->rhd", probabilities, value))
        return torch.stack(outputs, dim=2).to(call.query.dtype)
