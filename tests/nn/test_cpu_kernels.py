"""The kernels of a CPU: against their definitions in float64, on one thread and on two, and what they leave alone."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("numba")

from replaying import launched_steps
from small_families import load
from softcfg import CFG, Sampling, SoftCFG, UserError
from softcfg.decoding import decode, draw, image_uniforms
from softcfg.guidance import perturbation_weights
from softcfg.models.lumina.generator import HeadNorm
from softcfg.nn import AttentionContext, KVCache, Position, Rotary, choices, fused, launches, use_backend
from softcfg.nn.backends import BACKENDS, AttentionCall, attention, numba_decode
from softcfg.nn.choices import on_threads
from softcfg.nn.kernels import available, cpu
from softcfg.nn.kv_cache import Int8KVCache
from softcfg.nn.norm import RMSNorm
from softcfg.nn.products import PRODUCTS, use_product
from softcfg.nn.settings import holding

NORMS = (nn.RMSNorm, RMSNorm, nn.LayerNorm, "bare RMS", "bare layer")


@pytest.fixture(autouse=True)
def no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has a gradient, nothing that is measured or fails is kept, and random numbers are the same each time."""
    monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path / "choices"))
    monkeypatch.setattr(choices, "MADE", {})
    monkeypatch.setattr(fused, "UNAVAILABLE", set())
    monkeypatch.setattr(BACKENDS["numba_decode"], "unavailable", {})
    monkeypatch.setattr(numba_decode, "is_faster", lambda: True)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernels that were launched, in turn."""
    kernels: list[int] = []
    launch = cpu.launch

    def noted(kernel: int, *parameters: int) -> None:
        kernels.append(kernel)
        launch(kernel, *parameters)

    monkeypatch.setattr(cpu, "launch", noted)
    return kernels


def close(found: Tensor, wanted: Tensor, far: float = 2e-6) -> None:
    assert found.dtype == torch.float32
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(found.double(), wanted, rtol=far, atol=far)


def heads_of(rows: int, *heads: int, dim: int) -> list[Tensor]:
    """Queries, keys and values [rows, heads, 1, dim] side by side, as one product gives them."""
    parts = torch.randn(rows, 1, sum(heads) * dim).split([each * dim for each in heads], dim=-1)
    return [part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in parts]


def random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0)
    return module.requires_grad_(False)


# Attention.


def exact_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    log_attention: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    query, keys, values = (each.double() for each in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    scores = query @ keys.mT / query.shape[3] ** 0.5
    if key_weights is not None:
        scores = scores * key_weights[:, None, None].double()
    if log_attention is not None:
        scores = scores + log_attention[:, None, None].double()
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    chances = scores.softmax(-1)
    if visible is not None:
        chances = chances.masked_fill(~visible.any(-1)[:, None, None, None], 0)
    if value_weights is not None:
        chances = chances * value_weights[:, None, None].double()
    return chances @ values


def tables(names: str, rows: int, slots: int) -> dict[str, Tensor]:
    """Those of the names, whose rows follow each other in wider steps."""
    made: dict[str, Tensor] = {}
    for name in names.split():
        if name == "visible":
            made[name] = torch.rand(rows, slots + 3)[:, :slots] < 0.6
            made[name][0, -1] = True
        else:
            table = torch.rand(rows, slots + 3)[:, :slots]
            made[name] = table.log() if name == "log_attention" else table
    return made


ALL = "value_weights key_weights log_attention visible"


def by_slot(contents: Tensor) -> Tensor:
    """The same numbers [..., rows, heads, slots, width], in memory the heads of a slot side by side."""
    return contents.movedim(-2, -4).contiguous().movedim(-4, -2)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("slots", [1, 3, 8, 33, 137])
@pytest.mark.parametrize("dim", [6, 24, 32, 48, 80, 100])
def test_attention_is_its_definition(heads: int, key_heads: int, slots: int, dim: int) -> None:
    rows = 3
    query, *_ = heads_of(rows, heads, key_heads, dim=dim)
    cache = torch.randn(2, rows + 1, key_heads, slots + 5, dim)
    cache[:, :, :, slots:] = torch.nan  # is not read
    for names in ("", *ALL.split(), ALL):
        for shared in (1, rows):
            given = tables(names, shared, slots)
            for keys, values in (cache[:, 1:], by_slot(cache)[:, 1:]):
                found = cpu.attention(query, keys, values, slots, **given)
                assert found.is_contiguous()
                close(found, exact_attention(query, keys[:, :, :slots], values[:, :, :slots], **given))


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("slots", [1, 8, 33, 137])
@pytest.mark.parametrize("dim", [6, 24, 32, 80, 100])
def test_attention_over_integers_is_its_definition(heads: int, key_heads: int, slots: int, dim: int) -> None:
    rows = 3
    query, *_ = heads_of(rows, heads, key_heads, dim=dim)
    cache = torch.randint(-128, 128, (2, rows + 1, key_heads, slots + 5, dim), dtype=torch.int8)
    keys, values = cache[:, 1:]
    scales = torch.rand(2, rows + 1, key_heads, slots + 5, 1) / 64
    scales[:, :, :, slots:] = torch.nan  # are not read
    wide = [(keys * scales[0, 1:])[:, :, :slots], (values * scales[1, 1:])[:, :, :slots]]
    for names in ("", "value_weights", ALL):
        given = tables(names, rows, slots)
        wanted = exact_attention(query, *wide, **given)
        for contents, (key_scales, value_scales) in (
            (cache[:, 1:], scales[:, 1:]),
            (by_slot(cache[:, 1:]), by_slot(scales[:, 1:])),
            (by_slot(cache)[:, 1:], scales[:, 1:]),
        ):
            found = cpu.attention(query, *contents, slots, **given, key_scales=key_scales, value_scales=value_scales)
            close(found, wanted, 4e-6)


def test_large_scores_do_not_overflow_in_attention() -> None:
    query, keys, values = torch.randn(2, 4, 1, 32) * 40, torch.randn(2, 2, 9, 32) * 40, torch.randn(2, 2, 9, 32)
    close(cpu.attention(query, keys, values, 9), exact_attention(query, keys, values), 1e-4)


@pytest.mark.parametrize("slots", [1, 6])
def test_a_row_that_sees_nothing_gives_zeros(slots: int) -> None:
    query, (keys, values) = torch.randn(3, 4, 1, 32), torch.randn(2, 3, 2, slots, 32)
    visible = torch.ones(3, slots, dtype=torch.bool)
    visible[1] = False
    found = cpu.attention(query, keys, values, slots, visible=visible)
    close(found, exact_attention(query, keys, values, visible=visible))
    assert torch.equal(found[1], torch.zeros(4, 1, 32))
    assert not (found[[0, 2]] == 0).any()


@pytest.mark.parametrize("where", ["query", "key", "key_weights", "log_attention", "score"])
@pytest.mark.parametrize("slot", [0, 5])
def test_what_is_not_a_number_shows_in_the_heads_that_it_meets(where: str, slot: int) -> None:
    query, (keys, values) = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 2, 6, 32)
    given = {}
    if where == "query":
        query[1, 2, 0, 7] = torch.nan
        met = [(1, 2)]
    elif where in ("key", "score"):  # inf - inf
        keys[1, 1, slot, 3] = torch.nan if where == "key" else torch.inf
        query[1, 2:, 0, 3] = 1
        met = [(1, 2), (1, 3)]
    else:
        given[where] = torch.rand(2, 6)
        given[where][1, slot] = torch.nan
        met = [(1, head) for head in range(4)]
    found = cpu.attention(query, keys, values, 6, **given).isnan()
    assert found.any(-1)[:, :, 0].nonzero().tolist() == [list(each) for each in met]
    assert torch.equal(found.any(-1), found.all(-1))


def test_what_is_hidden_may_be_no_number() -> None:
    query, (keys, values) = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 2, 6, 32)
    visible = torch.arange(6) > 1
    wanted = exact_attention(query, keys, values, visible=visible[None])
    keys[:, :, :2] = torch.nan
    close(cpu.attention(query, keys, values, 6, visible=visible[None]), wanted)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "by_slot"), [(KVCache, False), (KVCache, True), (Int8KVCache, True)])
@pytest.mark.parametrize("names", ["", "value", "key", "attention", "value key attention"])
def test_the_backend_computes_what_the_products_do(
    names: str, kind: type[KVCache], by_slot: bool, padded: bool, cached: bool, launched: list[int]
) -> None:
    rows, slots, position = 3, 7, Position.shared(6)
    keys, values = torch.randn(2, rows, 2, slots, 48)
    cache = kind(2, rows, 2, slots + 4, 48, by_slot=by_slot)
    for contents in (*cache.keys, *cache.values) if kind is KVCache else ():
        contents.fill_(torch.nan)
    cache.write(1, keys, values, Position.start())
    padding = torch.tensor([0, 2, slots]) if padded else None  # the last row sees nothing
    for shape in ((rows, slots + 5), (1, slots + 5), (rows, 1, slots + 5), (1, 1, slots + 5)):
        weights: Any = {f"{name}_weights": torch.rand(shape) for name in names.split()}
        context = AttentionContext.create(position, 1, cache, padding=padding, **weights)
        if not cached:
            mask = context.mask
            mask = mask if mask is None or len(shape) == 2 else mask[:, None]
            factors = {name: each[..., :slots] for name, each in weights.items()}
            context = AttentionContext(position, slots, given_mask=mask, **factors)
        query, key, value = heads_of(rows, 4, 2, 2, dim=48)
        call = AttentionCall(query, *((key, value) if cached else (keys, values)), context, 1)
        with use_backend("math"):
            wanted = attention(call)
        assert not launched
        with use_backend("numba_decode"):
            found = attention(call)
        assert launched == [cpu._attention]
        launched.clear()
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
        if padded:
            assert torch.equal(found[2], torch.zeros(4, 1, 48))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "in float32"), ({"dtype": torch.bfloat16}, "in float32"),
        ({"new": 2}, "one query per row"), ({"heads": 3}, "as many queries for each head"),
        ({"grad": True}, "no gradient"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_backend_does_not_serve(change: dict[str, Any], reason: str, launched: list[int]) -> None:
    dtype, new = change.get("dtype", torch.float32), change.get("new", 1)
    cache = KVCache(1, 2, 2, 6, 32, dtype=dtype)
    query, (key, value) = torch.randn(2, change.get("heads", 4), new, 32), torch.randn(2, 2, 2, new, 32)
    context = AttentionContext.create(Position.shared(6 - new), new, cache)
    call = AttentionCall(*(each.to(dtype) for each in (query, key, value)), context)
    with torch.set_grad_enabled("grad" in change):
        with pytest.raises(UserError, match=reason), use_backend("numba_decode"):
            attention(call)
        if "heads" not in change:
            attention(call)
    assert not launched


# What stands between the products.


def norm_of(kind: Any, width: int) -> nn.Module:
    if kind == "bare RMS":
        return nn.RMSNorm(width, 1e-5, elementwise_affine=False)
    if kind == "bare layer":
        return nn.LayerNorm(width, 1e-6, elementwise_affine=False)
    return random(kind(width, eps=1e-5))


def exact_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """In float64, by hand."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps: Any = norm.eps
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    for each, combine in ((weight, torch.mul), (bias, torch.add)):
        if each is not None:
            each = each.double()
            if each.dim() == 2:  # of groups of heads
                each = each.repeat_interleave(x.shape[1] // len(each), dim=0)[:, None]
            x = combine(x, each)
    return x


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: getattr(kind, "__module__", "") + str(kind)[-12:])
@pytest.mark.parametrize("shape", [(3, 1, 48), (2, 5, 36), (4, 1, 1283)], ids=str)
def test_add_norm_is_its_definition(kind: Any, shape: tuple[int, int, int], launched: list[int]) -> None:
    width = shape[-1]
    norm = norm_of(kind, width)
    for adds, gated, modulated, strided in product((False, True), repeat=4):
        if gated and not adds:
            continue
        x, added = torch.randn(2, *shape) * 3 + 0.5
        if strided:
            x = torch.randn(*shape[:2], width + 4)[..., :width]
        gate, scale, shift = torch.randn(*shape[:2], 3 * width).chunk(3, dim=-1)
        before = [each.clone() for each in (x, added, gate, scale, shift)]
        total, normed = fused.add_norm(
            x, added if adds else None, gate if gated else None, norm=norm,
            modulation=(scale, shift) if modulated else None,
        )  # fmt: skip
        assert launched == [cpu._add_norm]
        launched.clear()
        wanted = x.double()
        if adds:
            wanted = wanted + added.double() * (gate.double() if gated else 1)
        close(total, wanted)
        wanted = exact_norm(norm, total.double())
        if modulated:
            wanted = wanted * (1 + scale.double()) + shift.double()
        close(normed, wanted, 4e-6)
        assert all(map(torch.equal, before, (x, added, gate, scale, shift)))


