"""The fused kernels in Triton's interpreter: against their definitions in float64, and the steps of every family."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softcfg
from small_families import load
from softcfg import CFG, Sampling, SoftCFG
from softcfg.decoding import decode, image_uniforms
from softcfg.decoding.sequential import Decoder, Step
from softcfg.guidance import perturbation_weights
from softcfg.models.base import Generator
from softcfg.models.lumina.generator import HeadNorm
from softcfg.nn import AttentionContext, KVCache, Position, Rotary, fused, kernels, launches
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache
from softcfg.nn.linear import are_side_by_side, prepared_linear_layers
from softcfg.nn.norm import RMSNorm
from softcfg.nn.products import use_product

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds on Linux")

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # and how far rounding goes


def here() -> torch.device:
    return torch.get_default_device()


def loaded(family: str) -> Generator:
    with torch.inference_mode(False):  # as users do; others keep their weights where they are
        return load(family).to(here())


def random(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0)
    return module.to(dtype).requires_grad_(False)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    assert found.dtype == dtype
    far = roundings * DTYPES[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=far, atol=far)


def some(cases: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """All cases of a product, or each so-many-th: a number prime to its factors, so that all values are among them."""
    return list(cases)[first % every :: every]


def check_add_norm(every: int = 1) -> None:
    widths = {torch.float32: (48,), torch.bfloat16: (1280,), torch.float16: (7168,)}
    for first, dtype in enumerate(DTYPES):
        kinds, ways = (nn.RMSNorm, nn.LayerNorm, "bare"), ((False, False), (True, False), (True, True))
        cases = product(widths[dtype], kinds, ways, (False, True))
        for width, kind, (adds, gated), modulated in some(cases, every, first):
            if width == 7168 and not (adds and gated == modulated):
                continue
            bare = kind == "bare"
            norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False) if bare else kind(width, eps=1e-5)  # type: ignore[operator]
            norm = random(norm, dtype)
            x, added = (torch.randn(2, 3, 1, width) + 0.5).to(dtype)
            gate, scale, shift = torch.randn(3, 1, 3 * width).to(dtype).chunk(3, dim=-1)
            at = None if width == 48 else torch.tensor([[4], [0], [4]])
            if at is not None:
                tables = torch.randn(5, 3 * width).to(dtype).chunk(3, dim=-1)
                gate, scale, shift = (table[at] for table in tables)
            entries = (gate, scale, shift) if at is None else tables
            total, normed = fused.add_norm(
                x, added if adds else None, entries[0] if gated else None, norm=norm,
                modulation=(entries[1], entries[2]) if modulated else None, at=at,
            )  # fmt: skip
            wanted = x.double()
            if adds:
                wanted = wanted + added.double() * (gate.double() if gated else 1)
            close(total, wanted, dtype)
            weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
            weight, bias = (None if each is None else each.double() for each in (weight, bias))
            wanted = total.double()  # rounded, as the stream is
            if kind is nn.RMSNorm:
                wanted = F.rms_norm(wanted, (width,), weight, 1e-5)
            else:
                wanted = F.layer_norm(wanted, (width,), weight, bias, 1e-6 if bare else 1e-5)
            if modulated:
                wanted = wanted * (1 + scale.double()) + shift.double()
            close(normed, wanted, dtype)


def check_rotate_and_cache(every: int = 1) -> None:
    shapes = [(3, 4, 2, 80), (2, 3, 3, 48), (2, 1, 1, 128), (1, 20, 4, 100)]
    kinds = list(product((None, "neighbours", "halves"), (None, nn.RMSNorm, nn.LayerNorm, HeadNorm), (False, True)))
    for number, (turned, kind, rounded) in some(enumerate(kinds), every):
        rows, heads, shared, dim = shapes[number % len(shapes)]
        dtype = list(DTYPES)[number % len(DTYPES)]
        slots = 7
        cache = (Int8KVCache if rounded else KVCache)(2, rows + 1, shared, slots, dim, dtype=dtype, device=here())
        cache = cache.up_to(slots)
        groups: Any = (shared, dim) if kind is HeadNorm else (dim,)
        norms = [None if kind is None else random(kind(*groups), dtype) for _ in range(2)]
        if kind is not None and number % 2:
            norms[1] = norms[0]
        # Queries, keys and values side by side, as one product gives them.
        together = torch.randn(rows, 1, (heads + 2 * shared) * dim).to(dtype)
        query, key, value = (
            part.unflatten(-1, (-1, dim)).transpose(1, 2)
            for part in together.split([heads * dim, shared * dim, shared * dim], dim=-1)
        )
        at = torch.arange(rows) * 2 % slots
        angles = torch.randn(rows, 1, dim // 2)
        rotary = None if turned is None else Rotary(angles.cos(), angles.sin(), halves=turned == "halves")
        position = Position.by_row(at)
        before = [each.clone() for each in (*cache.keys, *cache.values)]
        cache.keys, cache.values = ([each[:rows] for each in half] for half in (cache.keys, cache.values))
        if isinstance(cache, Int8KVCache):
            scales = cache._scales
            scales.keys, scales.values = ([each[:rows] for each in half] for half in (scales.keys, scales.values))
        context = AttentionContext.create(position, 1, cache, rotary=rotary)
        found = fused.rotate_and_cache(query, key, value, 1, context, *norms)

        wanted = []
        for x, norm in zip((query, key), norms, strict=True):
            x = x.double()
            if norm is not None:
                x = norm.double()(x)
                norm.to(dtype)
            if rotary is not None:
                x = rotary(x)
            wanted.append(x)
        for one, other in zip(found, wanted, strict=True):
            close(one, other, dtype)
        keys, values = cache.read(1, slots)
        for contents, vectors in ((keys, found[1]), (values, value)):
            row = torch.arange(rows)
            written = contents[row, :, at].double()
            vectors = vectors[:, :, 0].double()
            if rounded:
                step = vectors.abs().amax(dim=-1, keepdim=True) / 127
                assert ((written - vectors).abs() <= step * (0.5 + 1e-3) + DTYPES[dtype] * vectors.abs()).all()
            else:
                assert torch.equal(written, vectors)
        # Nothing else is written.
        for contents, old, layer in zip((*cache.keys, *cache.values), before, (0, 1) * 2, strict=True):
            changed = (contents != old[:rows]).any(dim=-1)
            assert layer == 1 or not changed.any()
            changed[torch.arange(rows), :, at] = False
            assert not changed.any()


def check_silu_product() -> None:
    for dtype in DTYPES:
        gate, up = (torch.randn(2, 5, 1, 700) * 4).to(dtype)
        close(fused.silu_product(gate, up), F.silu(gate.double()) * up.double(), dtype)


def check_few_rows(every: int = 1) -> None:
    """Products of few rows, with all that may stand before and behind them, and the others, which are PyTorch's."""
    shapes = {torch.float32: ((1, 48, 30), (5, 48, 7)), torch.bfloat16: ((2, 768, 9),), torch.float16: ((3, 2100, 5),)}
    if every > 1:  # the interpreter takes long for each program
        shapes = {
            torch.float32: ((1, 48, 5), (5, 48, 7)),
            torch.bfloat16: ((2, 80, 3),),
            torch.float16: ((3, 2100, 3),),
        }
    kinds = list(enumerate((None, nn.RMSNorm, RMSNorm, "bare", nn.LayerNorm)))
    each = [(dtype, *shape) for dtype, those in shapes.items() for shape in those]
    for first, (dtype, rows, width, count) in enumerate(each):
        x, added, onto = (torch.randn(rows, 1, size).to(dtype) for size in (width, width, count))
        for number, kind in some(kinds, every, first):
            bias = bool((number + rows) % 2)
            layers = [random(nn.Linear(width, count, bias=bias), dtype) for _ in range(2)]
            for layer in layers:
                layer.weight.mul_(width**-0.5)
            one_kernel = 3 if kind is nn.LayerNorm or rows > launches.FEW_ROWS else 1
            norm = random(kind(width, eps=1e-5), dtype) if isinstance(kind, type) else None
            if kind == "bare":
                norm = nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)
            for plus in (None, added):
                total = x.double() if plus is None else (x + plus).double()
                stream, hidden = fused.add_gated_products(x, *layers, added=plus, norm=norm)
                close(stream, total, dtype)
                wide = [copy.deepcopy(each).double() for each in layers]
                inputs = stream.double()  # rounded, as the stream is
                if norm is not None:
                    inputs = copy.deepcopy(norm).double()(inputs)
                gate, up = (layer(inputs) for layer in wide)
                close(hidden, F.silu(gate) * up, dtype, one_kernel)
                if plus is None:
                    for found, wanted in zip(fused.products(x, *layers, norm=norm), (gate, up), strict=True):
                        close(found, wanted, dtype, 3)
                    close(fused.products(x, layers[0], norm=norm)[0], gate, dtype, one_kernel)
            inputs = x.double()
            stream = onto.clone()
            close(fused.add_product(stream, layers[0], x), onto.double() + wide[0](inputs), dtype)


