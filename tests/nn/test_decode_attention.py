"""The Triton kernel in Triton's interpreter, against attention in float64 over the visible slots alone."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds on Linux")

DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 2e-2)}


def reference(query, keys, values, last, first, value_weights, key_weights):
    """Row by row in float64, as the definition of attention has it."""
    rows, heads, _, dim = query.shape
    out = torch.empty(rows, heads, 1, dim, dtype=torch.float64)
    for row in range(rows):
        seen = slice(int(first[row]), int(last[row]) + 1)
        for head in range(heads):
            shared = head * keys.shape[1] // heads
            k, v = keys[row, shared, seen].double(), values[row, shared, seen].double()
            scores = k @ query[row, head, 0].double() / dim**0.5
            if key_weights is not None:
                scores = scores * key_weights[row, seen].double()
            probabilities = scores.softmax(0)
            if value_weights is not None:
                probabilities = probabilities * value_weights[row, seen].double()
            out[row, head, 0] = probabilities @ v
    return out


def check(every: int = 1) -> None:
    """Combinations of weights and padding, at head dimensions that are no powers of two, across chunks.

    Args:
        every: check each so-many-th combination, other ones for each shape.
    """
    from softcfg.nn.kernels import decode_attention as kernels
    from softcfg.nn.kernels.decode_attention import PROGRAMS, decode_attention

    torch.manual_seed(0)
    shapes = [
        (2, 2, 2, 70, 48, "float32", False), (2, 2, 1, 138, 80, "float32", False), (2, 1, 1, 70, 64, "bfloat16", False),
        (2, 2, 1, 70, 48, "bfloat16", True),
    ]  # fmt: skip
    for number, (rows, heads, shared, slots, dim, name, whole) in enumerate(shapes):
        kernels.PROGRAMS = rows * heads if whole else PROGRAMS  # so that slots are not split
        dtype, tolerance = DTYPES[name]
        # Rows of a larger cache, as a layer sees them.
        keys, values = torch.randn(2, 2, rows, shared, slots, dim).to(dtype)[:, 1]
        query = torch.randn(rows, heads, 1, dim).to(dtype)
        last = torch.randint(8, slots, (rows,))
        last[0] = slots - 1
        padding = torch.arange(rows) * 3
        plain = [(*used, False) for used in product((False, True), repeat=3)]
        cases = [*plain, (False,) * 3 + (True,), (True,) * 4]
        for weigh_values, weigh_keys, padded, rounded in cases[number % every :: every]:
            # Cut from longer rows, as decoding hands them over.
            weights = [torch.rand(rows, slots + 3)[:, :slots] if used else None for used in (weigh_values, weigh_keys)]
            first = padding if padded else torch.zeros_like(last)
            scales: list[torch.Tensor | None] = [None, None]
            if rounded:
                stored = torch.randint(-127, 128, (2, *keys.shape), dtype=torch.int8)
                scales = list(torch.rand(2, rows, shared, slots, 1) / 64)
                wanted = reference(query, stored[0] * scales[0], stored[1] * scales[1], last, first, *weights)
            else:
                stored = torch.stack((keys, values))
                wanted = reference(query, *stored, last, first, *weights)
            for row, end in enumerate(last.tolist()):  # what lies after a row's position must not matter
                for behind in scales if rounded else stored:
                    behind[row, :, end + 1 :] = float("nan")
            by_query = None if weights[0] is None else weights[0][:, None]
            out = decode_attention(
                query, *stored, last,
                first=padding if padded else None, key_scales=scales[0], value_scales=scales[1],
                value_weights=by_query, key_weights=weights[1],
            )  # fmt: skip
            torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)
            assert out.dtype == dtype
    kernels.PROGRAMS = PROGRAMS
    # Positions that all rows share come as one number, expanded.
    shared = torch.tensor([3]).expand(rows)
    out = decode_attention(query, keys, values, shared, first=torch.tensor([1]).expand(rows))
    wanted = reference(query, keys, values, shared, torch.ones_like(shared), None, None)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_kernel_is_attention_over_the_visible_slots(every: int):
    # The interpreter is chosen when Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(every)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_a_gpu():
    with torch.device("cuda"):
        check()


if __name__ == "__main__":
    check(int(sys.argv[1]))
