"""The weighted sum of a single query as PyTorch's embedding bag: a sum of rows of a table, each with a factor.

A decoding step on a CPU sums the cached values of each head with its probabilities. A batched product takes that for
hundreds of small products of one row; some processors then read the cache at half the speed of the memory, and those
without instructions for bfloat16 at a tenth of it. An embedding bag reads each row once, and converts it in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.nn.backends.math import Math
from softcfg.nn.backends.registry import AttentionCall, register_backend
from softcfg.nn.choices import choose_once, time_sides
from softcfg.nn.precision import dtype_name

FEW = 4.0  # times the smallest steps, up to which the products take no longer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIES, MEASURED = 8, (2, 32, 256, 64)  # of a layer's values: 32 MiB in float32, so that they come from memory


@register_backend
class EmbeddingBag(Math):
    """The plain products, but for the weighted sum of a single query, where a measurement finds it faster."""

    name = "embedding_bag"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        if not call.query.is_cpu or call.query.dtype not in DTYPES:
            return "it serves float32, bfloat16 and float16 on a CPU"
        if call.query.shape[2] > 1 or call.query.shape[1] != call.key.shape[1]:
            return "it serves one query for each head of the keys"
        return "it has no gradient" if torch.is_grad_enabled() else None

    def preferred(self, call: AttentionCall) -> bool:
        """See `AttentionBackend.preferred`: for larger steps on a CPU, if it is faster on this machine."""
        return call.step_size > FEW and self.why_not(call) is None and _is_faster(call.query.dtype)

    def weighted_sum(self, call: AttentionCall, probabilities: Tensor, value: Tensor) -> Tensor:
        """See `Math.weighted_sum`."""
        rows, heads, slots, width = value.shape
        if value.stride(3) != 1 or any(step % width for step in value.stride()[:3]):
            value = value.contiguous()
        row, head, slot = (step // width for step in value.stride()[:3])
        entries = (rows - 1) * row + (heads - 1) * head + (slots - 1) * slot + 1
        key = (self.name, *value.shape, row, head, slot)
        if key not in call.context.memory:
            dtype = torch.int32 if entries < 1 << 31 else torch.int64
            starts = torch.arange(rows, dtype=dtype)[:, None] * row + torch.arange(heads, dtype=dtype) * head
            call.context.memory[key] = starts.view(-1, 1) + torch.arange(slots, dtype=dtype) * slot
        table = value.as_strided((entries, width), (width, 1))
        return _bags(call.context.memory[key], table, probabilities).view(rows, heads, 1, width)


def _bags(index: Tensor, table: Tensor, factors: Tensor) -> Tensor:
    """index [bags, S] into table [entries, width], factors of bags * S -> [bags, width]."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=factors.view(index.shape))


def _is_faster(dtype: torch.dtype) -> bool:
    """Whether it is faster than a batched product on this machine."""

    def measure() -> str:
        rows, heads, slots, width = MEASURED
        values = [torch.ones(rows * heads, slots, width, dtype=dtype) for _ in range(COPIES)]
        factors = torch.ones(rows * heads, slots, dtype=dtype)
        index = torch.arange(factors.numel(), dtype=torch.int32).view(factors.shape)

        def bags() -> None:
            for each in values:
                _bags(index, each.view(-1, width), factors)

        def batched() -> None:
            for each in values:
                torch.bmm(factors[:, None], each)

        seconds = time_sides({EmbeddingBag.name: bags, Math.name: batched})
        return min(seconds, key=seconds.__getitem__)

    name = dtype_name(dtype)
    return choose_once(f"attention-{name}", (EmbeddingBag.name, Math.name), measure) == EmbeddingBag.name
