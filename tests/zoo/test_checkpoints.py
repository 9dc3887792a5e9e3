import argparse
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import softcfg
from softcfg import CheckpointError, UserError
from softcfg.files import hash_file
from softcfg.zoo import GENERATORS, MODELS, TOKENIZERS, Component, ModelFile, fetch, read_state_dict
from tiny_models import ALITOK, ON_DRIVE, VQ, on_hub, weights

RAR_PART = on_hub("someone/tiny", "tiny_rar.bin").generator


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights(ON_DRIVE.generator)


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- reading


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_formats(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    assert same(read_state_dict(save(state, tmp_path / f"weights{suffix}")), state)


def test_the_format_before_zip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(read_state_dict(path), state)


@pytest.mark.parametrize(
    ("wrap", "entries"),
    [
        (lambda state: {"model": state, "epoch": 3}, ("model", "state_dict")),
        (lambda state: {"state_dict": state}, ("model", "state_dict")),
        (lambda state: {"ema": state, "model": {"w": torch.zeros(1)}}, ("ema", "model")),
        (lambda state: {"model": state, "ema": {"w": torch.zeros(1)}}, ("model", "state_dict")),
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, ()),
        (lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}}, ("model",)),
    ],
)
def test_wrappers(tmp_path: Path, state: dict[str, Tensor], wrap: Callable, entries: tuple[str, ...]) -> None:
    assert same(read_state_dict(save(wrap(state), tmp_path / "weights.pt"), entries), state)


