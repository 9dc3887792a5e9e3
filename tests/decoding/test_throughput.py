"""What is measured of a generator before it has any weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from small_families import FAMILIES, load
from softcfg.decoding import throughput
from softcfg.nn import choices, linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None that other tests have made; and products are faster in bfloat16."""
    monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(choices, "MADE", {})
    monkeypatch.setattr(linear, "fastest_dtype", lambda module, device: torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [True, False])
def test_steps_of_every_family_are_measured_in_both_dtypes(
    family: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Tensor] = {}

    def time_sides(sides: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        with torch.inference_mode():
            drawn.update({name: step() for name, step in sides.items()})
        return {"float32": 1.0, "bfloat16": 0.9}

    monkeypatch.setattr(throughput, "time_sides", time_sides)
    generator = load(family)
    before = {name: each.clone() for name, each in generator.state_dict().items()}
    layers, shape, state = len(generator.blocks), generator.cache_shape, torch.get_rng_state()
    if empty:
        generator.to("meta")
    for _ in range(2):
        assert throughput.fastest_dtype(generator, CPU) is torch.bfloat16
    assert drawn.keys() == {"float32", "bfloat16"}
    for each in drawn.values():
        assert each.shape == (8,)
        assert (each < generator.vocab_size).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(generator.blocks) == layers
    assert generator.cache_shape == shape
    if not empty:
        assert all(torch.equal(each, before[name]) for name, each in generator.state_dict().items())


def test_bfloat16_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, dtype in ((0.95, torch.float32), (0.85, torch.bfloat16)):
        monkeypatch.setattr(choices, "MADE", {})
        monkeypatch.setattr(choices, "_kept", lambda which: "")
        monkeypatch.setattr(throughput, "time_sides", lambda sides, taken=seconds: {"float32": 1.0, "bfloat16": taken})
        assert throughput.fastest_dtype(load("alitok"), CPU) is dtype


def test_of_what_is_large_or_no_stack_of_layers_products_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "time_sides", lambda sides: pytest.fail("it was measured"))
    generator = load("alitok")
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "LARGEST_PART", 1000)
        assert throughput.fastest_dtype(generator, CPU) is torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "example_inputs", throughput.Generator.example_inputs)
        assert throughput.fastest_dtype(generator, CPU) is torch.bfloat16
    del generator.blocks
    assert throughput.fastest_dtype(generator, CPU) is torch.bfloat16