def test_add_norm_finds_gate_and_modulation_in_tables(launched: list[int]) -> None:
    """As if every row had been given its entries."""
    norm = norm_of(nn.LayerNorm, 36)
    x, added = torch.randn(2, 4, 2, 36)
    gate, scale, shift = torch.randn(5, 3 * 36).chunk(3, dim=-1)
    at = torch.tensor([[4, 0], [4, 3], [1, 1], [0, 2]])
    for given in (at, at.repeat(1, 2)[:, ::2].t().contiguous().t()):
        entries = given.clone()
        found = fused.add_norm(x, added, gate, norm=norm, modulation=(scale, shift), at=given)
        wanted = fused.add_norm(x, added, gate[entries], norm=norm, modulation=(scale[entries], shift[entries]))
        assert launched == [cpu._add_norm] * 2
        assert all(map(torch.equal, found, wanted))
        launched.clear()
    with fused.without_fused_kernels():
        operations = fused.add_norm(x, added, gate, norm=norm, modulation=(scale, shift), at=at)
    for one, other in zip(
        operations, fused.add_norm(x, added, gate, norm=norm, modulation=(scale, shift), at=at), strict=True
    ):
        close(other, one.double(), 4e-6)


@pytest.mark.parametrize("shape", [(1,), (3, 37), (2, 1, 3072), (5, 4099)], ids=str)
def test_gelu_is_its_definition(shape: tuple[int, ...], launched: list[int]) -> None:
    """Next to 0 and far from it, to some units in the last place of its argument."""
    for spread in (1e-6, 1.0, 8.0):
        x = torch.randn(shape) * spread
        found = fused.gelu(x)
        exact = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
        assert found.shape == x.shape
        assert ((found - exact).abs() <= 3e-7 * x.abs()).all()
    assert launched == [cpu._gelu] * 3
    edges = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 20.0, -20.0])
    # Not by PyTorch's own, which gives NaN for inf on some processors.
    expected = torch.tensor([0.0, -0.0, 1e30, -0.0, torch.inf, torch.nan, torch.nan, 20.0, -0.0])
    torch.testing.assert_close(fused.gelu(edges), expected, equal_nan=True)
    assert torch.equal(fused.gelu(x[..., ::2]), fused.gelu(x)[..., ::2])


