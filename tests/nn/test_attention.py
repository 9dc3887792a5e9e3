import math

import pytest
import torch
from torch import Tensor

from softcfg.nn import AttentionContext, KVCache, Position, Rotary, weighted_attention

ROWS, HEADS, DIM = 3, 2, 8


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, value_weights: Tensor, key_weights: Tensor, mask: Tensor
) -> Tensor:
    """Attention over a cache that really is scaled, one row, head and query at a time, in float64.

    Weights are [rows, n, S]: what query i sees.
    """
    rows, heads, new, dim = query.shape
    slots = key.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for r in range(rows):
        for h in range(heads):
            for i in range(new):
                seen = [s for s in range(slots - new + i + 1) if mask[r, s]]
                if not seen:
                    continue
                scaled_keys = key[r, h, seen].double() * key_weights[r, i, seen, None].double()
                scaled_values = value[r, h, seen].double() * value_weights[r, i, seen, None].double()
                scores = scaled_keys @ query[r, h, i].double() / math.sqrt(dim)
                out[r, h, i] = scores.softmax(0) @ scaled_values
    return out


def inputs(new: int, slots: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(new * 100 + slots)
    query = torch.randn(ROWS, HEADS, new, DIM).to(dtype)
    key, value = torch.randn(2, ROWS, HEADS, slots, DIM).to(dtype)
    return query, key, value


@pytest.mark.parametrize(("new", "slots"), [(1, 1), (1, 9), (4, 4), (3, 11)])
@pytest.mark.parametrize("target", ["none", "value", "key", "both"])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.04)]
)
def test_equals_attention_over_a_scaled_cache(
    new: int, slots: int, target: str, per_query: bool, padded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = inputs(new, slots, dtype)
    weights = torch.rand(ROWS, new, slots) if per_query else torch.rand(ROWS, slots)
    each = weights if per_query else weights[:, None].expand(-1, new, -1)
    ones = torch.ones(ROWS, new, slots)
    mask = torch.ones(ROWS, slots, dtype=torch.bool)
    if padded:
        mask[1, : slots // 3] = False
        mask[2, : slots - 1] = False
    got = weighted_attention(
        query,
        key,
        value,
        value_weights=weights if target in ("value", "both") else None,
        key_weights=weights if target in ("key", "both") else None,
        mask=mask if padded else None,
    )
    expected = brute_force(
        query,
        key,
        value,
        each if target in ("value", "both") else ones,
        each if target in ("key", "both") else ones,
        mask,
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_weights_of_one_change_nothing() -> None:
    query, key, value = inputs(2, 7)
    ones = torch.ones(ROWS, 7)
    torch.testing.assert_close(
        weighted_attention(query, key, value, value_weights=ones, key_weights=ones),
        weighted_attention(query, key, value),
    )


def test_value_weights_do_not_renormalise() -> None:
    query, key, value = inputs(1, 5)
    half = weighted_attention(query, key, value, value_weights=torch.full((ROWS, 5), 0.5))
    torch.testing.assert_close(half, 0.5 * weighted_attention(query, key, value))


def test_weights_may_be_differentiated() -> None:
    query, key, value = inputs(1, 5)
    weights = torch.rand(ROWS, 5, requires_grad=True)
    weighted_attention(query, key, value, value_weights=weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.abs().sum() > 0


def test_layers_may_lie_on_several_devices() -> None:
    cache = KVCache(layers=2, rows=1, heads=1, slots=2, head_dim=4, device=[torch.device("cpu"), torch.device("meta")])
    assert [part.device.type for part in cache.values] == ["cpu", "meta"]
    table = torch.zeros(1, 2)
    for position in (Position.shared(1), Position.by_row(torch.tensor([1]))):
        context = AttentionContext.create(
            position, 1, cache, rotary=Rotary(table, table), value_weights=torch.ones(1, 3), padding=torch.tensor([1])
        )
        assert context.on(torch.device("cpu")) is context
        moved = context.on(torch.device("meta"))
        assert context.on(torch.device("meta")) is moved  # all layers of a device share the copy
        assert moved.cache is cache
        assert moved.slots == 2
        tensors = [moved.mask, moved.padding, moved.value_weights, moved.rotary and moved.rotary.cos]
        if position.row_slots is not None:
            tensors.append(moved.position.row_slots)
        assert [tensor.device.type for tensor in tensors if tensor is not None] == ["meta"] * len(tensors)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_grouped_query_heads_share_keys_and_values(new: int, weighted: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(ROWS, 6, new, DIM, dtype=torch.float64)
    key, value = torch.randn(2, ROWS, 2, 9, DIM, dtype=torch.float64)
    settings = {"value_weights": torch.rand(ROWS, 9), "key_weights": torch.rand(ROWS, new, 9)} if weighted else {}
    got = weighted_attention(query, key, value, **settings)
    each = weighted_attention(query, key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1), **settings)
    torch.testing.assert_close(got, each, atol=1e-12, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mask_by_query_takes_the_place_of_the_causal_rule(weighted: bool) -> None:
    """The last of four queries sees the first two slots alone, as if nothing else were there."""
    query, key, value = inputs(4, 6, torch.float64)
    weights = torch.rand(ROWS, 6) if weighted else None
    mask = torch.ones(ROWS, 4, 6, dtype=torch.bool)
    mask[:, 3, 2:] = False
    got = weighted_attention(query, key, value, value_weights=weights, mask=mask)
    for row, slots in ((slice(0, 3), 6), (slice(3, 4), 2)):
        for i in range(4)[row]:
            alone = weighted_attention(
                query[:, :, i : i + 1],
                key[:, :, :slots],
                value[:, :, :slots],
                value_weights=None if weights is None else weights[:, :slots],
            )
            torch.testing.assert_close(got[:, :, i : i + 1], alone, atol=1e-12, rtol=0)


def test_queries_that_see_nothing_are_no_concern_of_the_others() -> None:
    """Products in bfloat16 read over the end of a row of odd length, and so a NaN that stands there."""
    rows, new, dim = 2, 203, 16
    torch.manual_seed(0)
    query = torch.randn(rows, 4, new, dim).bfloat16()
    key, value = torch.randn(2, rows, 2, new, dim).bfloat16()
    padding = torch.tensor([147, 120])
    mask = torch.arange(new) >= padding[:, None]
    weights = torch.ones(rows, new)
    got = weighted_attention(query, key, value, value_weights=weights, mask=mask)
    assert got.isfinite().all()
    for row, blind in enumerate(padding.tolist()):
        assert (got[row, :, :blind] == 0).all()
        alone = [tensor[row : row + 1, :, blind:] for tensor in (query, key, value)]
        expected = weighted_attention(*alone, value_weights=weights[:1, blind:])
        torch.testing.assert_close(got[row : row + 1, :, blind:], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["value_weights", "key_weights", "attention_weights", "mask"])
@pytest.mark.parametrize("shape", [(ROWS, 8), (ROWS - 1, 9), (ROWS, 2, 9), (9,), (1, 1, 1, 9)])
def test_tables_of_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """Kernels would read what lies behind them."""
    table = torch.ones(shape)
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"{name} must be \[3, 9\] or \[3, 1, 9\]"):
        weighted_attention(*inputs(1, 9), **{name: table.bool() if name == "mask" else table})


def test_keys_of_other_rows_or_heads_are_refused() -> None:
    query, key, value = inputs(1, 9)
    for other in (slice(None, 1), slice(None, 2)):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"queries \[3, 2, 1, 8\] do not fit keys"):
            weighted_attention(query, key[other], value[other])
    with pytest.raises(ValueError, match="do not fit keys"):
        weighted_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="do not fit keys"):
        weighted_attention(key, query, query)
