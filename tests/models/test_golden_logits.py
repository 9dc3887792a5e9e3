"""The generators compute what the released code computes, step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import softcfg
from goldens import Golden, golden
from softcfg import CFG, SoftCFG
from softcfg.decoding import Sampling, decode, image_uniforms
from softcfg.models.base import Generator

CASES = {
    "alitok/golden-generator-cfg": "alitok",
    "alitok/golden-generator-softcfg-stepnorm-s1": "alitok",
    "alitok/golden-generator-softcfg-nostepnorm-s1": "alitok",
    "alitok/golden-generator-softcfg-stepnorm-s05-t09": "alitok",
    "alitok/golden-generator-softcfg-stepnorm-s3-t05": "alitok",
    "rar/golden-generator-cfg-a": "rar",
    "llamagen/golden-generator-cfg-a": "llamagen",
    "llamagen/golden-generator-cfg-a-topk20-topp09": "llamagen",
    "llamagen/golden-generator-cfg-a-interval20-temp09": "llamagen",
}
FILTERED = ["llamagen/golden-generator-cfg-a-topk20-topp09", "llamagen/golden-generator-cfg-a-interval20-temp09"]
SOFT = [name for name in CASES if "softcfg" in name]


def load(name: str, **arguments: Any) -> tuple[Golden, Generator]:
    case = golden(name)
    arguments.setdefault("config", case.config)
    return case, softcfg.load_generator(CASES[name], checkpoint=case.weights(), **arguments)


def guidance(case: Golden) -> CFG:
    call = case.call
    if "cfg_interval" in call:
        # The first step is guided, and then those whose number less one is at most the interval.
        interval = None if call["cfg_interval"] <= -1 else (0, call["cfg_interval"] + 2)
        return CFG(call["cfg_scale"], schedule="constant", interval=interval)
    scale = {"guidance_scale": call["guidance_scale"], "guidance_scale_pow": call["guidance_scale_pow"]}
    if "step_norm" not in call:
        return CFG(**scale)
    return SoftCFG.released(strength=call["softcfg_strength"], step_norm=call["step_norm"], **scale)


def labels(case: Golden) -> Tensor:
    return case.arrays["labels" if "labels" in case.arrays else "condition"]


def sampling(case: Golden) -> Sampling:
    call = case.call
    if "temperature" in call:
        return Sampling(call["temperature"], call["top_k"], call["top_p"])
    return Sampling(call["randomize_temperature"])


def replay(case: Golden, generator: Generator) -> softcfg.Trace:
    return softcfg.trace(
        generator,
        labels=labels(case),
        tokens=case.arrays["tokens"],
        guidance=guidance(case),
        temperature=sampling(case).temperature,
    )


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_teacher_forced_logits(name: str) -> None:
    case, generator = load(name)
    trace = replay(case, generator)
    close(trace.cond_logits, case.arrays["cond_logits"], 3e-5)
    close(trace.uncond_logits, case.arrays["uncond_logits"], 3e-5)
    close(trace.guided_logits, case.arrays["guided_logits"], 2e-4)
    if "guidance_on" in case.arrays:
        scale = torch.where(case.arrays["guidance_on"].bool(), case.call["cfg_scale"], 1.0)
    else:
        scale = next(array for key, array in case.arrays.items() if key.startswith("guidance_scale"))
    close(trace.guidance_scale, scale, 1e-6)


@pytest.mark.parametrize("name", FILTERED)
def test_probabilities_that_tokens_are_drawn_from(name: str) -> None:
    case, generator = load(name)
    probabilities = sampling(case).probabilities(replay(case, generator).guided_logits)
    close(probabilities, case.arrays["probs"], 3e-5)
    assert torch.equal(probabilities > 0, case.arrays["probs"] > 0)


@pytest.mark.parametrize("name", SOFT)
def test_released_confidences_and_weights(name: str) -> None:
    case, generator = load(name)
    trace = replay(case, generator)
    close(trace.confidence, case.arrays["confidence"], 5e-6)
    assert trace.value_weights is not None
    steps = [int(key.rpartition("_")[2]) for key in case.arrays if key.startswith("value_weights_step_")]
    assert len(steps) == 6
    for step in steps:
        # The released array begins with the condition, which is never weighted.
        expected = case.arrays[f"value_weights_step_{step}"]
        close(trace.value_weights[:, step, :step], expected[:, 1:], 2e-5)
        assert (trace.value_weights[:, step, step:] == 1).all()


@pytest.mark.parametrize("name", CASES)
def test_step_by_step_decoding_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached loop that samples, against the parallel replay: they share no code but the model."""
    case, generator = load(name)
    method = guidance(case)
    seen: list[Tensor] = []
    guide = type(method).guide

    def watch(self: CFG, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        seen.append(torch.stack((cond, uncond, guide(self, cond, uncond, scale))))
        return seen[-1][2]

    monkeypatch.setattr(type(method), "guide", watch)
    tokens = case.arrays["tokens"]
    decode(
        generator,
        labels(case),
        method,
        uniforms=image_uniforms(0, range(len(tokens)), tokens.shape[1]),
        sampling=sampling(case),
        forced_tokens=tokens,
    )
    cond, uncond, guided = torch.cat(seen, dim=2)
    close(cond, case.arrays["cond_logits"], 3e-5)
    close(uncond, case.arrays["uncond_logits"], 3e-5)
    close(guided, case.arrays["guided_logits"], 2e-4)


@pytest.mark.parametrize("name", ["alitok/golden-generator-cfg", "rar/golden-generator-cfg-a"])
def test_released_yaml_layout(name: str, tmp_path: Path) -> None:
    case = golden(name)
    sizes = dict(case.config)
    released = {
        "experiment": {"project": "x", "output_dir": "y"},
        "model": {
            "vq_model": {"codebook_size": sizes.pop("codebook_size"), "token_size": 32},
            "generator": {**sizes, "dropout": 0.1, "guidance_scale": 4.0, "use_checkpoint": False},
        },
        "training": {"seed": 42},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(released))
    for config in (path, str(path), released):
        _, generator = load(name, config=config)
        trace = softcfg.trace(
            generator,
            labels=labels(case).tolist(),
            tokens=case.arrays["tokens"].numpy(),
            guidance=guidance(case),
        )
        close(trace.cond_logits, case.arrays["cond_logits"], 3e-5)


@pytest.mark.parametrize(
    "name", ["alitok/golden-generator-cfg", "rar/golden-generator-cfg-a", "llamagen/golden-generator-cfg-a"]
)
def test_float64_agrees(name: str) -> None:
    case, generator = load(name, dtype=torch.float64)
    trace = softcfg.trace(generator, labels=labels(case), tokens=case.arrays["tokens"], guidance=guidance(case))
    close(trace.cond_logits, case.arrays["cond_logits"], 3e-5)


@pytest.mark.parametrize(
    "name",
    ["alitok/golden-generator-softcfg-stepnorm-s1", "rar/golden-generator-cfg-a", "llamagen/golden-generator-cfg-a"],
)
def test_bfloat16_stays_near(name: str) -> None:
    case, generator = load(name, dtype=torch.bfloat16)
    trace = softcfg.trace(generator, labels=labels(case), tokens=case.arrays["tokens"], guidance=guidance(case))
    error = (trace.cond_logits - case.arrays["cond_logits"]).square().mean().sqrt()
    assert 1e-4 < error / case.arrays["cond_logits"].std() < 0.02
