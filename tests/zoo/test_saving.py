"""Models that users save, and put on the Hub."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import softcfg
from hub import Hub, client_environment, serving
from small_families import FAMILIES, load
from softcfg import Pipeline, UserError
from softcfg.models.conditioning import LabelConditioning
from softcfg.zoo import GENERATORS
from softcfg.zoo.saving import write_model_folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_the_same(model_folder: Path, tmp_path: Path, dtype: str) -> None:
    pipe = Pipeline.from_pretrained(model_folder, dtype=dtype)
    assert pipe.save_pretrained(tmp_path / "new") == tmp_path / "new"
    again = Pipeline.from_pretrained(tmp_path / "new")
    assert (again.name, again.classes, again.dtype) == ("tiny", pipe.classes, pipe.dtype)
    assert again.sampling_defaults == pipe.sampling_defaults
    assert torch.equal(again(["Star", 1], seed=4).tokens, pipe([3, 1], seed=4).tokens)
    again.to("float32").save_pretrained(tmp_path / "new")  # over itself
    assert Pipeline.from_pretrained(tmp_path / "new").dtype == torch.float32
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "generator.safetensors", "model.yaml", "tokenizer.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("replaced", [0, 1, 2, 3])
def test_a_model_saved_over_another_is_whole_or_none(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Wherever it is stopped, never the parts of two."""
    old = Pipeline.from_pretrained(Pipeline.from_pretrained(model_folder).save_pretrained(tmp_path / "old"))
    new = Pipeline.from_pretrained(model_folder)
    for module in (new.generator, new.tokenizer):
        for parameter in module.parameters():
            parameter.data.mul_(1.5)
    rename, calls = os.replace, []

    def stopped(source: Any, target: Any) -> None:
        if len(calls) == replaced:
            raise KeyboardInterrupt
        calls.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with contextlib.suppress(KeyboardInterrupt):
        new.save_pretrained(tmp_path / "old")
    monkeypatch.undo()
    assert not list((tmp_path / "old").glob(".*"))
    if not (tmp_path / "old" / "model.yaml").exists():
        with pytest.raises(UserError, match=r"model\.yaml"):
            Pipeline.from_pretrained(tmp_path / "old")
        return
    found = Pipeline.from_pretrained(tmp_path / "old")
    whole = new if replaced == 3 else old
    for one, other in ((found.generator, whole.generator), (found.tokenizer, whole.tokenizer)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="only where files have a limit")
def test_a_full_disk_is_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, softcfg; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"pipe = softcfg.Pipeline.from_pretrained({str(model_folder)!r}); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        f"pipe.save_pretrained({str(tmp_path / 'new')!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: cannot write" in ended.stderr
    assert not list((tmp_path / "new").iterdir())


def test_a_saved_model_reads_prompts(prompt_model_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(prompt_model_folder)
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path))
    assert torch.equal(again("red apple").tokens, pipe("red apple").tokens)
    with pytest.raises(UserError, match="words lacks the files that it reads texts with"):
        Pipeline.with_random_weights(prompt_model_folder).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_back(family: str, model_folder: Path, tmp_path: Path) -> None:
    generator, tokenizer = load(family), softcfg.load_tokenizer(model_folder)

    class Anything(LabelConditioning):
        def check_tokenizer(self) -> None:
            pass

    write_model_folder(tmp_path, generator, tokenizer, Anything(generator, tokenizer), name=family)
    again = softcfg.load_generator(tmp_path)
    assert type(again) is GENERATORS[family].classes()[0]
    assert again.config == generator.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in generator.state_dict().items())


def test_what_cannot_be_saved(model_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write into folder"):
        pipe.save_pretrained(tmp_path / "file")
    config = pipe.generator.config
    del pipe.generator.config
    with pytest.raises(UserError, match=r"AliTok does not keep its configuration, .* set self\.config"):
        pipe.save_pretrained(tmp_path / "none")
    pipe.generator.config = object()
    with pytest.raises(UserError, match="AliTok is of no family that is registered"):
        pipe.save_pretrained(tmp_path / "other")
    pipe.generator.config = config
    pytest.importorskip("torchao")
    rounded = Pipeline.from_pretrained(model_folder, quantize="int8")
    with pytest.raises(UserError, match="the weights of the generator are quantized or offloaded"):
        rounded.save_pretrained(tmp_path / "rounded")
    with pytest.raises(UserError, match="the weights of the generator are int8: load the model anew"):
        rounded.to(torch.bfloat16)


SCRIPT = """
import json, sys
from softcfg import Pipeline, UserError
from softcfg.cli.main import main
folder = sys.argv[1]
pipe = Pipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
address = pipe.push_to_hub("me/mine", token="hf_secret")
again = Pipeline.from_pretrained("me/mine")
again.set_progress_bar_config(disable=True)
errors = []
for call in (
    lambda: pipe.push_to_hub("forbidden/mine", token="hf_secret"),
    lambda: Pipeline.from_pretrained("me/nothing"),
    lambda: Pipeline.from_pretrained("me/roaming"),
):
    try:
        call()
    except UserError as error:
        errors.append(str(error))
main(["fetch", "me/mine"])
same = pipe("red apple").tokens.equal(again("red apple").tokens)
print(json.dumps({"address": address, "same": same, "errors": errors}))
"""


@pytest.mark.slow
def test_push_to_hub(prompt_model_folder: Path, tmp_path: Path) -> None:
    hub = Hub()
    roaming = yaml.safe_load((prompt_model_folder / "model.yaml").read_text())
    roaming["generator"]["checkpoint"] = "../../secret.safetensors"
    hub.add("me/roaming", "model.yaml", yaml.safe_dump(roaming).encode())
    with serving(hub):
        environment = client_environment(hub, tmp_path)
        command = [sys.executable, "-c", SCRIPT, str(prompt_model_folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        *fetched, found = done.stdout.splitlines()
    fetched, found = "".join(fetched), json.loads(found)
    assert found["same"]
    assert found["address"] == f"{environment['HF_ENDPOINT']}/me/mine"
    assert "forbidden/mine was not pushed to the Hub, where `hf auth login` lets you in" in found["errors"][0]
    assert "there is no folder me/nothing, and model.yaml was not downloaded from me/nothing" in found["errors"][1]
    assert "model.yaml of me/roaming names '../../secret.safetensors', which is not beside it" in found["errors"][2]
    names = {path.rpartition("/")[2] for path in hub.files if path.startswith("/me/mine/")}
    assert {"README.md", "model.yaml", "generator.safetensors", "tokenizer.safetensors", "tokenizer.json"} <= names
    assert b'from_pretrained("me/mine")' in hub.files["/me/mine/resolve/main/README.md"]
    assert {token for method, _, token in hub.requests if method == "POST"} == {"Bearer hf_secret"}
    assert "generator.safetensors" in fetched
