"""What stands between the matrix products of a step, one kernel for each place: it is read and written once.

At a few rows a kernel of a few operations takes as long as the launch of the next; at many rows its tensors are read
from memory again and again. All of them compute in float32 and round once, when they write. `softcfg.nn.fused` chooses
between them and the operations that they replace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softcfg.nn.kernels.launching import begin_linked, launch_options


@triton.jit
def _add_norm(
    x, added, gate, weight, bias, scale, shift, at, total, normed, gate_row, scale_row, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, MODULATED: tl.constexpr,
    INDEXED: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    row = tl.program_id(0).to(tl.int64)
    modulated = row
    if INDEXED:
        modulated = tl.load(at + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    place = row * WIDTH + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + modulated * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + more).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if KIND == 2:
        value = tl.where(inside, value - tl.sum(value, axis=0) / WIDTH, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    if WEIGHTED:
        value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        value *= 1.0 + tl.load(scale + modulated * scale_row + columns, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(shift + modulated * scale_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _head_norm_rotate(
    vectors, weight, bias, per_weight, cosines, sines, heads, channels, inside, eps,
    DIM: tl.constexpr, OTHER: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Both channels of every pair of some heads [heads, pairs]: loaded, normalised and rotated, in float32."""
    first = tl.load(vectors + channels, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(vectors + channels + OTHER, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        mean = tl.sum(first + second, axis=1)[:, None] / DIM
        first = tl.where(inside, first - mean, 0.0)
        second = tl.where(inside, second - mean, 0.0)
    if NORM > 0:
        factor = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / DIM + eps)[:, None]
        place = heads // per_weight * DIM + channels
        first *= factor * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        second *= factor * tl.load(weight + place + OTHER, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            first += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
            second += tl.load(bias + place + OTHER, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        turned = first * cosines - second * sines
        second = second * cosines + first * sines
        first = turned
    return first, second


@triton.jit
def _store_rounded(first, second, contents, scales, places, scale_places, inside, there, OTHER: tl.constexpr):
    """Store vectors as int8 and the scale of each; the largest entry is 127."""
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
    scale = largest / 127.0
    divisor = tl.where(scale > 0, scale, 1.0)[:, None]
    # Rounds to the nearest integer, to the even one of two.
    first = (first / divisor + 12582912.0) - 12582912.0
    second = (second / divisor + 12582912.0) - 12582912.0
    tl.store(contents + places, first.to(tl.int8), mask=inside)
    tl.store(contents + places + OTHER, second.to(tl.int8), mask=inside)
    tl.store(scales + scale_places, scale, mask=there)


@triton.jit
def _rotate_and_cache(
    query, key, value, query_weight, query_bias, key_weight, key_bias, cos, sin, slots, rotated,
    keys, values, key_scales, value_scales,
    query_row, key_row, value_row, cache_row, cache_head, scales_row, scales_head, rotary_row,
    heads, key_heads, query_per_weight, key_per_weight, query_eps, key_eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, ROTATED: tl.constexpr, SCALED: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pairs = tl.arange(0, BLOCK)
    cosines = 1.0
    sines = 0.0
    if ROTATED:
        cosines = tl.load(cos + row * rotary_row + pairs, mask=pairs < DIM // 2, other=0.0)[None, :]
        sines = tl.load(sin + row * rotary_row + pairs, mask=pairs < DIM // 2, other=0.0)[None, :]
    query_groups = tl.cdiv(heads, HEADS)
    dtype = rotated.dtype.element_ty
    if group < query_groups:
        which = group * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (which < heads) & (pairs[None, :] < DIM // 2)
        channels = pairs[None, :] * STEP
        first, second = _head_norm_rotate(
            query + row * query_row + which * DIM, query_weight, query_bias, query_per_weight, cosines, sines, which,
            channels, inside, query_eps, DIM, OTHER, NORM, BIASED, ROTATED,
        )  # fmt: skip
        place = (row * (heads + key_heads) + which) * DIM + channels
        tl.store(rotated + place, first.to(dtype), mask=inside)
        tl.store(rotated + place + OTHER, second.to(dtype), mask=inside)
    else:
        head = (group - query_groups) * HEADS + tl.arange(0, HEADS)
        which = head[:, None]
        inside = (which < key_heads) & (pairs[None, :] < DIM // 2)
        channels = pairs[None, :] * STEP
        slot = tl.load(slots + row)
        first, second = _head_norm_rotate(
            key + row * key_row + which * DIM, key_weight, key_bias, key_per_weight, cosines, sines, which,
            channels, inside, key_eps, DIM, OTHER, NORM, BIASED, ROTATED,
        )  # fmt: skip
        key_first, key_second = first.to(dtype), second.to(dtype)
        place = (row * (heads + key_heads) + heads + which) * DIM + channels
        tl.store(rotated + place, key_first, mask=inside)
        tl.store(rotated + place + OTHER, key_second, mask=inside)
        source = value + row * value_row + which * DIM + channels
        value_first = tl.load(source, mask=inside, other=0.0)
        value_second = tl.load(source + OTHER, mask=inside, other=0.0)
        cached = row * cache_row + which * cache_head + slot * DIM + channels
        if SCALED:
            scaled = row * scales_row + head * scales_head + slot
            there = head < key_heads
            _store_rounded(
                key_first.to(tl.float32), key_second.to(tl.float32), keys, key_scales, cached, scaled, inside, there,
                OTHER,
            )  # fmt: skip
            _store_rounded(
                value_first.to(tl.float32), value_second.to(tl.float32), values, value_scales, cached, scaled, inside,
                there, OTHER,
            )  # fmt: skip
        else:
            tl.store(keys + cached, key_first, mask=inside)
            tl.store(keys + cached + OTHER, key_second, mask=inside)
            tl.store(values + cached, value_first, mask=inside)
            tl.store(values + cached + OTHER, value_second, mask=inside)


@triton.jit
def _silu_product(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr, LINKED: tl.constexpr):
    begin_linked(LINKED)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    value = tl.load(gate + row * gate_row + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_row + place, mask=inside, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * factor
    tl.store(out + row * width + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _confidence_weights(
    confidence, weights, confidence_row, weights_row, count, eps, floor, strength,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, NORMED: tl.constexpr, POWER: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    value = tl.load(confidence + row * confidence_row + place + SHIFT, mask=place + SHIFT < count, other=0.0)
    if NORMED:
        total = tl.maximum(tl.sum(value, axis=0) + eps, 1.1754943508222875e-38)  # without confidences, all are 0
        value = tl.math.div_rn(value, total + tl.zeros_like(value))  # a token that is alone has a share of exactly 1
    value = tl.maximum(1.0 - value, 0.0)
    if POWER:
        value = tl.exp2(strength * tl.log2(value))
    tl.store(weights + row * weights_row + place, tl.maximum(value, floor), mask=place < count)


@triton.jit
def _probability(
    logits, confidence, codes, tokens, at, logits_row, confidence_row, codes_row, count, temperature,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, DRAWN: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    begin_linked(LINKED)
    row = tl.program_id(0).to(tl.int64)
    largest = -1e30
    total = 0.0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * logits_row + place, mask=place < count, other=float("-inf")) / temperature
        before = largest
        largest = tl.maximum(largest, tl.max(value, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), axis=0)
    column = tl.load(at)
    found = 1.0 / total
    if DRAWN:
        token = tl.load(tokens + row)
        known = (token >= 0) & (token < count)
        value = tl.load(logits + row * logits_row + token, mask=known, other=float("-inf")) / temperature
        found *= tl.exp(value - largest)
    if MASKED:
        found *= tl.load(codes + row * codes_row + column).to(tl.float32)
    tl.store(confidence + row * confidence_row + column, found)


def add_norm(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    kind: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gate * added, and the norm of it times 1 + scale plus shift; all of one dtype.

    Args:
        x, added: [..., width].
        gate: shaped alike; None for ones.
        kind: `RMS` or `LAYER` of `nn.norm`.
        weight, bias: [width] of the norm; None for ones and zeros.
        modulation: scale and shift, of the same strides; shaped like `gate`.
        at: int64, an entry for each row. Gate, scale and shift are then tables [entries, width], and this says which
            entry serves which row; None for its own.

    Returns:
        Both [..., width]; the first has the values of `x` if nothing is added.
    """
    shape, width = x.shape, x.shape[-1]
    x = x.contiguous()
    added, at = (None if each is None else each.contiguous() for each in (added, at))
    gate, scale, shift = (
        None if each is None else each.reshape(-1, width) for each in (gate, *(modulation or (None, None)))
    )
    rows = x.numel() // width
    total = x if added is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x, added, gate, weight, bias, scale, shift, at, total, normed,
        0 if gate is None else gate.stride(0), 0 if scale is None else scale.stride(0), eps,
        WIDTH=width, BLOCK=block, KIND=kind, ADD=added is not None, GATED=gate is not None,
        WEIGHTED=weight is not None, BIASED=bias is not None, MODULATED=scale is not None,
        INDEXED=at is not None,
        num_warps=min(16, max(1, block // 512)), **launch_options(x.view(rows, width)),
    )  # fmt: skip
    return total.view(shape), normed.view(shape)


def rotate_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    norm: int = 0,
    query_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    key_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: tuple[float, float] = (0.0, 0.0),
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    neighbours: bool = False,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate the queries and keys of one slot of each row; write keys and values into the cache.

    Args:
        query: [rows, heads, 1, head_dim], the heads of a row side by side; head_dim even.
        key, value: [rows, key_heads, 1, head_dim], likewise.
        slots: int64 [rows], where each row writes.
        keys, values: [rows, key_heads, slots, head_dim] of the same strides, the slots of a head side by side. In
            int8 each vector is rounded, and its scale goes into `key_scales` and `value_scales`, float32
            [rows, key_heads, slots, 1] of the same strides.
        norm: kind of norm over head_dim, `RMS` or `LAYER` of `nn.norm`, or 0.
        query_weights, key_weights: weight and bias of the norms, [head_dim] or [groups, head_dim] for as many groups of
            neighbouring heads.
        eps: of the norms.
        cos, sin: float32 [rows, head_dim / 2], of the same strides; None for no rotation.
        neighbours: pairs are the channels (2i, 2i + 1) rather than (i, head_dim / 2 + i).

    Returns:
        Queries and keys as they go into attention, [rows, heads, 1, head_dim] and [rows, key_heads, 1, head_dim].
    """
    rows, heads, _, dim = query.shape
    key_heads = key.shape[1]
    rotated = torch.empty(rows, heads + key_heads, 1, dim, dtype=query.dtype, device=query.device)
    block = triton.next_power_of_2(dim // 2)
    together = min(triton.next_power_of_2(heads), max(1, 512 // block))  # heads of a program
    (query_weight, query_bias), (key_weight, key_bias) = query_weights, key_weights
    per_weight = [
        1 if weight is None else count * dim // weight.numel()
        for count, weight in ((heads, query_weight), (key_heads, key_weight))
    ]
    scales_row, scales_head = (0, 0) if key_scales is None else key_scales.stride()[:2]
    _rotate_and_cache[(rows, triton.cdiv(heads, together) + triton.cdiv(key_heads, together))](
        query, key, value, query_weight, query_bias, key_weight, key_bias, cos, sin, slots, rotated,
        keys, values, key_scales, value_scales,
        query.stride(0), key.stride(0), value.stride(0), keys.stride(0), keys.stride(1), scales_row, scales_head,
        0 if cos is None else cos.stride(0), heads, key_heads, *per_weight, *eps,
        DIM=dim, BLOCK=block, HEADS=together, STEP=2 if neighbours else 1, OTHER=1 if neighbours else dim // 2,
        NORM=norm, BIASED=query_bias is not None, ROTATED=cos is not None, SCALED=key_scales is not None,
        num_warps=4, **launch_options(query),
    )  # fmt: skip
    return rotated[:, :heads], rotated[:, heads:]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors [..., width] of one dtype; contiguous."""
    shape, width = gate.shape, gate.shape[-1]
    gate, up = gate.reshape(-1, width), up.reshape(-1, width)
    rows = len(gate)
    out = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    block = 1024
    _silu_product[(rows, triton.cdiv(width, block))](
        gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=4, **launch_options(gate)
    )
    return out


def write_weights(
    confidence: Tensor,
    weights: Tensor,
    *,
    step_norm: bool,
    strength: float,
    floor: float,
    eps: float,
    successor: bool,
) -> None:
    """Write the weights of SoftCFG [B, T] for the confidences [B, T]; see `guidance.perturbation_weights`.

    Both are float32, the entries of a row side by side. The strength must be above 0.
    """
    batch, count = confidence.shape
    block = triton.next_power_of_2(count)
    _confidence_weights[(batch,)](
        confidence, weights, confidence.stride(0), weights.stride(0), count, float(eps), float(floor), float(strength),
        BLOCK=block, SHIFT=int(successor), NORMED=step_norm, POWER=strength != 1,
        num_warps=min(32, max(1, block // 256)), **launch_options(weights),
    )  # fmt: skip


def write_confidence(
    logits: Tensor,
    confidence: Tensor,
    at: Tensor,
    temperature: float,
    codes: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Write the largest of softmax(logits / temperature), of float32 [B, V], into column `at` of `confidence` [B, T].

    Args:
        at: int64 [1].
        codes: bool [T] or [B, T], where it is kept; elsewhere 0 is written.
        tokens: int64 [B], whose probability it is instead; 0 for those outside of 0 .. V - 1.
    """
    batch, count = logits.shape
    _probability[(batch,)](
        logits, confidence, codes, tokens, at, logits.stride(0), confidence.stride(0),
        0 if codes is None or codes.dim() == 1 else codes.stride(0), count, float(temperature),
        BLOCK=4096, MASKED=codes is not None, DRAWN=tokens is not None, num_warps=8, **launch_options(logits),
    )  # fmt: skip
