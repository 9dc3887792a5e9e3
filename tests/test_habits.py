"""Calls as users of diffusers and transformers write them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcfg import CFG, Pipeline, Sampling, SoftCFG, UserError, load_generator

# ---- loading, moving, looking


@pytest.mark.parametrize("given", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}])
def test_dtypes_of_loading(model_folder: Path, given: dict) -> None:
    loaded = Pipeline.from_pretrained(model_folder, **given)
    assert loaded.dtype == torch.bfloat16
    assert loaded.device == torch.device("cpu")
    assert next(loaded.tokenizer.parameters()).dtype == torch.float32
    assert load_generator(model_folder, dtype="bfloat16").dtype == torch.bfloat16
    assert Pipeline.from_pretrained(model_folder, dtype="auto", kv_cache_dtype="int8").dtype == torch.float32


def test_to(model_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    expected = Pipeline.from_pretrained(model_folder, dtype="bfloat16")([1, 2]).tokens
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(pipe([1, 2]).tokens, expected)
    assert pipe.to("float32").dtype == torch.float32
    assert pipe.to(device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    for where, text in (
        (("bf16",), r"dtype must be .* got 'bf16'; did you mean bfloat16"),
        ((torch.int8,), "a generator computes in floating point"),
        (("cuda:77",), "device 'cuda:77' is not available here"),
    ):
        with pytest.raises(UserError, match=text):
            pipe.to(*where)
    assert pipe.dtype == torch.bfloat16


def test_repr(pipe: Pipeline, prompt_pipe: Pipeline) -> None:
    assert repr(pipe) == (
        "<Pipeline tiny: AliTok of 0.0593 M parameters (float32 on cpu) with MaskGITVQ, draws 4 classes, "
        "8 x 8 pixels in 16 tokens>"
    )
    assert "Lumina" in repr(prompt_pipe)
    assert "draws texts" in repr(prompt_pipe)


# ---- what to draw


def test_class_names_are_labels(pipe: Pipeline) -> None:
    assert pipe(["Square", "star", 0], seed=1).labels.tolist() == [1, 3, 0]
    assert pipe("T-shirt/top").labels.tolist() == [2]
    with pytest.raises(
        UserError, match=r"'Sqare' is no class, and tiny does not read prompts; did you mean Square or Star"
    ):
        pipe("Sqare")
    nameless = Pipeline(pipe.generator, pipe.tokenizer)
    with pytest.raises(UserError, match=r"'Square' is no class, .* has classes 0 to 3, without names"):
        nameless(["Square"])


def test_prompt_and_prompts(prompt_pipe: Pipeline) -> None:
    expected = prompt_pipe(prompts=["red apple"], seed=2).tokens
    for out in (
        prompt_pipe("red apple", seed=2),
        prompt_pipe(prompt="red apple", seed=2),
        prompt_pipe(prompt=["red apple"], seed=2),
    ):
        assert torch.equal(out.tokens, expected)
    with pytest.raises(UserError, match="give prompt or prompts, not both"):
        prompt_pipe(prompt="a star", prompts=["a star"])


def test_several_images_of_a_prompt(prompt_pipe: Pipeline, pipe: Pipeline) -> None:
    out = prompt_pipe(prompt=["red apple", "green star"], num_images_per_prompt=2, seed=2)
    expected = prompt_pipe(prompts=["red apple", "red apple", "green star", "green star"], seed=2)
    assert torch.equal(out.tokens, expected.tokens)
    assert [prompt.text for prompt in out.prompts] == ["red apple", "red apple", "green star", "green star"]
    assert pipe([3, 1], num_images_per_prompt=2).labels.tolist() == [3, 3, 1, 1]
    with pytest.raises(UserError, match="num_images_per_prompt must be at least 1, got 0"):
        pipe([3], num_images_per_prompt=0)


def test_negative_prompts_where_there_are_none(prompt_pipe: Pipeline, pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="tiny draws classes: it takes no negative prompt"):
        pipe([1], negative_prompt="green")
    with pytest.raises(UserError, match="negative_prompt must be a text, or one for each of 1 prompts"):
        prompt_pipe("red apple", negative_prompt=["a", "star"])


# ---- guidance and sampling in the call


def test_fields_of_guidance(pipe: Pipeline) -> None:
    def tokens(*arguments: object, **settings: object) -> list:
        return pipe([0, 1, 2], *arguments, seed=5, **settings).tokens.tolist()

    assert tokens(guidance_scale=6.0, strength=0.5) == tokens(pipe.default_guidance(guidance_scale=6.0, strength=0.5))
    assert tokens(guidance_scale=6.0) != tokens()
    assert tokens(rule="apg", apg_eta=0.2) == tokens(SoftCFG(3.0, 0.5, rule="apg"), apg_eta=0.2)
    assert tokens(perturbation="none", guidance_scale=5) == tokens(CFG(5, 0.5))
    # On top of guidance that is given, the other fields stay.
    assert tokens(SoftCFG.released(guidance_scale=2.0), guidance_scale=6.0) == tokens(
        SoftCFG.released(guidance_scale=6.0)
    )
    assert tokens(CFG(2.0, rule="apg"), guidance_scale=6.0) == tokens(CFG(6.0, rule="apg"))
    assert tokens(entropy_gain=2.5, temperature=0.8) == tokens(sampling=Sampling(0.8, entropy_gain=2.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1}, "guidance_scale must be"),
        ({"guidance": "strong"}, "guidance must be"),
        ({"apg_eta": 0.2}, "apg_eta is a setting of the rule apg, which is not chosen"),
        ({"sampling": Sampling(), "entropy_gain": 2.5}, "give sampling or entropy_gain, not both"),
    ],
)
def test_bad_guidance(pipe: Pipeline, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe([1], **settings)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("guidence_scale", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("class_labels", "labels"),
        ("num_images", "num_images_per_prompt"),
        ("num_return_sequences", "num_images_per_prompt"),
        ("ouput_type", "output_type"),
        ("manual_seed", "seed"),
        ("topk", "top_k"),
        ("label", "labels"),
        ("softcfg_strength", "strength"),
        ("num_inference_steps", "none at all: there is a step for every token of an image"),
    ],
)
def test_unknown_words_name_the_local_one(pipe: Pipeline, name: str, local: str) -> None:
    with pytest.raises(UserError) as caught:
        pipe([1], **{name: 1})
    assert str(caught.value) == f"the pipeline takes no {name}; did you mean {local}?"
    assert isinstance(caught.value, TypeError)


def test_unknown_words_of_loading(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"from_pretrained takes no torch_dtpye; did you mean torch_dtype\?"):
        Pipeline.from_pretrained(model_folder, torch_dtpye="bfloat16")
    with pytest.raises(UserError, match="from_pretrained takes no variant"):
        Pipeline.from_pretrained(model_folder, variant="fp16")
    with pytest.raises(UserError, match="dtype and torch_dtype are one setting"):
        Pipeline.from_pretrained(model_folder, dtype="float32", torch_dtype="bfloat16")


# ---- seeds


def test_generators_and_new_seeds(pipe: Pipeline) -> None:
    labels = [0, 1, 2, 3]
    first, again = (pipe(labels, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(pipe(labels, seed=first.seed).tokens, first.tokens)
    one = torch.Generator().manual_seed(3)
    assert not torch.equal(pipe(labels, generator=one).tokens, pipe(labels, generator=one).tokens)
    new, other = pipe(labels, seed=None), pipe(labels, seed=None)
    assert new.seed != other.seed
    assert not torch.equal(new.tokens, other.tokens)
    assert torch.equal(pipe(labels, seed=new.seed).tokens, new.tokens)
    assert pipe(labels).seed == 0
    for given, text in (
        ({"generator": one, "seed": 3}, "give seed or generator, not both"),
        ({"generator": [one]}, r"generator must be one torch\.Generator"),
    ):
        with pytest.raises(UserError, match=text):
            pipe(labels, **given)


# ---- what comes back


def test_output_types(pipe: Pipeline) -> None:
    out = pipe([0, 1])
    assert all(isinstance(image, Image.Image) for image in out.images)
    assert [np.asarray(image).tolist() for image in out[0]] == out.pixels.tolist()
    assert out["seed"] == 0
    arrays, tensors = pipe([0, 1], output_type="np").images, pipe([0, 1], output_type="pt").images
    assert arrays.shape == (2, 8, 8, 3)
    assert arrays.dtype == np.float32
    assert np.array_equal((arrays * 255).round(), out.pixels)
    assert tensors.shape == (2, 3, 8, 8)
    assert torch.equal(tensors, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    (images,) = pipe([0, 1], return_dict=False, output_type="np")
    assert np.array_equal(images, arrays)
    with pytest.raises(UserError, match="output_type must be one of pil, np, pt, got 'latent'; tokens and codes"):
        pipe([0], output_type="latent")
    with pytest.raises(KeyError):
        out["image"]


def test_progress_bar(pipe: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe([0, 1, 2], batch_size=2)
    assert "32/32" in capfd.readouterr().err
    pipe([0], progress=False)
    pipe([0], on_step=lambda done: None)  # who watches shows it in another way
    assert not capfd.readouterr().err
    pipe([0], on_step=lambda done: None, progress=True, speculative_jacobi=6)
    assert "16/16" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe([0])
        assert not capfd.readouterr().err
    finally:
        pipe.set_progress_bar_config()


def test_callback_on_step_end(pipe: Pipeline) -> None:
    seen: list = []

    def callback(given: Pipeline, step: int, timestep: int, tensors: dict) -> dict:
        seen.append((given, step, timestep, tensors["tokens"].shape[1]))
        return tensors

    pipe([0, 1, 2], batch_size=2, callback_on_step_end=callback)
    assert seen == [(pipe, step, step, step % 16 + 1) for step in range(32)]
    done: list[int] = []
    pipe([0, 1, 2], batch_size=2, callback_on_step_end=done.append)
    assert done == list(range(1, 33))