def check_guidance(every: int = 1) -> None:
    """The weights of SoftCFG and the confidence, in shapes that are no powers of two and with rows apart."""
    confidence = torch.rand(3, 300, dtype=torch.float32)
    confidence[:, 200:] = 0
    confidence[1] = 0  # nothing is drawn yet
    confidence[2, 1:] = 0  # one token has all of the budget
    whole = torch.full((5, 310), 7.0)
    cases = product((True, False), (1.0, 0.5, 3.0), (0.0, 0.3), (0.0, 0.25), (True, False))
    for step_norm, strength, floor, eps, successor in some(cases, every):
        settings: Any = {"step_norm": step_norm, "strength": strength, "floor": floor, "eps": eps}
        assert fused.write_weights(confidence, whole[2:, 10:], **settings, successor=successor)
        wanted = perturbation_weights(confidence.double(), **settings, alignment=("own", "successor")[successor])
        close(whole[2:, 10:], wanted, torch.float32)
        assert (whole[:2] == 7).all()
        assert (whole[:, :10] == 7).all()
    assert not fused.write_weights(confidence.double(), whole[2:, 10:].double(), **settings, successor=False)
    logits, at = torch.randn(3, 2, 5000, dtype=torch.float32)[:, 0] * 4, torch.tensor([210])
    cases = product((1.0, 0.7), (None, torch.arange(300) != 210, torch.rand(3, 300) < 0.5), (None, [0, 4999, 17]))
    for temperature, codes, tokens in cases:
        written, drawn = confidence.clone(), None if tokens is None else torch.tensor(tokens)
        assert fused.write_confidence(logits, written, at, temperature, codes, drawn)
        wanted = confidence.double()
        probabilities = (logits.double() / temperature).softmax(-1)
        wanted[:, 210] = probabilities.amax(-1) if tokens is None else probabilities[range(3), tokens]
        if codes is not None:
            wanted[:, 210] *= codes[..., 210]
        close(written, wanted, torch.float32)
    assert fused.write_confidence(logits, written, at, 1.0, None, torch.tensor([-1, 5000, 1]))
    assert written[:2, 210].tolist() == [0, 0]
    logits[0, 17] = torch.nan
    assert fused.write_confidence(logits, written, at, 1.0)
    assert torch.isnan(written).nonzero().tolist() == [[0, 210]]