@pytest.mark.parametrize("dim", [32, 48, 80, 100])
@pytest.mark.parametrize("turned", ["not", "neighbours", "halves"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("by_slot", [False, True])
def test_rotate_and_cache_is_its_definition(
    dim: int, turned: str, by_row: bool, by_slot: bool, launched: list[int]
) -> None:
    rows, heads, key_heads, slots = 3, 6, 2, 7
    for number, kind in enumerate((None, nn.Identity, nn.RMSNorm, RMSNorm, nn.LayerNorm, "bare RMS", HeadNorm)):
        norms: list[nn.Module | None] = [None, None]
        if kind is nn.Identity:
            norms = [nn.Identity(), nn.Identity()]
        elif kind is HeadNorm:
            norms = [random(HeadNorm(groups, dim)) for groups in (3, 2)]
        elif kind is not None:
            norms = [norm_of(kind, dim) for _ in range(2)]
        slot = number % slots
        angles = torch.randn(rows, 1, dim // 2) if by_row else torch.randn(1, dim // 2)
        rotary = None if turned == "not" else Rotary(angles.cos(), angles.sin(), halves=turned == "halves")
        query, key, value = heads_of(rows, heads, key_heads, key_heads, dim=dim)
        cache = KVCache(2, rows, key_heads, slots + 2, dim, by_slot=by_slot)
        for contents in (*cache.keys, *cache.values):
            contents.normal_()
        before = [each.clone() for each in (*cache.keys, *cache.values)]
        context = AttentionContext.create(Position.shared(slot), 1, cache.up_to(slots), rotary=rotary)
        found = fused.rotate_and_cache(query, key, value, 1, context, *norms)
        assert launched == [cpu._rotate_and_cache]
        launched.clear()
        for x, norm, one in zip((query, key), norms, found, strict=True):
            wanted = x.double()
            if kind not in (None, nn.Identity):
                wanted = exact_norm(norm, wanted)  # type: ignore[arg-type]
            close(one, rotated(wanted, angles.double(), turned))
        # The slot holds them, and nothing else is written.
        vectors = {1: found[1], 3: value}
        for index, (contents, old) in enumerate(zip((*cache.keys, *cache.values), before, strict=True)):
            if index in vectors:
                old[:, :, slot] = vectors[index][:, :, 0]
            assert torch.equal(contents, old)


@pytest.mark.parametrize("dim", [6, 24, 32, 100])
@pytest.mark.parametrize("by_slot", [False, True])
def test_rotate_and_cache_rounds_as_the_cache_does(dim: int, by_slot: bool, launched: list[int]) -> None:
    """To the bit, and nothing else is written."""
    rows, slots = 3, 7
    query, key, value = heads_of(rows, 6, 2, 2, dim=dim)
    value[0, 1] = 0
    found, wanted = (Int8KVCache(2, rows, 2, slots + 2, dim, by_slot=each) for each in (by_slot, False))
    angles = torch.randn(1, dim // 2)
    rotary = Rotary(angles.cos(), angles.sin())
    for slot in (0, 4, 6):
        context = AttentionContext.create(Position.shared(slot), 1, found.up_to(slots), rotary=rotary)
        _, turned = fused.rotate_and_cache(query, key, value, 1, context, *(norm_of(RMSNorm, dim) for _ in range(2)))
        wanted.write(1, turned, value, Position.shared(slot))
    assert launched == [cpu._rotate_and_cache] * 3
    for layer in range(2):
        for one, other in zip(found.read(layer, slots + 2), wanted.read(layer, slots + 2), strict=True):
            assert torch.equal(one, other)
    value[2, 0, 0, dim // 2] = torch.nan
    fused.rotate_and_cache(query, key, value, 1, context)
    assert found.read(1, slots)[1].isnan().any(-1).nonzero().tolist() == [[2, 0, 6]]


def rotated(x: Tensor, angles: Tensor, turned: str) -> Tensor:
    """By matrices of two by two."""
    if turned == "not":
        return x
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if turned == "halves" else x.unflatten(-1, (-1, 2))
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # [..., 1, pairs, 2, 2]
    turns = turns[:, None] if turns.dim() == 5 else turns
    found = (turns @ pairs[..., None])[..., 0]
    return (found.transpose(-1, -2) if turned == "halves" else found).flatten(-2)


def test_other_numbers_of_heads_for_weights_are_refused() -> None:
    query, (key, value) = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 4, 1, 8)
    keys, values = torch.zeros(2, 2, 4, 3, 8)
    weights: Any = {"query_weights": (torch.ones(3, 8), None), "key_weights": (torch.ones(3, 8), None)}
    with pytest.raises(ValueError, match="3 vectors of weights cannot serve 4 heads"):
        cpu.rotate_and_cache(query, key, value, 0, keys, values, norm=2, **weights)


@pytest.mark.parametrize("slot", [5, 6, 1000])
def test_what_is_beyond_the_cache_is_an_error_and_not_written(slot: int, launched: list[int]) -> None:
    cache = KVCache(1, 2, 2, 8, 32)
    query, key, value = heads_of(2, 4, 2, 2, dim=32)
    context = AttentionContext.create(Position.shared(slot), 1, cache.up_to(5))
    with pytest.raises(ValueError, match="the cache has 5 slots"):
        fused.rotate_and_cache(query, key, value, 0, context)
    assert not launched
    assert not cache.keys[0].any()
    assert not cache.values[0].any()


def test_silu_product_is_its_definition(launched: list[int]) -> None:
    width = 2 * cpu.PIECE + 700
    gate = torch.linspace(-200, 200, 3 * width)[torch.randperm(3 * width)].view(3, 1, width)
    gate[0, 0, :5] = torch.tensor([0.0, -0.0, -87.0, -1e-30, 88.0])
    both = torch.cat((gate, torch.randn(3, 1, width)), dim=-1)
    strided = both.chunk(2, dim=-1)
    for gate, up in (strided, [each.contiguous() for each in strided], [each[:, 0] for each in strided]):
        found = fused.silu_product(gate, up)
        assert launched.pop() == cpu._silu_product
        wanted = gate.double() / (1 + (-gate.double()).exp()) * up.double()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-35)
    gate, up = torch.randn(2, 2, 7, 30)
    gate[1, 3, 5] = torch.nan
    assert fused.silu_product(gate, up).isnan().nonzero().tolist() == [[1, 3, 5]]


def test_a_token_that_is_alone_has_all_of_the_budget() -> None:
    """Its weight is exactly 0: a strength of 0.1 makes 0.2 of 6e-8."""
    confidence = torch.zeros(200, 16)
    confidence[:, 0] = torch.linspace(0.01, 0.99, 200)
    weights = torch.empty_like(confidence)
    assert fused.write_weights(confidence, weights, step_norm=True, strength=0.1, floor=0.0, eps=0.0, successor=False)
    assert not weights[:, 0].any()
    assert (weights[:, 1:] == 1).all()


def test_write_weights_is_its_definition(launched: list[int]) -> None:
    confidence = torch.rand(3, 300)
    confidence[:, 200:] = 0
    confidence[1] = 0  # nothing is drawn yet
    confidence[2, 1:] = 0  # one token has all of the budget
    whole = torch.full((5, 310), 7.0)
    for step_norm, strength, floor, eps, successor in product(
        (True, False), (1.0, 0.5, 3.0), (0.0, 0.3), (0.0, 0.25), (True, False)
    ):
        settings: Any = {"step_norm": step_norm, "strength": strength, "floor": floor, "eps": eps}
        assert fused.write_weights(confidence, whole[2:, 10:], **settings, successor=successor)
        assert launched.pop() == cpu._write_weights
        wanted = perturbation_weights(confidence.double(), **settings, alignment=("own", "successor")[successor])
        close(whole[2:, 10:], wanted)
        assert (whole[:2] == 7).all()
        assert (whole[:, :10] == 7).all()
    assert not fused.write_weights(confidence.double(), whole[2:, 10:].double(), **settings, successor=False)
    assert not launched


def test_write_confidence_is_its_definition(launched: list[int]) -> None:
    confidence = torch.rand(5, 320)[2:, 10:310]
    logits, at = torch.randn(3, 2, 5000)[:, 0] * 4, torch.tensor([210])
    drawn = torch.stack((logits.argmax(-1), torch.tensor([0, 17, 4999])), dim=-1)[:, 1]
    for temperature, codes, tokens in product(
        (1.0, 0.7, 1e-3),
        (None, torch.arange(300) != 210, torch.arange(300) == 210, torch.rand(3, 305)[:, :300] < 0.5),
        (None, drawn),
    ):
        written = confidence.clone()
        assert fused.write_confidence(logits, written, at, temperature, codes, tokens)
        assert launched.pop() == cpu._write_confidence
        wanted = confidence.double()
        probabilities = (logits.double() / temperature).softmax(-1)
        wanted[:, 210] = probabilities.amax(-1) if tokens is None else probabilities[range(3), tokens]
        if codes is not None:
            wanted[:, 210] *= codes[..., 210]
        close(written, wanted)
    logits[0, 17], logits[2, 4999] = torch.nan, torch.inf  # infinity over infinity
    assert fused.write_confidence(logits, written, at, 1.0)
    assert torch.isnan(written).nonzero().tolist() == [[0, 210], [2, 210]]
    assert fused.write_confidence(torch.zeros(3, 7), written, at, 1.0, None, torch.tensor([-1, 7, 1 << 40]))
    assert not written[:, 210].any()
    for column in (300, -1):
        with pytest.raises(IndexError, match="there are 300 columns"):
            cpu.write_confidence(logits, written, torch.tensor([column]), 1.0)


@pytest.mark.parametrize("codes", [1, 3, 64, 65, 1000])
def test_draw_is_its_definition(launched: list[int], codes: int) -> None:
    batch = 40
    logits, uniforms = torch.randn(2, batch, 2, codes + 3)[:, :, 1, 3:] * 4, torch.rand(batch, 3).double()[:, 1]
    cond, other = logits
    cond[::3, 0] = other[::3, 0] = -torch.inf if codes > 1 else 0  # ruled out
    uniforms[:2] = torch.tensor([1e-6, 1 - 1e-6])
    tokens, some = torch.arange(codes), (codes // 3, codes // 3 + max(1, codes // 2))
    for guided, scale, temperature, allowed in product((True, False), (0.5, 3.0), (1.0, 0.7, 0.1), (None, some)):
        given = None if allowed is None else torch.tensor([allowed])
        found = fused.draw(cond, other if guided else None, torch.tensor([scale]), temperature, uniforms, given)
        assert found is not None
        assert launched.pop() == cpu._draw
        drawn, seen = found
        wanted = other.double() + scale * (cond.double() - other.double()) if guided else cond.double()
        wanted = wanted.where(cond > -torch.inf, -torch.inf) / temperature
        if allowed is not None:
            wanted = wanted.where((tokens >= allowed[0]) & (tokens < allowed[1]), -torch.inf)
        assert torch.equal(drawn, draw(wanted.softmax(-1), uniforms))
        branches = [cond, other] if guided else [cond]
        torch.testing.assert_close(seen, torch.stack([each.amax(-1) for each in (*branches, wanted.float())]))


def test_a_code_without_a_probability_is_never_drawn() -> None:
    logits = torch.full((3000, 200), -torch.inf)
    possible = torch.tensor([7, 63, 64, 198])
    logits[:, possible] = torch.tensor([0.0, -30, 5, 1])
    uniforms = torch.cat((torch.rand(2998).double(), torch.tensor([0, 1 - 2**-53])))
    found = fused.draw(logits, None, torch.ones(1), 1.0, uniforms)
    assert found is not None
    assert set(found[0].tolist()) <= set(possible.tolist())
    assert found[0][-2:].tolist() == [7, 198]


def test_what_draw_saw_is_not_finite_where_there_is_no_distribution() -> None:
    cond, other, uniforms = torch.randn(6, 70), torch.randn(6, 70), torch.full((6,), 0.5).double()
    cond[1, 66], other[2, 0], cond[3, 3], cond[4] = torch.nan, torch.nan, torch.inf, -torch.inf
    other[5, 9] = -torch.inf  # and infinite once guided
    found = fused.draw(cond, other, torch.tensor([2.0]), 1.0, uniforms)
    assert found is not None
    drawn, seen = found
    assert seen.isfinite().T.tolist() == [
        [True, True, True], [False, True, False], [True, False, False], [False, True, False], [False, True, False],
        [True, True, False],
    ]  # fmt: skip
    assert seen[0, 1].isnan()
    assert seen[1, 2].isnan()
    assert seen[0, 3:5].tolist() == [torch.inf, -torch.inf]
    assert ((drawn >= 0) & (drawn < 70)).all()


def test_draw_leaves_alone_what_it_was_not_made_for() -> None:
    logits, scale, uniforms = torch.randn(2, 5), torch.ones(1), torch.rand(2).double()
    assert fused.draw(logits, None, scale, 1.0, uniforms.float()) is None
    assert fused.draw(logits.double(), None, scale, 1.0, uniforms) is None
    with fused.without_fused_kernels():
        assert fused.draw(logits, None, scale, 1.0, uniforms) is None
    for outside in ((0, 6), (-1, 3), (2, 2)):
        with pytest.raises(ValueError, match="not among the 5 of the vocabulary"):
            cpu.draw(logits, None, scale, 1.0, uniforms, torch.tensor([outside]))


class Half(CFG):
    def guide_step(self, *args: Any, **more: Any) -> Any:
        guided, state = super().guide_step(*args, **more)
        return guided / 2, state


@pytest.mark.parametrize("family", ["alitok", "emu3", "lumina-mgpt-2"])
@pytest.mark.parametrize("plain", [CFG(1.0), CFG(3.0), SoftCFG(3.0), CFG(3.0, perturbation="pag")])
def test_tokens_are_drawn_by_a_kernel_and_as_without(
    launched: list[int], plain: CFG, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = launched_steps(monkeypatch)
    generator, sampling = load(family), Sampling(0.8)
    inputs = generator.example_inputs(5)
    tokens = generator.condition(inputs, guided=False).num_tokens
    uniforms = image_uniforms(0, range(5), tokens)
    found = decode(generator, inputs, plain, uniforms=uniforms, sampling=sampling)
    assert launched.count(cpu._draw) + len(steps) == tokens
    with fused.without_fused_kernels():
        wanted = decode(generator, inputs, plain, uniforms=uniforms, sampling=sampling)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("guidance", "sampling"),
    [
        (CFG(3.0), Sampling(top_k=5)),
        (CFG(3.0), Sampling(top_p=0.9)),
        (CFG(3.0), Sampling(entropy_gain=2.5)),
        (CFG(3.0, rule="apg"), Sampling()),
        (CFG(3.0, perturbation="softcfg", perturbation_scale=1.0), Sampling()),
        (Half(3.0), Sampling()),
    ],
)
def test_other_tokens_are_drawn_by_operations(launched: list[int], guidance: CFG, sampling: Sampling) -> None:
    generator = load("alitok")
    decode(generator, [0], guidance, uniforms=image_uniforms(0, range(1), generator.num_tokens), sampling=sampling)
    assert launched
    assert cpu._draw not in launched


# Products.


@pytest.mark.parametrize("outputs", [1, 7, 15, 16, 17, 32, 41, 112])
@pytest.mark.parametrize("inputs", [2, 48, 130])
def test_packed_weights_are_the_weights(outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    weight[0, :2] = torch.tensor([-0.0, torch.nan])
    packed = cpu.pack(weight)
    assert packed.is_contiguous()
    assert packed.shape == weight.shape
    assert packed.data_ptr() != weight.data_ptr()
    assert torch.equal(cpu.unpack(packed).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("outputs", [1, 7, 16, 41, 48])
@pytest.mark.parametrize("inputs", [2, 48, 130])
def test_a_product_is_its_definition(inputs: int, outputs: int) -> None:
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    packed = cpu.pack(weight)
    for rows, with_bias, with_onto in product(range(1, 15), (False, True), (False, True)):
        x, onto = torch.randn(rows, 1, inputs), torch.randn(rows, 1, outputs)
        found = cpu.product(x, packed, bias if with_bias else None, onto if with_onto else None)
        wanted = x.double() @ weight.double().T + with_bias * bias.double() + with_onto * onto.double()
        close(found, wanted)


@pytest.mark.parametrize("inputs", [2, 48, 130])
def test_a_row_of_a_product_has_the_same_bits_among_any_others(inputs: int) -> None:
    weight, bias, onto = torch.randn(57, inputs), torch.randn(57), torch.randn(14, 57)
    packed, x = cpu.pack(weight), torch.randn(14, inputs)
    for more in ((None, None), (bias, None), (None, onto), (bias, onto)):
        alone = [
            cpu.product(x[i : i + 1], packed, more[0], None if more[1] is None else onto[i : i + 1]) for i in range(14)
        ]
        for rows in range(1, 15):
            together = cpu.product(x[:rows], packed, more[0], None if more[1] is None else onto[:rows])
            assert torch.equal(together, torch.cat(alone[:rows]))


def test_inputs_of_a_product_need_not_lie_side_by_side() -> None:
    weight, wide, onto = torch.randn(41, 48), torch.randn(2, 3, 96), torch.randn(41, 2, 3)
    x, onto = wide[..., 48:], onto.permute(1, 2, 0)
    close(cpu.product(x, cpu.pack(weight), None, onto), x.double() @ weight.double().T + onto.double(), 1e-5)


def test_a_product_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="inputs of width 48, got 32"):
        cpu.product(torch.randn(2, 32), cpu.pack(torch.randn(16, 48)))
    assert cpu.can_pack(torch.empty(16, 48))
    for refused in (torch.empty(16, 47), torch.empty(16, 0), torch.empty(16, 48, dtype=torch.float64)):
        assert not cpu.can_pack(refused)


# Threads.


def cases() -> dict[str, Callable[[], Any]]:
    """Each kernel on more numbers than a thread takes by itself, and on items that two threads cannot share evenly."""
    query, *_ = heads_of(9, 6, 3, 3, dim=80)
    keys, values = torch.randn(2, 9, 3, 137, 80)
    rounded, scales = torch.randint(-127, 128, (2, 9, 3, 137, 80), dtype=torch.int8), torch.rand(2, 9, 3, 137, 1)
    weights: Any = {"value_weights": torch.rand(9, 137), "visible": torch.rand(9, 137) < 0.7}
    x, added = torch.randn(2, 33, 1, 1280)
    norm, angles = norm_of(nn.LayerNorm, 1280), torch.randn(65, 1, 40)
    parts, cache = heads_of(65, 6, 3, 3, dim=80), KVCache(1, 65, 3, 4, 80)
    context = AttentionContext.create(Position.shared(2), 1, cache, rotary=Rotary(angles.cos(), angles.sin()))
    gate, up = torch.randn(2, 3, 1, 3 * cpu.PIECE + 5)
    confidence, written = torch.rand(65, 600), torch.empty(65, 600)
    logits, uniforms = torch.randn(7, 8000), torch.rand(7).double()
    packed, inputs, bias, onto = (
        cpu.pack(torch.randn(409, 130)), torch.randn(13, 1, 130), torch.randn(409), torch.randn(13, 1, 409),
    )  # fmt: skip
    settings: Any = {"step_norm": True, "strength": 0.5, "floor": 0.1, "eps": 0.0, "successor": True}

    def cached() -> list[Tensor]:
        return [*fused.rotate_and_cache(*parts, 0, context), cache.keys[0].clone(), cache.values[0].clone()]

    def weighted() -> Tensor:
        assert fused.write_weights(confidence, written, **settings)
        return written.clone()

    def confident() -> Tensor:
        assert fused.write_confidence(logits, written[:7], torch.tensor([3]), 0.9, None, torch.arange(7))
        return written[:7, 3].clone()

    return {
        "attention": lambda: cpu.attention(query, keys, values, 137, **weights),
        "attention over integers": lambda: cpu.attention(
            query, *rounded, 137, **weights, key_scales=scales[0], value_scales=scales[1]
        ),
        "add_norm": lambda: fused.add_norm(x, added, norm=norm),
        "rotate_and_cache": cached,
        "silu_product": lambda: fused.silu_product(gate, up),
        "gelu": lambda: fused.gelu(gate),
        "write_weights": weighted,
        "write_confidence": confident,
        "draw": lambda: cpu.draw(logits, logits.flip(0), torch.tensor([1.5]), 0.9, uniforms),
        "product": lambda: cpu.product(inputs, packed, bias, onto),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_two_threads_compute_the_bits_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu._openmp()[0]:
        pytest.skip("PyTorch's threads are not found")
    run, used, launch = cases()[name], [], cpu._launch

    def noted(kernel: int, parallel: int, threads: int, parameters: tuple[int, ...]) -> int:
        used.append(threads)
        return launch(kernel, parallel, threads, parameters)

    monkeypatch.setattr(cpu, "_launch", noted)
    found = []
    for threads in (1, 2, 2):
        result = on_threads(threads, run)
        found.append([result] if isinstance(result, Tensor) else list(result))
    assert used == [1, 2, 2]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_few_numbers_and_single_items_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(cpu, "_launch", lambda kernel, parallel, threads, parameters: used.append(threads))
    for rows, width in ((2, cpu.GRAIN // 2), (1, 4 * cpu.GRAIN), (2, cpu.GRAIN)):
        x = torch.randn(rows, width)
        on_threads(2, lambda x=x: cpu.add_norm(x, None, None, 1, None, None, 0.0, None))
    assert used == [1, 1, 2 if cpu._openmp()[0] else 1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("by_slot", [False, True])
def test_a_program_computes_the_bits_of_its_kernels(threads: int, by_slot: bool) -> None:
    """For other slots, tables and rotations than those with which it was recorded."""
    rows, slots = 8, 150
    caches = [KVCache(1, rows, 2, slots, 64, by_slot=by_slot) for _ in range(2)]
    for one, other in zip(*(cache.keys + cache.values for cache in caches), strict=True):
        other.copy_(one.normal_())
    query, key, value = heads_of(rows, 4, 2, 2, dim=64)
    packed, gate = cpu.pack(torch.randn(300, 256)), torch.randn(rows, 300)

    def step(cache: KVCache, slot: int, cos: Tensor, sin: Tensor, tables: list[Tensor | None]) -> list[Tensor]:
        turned = cpu.rotate_and_cache(query, key, value, slot, cache.keys[0], cache.values[0], cos=cos, sin=sin)
        attended = cpu.attention(turned[0], cache.keys[0], cache.values[0], slot + 1, *tables)
        found = cpu.product(attended.view(rows, 256), packed)
        return [*turned, attended, found, cpu.silu_product(gate, found)]

    recorded: list[tuple[int, ...]] = []
    with holding(launches.recorded, recorded):
        outputs = step(caches[0], 4, torch.rand(1, 32), torch.rand(1, 32), [None] * 4)
    program = cpu.Program(recorded, [])
    for half in ("keys", "values"):
        getattr(caches[1], half)[0].copy_(getattr(caches[0], half)[0])
    for slot, cosines, names in ((5, rows, ALL), (149, rows, "value_weights"), (6, 1, "visible"), (7, 1, "")):
        cos, sin = torch.randn(2, cosines, 32)
        given = tables(names, cosines, slot + 1)
        several: list[Tensor | None] = [given.get(name) for name in ALL.split()]
        wanted = step(caches[1], slot, cos, sin, several)
        for each in outputs:
            each.fill_(torch.nan)
        program.set_slot(slot + 1, cos, sin, several)
        on_threads(threads, program.launch)
        assert all(map(torch.equal, outputs, wanted))
        assert torch.equal(caches[0].keys[0], caches[1].keys[0])
        assert torch.equal(caches[0].values[0], caches[1].values[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_runs_several_times_with_parameters_that_move(threads: int) -> None:
    """Tokens of one column after the other are looked up, and what is found is rotated and cached slot by slot."""
    images, copies, width, slots = 3, 2, 64, 40
    table, tokens = torch.randn(50, width), torch.randint(50, (images, slots))
    fed = torch.zeros(images * copies, 1, width)
    heads = fed.view(images * copies, 1, 2, 32).transpose(1, 2)
    found, wanted = (KVCache(1, images * copies, 2, slots, 32) for _ in range(2))
    cos, sin = torch.randn(2, slots, 16)

    def step(cache: KVCache, slot: int) -> object:
        turn = {"cos": cos[slot : slot + 1], "sin": sin[slot : slot + 1]}
        return cpu.rotate_and_cache(heads, heads, heads, slot, cache.keys[0], cache.values[0], **turn)

    recorded = [cpu.as_recorded(*cpu.embedded(tokens[:, 2], table, fed))]
    with holding(launches.recorded, recorded):
        turned = step(found, 2)
    program = cpu.Program(recorded, turned)
    places = []
    for slot in (4, 3):
        program.parameters_of(0)[cpu.TOKENS_FED] = tokens.data_ptr() + 8 * slot
        program.set_slot(slot + 1, cos[slot : slot + 1], sin[slot : slot + 1], [None] * 4)
        places.append(program.parameters())
    on_threads(threads, lambda: program.launch(37, places[0] - places[1]))
    assert torch.equal(fed, table[tokens[:, -1]].repeat(copies, 1)[:, None])
    for slot in range(3, slots):
        fed.copy_(table[tokens[:, slot]].repeat(copies, 1)[:, None])
        step(wanted, slot)
    for half in ("keys", "values"):
        assert torch.equal(getattr(found, half)[0][:, :, 3:], getattr(wanted, half)[0][:, :, 3:])


# Where PyTorch's operations take their place.


class Own(Tensor):
    """A subclass that wants to see what is computed with it."""


class Watching(TorchDispatchMode):
    """A mode that wants to see all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def check_operations(dtype: torch.dtype = torch.float32, made: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """What each function returns, against float64."""
    far = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]

    def near(found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == dtype
        torch.testing.assert_close(found.detach().double().as_subclass(Tensor), wanted, rtol=far, atol=far)

    x, added = (made(each) for each in torch.randn(2, 3, 1, 48).to(dtype))
    norm = norm_of(RMSNorm, 48).to(dtype)
    wide = [each.detach().double().as_subclass(Tensor) for each in (x, added)]
    total, normed = fused.add_norm(x, added, norm=norm)
    near(total, wide[0] + wide[1])
    near(normed, exact_norm(norm, total.detach().double().as_subclass(Tensor)))
    near(fused.silu_product(x, added), F.silu(wide[0]) * wide[1])
    cache = KVCache(1, 3, 2, 5, 48, dtype=dtype)
    query, key, value = (made(each.to(dtype)) for each in heads_of(3, 4, 2, 2, dim=48))
    context = AttentionContext.create(Position.shared(3), 1, cache)
    found = fused.rotate_and_cache(query, key, value, 0, context)
    for one, other in ((found[0], query), (found[1], key), (cache.keys[0][:, :, 3:4], key)):
        near(one, other.detach().double().as_subclass(Tensor))
    near(cache.values[0][:, :, 3:4], value.detach().double().as_subclass(Tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_the_operations(dtype: torch.dtype, launched: list[int]) -> None:
    check_operations(dtype)
    assert not launched


def test_what_has_a_gradient_is_left_to_the_operations(launched: list[int]) -> None:
    with torch.enable_grad():
        check_operations()
        x = torch.randn(3, 4, requires_grad=True)
        total, normed = fused.add_norm(x, x, norm=nn.LayerNorm(4))
        (total + fused.silu_product(normed, x)).sum().backward()
    assert not launched
    assert x.grad is not None


def test_a_subclass_sees_the_operations(launched: list[int]) -> None:
    check_operations(made=lambda x: x.as_subclass(Own))
    assert isinstance(fused.silu_product(*torch.randn(2, 4).as_subclass(Own)), Own)
    assert not launched


def test_a_subclass_among_plain_tensors_sees_the_operations(launched: list[int]) -> None:
    x, other = torch.randn(3, 1, 48), torch.randn(3, 1, 48).as_subclass(Own)
    assert isinstance(fused.silu_product(x, other), Own)
    assert isinstance(fused.add_norm(x, other, norm=norm_of(RMSNorm, 48))[1], Own)
    assert not launched


def test_a_mode_sees_the_operations(launched: list[int]) -> None:
    with Watching() as watching:
        check_operations()
        x = torch.randn(2, 2, 1, 32)
        context = AttentionContext.create(Position.shared(3), 1, KVCache(1, 2, 2, 5, 32))
        attention(AttentionCall(x, x, x, context))
    assert not launched
    assert {"aten::silu", "aten::linalg_vector_norm", "aten::copy_"} <= watching.names
    check_operations()
    assert launched == [cpu._add_norm, cpu._silu_product, cpu._rotate_and_cache]


def test_kernels_can_be_turned_off(launched: list[int]) -> None:
    confidence = torch.rand(2, 5)
    settings: Any = {"step_norm": True, "strength": 1.0, "floor": 0.0, "eps": 0.0, "successor": False}
    with fused.without_fused_kernels():
        check_operations()
        assert not fused.write_weights(confidence, torch.empty(2, 5), **settings)
        assert not fused.write_confidence(torch.randn(2, 9), confidence, torch.tensor([1]), 1.0)
    assert not launched
    assert fused.write_weights(confidence, torch.empty(2, 5), **settings)
    assert len(launched) == 1


def test_strided_tables_of_a_rotation_are_left_to_the_operations(launched: list[int]) -> None:
    angles = torch.randn(1, 32)
    rotary = Rotary(angles.cos()[:, ::2], angles.sin()[:, ::2])
    context = AttentionContext.create(Position.shared(4), 1, KVCache(1, 2, 3, 5, 32), rotary=rotary)
    query, key, value = torch.randn(3, 2, 3, 1, 32)
    found = fused.rotate_and_cache(query, key, value, 0, context)
    turns = torch.polar(torch.ones(1, 16).double(), angles.double()[:, ::2])
    for one, x in zip(found, (query, key), strict=True):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns
        close(one, torch.view_as_real(pairs).flatten(-2))
    assert not launched


def test_weights_of_another_number_of_rows_are_left_to_the_operations(launched: list[int]) -> None:
    settings: Any = {"step_norm": True, "strength": 1.0, "floor": 0.0, "eps": 0.0, "successor": False}
    assert not fused.write_weights(torch.rand(1, 5), torch.ones(2, 5), **settings)
    assert not launched


def test_hooks_of_norms_are_called(launched: list[int]) -> None:
    norm, x, calls = norm_of(RMSNorm, 48), torch.randn(3, 1, 48), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    close(fused.add_norm(x, None, norm=norm)[1], exact_norm(norm, x.double()))
    assert calls == [1]
    assert not launched


@pytest.mark.parametrize(
    ("broken", "named"),
    [("launch", "plain"), ("launch", "measured"), ("import", "plain"), ("import", "measured"), ("import", "panels")],
)
def test_decoding_goes_on_without_kernels_that_do_not_run(
    broken: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, uniforms = load("alitok"), image_uniforms(3, range(2), 6)
    if named == "measured":  # which product is the fastest, and whether attention by the kernel is
        monkeypatch.undo()
        monkeypatch.setattr(choices, "MADE", {})
        for module in ("products", "backends.numba_decode", "backends.embedding_bag"):
            monkeypatch.setattr(f"softcfg.nn.{module}.time_sides", once)
        monkeypatch.setattr(choices, "_keep", lambda which, name: name)
        monkeypatch.setattr(choices, "_kept", lambda which: "")
    monkeypatch.setattr(fused, "UNAVAILABLE", set())
    monkeypatch.setattr(BACKENDS["numba_decode"], "unavailable", {})

    def drawn(name: str | None) -> Tensor:
        with use_product(name):
            return decode(generator, [0, 2], SoftCFG(3.0), uniforms=uniforms)

    with use_backend("math"), fused.without_fused_kernels():
        wanted = drawn("plain")
    if broken == "import":
        monkeypatch.setitem(sys.modules, cpu.__name__, None)
        monkeypatch.delattr("softcfg.nn.kernels.cpu")
        monkeypatch.setattr(available, "cpu_kernels", functools.cache(available.cpu_kernels.__wrapped__))
    else:
        monkeypatch.setattr(cpu, "launch", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(drawn(None if named == "measured" else named), wanted)
    assert {each.category for each in caught} == {RuntimeWarning}
    told = [str(warning.message).split(",")[0] for warning in caught]
    assert len(told) == len(set(told)) <= 3  # the kernels, their attention and their product, each once at most


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler")


def once(sides: dict[Any, Callable[[], object]]) -> dict[Any, float]:
    """As if the last of the sides were the fastest, after all of them have run."""
    for run in sides.values():
        run()
    return {name: -float(index) for index, name in enumerate(sides)}


@pytest.mark.slow
def test_damaged_files_of_compiled_kernels_do_no_harm(tmp_path: Path) -> None:
    code = "import torch; from softcfg.nn.kernels import cpu; print(cpu.silu_product(torch.ones(2), torch.ones(2)))"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error"}
    outputs = []
    for size in (None, 0, 40):
        files = [path for path in tmp_path.rglob("*.nb?") if path.is_file()]
        assert bool(files) == (size is not None)
        for path in files:
            path.write_bytes(path.read_bytes()[:size])
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        outputs.append((found.returncode, found.stdout, found.stderr))
    assert outputs == [(0, "tensor([0.7311, 0.7311])\n", "")] * 3


@pytest.mark.parametrize("name", ["add_norm", "silu_product", "rotate_and_cache", "write_weights", "write_confidence"])
def test_the_first_kernel_that_fails_is_told_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, name, failing)
    x, norm = torch.randn(3, 1, 48), norm_of(RMSNorm, 48)
    context = AttentionContext.create(Position.shared(3), 1, KVCache(1, 3, 2, 5, 48))
    settings: Any = {"step_norm": True, "strength": 1.0, "floor": 0.0, "eps": 0.0, "successor": False}
    calls: dict[str, Callable[[], Any]] = {
        "add_norm": lambda: fused.add_norm(x, x, norm=norm),
        "silu_product": lambda: fused.silu_product(x, x),
        "rotate_and_cache": lambda: fused.rotate_and_cache(*heads_of(3, 4, 2, 2, dim=48), 0, context),
        "write_weights": lambda: fused.write_weights(torch.rand(2, 5), torch.empty(2, 5), **settings),
        "write_confidence": lambda: fused.write_confidence(x[:, 0], torch.rand(3, 5), torch.tensor([1]), 1.0),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [calls[name]() for _ in range(2)]
        check_operations()
    assert [str(warning.message) for warning in caught] == [
        "fused kernels do not run on cpu, PyTorch's operations take their place: RuntimeError: no compiler"
    ]
    assert all(each is False for each in results) == name.startswith("write")
    assert {torch.device("cpu")} == fused.UNAVAILABLE


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("all memory is taken"), MemoryError()], ids=repr)
def test_out_of_memory_is_not_a_kernel_that_does_not_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        raise error

    monkeypatch.setattr(cpu, "launch", launch)
    x = torch.randn(2, 2, 1, 32)
    context = AttentionContext.create(Position.shared(3), 1, KVCache(1, 2, 2, 5, 32))
    with pytest.raises(type(error)):
        fused.silu_product(torch.ones(2), torch.ones(2))
    with pytest.raises(type(error)):
        attention(AttentionCall(x, x, x, context))
    assert not fused.UNAVAILABLE
    assert not BACKENDS["numba_decode"].unavailable


SCRIPT = """
import sys
import torch
from small_families import load
from softcfg import SoftCFG
from softcfg.decoding import decode, image_uniforms
from softcfg.nn import products
from softcfg.nn.backends import embedding_bag, numba_decode

for module in (products, embedding_bag, numba_decode):
    module.time_sides = lambda sides: {name: float(index) for index, name in enumerate(sides)}
generator = load("alitok")
decode(generator, [0, 1], SoftCFG(3.0), uniforms=image_uniforms(0, range(2), 6))
print("numba" in sys.modules, products.PRODUCTS["panels"].can_serve(torch.empty(2, 2)))
"""


@pytest.mark.parametrize("value", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_variable_turns_all_of_it_off(value: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", available.CPU_VARIABLE: value}
    environment[choices.FOLDER_VARIABLE] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(value == "1")] * 2


def test_panels_are_offered_where_numba_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRODUCTS["panels"].can_serve(torch.empty(2, 2))
    monkeypatch.setattr(available, "has_numba", lambda: False)
    assert not PRODUCTS["panels"].can_serve(torch.empty(2, 2))


def test_a_mistake_of_the_caller_switches_nothing_off() -> None:
    x = torch.randn(2, 2, 1, 32)
    context = AttentionContext(Position.shared(4), 5, value_weights=torch.rand(3, 5))
    call = AttentionCall(x, *torch.randn(2, 2, 2, 5, 32), context)
    with pytest.raises(ValueError, match="must have one row, or 2 like the queries"):
        BACKENDS["numba_decode"].attend(call)
    logits, allowed = torch.randn(2, 9), torch.tensor([[3, 30]])
    with pytest.raises(ValueError, match="are not among the 9 of the vocabulary"):
        fused.draw(logits, None, torch.ones(1), 1.0, torch.rand(2, dtype=torch.float64), allowed)
    assert not fused.UNAVAILABLE
    assert not BACKENDS["numba_decode"].unavailable


@pytest.mark.slow
def test_without_compilation_there_are_no_kernels(tmp_path: Path) -> None:
    """And what was chosen meanwhile is not what is chosen with it."""
    code = (
        "import softcfg; from softcfg.nn.products import PRODUCTS; import torch\n"
        "softcfg.Pipeline.from_pretrained('fashion-small')([0])\n"
        "print(PRODUCTS['panels'].can_serve(torch.empty(2, 2)))"
    )
    environment = os.environ | {choices.FOLDER_VARIABLE: str(tmp_path), "PYTHONWARNINGS": "ignore"}
    for more, expected in (({"NUMBA_DISABLE_JIT": "1"}, "False"), ({}, "True")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[-1] == expected
