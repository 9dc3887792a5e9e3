import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import softcfg
from softcfg import CFG, Sampling, SoftCFG, UserError
from softcfg.models.base import Generator


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> Generator:
    return softcfg.load_generator(model_folder)


def test_shapes_and_dtypes(generator: Generator) -> None:
    total, codes = generator.num_tokens, generator.vocab_size
    trace = softcfg.trace(generator, labels=[0, 3], guidance=SoftCFG(guidance_scale=3))
    assert trace.tokens.shape == (2, total)
    assert trace.tokens.dtype == torch.int64
    for logits in (trace.cond_logits, trace.uncond_logits, trace.guided_logits):
        assert logits.shape == (2, total, codes)
        assert logits.dtype == torch.float32
    assert trace.guidance_scale.shape == (total,)
    assert trace.confidence.shape == (2, total)
    assert trace.value_weights is not None
    assert trace.value_weights.shape == (2, total, total)


def test_drawn_tokens_are_those_of_the_pipeline(model_folder: Path) -> None:
    pipe = softcfg.Pipeline.from_pretrained(model_folder)
    guidance = SoftCFG(guidance_scale=3)
    drawn = pipe([0, 1, 2], guidance, seed=5, temperature=0.8, top_k=7)
    trace = softcfg.trace(pipe.generator, labels=[0, 1, 2], guidance=guidance, seed=5, temperature=0.8, top_k=7)
    same = softcfg.trace(pipe.generator, labels=[0, 1, 2], guidance=guidance, seed=5, sampling=Sampling(0.8, 7))
    assert torch.equal(same.confidence, trace.confidence)
    assert torch.equal(trace.tokens, drawn.tokens)


@pytest.mark.parametrize("method", [SoftCFG(), SoftCFG(step_norm=False, strength=2), SoftCFG.released()], ids=str)
def test_weights_follow_from_the_confidences(generator: Generator, method: SoftCFG) -> None:
    trace = softcfg.trace(generator, labels=[1], guidance=method)
    assert trace.value_weights is not None
    for step in range(generator.num_tokens):
        so_far = trace.confidence.clone()
        so_far[:, step:] = 0
        torch.testing.assert_close(trace.value_weights[:, step], method.weights(so_far))


def test_long_sequences_are_replayed_in_pieces(generator: Generator) -> None:
    guidance = SoftCFG.released(guidance_scale=3)
    whole = softcfg.trace(generator, labels=[0, 1], guidance=guidance)
    pieces = softcfg.trace(generator, labels=[0, 1], guidance=guidance, tokens=whole.tokens, steps_per_pass=5)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(pieces.tensors()[name], tensor, rtol=1e-5, atol=1e-4, msg=name)


def test_plain_guidance_has_weights_of_one(generator: Generator) -> None:
    trace = softcfg.trace(generator, labels=[0], guidance=CFG(guidance_scale=2))
    assert trace.value_weights is not None
    assert (trace.value_weights == 1).all()
    torch.testing.assert_close(trace.confidence, trace.cond_logits.softmax(-1).amax(-1))


def test_without_guidance_both_branches_are_still_there(generator: Generator) -> None:
    trace = softcfg.trace(generator, labels=[0], guidance=CFG(guidance_scale=0))
    assert torch.equal(trace.guided_logits, trace.cond_logits)
    assert (trace.uncond_logits - trace.cond_logits).abs().max() > 0.01


def test_weights_can_be_left_out(generator: Generator) -> None:
    trace = softcfg.trace(generator, labels=[0], guidance=SoftCFG(), value_weights=False)
    assert trace.value_weights is None
    assert "value_weights" not in trace.tensors()


def test_saving(generator: Generator, tmp_path: Path) -> None:
    trace = softcfg.trace(generator, labels=[0], guidance=SoftCFG(guidance_scale=3, strength=0.5), temperature=0.7)
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["softcfg"])
        assert set(file.keys()) == set(trace.tensors())
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), trace.tensors()[name])
    assert settings["method"] == "SoftCFG"
    assert settings["temperature"] == 0.7
    assert SoftCFG(**settings["guidance"]) == trace.guidance
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.safetensors"]
    with pytest.raises(UserError, match="cannot write"):
        trace.save(tmp_path / "missing" / "trace.safetensors")


def test_tokens_that_do_not_fit(generator: Generator) -> None:
    with pytest.raises(UserError, match=r"tokens must have shape \[1, 16\], got \[2, 16\]"):
        softcfg.trace(generator, labels=[0], guidance=CFG(), tokens=torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(UserError, match="tokens must be integers"):
        softcfg.trace(generator, labels=[0], guidance=CFG(), tokens=torch.zeros(1, 16))
    with pytest.raises(UserError, match="outside of"):
        softcfg.trace(generator, labels=[0], guidance=CFG(), tokens=[[20] * 16])
    with pytest.raises(UserError, match="give sampling or temperature, not both"):
        softcfg.trace(generator, labels=[0], guidance=CFG(), sampling=Sampling(), temperature=1.0)
