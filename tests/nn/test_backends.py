"""Attention backends: each serves what it says, the best one is chosen, and what fails is replaced."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from softcfg import CFG, Pipeline, SoftCFG, UserError, plugins
from softcfg.cli.main import main
from softcfg.decoding import decode, image_uniforms
from softcfg.decoding.perturbed import step_weights
from softcfg.nn import (
    AttentionContext,
    KVCache,
    Position,
    choices,
    register_backend,
    use_backend,
    weighted_attention,
)
from softcfg.nn.attention import attend
from softcfg.nn.backends import (
    BACKENDS,
    AttentionBackend,
    AttentionCall,
    BackendUnavailableError,
    attention,
    embedding_bag,
)
from softcfg.nn.backends.triton_decode import TritonDecode
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache

ROWS, HEADS, DIM, SLOTS = 3, 4, 8, 7
METHODS = [CFG(3.0), SoftCFG(3.0), SoftCFG(3.0, target="both")]


@pytest.fixture(autouse=True)
def own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test measures is not kept."""
    monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path / "choices"))
    monkeypatch.setattr(choices, "MADE", {})


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the CPU have tests of their own, in test_cpu_kernels.py."""
    monkeypatch.setattr(available, "has_numba", lambda: False)


@pytest.fixture(autouse=True)
def registry() -> Iterator[dict[str, AttentionBackend]]:
    """Backends that a test registers are gone after it."""
    before = dict(BACKENDS)
    yield BACKENDS
    BACKENDS.clear()
    BACKENDS.update(before)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that served a call, in turn."""
    names: list[str] = []
    for backend in BACKENDS.values():

        def watch(call: AttentionCall, name: str = backend.name, attend: Any = backend.attend) -> Tensor:
            names.append(name)
            return attend(call)

        monkeypatch.setattr(backend, "attend", watch)
    return names


def toy() -> Any:
    sys.modules.pop("toy_attention", None)
    importlib.import_module("toy_attention")
    return BACKENDS["toy"]