def steps(family: str, guidance: CFG, cache_dtype: torch.dtype | None, batch: int) -> tuple[Tensor, KVCache]:
    """What some steps of constant shapes draw from, and the cache after them."""
    generator = loaded(family)
    generator.cache_dtype = cache_dtype
    condition = generator.condition(generator.example_inputs(batch), guided=True)
    decoder = Decoder(generator, condition, guidance, Sampling())
    uniforms = image_uniforms(0, range(batch), condition.num_tokens).to(here())
    tokens = torch.zeros(batch, condition.num_tokens, dtype=torch.int64)
    with use_product("plain"), decoder.prepared_linear_layers():
        decoder.advance(decoder.step(0), tokens, uniforms)
        tokens[:] = tokens[:, :1]
        found = [decoder._feed(Step(torch.tensor([number])), tokens)[0] for number in (1, 2)]
    return torch.stack(found), decoder.cache


def check_families() -> None:
    """With guidance, two images are few rows and three are not."""
    for number, family in enumerate(("alitok", "rar", "llamagen", "emu3", "lumina-mgpt-2")):
        batch = 2 if family == "alitok" else 3
        cache_dtype = (None, torch.int8)[number % 2]
        with fused.without_fused_kernels():
            wanted, old = steps(family, SoftCFG(3.0), cache_dtype, batch)
        found, new = steps(family, SoftCFG(3.0), cache_dtype, batch)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if cache_dtype is None else 1e-3)
        for one, other in zip(new.read(0, 4), old.read(0, 4), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if cache_dtype is None else 2e-2)


