"""A weak model as what guidance leads away from (autoguidance), through everything that draws."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import softcfg
from conftest import GENERATOR
from softcfg import CFG, Pipeline, Sampling, SoftCFG, UserError
from softcfg.cli.main import main
from softcfg.configuration import load_config
from softcfg.decoding import ImageStreams, decode, draw, image_uniforms, jacobi_decode
from softcfg.decoding.throughput import TimedStep
from softcfg.guidance import describe, restore
from softcfg.models.alitok import AliTok, AliTokConfig
from softcfg.models.base import Generator
from softcfg.runs.folder import RunFolder
from softcfg.runs.plan import fingerprint
from softcfg.tuning import Sweep, SweepConfig
from stand_in import extractor

GUIDANCE = {
    "autoguidance": CFG(3.0, 0.5, weak_share=1.0),
    "beside cfg": CFG(3.0, 0.5, weak_share=0.25),
    "softcfg": SoftCFG(3.0, 0.5, weak_share=1.0),
    "softcfg beside cfg": SoftCFG(3.0, 0.5, weak_share=0.5),
    "apg": CFG(3.0, schedule="constant", interval=(2, 11), rule="apg", weak_share=1.0),  # type: ignore[arg-type]
    "tcfg+vpg": CFG(3.0, 0.5, rule="tcfg", perturbation="vpg", weak_share=0.5),  # type: ignore[arg-type]
    "third": CFG(3.0, 0.5, perturbation="pag", perturbation_scale=1.5, weak_share=1.0),  # type: ignore[arg-type]
}
WEAK = {**GENERATOR, "hidden_size": 16, "num_hidden_layers": 1}


def weak_folder(strong: Path, folder: Path, changes: dict[str, object] | None = None) -> Path:
    """A model folder like `strong`, with another generator, whose configuration has these changes."""
    config = {**WEAK, **(changes or {})}
    shutil.copytree(strong, folder)
    description = yaml.safe_load((folder / "model.yaml").read_text())
    description |= {"name": "weak", "generator": {**description["generator"], "config": config}}
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        generator = AliTok(load_config(AliTokConfig, config))
        for parameter in generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    save_file(generator.state_dict(), folder / "generator.safetensors")
    return folder


@pytest.fixture(scope="module")
def weak(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weak_folder(model_folder, tmp_path_factory.mktemp("models") / "weak")


@pytest.fixture(scope="module")
def pipe(model_folder: Path, weak: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder, weak=weak)


def brute_force(
    strong: Generator, weak: Generator, labels: list[int], tokens: torch.Tensor, guidance: CFG
) -> torch.Tensor:
    """Guided logits [B, T, V] in float64, step by step and without a cache, of CFG and SoftCFG by their formulas."""
    strong, weak = (copy.deepcopy(each).double() for each in (strong, weak))
    cond, uncond = (torch.tensor(labels), torch.full((len(labels),), strong.num_classes))
    share, total = guidance.weak_share, tokens.shape[1]
    scales = guidance.scales(total).double()
    confidence = torch.zeros(len(labels), total, dtype=torch.float64)
    rows = []
    for t in range(total):
        z_c = strong(strong.class_condition(cond), tokens[:, :t])[:, -1]  # type: ignore[operator]
        away = torch.zeros_like(z_c)
        for part, model, classes in ((share, weak, cond), (1 - share, strong, uncond)):
            condition = model.class_condition(classes)  # type: ignore[operator]
            weights = torch.ones(len(labels), condition.slots + t, condition.slots + t, dtype=torch.float64)
            if isinstance(guidance, SoftCFG):
                for step in range(1, t + 1):  # the query that predicts token `step` spends a budget of one
                    spent = confidence[:, :step] / confidence[:, :step].sum(dim=1, keepdim=True)
                    weights[:, condition.slots + step - 1, condition.slots : condition.slots + step] = 1 - spent
            away += part * model(condition, tokens[:, :t], value_weights=weights)[:, -1]
        confidence[:, t] = z_c.softmax(-1).amax(-1)
        rows.append(z_c + (scales[t] - 1) * (z_c - away))
    return torch.stack(rows, dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["autoguidance", "beside cfg", "softcfg", "softcfg beside cfg"])
def test_the_logits(pipe: Pipeline, name: str) -> None:
    guidance, labels = GUIDANCE[name], [1, 2]
    uniforms = image_uniforms(4, range(2), 16)
    tokens = decode(pipe.generator, labels, guidance, uniforms=uniforms, weak=pipe.weak_generator)
    assert pipe.weak_generator is not None
    expected = brute_force(pipe.generator, pipe.weak_generator, labels, tokens, guidance)
    trace = softcfg.trace(
        pipe.generator, labels=labels, tokens=tokens, guidance=guidance, steps_per_pass=6, weak=pipe.weak_generator
    )
    torch.testing.assert_close(trace.guided_logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, draw(expected.softmax(-1).float(), uniforms))


@pytest.mark.parametrize("name", GUIDANCE)
def test_decoding(pipe: Pipeline, name: str) -> None:
    """A replay of the drawn tokens draws them again; so do steps of constant shapes and a window of drafts."""
    guidance, labels, sampling, weak = GUIDANCE[name], [0, 1], Sampling(0.8, top_k=12), pipe.weak_generator
    uniforms = image_uniforms(5, range(2), 16)
    tokens = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling, weak=weak)
    trace = softcfg.trace(
        pipe.generator, labels=labels, tokens=tokens, guidance=guidance, sampling=sampling, weak=weak, steps_per_pass=5
    )
    assert torch.equal(tokens, draw(sampling.probabilities(trace.guided_logits), uniforms))
    assert torch.equal(
        decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling, weak=weak, static=True), tokens
    )
    greedy = Sampling(top_k=1)
    expected = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=greedy, weak=weak)
    drafted, _ = jacobi_decode(
        pipe.generator, labels, guidance, streams=ImageStreams(0, range(2)), window=5, sampling=greedy, weak=weak
    )
    assert torch.equal(drafted, expected)
    assert TimedStep(pipe.generator, labels, guidance, 3, weak=weak)().shape == (2,)
    without = decode(pipe.generator, labels, CFG(3.0, 0.5), uniforms=uniforms, sampling=sampling)
    assert not torch.equal(tokens, without)


def test_prompts(prompt_model_folder: Path) -> None:
    """Padded prompts of different lengths, structure tokens and what is ruled out."""
    weak = Pipeline.from_pretrained(prompt_model_folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in weak.generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    pipe = Pipeline.from_pretrained(prompt_model_folder, weak=weak)
    prompts, guidance = ["a red apple", "star"], SoftCFG(3.0, weak_share=0.5)
    drawn = pipe(prompts, guidance)
    inputs = pipe.conditioning.inputs(pipe.conditioning.requests(prompts))
    trace = softcfg.trace(
        pipe.generator, labels=inputs, tokens=drawn.tokens, guidance=guidance, sampling=pipe.sampling(),
        weak=weak.generator,
    )  # fmt: skip
    expected = draw(
        pipe.sampling().probabilities(trace.guided_logits), image_uniforms(0, range(2), drawn.tokens.shape[1])
    )
    assert torch.equal(drawn.tokens, expected)


@pytest.mark.parametrize("rule", ["cfg", "apg", "log_softmax"])
def test_a_weak_model_that_is_the_strong_one(model_folder: Path, rule: str) -> None:
    """There is nothing to lead away from: what is drawn is the conditional branch; at a scale of 1 whatever it is."""
    alone = Pipeline.from_pretrained(model_folder)
    pipe = Pipeline.from_pretrained(model_folder, weak=model_folder)
    guidance = CFG(5.0, rule=rule, weak_share=1.0)  # type: ignore[arg-type]
    trace = softcfg.trace(pipe.generator, labels=[0, 3], guidance=guidance, weak=pipe.weak_generator)
    exact = {} if rule == "cfg" else {"rtol": 0.0, "atol": 1e-4}
    expected = trace.cond_logits
    if rule != "cfg":  # up to a constant
        expected, trace.guided_logits = expected.log_softmax(-1), trace.guided_logits.log_softmax(-1)
        torch.testing.assert_close(trace.guided_logits, expected, **exact)
    else:
        assert torch.equal(trace.guided_logits, expected)
    assert torch.equal(pipe([0, 3], guidance).tokens, alone([0, 3], CFG(1.0)).tokens)
    # With itself beside the unconditional branch, what is left is that branch with the other share of the push.
    half = pipe([0, 1, 2, 3], CFG(5.0, schedule="constant", weak_share=0.5)).tokens
    assert torch.equal(half, alone([0, 1, 2, 3], CFG(3.0, schedule="constant")).tokens)


def test_scale_1_is_the_strong_model_alone(pipe: Pipeline, model_folder: Path) -> None:
    alone = Pipeline.from_pretrained(model_folder)
    for guidance in (CFG(1.0, weak_share=1.0), SoftCFG(0.0, weak_share=0.5), CFG(7.0, weak_share=1.0, interval=(3, 3))):
        assert torch.equal(pipe([0, 1, 2], guidance).tokens, alone([0, 1, 2], CFG(1.0)).tokens)
    assert not CFG(1.0, weak_share=1.0).has_weak_model
    assert torch.equal(pipe([0, 1, 2], CFG(4.0)).tokens, alone([0, 1, 2], CFG(4.0)).tokens)


def test_settings(pipe: Pipeline) -> None:
    for guidance in GUIDANCE.values():
        assert restore(json.loads(json.dumps(describe(guidance)))) == guidance
        assert not guidance.is_plain
    assert "weak_share" not in describe(CFG())
    assert GUIDANCE["autoguidance"].title == "CFG, weak model"
    assert pipe.default_guidance().weak_share == 1
    for share in (-0.5, 1.5):
        with pytest.raises(ValueError, match=r"weak_share must be a number in \[0, 1\]|weak_share must be in \[0, 1\]"):
            CFG(weak_share=share)


def test_runs(pipe: Pipeline, model_folder: Path, weak: Path, tmp_path: Path) -> None:
    """A run knows its weak model by its weights; runs without one are what they were."""
    words = ["sample", str(model_folder), "--labels", "all", "--batch-size", "4", "--guidance-scale", "3"]
    assert main([*words, "--output-dir", str(tmp_path / "plain")]) == 0
    unused = [*words, "--weak-model", str(weak), "--weak-share", "0", "--output-dir", str(tmp_path / "unused")]
    assert main(unused) == 0
    used = [*words, "--weak-model", str(weak), "--output-dir"]
    assert main([*used, str(tmp_path / "used")]) == 0
    plain, without, run = (RunFolder.open(tmp_path / name) for name in ("plain", "unused", "used"))
    assert plain.fingerprint == without.fingerprint
    assert "weak" not in plain.settings
    assert run.settings["guidance"]["weak_share"] == 1
    assert run.settings["weak"]["generator"]["config"]["num_hidden_layers"] == 1
    expected = pipe(range(4), SoftCFG(3.0, 0.5, weak_share=1.0), batch_size=4).pixels
    assert np.array_equal(next(iter(run.shards())).pixels, expected)
    other = copy.deepcopy(run.settings)
    other["weak"]["generator"]["sha256"] = "0" * 64
    assert fingerprint(other) != run.fingerprint
    assert main([*used, str(tmp_path / "plain")]) == 2  # another run


def test_commands(model_folder: Path, weak: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [str(model_folder), "--weak-model", str(weak)]
    words = ["--labels", "0", "--perturbation", "none", "--weak-share", "0.5"]
    assert main(["trace", *both, *words, "--output", str(tmp_path / "t.safetensors")]) == 0
    saved = load_file(tmp_path / "t.safetensors")
    assert saved["weak_logits"].shape == saved["cond_logits"].shape
    assert not torch.equal(saved["weak_logits"], saved["uncond_logits"])
    assert main(["bench", *both, "--random-weights", "--batch-sizes", "1", "--repeats", "1", "--no-pixels"]) == 0
    compared = ["compare", *both, "--methods", "cfg,weak,softcfg+weak", "--num-samples", "4"]
    assert main([*compared, "--output-dir", str(tmp_path / "compared")]) == 0
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())["entries"]
    assert [entry["guidance"].get("weak_share", 0) for entry in found] == [0, 1, 1]
    assert [entry["guidance"]["method"] for entry in found] == ["CFG", "CFG", "SoftCFG"]
    runs = [RunFolder.open(tmp_path / "compared" / "runs" / f"{e['method']}-3" / "seed-0") for e in found]
    assert ["weak" in run.settings for run in runs] == [False, True, True]
    capsys.readouterr()
    assert main(["compare", str(model_folder), "--methods", "weak", "--output-dir", str(tmp_path / "none")]) == 2
    assert "tiny has none: give one (--weak-model NAME" in capsys.readouterr().err


def test_sweep(pipe: Pipeline, model_folder: Path, weak: Path, tmp_path: Path) -> None:
    reference = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", reference)

    def config(of: Pipeline) -> SweepConfig:
        return SweepConfig(
            of, {"weak_share": [0.0, 1.0]}, fixed={"perturbation": "none"}, objective="fid", sampler="grid",
            num_samples=4, reference=tmp_path / "reference.npz", extractor=extractor(),
        )  # fmt: skip

    sweep = Sweep.open(tmp_path / "sweep", config(pipe))
    sweep.run(2)
    commands = {row.settings["weak_share"]: row.command for row in sweep.ranked()}
    for share, command in commands.items():
        assert f"--weak-model {weak}" in command
        assert f"--weak-share {share:g}" in command
    with pytest.raises(UserError, match="takes a weak model, and tiny has none"):
        Sweep.open(tmp_path / "other", config(Pipeline.from_pretrained(model_folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 24}, "24 tokens to draw from, the strong one 20"),
        ({"condition_num_classes": 5}, "5 classes, the strong one 4"),
        ({"image_seq_len": 9, "grid_size": 3}, "9 tokens an image, the strong one 16"),
    ],
)
def test_models_that_do_not_fit(pipe: Pipeline, changes: dict[str, object], message: str) -> None:
    other = AliTok(load_config(AliTokConfig, {**WEAK, **changes}))
    with pytest.raises(UserError, match=message):
        decode(pipe.generator, [0], GUIDANCE["softcfg"], uniforms=torch.zeros(1, 16), weak=other)


def test_other_refusals(pipe: Pipeline, model_folder: Path, weak: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weak_share 1 takes a weak model, and there is none"):
        decode(pipe.generator, [0], GUIDANCE["softcfg"], uniforms=torch.zeros(1, 16))
    with pytest.raises(UserError, match="weak_share 1 takes a weak model, and tiny has none"):
        Pipeline.from_pretrained(model_folder)([0], GUIDANCE["softcfg"])
    # Another image tokenizer of the same shape, and classes in another order.
    other = shutil.copytree(weak, tmp_path / "other")
    tensors = load_file(other / "tokenizer.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "tokenizer.safetensors")
    with pytest.raises(UserError, match="weak and tiny have different image tokenizers"):
        Pipeline.from_pretrained(model_folder, weak=other)
    description = yaml.safe_load((weak / "model.yaml").read_text())
    description["classes"] = description["classes"][::-1]
    shutil.copy(weak / "tokenizer.safetensors", other / "tokenizer.safetensors")
    (other / "model.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(UserError, match="weak and tiny are conditioned on different things"):
        Pipeline.from_pretrained(model_folder, weak=other)


def test_logits_that_are_no_numbers(model_folder: Path, weak: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder, weak=weak)
    assert pipe.weak_generator is not None
    next(iter(pipe.weak_generator.parameters())).data.fill_(float("nan"))
    for guidance in (GUIDANCE["autoguidance"], GUIDANCE["softcfg beside cfg"], GUIDANCE["third"]):
        with pytest.raises(UserError, match="the weak model's logits of row 0 at step"):
            pipe([0, 1], guidance)


def test_models_of_transformers_take_none() -> None:
    pytest.importorskip("transformers")
    from softcfg.integrations import transformers as plug

    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="a weak model is not for this function"):
        plug.decode(model, torch.tensor([[1]]), GUIDANCE["softcfg"], num_tokens=2)
