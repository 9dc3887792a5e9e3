"""Split-KV attention for decoding: one query per row against a static cache, with weights on values and keys.

A decoding step reads the whole cache once and computes next to nothing, so it is bound by memory bandwidth. In a small
batch, rows and heads alone are too few programs to reach it: the slots are split into chunks, every program attends to
one chunk, and a second kernel joins the chunks' results (as in flash-decoding). The position is read from a tensor, so
one launch, and one captured CUDA graph, serves every step; chunks after the position cost nothing.

A value weight is one multiplication of a probability in a register: SoftCFG costs nothing next to reading the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softcfg.nn.kernels.launching import begin_linked, launch_options

PROGRAMS = 1024  # that keep a GPU busy; with fewer rows and heads, the slots are split
WARPS, STAGES = 2, 2  # of a program; blocks on their way from memory: the fastest of ten on an H100
ELEMENTS = 2048  # of a block of keys, of at most 16 bits each; half as many in float32
CHUNKS = 64  # at most, that the second kernel holds in registers


@triton.jit
def _attend_chunk(
    query, keys, values, key_scales, value_scales, value_weights, key_weights, first, last, maxima, sums, outputs,
    query_row, query_head, cache_row, cache_head, scales_row, scales_head, value_weights_row, key_weights_row,
    heads, groups, chunks, size, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, WEIGHT_VALUES: tl.constexpr, WEIGHT_KEYS: tl.constexpr, PADDED: tl.constexpr,
    LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    row, head, chunk = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    end = tl.load(last + row) + 1
    start = 0
    if PADDED:
        start = tl.load(first + row)
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    q = tl.load(query + row * query_row + head * query_head + dims, mask=inside, other=0.0).to(tl.float32) * scale
    # A product with the constant DIM tells the compiler how the vectors are aligned: it loads up to 16 bytes at once.
    base = (row.to(tl.int64) * cache_row + (head // groups) * cache_head) * DIM
    keys += base
    values += base
    scales = row.to(tl.int64) * scales_row + (head // groups) * scales_head

    # Every lane of a block has a softmax of its own, so that nothing is exchanged between warps until the end.
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    output = tl.zeros((BLOCK, WIDTH), tl.float32)
    for begin in tl.range(chunk * size, tl.minimum((chunk + 1) * size, end), BLOCK, num_stages=STAGES):
        slots = begin + tl.arange(0, BLOCK)
        seen = (slots < end) & (slots >= start)
        place = slots[:, None] * DIM + dims[None, :]
        k = tl.load(keys + place, mask=seen[:, None] & inside[None, :], other=0.0)
        v = tl.load(values + place, mask=seen[:, None] & inside[None, :], other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        if SCALED:
            scores *= tl.load(key_scales + scales + slots, mask=seen, other=0.0)
        if WEIGHT_KEYS:
            scores *= tl.load(key_weights + row * key_weights_row + slots, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(maximum, scores)
        # A lane that has seen padding alone has its maximum at -inf, and -inf - -inf is no number.
        shift = tl.where(above == float("-inf"), 0.0, above)
        kept = tl.exp(maximum - shift)
        p = tl.exp(scores - shift)
        total = total * kept + p
        if SCALED:
            p *= tl.load(value_scales + scales + slots, mask=seen, other=0.0)
        if WEIGHT_VALUES:
            p *= tl.load(value_weights + row * value_weights_row + slots, mask=seen, other=0.0)
        output = output * kept[:, None] + v.to(tl.float32) * p[:, None]
        maximum = above

    highest = tl.max(maximum, axis=0)
    kept = tl.exp(maximum - tl.where(highest == float("-inf"), 0.0, highest))
    part = tl.program_id(0) * chunks + chunk
    whole, joined = tl.sum(total * kept, axis=0), tl.sum(output * kept[:, None], axis=0)
    if WHOLE:
        joined /= tl.where(whole > 0, whole, 1.0)
    else:
        tl.store(maxima + part, highest)
        tl.store(sums + part, whole)
    tl.store(outputs + part * DIM + dims, joined.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _join_chunks(
    maxima, sums, outputs, joined, chunks, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    place = tl.program_id(0)
    parts = tl.arange(0, CHUNKS)
    there = parts < chunks
    maximum = tl.load(maxima + place * chunks + parts, mask=there, other=float("-inf"))
    above = tl.max(maximum, axis=0)
    shift = tl.where(above == float("-inf"), 0.0, above)
    kept = tl.exp(maximum - shift)
    total = tl.sum(tl.load(sums + place * chunks + parts, mask=there, other=0.0) * kept, axis=0)
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    part = tl.load(
        outputs + (place * chunks + parts[:, None]) * DIM + dims[None, :],
        mask=there[:, None] & inside[None, :],
        other=0.0,
    )
    output = tl.sum(part * kept[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(joined + place * DIM + dims, output.to(joined.dtype.element_ty), mask=inside)


def slots_at_once(width: int, dtype: torch.dtype) -> int:
    """What the registers of a program have room for, such that many programs share a multiprocessor."""
    return (ELEMENTS // 2 if dtype == torch.float32 else ELEMENTS) // max(width, 32)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    last: Tensor,
    *,
    first: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row to the slots first .. last of a static cache.

    Args:
        query: [rows, heads, 1, head_dim].
        keys, values: [rows, key_value_heads, slots, head_dim] of the same strides, the slots of a head one after the
            other; every `heads / key_value_heads` consecutive heads share one. Slots after `last` may hold anything.
        last: int64 [rows], the slot of the query itself, on the device.
        first: int64 [rows], slots before it are padding; None for none.
        key_scales, value_scales: float32 [rows, key_value_heads, slots, 1], of the same strides: factors on
            the stored keys and values (`nn.kv_cache.Int8KVCache`); None for 1.
        value_weights, key_weights: [rows, slots] or [rows, 1, slots], factors on the values or keys of each slot. The
            attention row is not renormalised (SoftCFG, arXiv 2510.00996).

    Returns:
        [rows, heads, 1, head_dim] in the dtype of `query`; sums are in float32. A row that sees nothing gives zeros.
    """
    rows, heads, new, dim = query.shape
    slots = keys.shape[2]
    if new != 1:
        raise ValueError(f"decode_attention takes one query per row, got {new}")
    *outer, slot, entry = keys.stride()
    if values.stride() != keys.stride() or (slot, entry) != (dim, 1) or any(each % dim for each in outer):
        raise ValueError("keys and values must have the same strides, and the slots of a head must lie side by side")
    if (key_scales is None) != (value_scales is None):
        raise ValueError("keys and values must both have scales, or neither")
    scales_row, scales_head = (0, 0) if key_scales is None else key_scales.stride()[:2]
    query = query if query.stride(3) == 1 else query.contiguous()
    last = last.contiguous()
    first = None if first is None else first.contiguous()
    value_weights, value_weights_row = _by_row(value_weights, rows, slots)
    key_weights, key_weights_row = _by_row(key_weights, rows, slots)
    width = triton.next_power_of_2(dim)
    block = slots_at_once(width, keys.dtype)
    chunks = min(CHUNKS, triton.cdiv(PROGRAMS, rows * heads))
    size = triton.cdiv(triton.cdiv(slots, chunks), block) * block
    chunks = triton.cdiv(slots, size)
    joined = torch.empty(rows, heads, 1, dim, dtype=query.dtype, device=query.device)
    maxima, sums, outputs = None, None, joined
    if chunks > 1:
        maxima, sums = torch.empty(2, rows * heads, chunks, dtype=torch.float32, device=query.device)
        outputs = torch.empty(rows * heads, chunks, dim, dtype=torch.float32, device=query.device)
    # Without a limit the assembler aims for more threads on a multiprocessor, and spills; loads of small pieces need
    # a few registers more.
    options: dict[str, Any] = {**launch_options(query), "maxnreg": 160 if dim * keys.itemsize % 16 else 128}
    _attend_chunk[(rows * heads, chunks)](
        query, keys, values, key_scales, value_scales, value_weights, key_weights, first, last, maxima, sums, outputs,
        query.stride(0), query.stride(1), *(each // dim for each in outer),
        scales_row, scales_head, value_weights_row, key_weights_row,
        heads, heads // keys.shape[1], chunks, size, dim**-0.5,
        DIM=dim, WIDTH=width, BLOCK=block, WHOLE=chunks == 1, STAGES=STAGES,
        SCALED=key_scales is not None, WEIGHT_VALUES=value_weights is not None, WEIGHT_KEYS=key_weights is not None,
        PADDED=first is not None, num_warps=WARPS, **options,
    )  # fmt: skip
    if chunks > 1:
        _join_chunks[(rows * heads,)](
            maxima, sums, outputs, joined, chunks,
            DIM=dim, WIDTH=width, CHUNKS=triton.next_power_of_2(chunks), num_warps=4, **options,
        )  # fmt: skip
    return joined


def _by_row(weights: Tensor | None, rows: int, slots: int) -> tuple[Tensor | None, int]:
    """Weights as float32 [rows, slots], the slots side by side, and the distance of the rows; no copy if they are."""
    if weights is None:
        return None, 0
    weights = weights.to(torch.float32).reshape(-1, slots).expand(rows, slots)
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    return weights, weights.stride(0)