def check_side_by_side() -> None:
    """Preparing lays weights of the same inputs side by side, and changes none."""
    generator = loaded("emu3")
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    parts = [part for part in generator.modules() if hasattr(part, "together")]
    weights = [[getattr(part, name).weight for name in part.together] for part in parts]
    assert not any(map(are_side_by_side, weights))
    with use_product("plain"), prepared_linear_layers(generator, 2):
        assert len(weights) == 4
        assert all(map(are_side_by_side, weights))
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


def check_kernels(every: int = 1) -> None:
    check_add_norm(every)
    check_rotate_and_cache(every)
    check_silu_product()
    check_few_rows(min(every, 4))
    check_guidance(every)
    check_side_by_side()


PARTS = {"some": functools.partial(check_kernels, 5), "kernels": check_kernels, "families": check_families}


def check(*parts: str) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        for part in parts:
            PARTS[part]()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "part", ["some", pytest.param("kernels", marks=pytest.mark.slow), pytest.param("families", marks=pytest.mark.slow)]
)
def test_kernels_are_the_operations_that_they_replace(part: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__, part], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu() -> None:
    with torch.device("cuda"), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing takes the place of a kernel that fails
        check("kernels", "families")


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), ImportError("no driver")])
def test_decoding_goes_on_without_kernels_that_do_not_run(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    generator = softcfg.load_generator(model_folder)
    uniforms = image_uniforms(3, range(2), generator.num_tokens)
    wanted = decode(generator, [0, 2], SoftCFG(3.0), uniforms=uniforms, static=True)
    failing(monkeypatch, error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(decode(generator, [0, 2], SoftCFG(3.0), uniforms=uniforms, static=True), wanted)
    assert [str(warning.message) for warning in caught] == [
        f"fused kernels do not run on cpu, PyTorch's operations take their place: {type(error).__name__}: {error}"
    ]


def test_out_of_memory_is_not_a_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, torch.OutOfMemoryError("all memory is taken"))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        fused.silu_product(torch.ones(2), torch.ones(2))
    assert not fused.UNAVAILABLE


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As if the CPU were a GPU, on which no kernel runs."""

    def kernel(*_: object, **__: object) -> None:
        raise error

    for of, names in {
        "fused": ("add_norm", "rotate_and_cache", "silu_product", "write_weights", "write_confidence"),
        "few_rows": ("few_rows",),
    }.items():
        module = types.ModuleType(f"{kernels.__name__}.{of}")
        for name in names:
            setattr(module, name, kernel)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(kernels, of, module, raising=False)
    monkeypatch.setattr(available, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused, "UNAVAILABLE", set())


def test_what_has_a_gradient_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, AssertionError("a kernel has no gradient"))
    x = torch.randn(3, 4, requires_grad=True)
    total, normed = fused.add_norm(x, x, norm=nn.LayerNorm(4))
    (total + fused.silu_product(normed, x)).sum().backward()
    assert x.grad is not None
    assert not fused.UNAVAILABLE


def test_only_plain_layers_are_products() -> None:
    """An adapter, a hook or a norm of another kind has to be called."""

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Doubled(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    hooked.register_forward_hook(lambda module, inputs, out: out + 1)
    assert not any(map(fused._is_plain, (Adapted(4, 4, bias=False), hooked)))
    assert fused._kind(Doubled(4, eps=1e-5), x) is None
    assert fused._kind(nn.RMSNorm(4, eps=1e-5), x) == 1


if __name__ == "__main__":
    available.on_gpu = lambda x: True  # the interpreter runs on a CPU
    fused._launched = lambda device, launch: launch()  # and nothing takes the place of what fails
    check(*sys.argv[1:])
