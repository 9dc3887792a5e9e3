"""Devices without float64, such as Apple's GPUs: a CPU stands for one, and refuses float64 where a device computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import softcfg
from small_families import FAMILIES, load
from softcfg import CFG, Sampling, SoftCFG
from softcfg.decoding import ImageStreams, decode, jacobi, jacobi_decode, sequential
from softcfg.decoding.randomness import image_uniforms, on_device
from softcfg.models.base import Generator
from softcfg.nn import precision
from softcfg.nn.kernels import available


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that reads or makes a float64 tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, Tensor) and leaf.dtype == torch.float64), f"{function} in float64"
        return result


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the CPU computes before anything is on the device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


@pytest.fixture
def device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    for module in (sequential, jacobi):
        monkeypatch.setattr(module, "on_device", on_the_host(on_device))
    monkeypatch.setattr(ImageStreams, "uniforms", on_the_host(ImageStreams.uniforms))
    monkeypatch.setattr(CFG, "scales", on_the_host(CFG.scales))


def drawn(generator: Generator, guidance: CFG, uniforms: Tensor) -> list[Tensor]:
    inputs, sampling = generator.example_inputs(2), Sampling(temperature=0.9, top_p=0.9)
    found = [
        decode(generator, inputs, guidance, uniforms=uniforms, sampling=sampling, static=static)
        for static in (False, True)
    ]
    streams = ImageStreams(0, range(2))
    found.append(jacobi_decode(generator, inputs, guidance, streams=streams, window=3, sampling=sampling)[0])
    trace = softcfg.trace(generator, labels=inputs, guidance=guidance, sampling=sampling)
    return [*found, trace.tokens, trace.guided_logits]


GUIDANCE = {
    "CFG": CFG(3.0, schedule="linear"),
    "SoftCFG": SoftCFG(3.0),
    "released": SoftCFG.released(guidance_scale=3.0, target="both"),
}
CASES = [  # one of them for each family; all for each are slow
    pytest.param(family, name, marks=() if i % len(GUIDANCE) == j else pytest.mark.slow)
    for i, family in enumerate(FAMILIES)
    for j, name in enumerate(GUIDANCE)
]


@pytest.mark.parametrize(("family", "guidance"), CASES)
def test_drawing_takes_no_float64_and_draws_the_same(
    family: str, guidance: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(family)
    total = generator.condition(generator.example_inputs(2), guided=False).num_tokens
    uniforms = image_uniforms(0, range(2), total)
    monkeypatch.setattr(available, "has_numba", lambda: False)  # a mode that watches sees no kernels
    expected = drawn(generator, GUIDANCE[guidance], uniforms)
    request.getfixturevalue("device_without_float64")
    with NoFloat64():
        found = drawn(generator, GUIDANCE[guidance], uniforms)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_measures_are_computed_on_the_host(device_without_float64: None) -> None:
    logits = torch.randn(2, 3, 5)
    assert precision.as_float64(logits).device.type == "cpu"
    assert torch.equal(
        on_device(torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), torch.device("cpu")),
        torch.tensor([0, 2**52, 2**53 - 1]),
    )
