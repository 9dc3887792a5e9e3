"""The product of a few rows with the weights of a linear layer, with what stands before and behind it.

A step of one image reads every weight once and computes next to nothing, so it is bound by memory bandwidth and by the
number of its kernels. Here a program reads some rows of the weights for two rows of inputs; the norm of the inputs, the
bias, the residual stream and the gate are computed beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softcfg.nn.kernels.launching import launch_options, let_next_begin, wait_for_others

TOGETHER = 2  # rows of a program
OUTPUTS, GATED_OUTPUTS, WARPS = 4, 2, 1  # of a program, in 16 bits; a single warp has no other to wait for
WIDEST = 1024  # inputs at once


@triton.jit
def _weights(weight, first, outputs, count, start, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Of the rows from `first` on, which are `outputs`, some columns from `start` on."""
    # A product with the constant WIDTH tells the compiler how the rows are aligned.
    columns = start + tl.arange(0, SIZE)
    place = (outputs - first)[:, None] * WIDTH + columns[None, :]
    weight += first.to(tl.int64) * WIDTH
    mask = (outputs < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(weight + place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, added, total, row, start, WIDTH: tl.constexpr, SIZE: tl.constexpr, ADD: tl.constexpr):
    """Some of the stream x + added of a row, in float32 but rounded as it is stored, which the first program does."""
    columns = start + tl.arange(0, SIZE)
    inside = columns < WIDTH
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0)
    if ADD:
        more = tl.load(added + row * WIDTH + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(total.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(total + row * WIDTH + columns, value, mask=inside)
    return value.to(tl.float32)


@triton.jit
def _add_part(
    product, other_product, up, other_up, square, other_square,
    w, u, x, added, total, norm_weight, one, other, start,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """The sums of both rows with what some of the inputs add to them."""
    a = _inputs(x, added, total, one, start, WIDTH, SIZE, ADD)
    b = _inputs(x, added, total, other, start, WIDTH, SIZE, ADD)
    if NORM:
        square += tl.sum(a * a, axis=0)
        other_square += tl.sum(b * b, axis=0)
    if WEIGHTED:
        columns = start + tl.arange(0, SIZE)
        factor = tl.load(norm_weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    product += tl.sum(w.to(tl.float32) * a[None, :], axis=1)
    other_product += tl.sum(w.to(tl.float32) * b[None, :], axis=1)
    if GATED:
        up += tl.sum(u.to(tl.float32) * a[None, :], axis=1)
        other_up += tl.sum(u.to(tl.float32) * b[None, :], axis=1)
    return product, other_product, up, other_up, square, other_square


@triton.jit
def _few_rows(
    x, added, norm_weight, total, weight, up_weight, bias, up_bias, out, rows, count, eps,
    WIDTH: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, OUTPUTS: tl.constexpr, NORM: tl.constexpr,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, ONTO: tl.constexpr,
    LINKED: tl.constexpr,
):  # fmt: skip
    let_next_begin(LINKED)
    one = tl.program_id(0) * 2
    other = tl.minimum(one + 1, rows - 1)
    first = tl.program_id(1) * OUTPUTS
    outputs = first + tl.arange(0, OUTPUTS)
    # The inputs are parts of one size and a rest. The first weights and the rest are on their way while others end.
    w = _weights(weight, first, outputs, count, 0, WIDTH, PART)
    u = w
    if GATED:
        u = _weights(up_weight, first, outputs, count, 0, WIDTH, PART)
    if REST > 0:
        rest = _weights(weight, first, outputs, count, WIDTH // PART * PART, WIDTH, REST)
        up_rest = rest
        if GATED:
            up_rest = _weights(up_weight, first, outputs, count, WIDTH // PART * PART, WIDTH, REST)
    wait_for_others(LINKED)
    zeros = tl.zeros((OUTPUTS,), tl.float32)
    product, other_product, up, other_up, square, other_square = zeros, zeros, zeros, zeros, 0.0, 0.0
    for part in tl.static_range(0, WIDTH // PART):
        if part > 0:
            w = _weights(weight, first, outputs, count, part * PART, WIDTH, PART)
            if GATED:
                u = _weights(up_weight, first, outputs, count, part * PART, WIDTH, PART)
        product, other_product, up, other_up, square, other_square = _add_part(
            product, other_product, up, other_up, square, other_square,
            w, u, x, added, total, norm_weight, one, other, part * PART, WIDTH, PART, NORM, WEIGHTED, ADD, GATED,
        )  # fmt: skip
    if REST > 0:
        product, other_product, up, other_up, square, other_square = _add_part(
            product, other_product, up, other_up, square, other_square,
            rest, up_rest, x, added, total, norm_weight, one, other, WIDTH // PART * PART,
            WIDTH, REST, NORM, WEIGHTED, ADD, GATED,
        )  # fmt: skip
    if NORM:
        length = tl.rsqrt(square / WIDTH + eps)
        other_length = tl.rsqrt(other_square / WIDTH + eps)
        product *= length
        other_product *= other_length
        up *= length
        other_up *= other_length
    there = outputs < count
    if BIASED:
        more = tl.load(bias + outputs, mask=there, other=0.0).to(tl.float32)
        product += more
        other_product += more
    if GATED:
        if BIASED:
            more = tl.load(up_bias + outputs, mask=there, other=0.0).to(tl.float32)
            up += more
            other_up += more
        product = product / (1.0 + tl.exp(-product)) * up
        other_product = other_product / (1.0 + tl.exp(-other_product)) * other_up
    to = out + one * count + outputs
    if ONTO:
        product += tl.load(to, mask=there, other=0.0).to(tl.float32)
    tl.store(to, product.to(out.dtype.element_ty), mask=there)
    if other > one:
        to = out + other * count + outputs
        if ONTO:
            other_product += tl.load(to, mask=there, other=0.0).to(tl.float32)
        tl.store(to, other_product.to(out.dtype.element_ty), mask=there)


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: tuple[Tensor, Tensor | None] | None = None,
    added: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream x + added, and the product of its norm with the weights; all tensors are contiguous and of one dtype.

    Args:
        x, added: [rows, width]; None for nothing to add.
        weight, bias: [outputs, width] and [outputs].
        up: such weights and bias of a second product; the result is then silu(first) * second. Both have a bias, or
            neither has.
        norm: weight [width], or None for ones, and eps of an RMS norm; None for none.
        onto: [rows, outputs], to which the product is added in place.

    Returns:
        [rows, width], `x` itself if nothing is added to it, and [rows, outputs], `onto` if there is one. Sums are in
        float32, of inputs that are not rounded after the norm.
    """
    rows, width = x.shape
    count = weight.shape[0]
    total = x if added is None else torch.empty_like(x)
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device) if onto is None else onto
    up_weight, up_bias = up or (weight, None)
    norm_weight, eps = norm or (None, 0.0)
    part = min(WIDEST, 1 << (width.bit_length() - 1))
    rest = width % part and triton.next_power_of_2(width % part)
    outputs = (GATED_OUTPUTS if up else OUTPUTS) * 2 // weight.itemsize
    _few_rows[(triton.cdiv(rows, TOGETHER), triton.cdiv(count, outputs))](
        x, added, norm_weight, total, weight, up_weight, bias, up_bias, out, rows, count, eps,
        WIDTH=width, PART=part, REST=rest, OUTPUTS=outputs, NORM=norm is not None,
        WEIGHTED=norm_weight is not None, ADD=added is not None, BIASED=bias is not None, GATED=up is not None,
        ONTO=onto is not None, num_warps=WARPS, **launch_options(x),
    )  # fmt: skip
    return total, out
