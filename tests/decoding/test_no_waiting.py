"""No step waits for the device or moves tensors to another one, so that one CUDA graph can serve all steps.

On a CPU a dispatch mode refuses what would wait on a GPU. With a CUDA build of PyTorch the same steps run on fake CUDA
tensors as well, where an operation on tensors of two devices fails by itself; no GPU is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from small_families import FAMILIES, load
from softcfg import CFG, Sampling, SoftCFG
from softcfg.decoding import ImageStreams, image_uniforms
from softcfg.decoding.jacobi import JacobiDecoder
from softcfg.decoding.sequential import Decoder, Step
from softcfg.decoding.weak import WeakModel
from softcfg.guidance import CONFIDENCES, PERTURBATIONS, RULES
from softcfg.models.base import Condition, Generator
from softcfg.nn import precision
from softcfg.nn.backends.triton_decode import TritonDecode
from softcfg.nn.fused import without_fused_kernels

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive",
    "repeat_interleave", "bincount", "is_nonzero", "lift_fresh", "_pin_memory",
}  # fmt: skip
READS = ("tolist", "numpy", "cpu", "__array__")  # of tensors; on a CPU no operation that a mode would see
GUIDANCE: dict[str, CFG] = {
    "none": CFG(1.0),
    "cfg": CFG(3.0),
    "interval": CFG(3.0, interval=(1, 3)),
    "released": SoftCFG.released(guidance_scale=3.0),
    **{f"target {target}": SoftCFG(3.0, target=target) for target in ("value", "key", "both")},
    **{f"rule {name}": SoftCFG(3.0, rule=name) for name in RULES},  # type: ignore[arg-type]
    **{f"confidence {name}": SoftCFG(3.0, confidence=name) for name in CONFIDENCES},
    **{f"perturbation {name}": CFG(3.0, perturbation=name) for name in PERTURBATIONS},  # type: ignore[arg-type]
    **{
        f"third {name}": CFG(3.0, perturbation=name, perturbation_scale=1.0)  # type: ignore[arg-type]
        for name in PERTURBATIONS
    },
    **{f"weak model, share {share}": SoftCFG(3.0, weak_share=share) for share in (0.5, 1.0)},
}
FILTERS = {
    "all": Sampling(),
    "top-k": Sampling(0.9, top_k=5),
    "top-p": Sampling(0.9, top_p=0.8),
    "both": Sampling(top_k=5, top_p=0.8, min_candidates=2),
    "by entropy": Sampling(entropy_gain=2.5),
    "candidates by entropy": Sampling(top_p=0.9, entropy_top_p=0.5),
}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for the device, or that move a tensor to another device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{function} waits for the device"
        if name.startswith(("index", "_index")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{function} with a mask waits for the device"
        devices = {
            leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()
        }
        assert len(devices) < 2, f"{function} is on {devices}"
        return result


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Under `NoWaiting`; gives the names of the reads of tensors, which only the caller can judge."""
    reads: list[str] = []

    def watched(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return read(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, NoWaiting():
        for name in READS:
            patch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
        yield reads


def step_from(
    generator: Generator, guidance: CFG, sampling: Sampling, condition: Condition | None = None
) -> Callable[[int], None]:
    """A decoder that has drawn the first token, and its next steps by number; it holds all that a step needs."""
    device = generator.device
    if condition is None:
        condition = generator.condition(generator.example_inputs(2), guided=guidance.has_unconditional_branch)
    weak = None
    if guidance.has_weak_model:
        weak = WeakModel(generator, generator.condition(generator.example_inputs(2), guided=False))
    decoder = Decoder(generator, condition, guidance, sampling, weak=weak)
    total = condition.num_tokens
    tokens = torch.zeros(2, total, dtype=torch.int64, device=device)
    uniforms = image_uniforms(0, range(2), total).to(device)
    forced, mask = torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    numbers = [torch.tensor([number], device=device) for number in range(4)]
    decoder.advance(decoder.step(0), tokens, uniforms)
    decoder.advance(Step(numbers[1]), tokens, uniforms)  # warms up, as before a capture

    def step(number: int) -> None:
        decoder.advance(Step(numbers[number]), tokens, uniforms, forced, mask)

    return step


def check(generator: Generator, guidance: CFG, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        step = step_from(generator, guidance, sampling)
        with no_waiting(monkeypatch) as reads:
            step(2)
            step(3)
    assert reads == []


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return {family: load(family) for family in FAMILIES}


CACHES = (None, torch.int8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_steps_of_every_family(
    generators: dict[str, Generator], family: str, cache_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generators[family]
    monkeypatch.setattr(generator, "cache_dtype", cache_dtype)
    for name in ("none", "cfg", "released", "target both", "perturbation window", "third pag"):
        check(generator, GUIDANCE[name], FILTERS["both"], monkeypatch)


@pytest.mark.parametrize("family", ["alitok", "lumina-mgpt-2"])  # without and with structure between the codes
@pytest.mark.parametrize("name", GUIDANCE)
def test_steps_of_every_guidance(
    generators: dict[str, Generator], family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(generators[family], GUIDANCE[name], FILTERS["all"], monkeypatch)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("has_float64", [True, False])
def test_steps_of_every_filter(
    generators: dict[str, Generator], name: str, has_float64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_float64:
        monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    check(generators["alitok"], GUIDANCE["released"], FILTERS[name], monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cfg", "released", "rule apg", "perturbation window", "third softcfg"])
def test_speculative_decoding_reads_once_a_pass(
    generators: dict[str, Generator], family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, guidance = generators[family], GUIDANCE[name]
    condition = generator.condition(generator.example_inputs(2), guided=guidance.has_unconditional_branch)
    streams = ImageStreams(0, range(2))
    with torch.inference_mode():
        decoder = JacobiDecoder(generator, condition, guidance, FILTERS["both"], 3)
        for _ in range(3):
            uniforms = streams.uniforms(3 * decoder.window)
            with no_waiting(monkeypatch) as reads:
                decoder.advance(uniforms)
                decoder.done()
            assert reads == ["tolist"]


def on_fake_cuda(thing: Any, mode: FakeTensorMode) -> Any:
    """The tensors of a module or a condition, as fake ones of a GPU."""

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cuda:0"))

    for part in thing.modules() if isinstance(thing, nn.Module) else [thing]:
        tables = (part._parameters, part._buffers) if isinstance(part, nn.Module) else (vars(part),)
        for table in tables:
            for name, value in table.items():
                if name == "_on_host":
                    continue
                if isinstance(value, nn.Parameter):
                    table[name] = nn.Parameter(fake(value), requires_grad=False)
                elif isinstance(value, Tensor):
                    table[name] = fake(value)
    return thing


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("name", ["none", "cfg", "released", "target both", "perturbation window", "third pag"])
def test_steps_on_fake_cuda_tensors(
    family: str, cache_dtype: torch.dtype | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors of a step, of the first one too, are on the GPU."""
    if family in ("rar", "robustok") and name == "third pag":
        pytest.skip("the classes of a part of the batch are counted, on the host, and fake ones cannot be")
    monkeypatch.setattr(TritonDecode, "why_not", lambda self, call: "a fake tensor has no memory")
    guidance, generator = GUIDANCE[name], load(family)
    generator.cache_dtype = cache_dtype
    condition = generator.condition(generator.example_inputs(2), guided=guidance.has_unconditional_branch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            torch.ones(2, device="cuda")[:1]
    except RuntimeError as error:
        pytest.skip(f"this version asks the driver for fake tensors, too: {error}")
    on_fake_cuda(generator, mode)
    on_fake_cuda(condition, mode)
    with torch.no_grad(), without_fused_kernels(), mode:
        step = step_from(generator, guidance, FILTERS["both"], condition)
        with no_waiting(monkeypatch) as reads:
            step(2)
    assert reads == []


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("waits", lambda x: float(x.sum())),
        ("waits", lambda x: x[x > 0]),
        ("waits", lambda x: (x > 0).nonzero()),
        ("waits", lambda x: torch.tensor([1.0])),
        ("is on", lambda x: x.to("meta")),
    ],
)
def test_the_mode_sees_what_it_is_for(what: str, fault: Callable[[Tensor], object]) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=what), NoWaiting():
        fault(x)
