from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from softcfg import CFG, Pipeline, Sampling, SoftCFG, UserError, trace
from softcfg.models.ids import as_ids
from softcfg.runs import RunRequest, draw_run
from softcfg.zoo.registry import default_settings

FORCED = {"labels": [0, 1], "forced_tokens": [[0] * 16] * 2}


def test_output(pipe: Pipeline) -> None:
    out = pipe(labels=[0, 3, 2], guidance=SoftCFG(guidance_scale=4.0), seed=0)
    assert out.tokens.shape == (3, 16)
    assert out.tokens.dtype == torch.int64
    assert out.pixels.shape == (3, 8, 8, 3)
    assert out.pixels.dtype == np.uint8
    assert [image.size for image in out.images] == [(8, 8)] * 3
    assert np.array_equal(np.asarray(out.images[1]), out.pixels[1])
    assert out.labels.tolist() == [0, 3, 2]
    assert out.indices == [0, 1, 2]
    decoded = (pipe.tokenizer.decode(out.tokens) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(decoded, out.pixels)


def test_8_bit_pixels_are_the_tokenizers(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    truncated = pipe([0, 1]).pixels
    monkeypatch.setattr(type(pipe.tokenizer), "rounds", True)
    rounded = pipe([0, 1]).pixels
    assert set(np.unique(rounded.astype(int) - truncated)) == {0, 1}


def test_defaults_come_from_the_model(pipe: Pipeline) -> None:
    assert pipe.default_guidance() == SoftCFG(guidance_scale=3.0, guidance_scale_pow=0.5)
    assert pipe.default_guidance(CFG, guidance_scale=7.0) == CFG(guidance_scale=7.0, guidance_scale_pow=0.5)
    explicit = pipe([0, 1], SoftCFG(guidance_scale=3.0, guidance_scale_pow=0.5), temperature=0.9)
    assert torch.equal(pipe([0, 1]).tokens, explicit.tokens)
    assert not torch.equal(pipe([0, 1], temperature=3.0).tokens, explicit.tokens)
    assert torch.equal(pipe([0, 1], sampling=Sampling(0.7, 5)).tokens, pipe([0, 1], temperature=0.7, top_k=5).tokens)
    defaults = {"guidance_scale": 2.0, "schedule": "constant"}
    other = Pipeline(pipe.generator, pipe.tokenizer, sampling_defaults=defaults)
    assert other.default_guidance() == SoftCFG(guidance_scale=2.0, schedule="constant")


OWN = {
    "temperature": 0.8, "top_k": 12, "top_p": 0.9, "entropy_gain": 2.5, "entropy_decay": 2.0, "entropy_base": 0.4,
    "entropy_top_p": 0.5, "min_candidates": 2, "guidance_scale": 2.0, "guidance_scale_pow": 0.3, "schedule": "linear",
    "rule": "apg", "seed": 7,
}  # fmt: skip


def test_every_default_of_a_model_takes_effect(pipe: Pipeline, tmp_path: Path) -> None:
    own = Pipeline(pipe.generator, pipe.tokenizer, sampling_defaults=OWN)
    assert OWN.keys() == {*default_settings(), "seed"}
    for made in (own, Pipeline.from_pretrained(own.save_pretrained(tmp_path))):
        sampling = Sampling(0.8, 12, 0.9, 2.5, 2.0, 0.4, 0.5, 2)
        assert made.sampling() == sampling
        assert made.sampling(top_p=1.0, entropy_gain=0.0) == replace(sampling, top_p=1.0, entropy_gain=0.0)
        guidance = SoftCFG(2.0, 0.3, "linear", rule="apg")
        assert made.default_guidance() == guidance
        assert torch.equal(made([0, 1, 2]).tokens, pipe([0, 1, 2], guidance, sampling=sampling).tokens)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"temprature": 0.01},
            "sampling_defaults: temprature is not known, but temperature, .*did you mean temperature",
        ),
        ({"strength": 0}, "sampling_defaults: strength is not known"),
        ({"temperature": 0}, "sampling_defaults: temperature must be a finite number > 0, got 0"),
        ({"seed": -1}, "sampling_defaults: seed must be a whole number"),
    ],
)
def test_defaults_that_would_be_ignored(pipe: Pipeline, defaults: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline(pipe.generator, pipe.tokenizer, sampling_defaults=defaults)


def test_seed_and_index_fix_an_image(pipe: Pipeline) -> None:
    out = pipe([0, 1, 2, 3], seed=3)
    again = pipe([2, 0], seed=3, indices=[2, 0])
    assert torch.equal(again.tokens, out.tokens[[2, 0]])
    assert not torch.equal(pipe([0, 1, 2, 3], seed=4).tokens, out.tokens)
    assert pipe([0], indices=[2**64 - 1]).indices == [2**64 - 1]  # the last image of the seed


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches(pipe: Pipeline, batch_size: int) -> None:
    labels = [0, 1, 2, 3, 0]
    whole = pipe(labels, seed=1)
    steps: list[int] = []
    parts = pipe(labels, seed=1, batch_size=batch_size, on_step=steps.append)
    assert torch.equal(parts.tokens, whole.tokens)
    assert np.abs(parts.pixels.astype(int) - whole.pixels).max() <= 1
    assert steps == list(range(1, -(-5 // batch_size) * 16 + 1))


def test_a_padded_batch_gives_the_same_bits(pipe: Pipeline) -> None:
    full = pipe([0, 1, 2, 3], seed=1, batch_size=4)
    partial = pipe([0, 1, 2], seed=1, batch_size=4, pad_batches=True)
    assert np.array_equal(partial.pixels, full.pixels[:3])


def test_batches_are_padded_only_on_request(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    decode = pipe.tokenizer.decode
    monkeypatch.setattr(pipe.tokenizer, "decode", lambda codes, grid: rows.append(len(codes)) or decode(codes, grid))
    pipe([0], batch_size=128)
    pipe([0, 1, 2], batch_size=2)
    pipe([0, 1, 2], batch_size=2, pad_batches=True)
    assert rows == [1, 2, 1, 2, 2]


@pytest.mark.slow
def test_a_compiled_generator_is_the_generator(pipe: Pipeline, tmp_path: Path) -> None:
    compiled = torch.compile(pipe.generator, backend="eager")
    other = Pipeline(compiled, pipe.tokenizer, classes=pipe.classes, sampling_defaults=pipe.sampling_defaults)
    assert type(other.conditioning) is type(pipe.conditioning)
    assert torch.equal(other([0, 1], seed=1).tokens, pipe([0, 1], seed=1).tokens)
    one, two = (trace(generator, labels=[1], guidance=CFG(2.0)) for generator in (pipe.generator, compiled))
    assert torch.allclose(one.guided_logits, two.guided_logits, atol=1e-5)
    plain = Pipeline(pipe.generator, pipe.tokenizer, classes=pipe.classes, sampling_defaults=pipe.sampling_defaults)
    runs = [
        draw_run(RunRequest(made, [0], num_samples=1), tmp_path / name) for made, name in ((other, "a"), (plain, "b"))
    ]
    assert runs[0].fingerprint == runs[1].fingerprint
    assert runs[0].settings["model"] == "AliTok"


def test_forced_tokens_reach_their_images(pipe: Pipeline) -> None:
    tokens = torch.randint(20, (3, 16))
    out = pipe([0, 1, 2], forced_tokens=tokens.tolist(), batch_size=2)
    assert torch.equal(out.tokens, tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [1], "sampling": Sampling(), "top_k": 3}, "give sampling or top_k, not both"),
        ({"labels": [4]}, r"labels holds 4, which is outside of 0\.\.3"),
        ({"labels": []}, "at least one class id"),
        ({"labels": 3}, "flat list"),
        ({"labels": [0], "indices": [0, 1]}, "indices must be as many as labels"),
        ({"labels": [0, 1], "indices": [[0], [1]]}, r"indices must be a list, got \[\[0\], \[1\]\]"),
        ({"labels": [0], "indices": [2**64]}, r"image index must be a whole number in 0\.\.2\^64-1"),
        ({"labels": [0], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"labels": [0], "seed": -1}, "seed must be"),
        ({"labels": [0], "temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"labels": [0], "top_k": 3.0}, r"top_k must be an integer >= 0 \(0: off\), got 3.0"),
        ({"labels": [0], "top_k": True}, "top_k must be an integer"),
        ({"labels": [0], "entropy_gain": -1}, "entropy_gain must be"),
        ({"labels": [0], "num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, got True"),
        ({"labels": [0], "num_images_per_prompt": 2.0}, "num_images_per_prompt must be a whole number, got 2.0"),
        ({"labels": [0], "on_step": 5}, "on_step must be a function, got 5"),
        ({"labels": [0], "on_tokens": "print"}, "on_tokens must be a function, got 'print'"),
        ({"labels": [0], "callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        ({"labels": [0], "generator": torch.Generator(), "seed": np.array([0, 1])}, "seed must be a whole number"),
        ({"labels": [0], "generator": torch.Generator(), "seed": 1}, "give seed or generator, not both"),
        ({"labels": [0], "forced_mask": [[True] * 16]}, "forced_mask says where to use forced_tokens"),
        ({"labels": [0], "forced_mask": [[True] * 16], "speculative_jacobi": 4}, "forced_mask says where"),
        ({**FORCED, "forced_mask": [[True] * 16] * 3}, r"forced_mask must have shape \[2, 16\], got \[3, 16\]"),
        ({**FORCED, "forced_mask": [[True] * 16]}, r"forced_mask must have shape \[2, 16\], got \[1, 16\]"),
        ({**FORCED, "forced_mask": [[True] * 9] * 2}, r"forced_mask must have shape \[2, 16\], got \[2, 9\]"),
        ({**FORCED, "forced_mask": [[1] * 16] * 2}, "forced_mask must be boolean, got torch.int64"),
        ({**FORCED, "forced_mask": "x"}, "forced_mask must hold True and False, got 'x'"),
        ({**FORCED, "forced_mask": [[True], [True, False]]}, "forced_mask must hold True and False"),
        ({**FORCED, "forced_tokens": [[0] * 9] * 2}, r"forced_tokens must have shape \[2, 16\], got \[2, 9\]"),
    ],
)
def test_bad_arguments(pipe: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**arguments)


def test_numbers_of_numpy(pipe: Pipeline) -> None:
    wanted = pipe([1], num_images_per_prompt=2).tokens
    assert torch.equal(pipe([1], num_images_per_prompt=np.int64(2)).tokens, wanted)  # type: ignore[arg-type]


def test_forced_tokens_where_the_mask_says_so(pipe: Pipeline) -> None:
    free = pipe([0, 1, 2], seed=1).tokens
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[1, :4] = True
    out = pipe([0, 1, 2], seed=1, batch_size=2, forced_tokens=torch.zeros(3, 16).long(), forced_mask=mask.tolist())
    assert not out.tokens[1, :4].any()
    assert torch.equal(out.tokens[[0, 2]], free[[0, 2]])


@pytest.mark.parametrize("jacobi", [0, 4])
def test_another_default_device(pipe: Pipeline, jacobi: int) -> None:
    wanted = pipe(["Star", 1], speculative_jacobi=jacobi, rule="apg")
    with torch.device("meta"):
        found = pipe(["Star", 1], speculative_jacobi=jacobi, rule="apg")
        assert as_ids([1, 2], "labels", 4).tolist() == [1, 2]
    assert torch.equal(found.tokens, wanted.tokens)
    assert np.array_equal(found.pixels, wanted.pixels)
    assert found.labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pipe, folder: Pipeline.from_pretrained(3), "a model is the name of one"),
        (lambda pipe, folder: Pipeline.from_pretrained(None), "a model is the name of one"),
        (lambda pipe, folder: Pipeline.with_random_weights(folder, weak=3), "a model is the name of one"),
        (lambda pipe, folder: Pipeline.from_pretrained(folder, weak=3), "weak must be a model or the pipeline of one"),
        (
            lambda pipe, folder: Pipeline(pipe.generator, pipe.tokenizer, weak=pipe.generator),
            "weak must be the pipeline of a weak model",
        ),
        (
            lambda pipe, folder: pipe.save_pretrained(None),
            "a model is saved in a folder, whose path is a text, got None",
        ),
        (lambda pipe, folder: Pipeline.from_pretrained(folder, dtype="float8_e4m3fn"), "dtype must be a dtype such as"),
        (lambda pipe, folder: Pipeline.from_pretrained(folder, tokenizer_dtype="float8_e5m2"), "tokenizer_dtype must"),
        (lambda pipe, folder: pipe.to("float8_e4m3fn"), "a generator computes in floating point, not in"),
    ],
)
def test_wrong_kinds(pipe: Pipeline, model_folder: Path, make: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(pipe, model_folder)
    assert pipe.dtype == torch.float32


def test_halves_that_do_not_fit(pipe: Pipeline) -> None:
    class Other(torch.nn.Module):
        num_tokens, codebook_size = 16, 21

    with pytest.raises(UserError, match="16 tokens of 20 codes, but the tokenizer reads 16 tokens of 21 codes"):
        Pipeline(pipe.generator, Other())  # type: ignore[arg-type]


def test_speculative_jacobi_decoding(pipe: Pipeline) -> None:
    total = pipe.generator.num_tokens
    assert pipe([0, 1, 2], seed=3).passes == total
    assert pipe([0, 1, 2], seed=3, batch_size=2).passes == 2 * total
    done: list[int] = []
    seen: list[torch.Tensor] = []
    drawn = pipe(
        [0, 1, 2], seed=3, speculative_jacobi=6, on_step=done.append, on_tokens=lambda t: seen.append(t.clone())
    )
    assert 0 < drawn.passes == len(done) <= total
    assert done[-1] == total
    assert [tokens.shape[1] for tokens in seen] == done
    assert all(torch.equal(tokens, drawn.tokens[:, : tokens.shape[1]]) for tokens in seen)
    in_batches = pipe([0, 1, 2], seed=3, speculative_jacobi=6, batch_size=2)
    assert torch.equal(in_batches.tokens, drawn.tokens)
    assert np.array_equal(in_batches.pixels, drawn.pixels)
    assert not torch.equal(drawn.tokens, pipe([0, 1, 2], seed=3).tokens)
    with pytest.raises(UserError, match="forced_tokens are for drawing token by token"):
        pipe([0], speculative_jacobi=6, forced_tokens=drawn.tokens[:1])
    with pytest.raises(UserError, match="speculative_jacobi must be at least 0"):
        pipe([0], speculative_jacobi=-1)


def test_an_int8_cache(pipe: Pipeline, model_folder: Path) -> None:
    rounded = Pipeline.from_pretrained(model_folder, kv_cache_dtype=torch.int8)
    labels = [n % 4 for n in range(20)]
    same = [
        (
            rounded(labels, seed=0, speculative_jacobi=jacobi).tokens
            == pipe(labels, seed=0, speculative_jacobi=jacobi).tokens
        )
        for jacobi in (0, 1)
    ]
    for tokens in same:  # the draws are the same until the logits differ by enough
        assert tokens.any(0).all()
        assert 0.3 < tokens.float().mean() < 1
    with pytest.raises(UserError, match="tokenizer_dtype must be a dtype of torch or its name, got 'fastest'"):
        Pipeline.from_pretrained(model_folder, tokenizer_dtype="fastest")
    with pytest.raises(UserError, match=r"kv_cache_dtype must be None or one of torch\.int8, got torch\.int4"):
        Pipeline.from_pretrained(model_folder, kv_cache_dtype=torch.int4)


def test_an_interval_without_a_step_is_refused(pipe: Pipeline) -> None:
    said = r"the interval 16-200 holds none of the 16 steps, 0 to 15, of an image, so that nothing is guided"
    for guidance in (
        SoftCFG(3.0, interval=(16, 200)),
        CFG(1.0, interval=(16, 200), perturbation="pag", perturbation_scale=2.0),
    ):
        with pytest.raises(UserError, match=said):
            pipe([0], guidance=guidance)
    with pytest.raises(UserError, match=said):
        pipe([0], interval=(16, 200))
    with pytest.raises(UserError, match=said):
        trace(pipe.generator, labels=[0], guidance=SoftCFG(3.0, interval=(16, 200)))
    last = pipe([0], guidance=SoftCFG(30.0, interval=(15, 200), schedule="constant"))
    nothing = pipe([0], guidance=CFG(1.0, interval=(16, 200)))  # not said to guide
    assert last.tokens[:, :15].equal(nothing.tokens[:, :15])