def layer(new: int, weighted: str, by_row: bool = False, padded: bool = False, int8: bool = False) -> Tensor:
    """One layer's attention of a pass that ends with the last slot of a filled cache."""
    torch.manual_seed(new)
    cache = (Int8KVCache if int8 else KVCache)(1, ROWS, HEADS // 2, SLOTS, DIM)
    cache.write(0, *torch.randn(2, ROWS, HEADS // 2, SLOTS, DIM), Position.start())
    position = Position.shared(SLOTS - new)
    if by_row:
        position = Position.by_row(torch.full((ROWS,), SLOTS - new))
    weights = {f"{name}_weights": torch.rand(ROWS, new, SLOTS) for name in weighted.split()}
    padding = torch.tensor([0, 1, SLOTS - 1]) if padded else None
    context = AttentionContext.create(position, new, cache, padding=padding, **weights)
    query, key, value = (torch.randn(ROWS, heads, new, DIM) for heads in (HEADS, HEADS // 2, HEADS // 2))
    return attend(query, key, value, 0, context)


@pytest.mark.parametrize("name", ["sdpa", "toy"])
@pytest.mark.parametrize("new", [1, 3, SLOTS])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("weighted", ["", "value"])
def test_a_backend_computes_what_the_products_do(
    name: str, new: int, by_row: bool, padded: bool, int8: bool, weighted: str
) -> None:
    toy()
    with use_backend("math"):
        wanted = layer(new, weighted, by_row, padded, int8)
    with use_backend(name):
        if name == "sdpa" and weighted:
            with pytest.raises(UserError, match="'sdpa' of use_backend cannot serve this call: it has no weights"):
                layer(new, weighted, by_row, padded, int8)
            return
        torch.testing.assert_close(layer(new, weighted, by_row, padded, int8), wanted, rtol=0, atol=1e-5)


SEPARABLE = [
    SoftCFG(), SoftCFG(eps=1e-5), SoftCFG(step_norm=False), SoftCFG(strength=0.0),
    *(SoftCFG(confidence=name) for name in ("sampled", "entropy", "margin")),
]  # fmt: skip
OTHERS = [SoftCFG(strength=0.5), SoftCFG(floor=0.95), SoftCFG(alignment="successor"), SoftCFG.released()]


@pytest.mark.parametrize("method", [*SEPARABLE, *OTHERS], ids=repr)
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_in_the_values_are_weights_on_the_probabilities(
    method: SoftCFG, new: int, by_row: bool, padded: bool
) -> None:
    """In float64, for the last `new` of 12 steps after a condition of 2 slots."""
    torch.manual_seed(new)
    steps, slots = torch.arange(12 - new, 12), 13
    chances = torch.rand(ROWS, 12, 9, dtype=torch.float64).log().mul(3)
    confidence = method.token_confidence(chances, torch.randint(9, (ROWS, 12))).double()
    weights = torch.nn.functional.pad(step_weights(confidence, method, steps), (2, 0), value=1.0)[..., :slots]
    cache = KVCache(1, ROWS, HEADS // 2, slots, DIM, dtype=torch.float64)
    key, value = torch.randn(2, ROWS, HEADS // 2, slots, DIM, dtype=torch.float64)
    cache.write(0, key, value, Position.start())
    position = Position.by_row(torch.full((ROWS,), slots - new)) if by_row else Position.shared(slots - new)
    padding = torch.tensor([0, 1, 1]) if padded else None
    context = AttentionContext.create(position, new, cache, padding=padding, value_weights=weights)
    query = torch.randn(ROWS, HEADS, new, DIM, dtype=torch.float64)
    call = AttentionCall(query, key[:, :, -new:], value[:, :, -new:], context)
    with use_backend("sdpa_weighted"):
        if new > 1 and method in OTHERS:
            with pytest.raises(UserError, match=r"not 1 - p / s .* strength 1, floor 0 and the alignment 'own'"):
                attention(call)
            return
        found = attention(call)
    with use_backend("math"):
        torch.testing.assert_close(found, attention(call), rtol=0, atol=1e-12)


def test_traces_with_weights_in_the_values(model_folder: Path) -> None:
    generator, tokens = softcfg.load_generator(model_folder), torch.randint(20, (2, 16))
    wanted = softcfg.trace(generator, labels=[0, 2], tokens=tokens, guidance=SoftCFG(3.0))
    with use_backend("sdpa_weighted"):
        found = softcfg.trace(generator, labels=[0, 2], tokens=tokens, guidance=SoftCFG(3.0))
        with pytest.raises(UserError, match="it has weights on values alone"):
            softcfg.trace(generator, labels=[0, 2], tokens=tokens, guidance=SoftCFG(3.0, target="key"))
    torch.testing.assert_close(found.uncond_logits, wanted.uncond_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("new", "weighted", "name"),
    [
        (1, "", "sdpa"),
        (1, "value", "sdpa_weighted"),
        (1, "key", "math"),
        (3, "", "sdpa"),
        (3, "value", "math"),
        (3, "key", "math"),
        (7, "", "sdpa"),
    ],
)
def test_the_choice_on_a_cpu(served: list[str], new: int, weighted: str, name: str, by_row: bool) -> None:
    layer(new, weighted, by_row)
    assert served == [name]


@pytest.mark.parametrize("bags", [False, True], ids=["products faster", "bags faster"])
@pytest.mark.parametrize(
    ("rows", "slots", "dtype", "names"),
    [
        (2, 64, torch.float32, ["sdpa", "sdpa_weighted"]), (12, 40, torch.float32, ["sdpa", "math"]),
        (2, 512, torch.float32, ["math", "math"]), (64, 8, torch.float32, ["math", "math"]),
        (16, 512, torch.float32, ["embedding_bag", "embedding_bag"]),
        (2, 64, torch.bfloat16, ["embedding_bag", "embedding_bag"]), (2, 64, torch.float64, ["math", "math"]),
    ],
)  # fmt: skip
def test_what_serves_a_step_depends_on_its_size_and_on_the_machine(
    served: list[str],
    rows: int,
    slots: int,
    dtype: torch.dtype,
    names: list[str],
    bags: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding_bag, "time_sides", lambda sides: {name: (name == "math") == bags for name in sides})
    if not bags:
        names = ["math" if name == "embedding_bag" else name for name in names]
    cache = KVCache(1, rows, 4, slots, 64, dtype=dtype)
    query, key, value = torch.randn(3, rows, 4, 1, 64, dtype=dtype)
    for weights in (None, torch.rand(rows, slots)):
        context = AttentionContext.create(Position.shared(slots - 1), 1, cache, value_weights=weights)
        with torch.inference_mode():
            attend(query, key, value, 0, context)
    assert served == names  # without weights and with them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["cache", "by slot", "heads", "slots", "channels", "expanded"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_batched_products_whatever_the_layout(dtype: torch.dtype, layout: str, weighted: bool) -> None:
    rows, heads, slots, width = 3, 4, 21, 24
    torch.manual_seed(0)
    query, key = torch.randn(rows, heads, 1, width), torch.randn(rows, heads, slots, width)
    value = {
        "cache": lambda: torch.randn(2, rows, heads, slots + 5, width)[1, :, :, :slots],
        "by slot": lambda: torch.randn(slots + 5, rows, heads, width).permute(1, 2, 0, 3)[:, :, :slots],
        "heads": lambda: torch.randn(rows, slots, heads, width).transpose(1, 2),
        "slots": lambda: torch.randn(rows, heads, slots, 2 * width)[..., :width],
        "channels": lambda: torch.randn(rows, heads, width, slots).mT,
        "expanded": lambda: torch.randn(1, heads, slots, width).expand(rows, -1, -1, -1),
    }[layout]()
    query, key, value = (each.to(dtype) for each in (query, key, value))
    weights = torch.rand(rows, slots) if weighted else None
    padding = torch.arange(rows)[:, None] <= torch.arange(slots)
    with torch.inference_mode(), use_backend("embedding_bag"):
        found = weighted_attention(query, key, value, value_weights=weights, mask=padding)
    exact = (query.double() @ key.double().mT * width**-0.5).masked_fill(~padding[:, None, None], -math.inf).softmax(-1)
    expected = (exact if weights is None else exact * weights[:, None, None].double()) @ value.double()
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it serves float32"), ({"new": 2}, "one query for each head"),
        ({"heads": 8}, "one query for each head"), ({"grad": True}, "it has no gradient"),
    ],
    ids=str,
)  # fmt: skip
def test_what_bags_do_not_serve(change: dict[str, Any], reason: str) -> None:
    grad, dtype = change.get("grad", False), change.get("dtype", torch.float32)
    query = torch.randn(2, change.get("heads", 4), change.get("new", 1), 16, dtype=dtype)
    key, value = torch.randn(2, 2, 4, 9, 16, dtype=dtype)
    with torch.set_grad_enabled(grad), use_backend("embedding_bag"), pytest.raises(UserError, match=reason):
        weighted_attention(query, key, value)


def test_nothing_is_measured_for_what_bags_do_not_serve(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_bag, "time_sides", lambda sides: pytest.fail("it was measured"))
    query, (key, value) = torch.randn(16, 8, 1, 64), torch.randn(2, 16, 4, 512, 64)
    with torch.inference_mode():
        weighted_attention(query, key, value)
    assert served == ["math"]


def test_a_forced_backend_serves_until_the_context_closes(served: list[str]) -> None:
    elsewhere = threading.Thread(target=layer, args=(3, ""))
    with use_backend("math"):
        layer(3, "")
        with use_backend("sdpa"):
            layer(1, "")
        layer(3, "")
        elsewhere.start()
        elsewhere.join()
    with pytest.raises(ZeroDivisionError), use_backend("math"):
        raise ZeroDivisionError
    layer(3, "")
    assert served == ["math", "sdpa", "math", "sdpa", "sdpa"]


def test_a_forced_backend_that_cannot_serve_says_why() -> None:
    cases = [
        ("triton_decode", (1, "", True), "runs on GPUs alone"),
        ("triton_decode", (3, "", True), "one query per row"),
        ("sdpa", (3, "key"), "no weights on values or keys"),
    ]
    for name, arguments, reason in cases:
        with pytest.raises(UserError, match=f"{name}.*{reason}"), use_backend(name):
            layer(*arguments)
    with (
        pytest.raises(
            UserError,
            match="no attention backend 'flash'; there are math, embedding_bag, sdpa_weighted, sdpa, numba_decode, "
            "triton_decode",
        ),
        use_backend("flash"),
    ):
        pass


def test_a_backend_that_does_not_run_is_replaced_with_one_warning() -> None:
    @register_backend
    class Broken(AttentionBackend):
        name = "broken"

        def why_not(self, call: AttentionCall) -> str | None:
            return None

        def attend(self, call: AttentionCall) -> Tensor:
            raise BackendUnavailableError("no driver")

    with use_backend("sdpa_weighted"):
        wanted = layer(1, "value")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(layer(1, "value"), wanted)
    assert [str(warning.message) for warning in caught] == [
        "the attention backend 'broken' does not run on cpu, a slower one takes its place: no driver"
    ]
    with pytest.raises(UserError, match="'broken' of use_backend does not run here: no driver"), use_backend("broken"):
        layer(1, "value")


def test_errors_of_a_backend_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="Double but found Float"):
        weighted_attention(torch.zeros(1, 1, 1, 4).double(), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


@pytest.mark.parametrize("new", [1, 2])
def test_keys_and_values_of_different_lengths_are_refused(new: int) -> None:
    with pytest.raises(ValueError, match=r"rows, heads and slots, got \[1, 1, 2, 4\] and \[1, 1, 3, 4\]"):
        weighted_attention(torch.zeros(1, 1, new, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), ValueError("unsupported GPU"), ImportError("no driver")]
)
def test_decoding_goes_on_without_a_kernel_that_does_not_compile(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: CFG, error: Exception
) -> None:
    def decode_attention(*_: Any, **__: Any) -> Tensor:
        raise error

    generator = softcfg.load_generator(model_folder)
    uniforms = image_uniforms(3, range(2), generator.num_tokens)
    wanted = decode(generator, [0, 2], method, uniforms=uniforms)

    kernel = types.ModuleType("softcfg.nn.kernels.decode_attention")
    kernel.decode_attention = decode_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)

    @register_backend
    class OnCPU(TritonDecode):
        """The Triton backend as if the CPU were a GPU."""

        def why_not(self, call: AttentionCall) -> str | None:
            fits = call.query.shape[2] == 1 and call.context.position.row_slots is not None
            return None if fits else "it takes one query per row"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(decode(generator, [0, 2], method, uniforms=uniforms, static=True), wanted)
    (warning,) = caught
    assert f"'triton_decode' does not run on cpu, a slower one takes its place: {type(error).__name__}: {error}" in str(
        warning.message
    )


def test_out_of_memory_is_no_reason_to_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_attention(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("all memory is taken")

    kernel = types.ModuleType("softcfg.nn.kernels.decode_attention")
    kernel.decode_attention = decode_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(TritonDecode, "why_not", lambda self, call: None)
    with pytest.raises(torch.OutOfMemoryError):
        layer(1, "", by_row=True)
    assert BACKENDS["triton_decode"].unavailable == {}


def test_a_backend_of_one_file_outside_draws_and_traces(model_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    wanted = [pipe([0, 2], guidance=method, seed=1).tokens for method in METHODS]
    backend = toy()
    for method, tokens in zip(METHODS, wanted, strict=True):
        backend.served = 0
        assert torch.equal(pipe([0, 2], guidance=method, seed=1).tokens, tokens)
        with_keys = getattr(method, "target", "") == "both"  # the next backend serves these
        assert (backend.served == 0) is with_keys
        backend.served = 0
        with use_backend("math"):
            expected = softcfg.trace(pipe.generator, labels=[0, 2], guidance=method, tokens=tokens)
        assert backend.served == 0
        traced = softcfg.trace(pipe.generator, labels=[0, 2], guidance=method, tokens=tokens)
        assert backend.served > 0
        torch.testing.assert_close(traced.guided_logits, expected.guided_logits, rtol=0, atol=1e-4)
    cannot = pytest.raises(UserError, match="'toy' of use_backend cannot serve this call: it has no weights on keys")
    with cannot, use_backend("toy"):
        pipe([0, 2], guidance=SoftCFG(3.0, target="key"))


def test_a_backend_of_one_file_outside_draws_on_the_command_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.delitem(sys.modules, "toy_attention", raising=False)
    words = ["sample", str(model_folder), "--labels", "0,2", "--num-samples", "2", "--batch-size", "2", "--no-compare"]
    assert main([*words, "--output-dir", str(tmp_path / "without")]) == 0
    plugin = Path(__file__).parents[1] / "toy_attention.py"
    assert main([*words, "--output-dir", str(tmp_path / "with"), "--plugin", str(plugin)]) == 0
    assert getattr(BACKENDS["toy"], "served") > 0  # noqa: B009  # a class of the plugin's
    images = [sorted(path.read_bytes() for path in (tmp_path / run).rglob("*.png")) for run in ("without", "with")]
    assert images[0] == images[1] != []