def test_a_prefix_that_not_all_names_share_stays(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "bias": torch.ones(2)}
    assert same(read_state_dict(save(state, tmp_path / "weights.pt")), state)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("weights.bin", b"", "is empty"),
        ("weights.safetensors", b"", "is empty"),
        ("weights.pth", b"\n<!DOCTYPE html><html><body>Virus scan warning</body></html>", "is a web page"),
        ("weights.bin", b"<html>Sign in to the network</html>", "is a web page"),
        (
            "weights.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "Git LFS pointer",
        ),
        ("weights.bin", b"PK\x03\x04 and no archive", "is truncated, damaged or not a weights file"),
        ("weights.bin", bytes(range(256)), "is truncated, damaged or not a weights file"),
        ("weights.safetensors", struct.pack("<Q", 1 << 40) + b"{}", "is truncated, damaged or not a weights file"),
        ("weights.safetensors", struct.pack("<Q", 8) + b"{broken}", "is truncated, damaged or not a weights file"),
        ("weights.txt", b"a b c", "must end in one of .safetensors, .bin, .pt, .pth"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_state_dict(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone.bin does not exist"):
        read_state_dict(tmp_path / "gone.bin")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, state: dict[str, Tensor], suffix: str, kept: float) -> None:
    path = save(state, tmp_path / f"weights{suffix}")
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(CheckpointError, match="truncated, damaged or not a weights file"):
        read_state_dict(path)


def test_a_compressed_archive_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Its records would be taken as they are."""
    sound, packed = save(state, tmp_path / "sound.pt"), tmp_path / "packed.pt"
    with zipfile.ZipFile(sound) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for record in one.infolist():
            other.writestr(record.filename, one.read(record))
    with pytest.raises(CheckpointError, match="is a compressed archive: some program packed it anew"):
        read_state_dict(packed)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (
            torch.empty(7, device="meta"),
            "holds no numbers for 1 tensors, .* the model was saved while it was offloaded",
        ),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "sparse, nested or quantized"),
    ],
)
def test_tensors_without_numbers(tmp_path: Path, state: dict[str, Tensor], tensor: Tensor, text: str) -> None:
    name = min(state, key=lambda name: state[name].numel())
    changed = torch.empty_like(state[name], device="meta") if tensor.is_meta else tensor
    path = save({**state, name: changed}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=text):
        softcfg.load_generator("alitok", ALITOK, path)


def test_a_truncated_file_in_the_format_before_zip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated, damaged or not a weights file"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([torch.zeros(1)], "holds no mapping of names to tensors but a list"),
        ({}, "it is empty"),
        ({"epoch": 3}, "under 'epoch' there is a int"),
        ({0: torch.zeros(1)}, "under 0 there is a Tensor"),
        ({"optimizer": {"weight": torch.zeros(1)}}, "under 'optimizer' there is a dict"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_state_dict(save(content, tmp_path / "weights.pt"))


class Attack:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, old_format: bool) -> None:
    trace = tmp_path / "trace"
    content = {"weight": torch.zeros(2), "bias": Attack(f"touch '{trace}'")}
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"refused: .* objects other than tensors \((posix|nt)\.system\)"):
        read_state_dict(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the attack does work on who lets it
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_with_code_is_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps(Attack(f"touch '{trace}'"), protocol))
    with pytest.raises(CheckpointError):
        read_state_dict(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


# ---- files that hold more than weights

ROBUSTOK = {"codebook_size": 8, "codebook_embed_dim": 4, "vit_embed_dim": 8, "vit_depth": 1, "vit_num_heads": 2,
            "image_size": 8, "patch_size": 4}  # fmt: skip
ROBUSTOK_PART = Component(TOKENIZERS["robustok"], ROBUSTOK, ModelFile("post-train.pt", "someone/tiny"))
UNNEEDED = {
    "semantic_model.cls_token": torch.zeros(1, 1, 8),
    "quantize.ema_vocab_hit_SV": torch.zeros(8),
    "encoder.lvl1LC": torch.zeros(1, 9, dtype=torch.int64),
    "decoder.lvl1LC": torch.zeros(1, 10, dtype=torch.int64),
}


def training_checkpoint(args: Any) -> dict[str, Any]:
    """What the training of a tokenizer saves."""
    ema = {**weights(ROBUSTOK_PART), **UNNEEDED}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    other = {name: tensor + 1 for name, tensor in ema.items()}
    return {"model": other, "optimizer": optimizer.state_dict(), "steps": 3, "args": args, "ema": ema}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_training_checkpoint_with_its_arguments(tmp_path: Path, suffix: str) -> None:
    args = argparse.Namespace(lr=1e-4, v_patch_nums=[16], name="x", nested=argparse.Namespace(deep=None))
    path = tmp_path / f"post-train{suffix}"
    torch.save(training_checkpoint(args), path, _use_new_zipfile_serialization=suffix == ".pt")
    tokenizer = softcfg.load_tokenizer("robustok", ROBUSTOK, path)
    assert same(dict(tokenizer.state_dict()), weights(ROBUSTOK_PART))  # those of the entry "ema"
    content = training_checkpoint(None)
    del content["ema"], content["args"], content["optimizer"], content["steps"]
    tokenizer = softcfg.load_tokenizer("robustok", ROBUSTOK, content)
    assert same(dict(tokenizer.state_dict()), {name: one + 1 for name, one in weights(ROBUSTOK_PART).items()})


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("hide", [lambda attack: attack, lambda attack: argparse.Namespace(output=attack)])
def test_code_beside_the_arguments_is_refused_and_not_run(tmp_path: Path, hide: Callable, old_format: bool) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "weights.pt"
    content = training_checkpoint(hide(Attack(f"touch '{trace}'")))
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"refused: .* objects other than tensors \((posix|nt)\.system\)"):
        softcfg.load_tokenizer("robustok", ROBUSTOK, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_other_objects_beside_the_arguments_are_refused(tmp_path: Path) -> None:
    path = save(training_checkpoint(argparse.Namespace(share=Fraction(1, 2))), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"refused: .*\(fractions\.Fraction\)"):
        softcfg.load_tokenizer("robustok", ROBUSTOK, path)


LLAMAGEN = {"dim": 8, "n_layer": 1, "n_head": 2, "num_classes": 2, "vocab_size": 4, "block_size": 4, "multiple_of": 8}
LLAMAGEN_PART = Component(GENERATORS["llamagen"], LLAMAGEN, ModelFile("c2i.pt", "someone/tiny"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "steps": 3, "args": argparse.Namespace(lr=1e-4)},
        lambda state: {"module": state},
        lambda state: {"state_dict": state},
    ],
)
def test_layouts_of_llamagen(tmp_path: Path, wrap: Callable) -> None:
    state = weights(LLAMAGEN_PART)
    stored = {**state, "freqs_cis": torch.zeros(5, 1, 2)}
    generator = softcfg.load_generator("llamagen", LLAMAGEN, save(wrap(stored), tmp_path / "c2i.pt"))
    assert same(dict(generator.state_dict()), state)


@pytest.mark.usefixtures("small_zoo")
def test_only_what_the_family_ignores_may_be_there() -> None:
    state = {**weights(ROBUSTOK_PART), **UNNEEDED, "encoder.lvl2LC": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r": 1 unexpected \(encoder\.lvl2LC\)$"):
        softcfg.load_tokenizer("robustok", ROBUSTOK, state)
    del state["encoder.lvl2LC"], state["encoder.lvl_embed.weight"]
    with pytest.raises(CheckpointError, match=r": 1 missing \(encoder\.lvl_embed\.weight\)$"):
        softcfg.load_tokenizer("robustok", ROBUSTOK, state)


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert hash_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- loading


def test_a_generator_from_a_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    generator = softcfg.load_generator("alitok", ALITOK, save(state, tmp_path / "weights.safetensors"))
    assert same(dict(generator.state_dict()), state)
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert not any(tensor.is_meta for tensor in (*generator.parameters(), *generator.buffers()))
    logits = generator(generator.condition([0, 2], guided=True), torch.zeros(4, 5, dtype=torch.int64))
    assert logits.shape == (4, 6, 16)
    assert logits.isfinite().all()


def test_a_generator_from_a_state_dict_and_a_released_configuration(state: dict[str, Tensor]) -> None:
    trained = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.items()}
    sizes = dict(ALITOK)
    released = {
        "experiment": {"name": "x"},
        "model": {"vq_model": {"codebook_size": sizes.pop("codebook_size")}, "generator": sizes},
    }
    generator = softcfg.load_generator("alitok", released, trained)
    assert same(dict(generator.state_dict()), state)
    assert all(parameter.requires_grad for parameter in trained.values())  # the caller's are left alone


def test_a_tokenizer_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "vq.yaml"
    config.write_text(json.dumps(VQ))
    tokenizer = softcfg.load_tokenizer("maskgit-vq", config, weights(ON_DRIVE.tokenizer))
    assert tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float16, None), (torch.float32, torch.bfloat16)])
def test_dtypes_are_converted(state: dict[str, Tensor], stored: torch.dtype, wanted: torch.dtype | None) -> None:
    given = {name: tensor.to(stored) for name, tensor in state.items()}
    generator = softcfg.load_generator("alitok", ALITOK, given, dtype=wanted)
    expected = wanted or torch.float32
    assert same(dict(generator.state_dict()), {name: tensor.to(expected) for name, tensor in given.items()})
    assert all(parameter.dtype == expected for parameter in generator.parameters())


def test_a_model_folder_supplies_what_is_not_given(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = {
        "generator": {"family": "alitok", "config": ALITOK},
        "tokenizer": {"family": "maskgit-vq", "config": VQ, "checkpoint": "vq.pt"},
    }
    (tmp_path / "model.yaml").write_text(json.dumps(model))
    with pytest.raises(CheckpointError, match=r"generator.safetensors of .* is missing: put it into"):
        softcfg.load_generator(tmp_path)
    save(state, tmp_path / "generator.safetensors")
    assert same(dict(softcfg.load_generator(tmp_path).state_dict()), state)
    vq = weights(ON_DRIVE.tokenizer)
    save(vq, tmp_path / "vq.pt")
    assert same(dict(softcfg.load_tokenizer(str(tmp_path)).state_dict()), vq)
    other = {name: tensor + 1 for name, tensor in state.items()}
    assert same(dict(softcfg.load_generator(tmp_path, checkpoint=other).state_dict()), other)


def test_what_to_load_must_be_said() -> None:
    with pytest.raises(UserError, match="needs checkpoint="):
        softcfg.load_generator("alitok", ALITOK)
    with pytest.raises(UserError, match="AliTokConfig needs hidden_size"):
        softcfg.load_generator("alitok", checkpoint={"w": torch.zeros(1)})
    with pytest.raises(
        UserError, match="there is no tokenizer family or model named 'maskgit_vqq'; did you mean maskgit-vq"
    ):
        softcfg.load_tokenizer("maskgit_vqq", VQ, {})


# ---- weights that do not fit


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer models to compare with."""
    for name in MODELS.keys() - {"alitok-b", "rar-b", "robustok-b"}:
        monkeypatch.delitem(MODELS, name)


def refusal(config: Any, checkpoint: Any, family: str = "alitok") -> str:
    with pytest.raises(CheckpointError) as caught:
        softcfg.load_generator(family, config, checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("small_zoo")
def test_all_differences_are_listed_together(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrong = dict(state)
    del wrong["norm.weight"], wrong["output.bias"]
    wrong["head.weight"] = torch.zeros(3)
    wrong["embeddings.weight"] = torch.zeros(22, 32)
    wrong["output.weight"] = wrong["output.weight"].to(torch.int64)
    path = save(wrong, tmp_path / "wrong.bin")
    assert refusal(ALITOK, path) == (
        f"{path} does not fit the configured AliTok: 2 missing (norm.weight, output.bias); "
        "1 unexpected (head.weight); "
        "1 of another shape (embeddings.weight is [22, 32], expected [21, 32]); "
        "1 of another type (output.weight is torch.int64, expected torch.float32)"
    )


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_quantized_weights_are_refused(tmp_path: Path, state: dict[str, Tensor], dtype: str, suffix: str) -> None:
    number = getattr(torch, dtype, None) or pytest.skip(f"this torch has no {dtype}")
    quantized = torch.zeros(state["output.weight"].shape, dtype=torch.uint8).view(number)
    assert refusal(ALITOK, save({**state, "output.weight": quantized}, tmp_path / f"quantized{suffix}")).endswith(
        f"1 quantized, to be converted first (output.weight is {number}, expected torch.float32)"
    )


@pytest.mark.usefixtures("small_zoo")
def test_long_lists_are_cut(state: dict[str, Tensor]) -> None:
    text = refusal(ALITOK, {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.")})
    assert "11 missing (blocks.1.norm1.weight, " in text
    assert text.endswith(" and 7 more)")


@pytest.mark.parametrize(("fitting", "configured"), [("alitok-l", "alitok-b"), ("alitok-b", "alitok-xl")])
def test_another_size_is_recognised(fitting: str, configured: str) -> None:
    text = refusal(MODELS[configured].generator.config, weights(MODELS[fitting].generator, "meta"))
    assert text.endswith(f"; it fits {fitting}")


@pytest.mark.usefixtures("small_zoo")
def test_another_family_is_recognised(state: dict[str, Tensor]) -> None:
    known = weights(MODELS["rar-b"].generator, "meta")
    assert refusal(ALITOK, known).endswith("; this looks like a checkpoint of the rar generator (it fits rar-b)")
    unknown = weights(RAR_PART, "meta")
    assert refusal(ALITOK, unknown).endswith("; this looks like a checkpoint of the rar generator")
    # RobusTok's files hold more than is loaded; what is ignored is ignored here too.
    text = refusal(MODELS["rar-b"].generator.config, weights(MODELS["robustok-b"].generator, "meta"), "rar")
    assert text.endswith("; it fits robustok-b")
    robustok = weights(MODELS["robustok-b"].tokenizer, "meta") | UNNEEDED
    assert refusal(ALITOK, robustok).endswith("checkpoint of the robustok tokenizer (it fits robustok-b)")
    text = refusal(MODELS["rar-b"].generator.config, state, "rar")
    assert text.endswith("; this looks like a checkpoint of the alitok generator")
    tokenizer = weights(MODELS["rar-b"].tokenizer, "meta")
    assert "checkpoint of the maskgit-vq tokenizer" in refusal(ALITOK, tokenizer)


@pytest.mark.usefixtures("small_zoo")
def test_foreign_weights_get_no_guess() -> None:
    assert refusal(ALITOK, {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}).endswith("fc.bias)")


def test_a_full_size_file_is_checked_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "checkpoints"))
    entry = MODELS["rar-xxl"]
    for part in entry.components:
        tensors = {name: torch.empty(tensor.shape) for name, tensor in weights(part, "meta").items()}
        # A file whose tensors were skipped is sparse: of full size, but it takes neither disk space nor time.
        with torch.serialization.skip_data():
            torch.save(tensors, tmp_path / part.file.name)
        del tensors
    assert (tmp_path / "rar_xxl.bin").stat().st_size > 4 * entry.generator.parameters
    before = peak_memory()
    assert len(fetch(entry, tmp_path, link=True)) == 2
    assert peak_memory() - before < 1e9


def peak_memory() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
