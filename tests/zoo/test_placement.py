"""Weights of 8 and 4 bits, and generators spread over several devices."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softcfg import Pipeline, SoftCFG, UserError, trace
from softcfg.models.base import Generator
from softcfg.models.lumina import Lumina, LuminaConfig, TokenPrompt
from softcfg.zoo import placement
from tiny_models import LUMINA, ON_DRIVE, module

CPU = torch.device("cpu")
PROMPTS = [TokenPrompt([7, 2, 4, 8], 8, 8), TokenPrompt([7, 5, 8], 8, 8)]


def lumina() -> Lumina:
    """A generator whose linear layers have 128, 64 and 32 inputs."""
    torch.manual_seed(0)
    config = LuminaConfig(**{**LUMINA, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4})
    return Lumina(config).requires_grad_(False).eval()


def logits(generator: Generator, tokens: Any = None) -> tuple[Tensor, Tensor]:
    replayed = trace(generator, labels=PROMPTS, guidance=SoftCFG(3.0, schedule="constant"), tokens=tokens, seed=1)
    return replayed.uncond_logits, replayed.tokens


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("int4", 0.3)])
def test_quantized_weights(kind: str, error: float) -> None:
    exact, tokens = logits(lumina())
    generator = lumina()
    assert placement.quantize(generator, kind, CPU) is generator
    linear = {name: layer for name, layer in generator.named_modules() if isinstance(layer, nn.Linear)}
    assert len(linear) == 2 * 7 + 1
    assert all(type(layer.weight.data) is not Tensor for layer in linear.values())
    got, _ = logits(generator, tokens)
    deviation = ((got - exact).square().mean() / exact.square().mean()).sqrt()
    assert 1e-4 < deviation < error
    # A layer alone: at most half a step of the scale away.
    original = dict(lumina().named_modules())
    for name, layer in linear.items():
        weight = original[name].weight
        steps, group = (255, weight.shape[1]) if kind == "int8" else (15, min(128, weight.shape[1]))
        bound = weight.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) * 2 / steps * 0.55
        off = (layer(torch.eye(weight.shape[1])).T - weight).abs().unflatten(1, (-1, group))
        assert (off <= bound + 1e-6).all()
        assert off.max() > bound.max() / 4


def test_quantized_pipeline(prompt_model_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(prompt_model_folder, quantize="int8")
    plain = Pipeline.from_pretrained(prompt_model_folder)
    assert type(pipe.generator.lm_head.weight.data) is not Tensor
    out = pipe(prompts=["a red apple"])
    assert out.pixels.shape == plain(prompts=["a red apple"]).pixels.shape


def test_layers_on_disk_draw_the_same(tmp_path: Path) -> None:
    exact, tokens = logits(lumina())
    generator = lumina()
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
        "lm_head": "disk",
    }  # fmt: skip
    placement.spread(generator, device_map, offload_folder=str(tmp_path / "offload"))
    assert generator.model.layers[0].mlp.up_proj.weight.is_meta
    assert generator.lm_head.weight.is_meta
    assert generator.layer_devices == [CPU, CPU]
    assert generator.device == CPU
    got, again = logits(generator)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)


def test_without_gpus_auto_is_the_cpu(prompt_model_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    pipe = Pipeline.from_pretrained(prompt_model_folder, device_map="auto", device="cpu")
    plain = Pipeline.from_pretrained(prompt_model_folder)
    assert torch.equal(pipe(prompts=["star"]).tokens, plain(prompts=["star"]).tokens)


def test_what_is_refused(prompt_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: placement.quantize(lumina(), "int2", CPU), "one of int8, int4, got 'int2'"),
        (lambda: placement.quantize(lumina(), "int4", torch.device("cuda")), "need bfloat16, not float32"),
        (lambda: placement.spread(lumina(), "balanced"), "'auto' or a mapping"),
        (lambda: placement.spread(lumina(), 3), "'auto' or a mapping of modules to devices, got 3"),  # type: ignore[arg-type]
        (lambda: placement.spread(lumina(), {"model.embed_tokens": "disk"}), "device_map does not fit"),
        (lambda: placement.spread(module(ON_DRIVE.generator), "auto"), "AliTok generators fit on one device"),
        (
            lambda: Pipeline.from_pretrained(prompt_model_folder, quantize="int8", device_map="auto"),
            "do not go together",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()

    find = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("torchao", "accelerate"):
            raise ImportError(name)
        return find(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"int8 weights need torchao: pip install '\.\[quantize\]'"):
        placement.quantize(lumina(), "int8", CPU)
    with pytest.raises(UserError, match=r"device_map needs Accelerate: pip install '\.\[runs\]'"):
        placement.spread(lumina(), "auto")
