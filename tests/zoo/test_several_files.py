"""Models published in several files: an index and the weights it lists, a configuration, a text tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from hub import Hub, client_environment, serving
from softcfg import CheckpointError, Pipeline
from softcfg.cli.main import main
from softcfg.files import hash_file
from softcfg.zoo import MODELS, ModelEntry, fetch, files, load_generator, load_tokenizer, reading
from tiny_models import lumina_on_hub, write_lumina_files

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    path = tmp_path / "downloads"
    path.mkdir()
    write_lumina_files(path)
    return path


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> ModelEntry:
    entry = lumina_on_hub()
    monkeypatch.setitem(MODELS, entry.name, entry)
    return entry


def test_files_are_taken_and_read(entry: ModelEntry, folder: Path, downloads: Path) -> None:
    home = folder / "tiny-lumina"
    placed = fetch(entry, downloads)
    assert placed == [home / INDEX, *(home / shard for shard in SHARDS), home / "config.json", folder / "movq.ckpt",
                      home / "tokenizer.json"]  # fmt: skip
    assert fetch(entry) == placed
    assert files.missing_files(entry.files) == []

    generator = load_generator("tiny-lumina")
    assert generator.dtype == torch.bfloat16
    assert generator.cache_shape[0] == 2  # what config.json says
    assert (generator.config.image_end_id, generator.config.size_id) == (7, 11)  # what tokenizer.json says
    for name, file in json.loads((downloads / INDEX).read_text())["weight_map"].items():
        expected = reading.read_state_dict(downloads / file)[name]
        assert torch.equal(generator.state_dict()[name], expected)
    assert load_generator("tiny-lumina", dtype=torch.float32).dtype == torch.float32
    assert load_tokenizer("tiny-lumina").codebook_size == 20  # the file's other tensors are no harm
    out = Pipeline.from_pretrained("tiny-lumina")(prompts=["a red apple"], width=4, height=4)
    assert out.pixels.shape == (1, 4, 4, 3)


def test_the_commands(entry: ModelEntry, folder: Path, downloads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "tiny-lumina"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{INDEX} is missing: https://huggingface.co/someone/lumina/blob/main/{INDEX}" in text
    assert main(["fetch", "tiny-lumina", "--from", str(downloads)]) == 0
    assert len(capsys.readouterr().out.split()) == 7
    main(["models"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("all")
    (folder / "tiny-lumina" / SHARDS[1]).unlink()
    main(["models"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"missing {SHARDS[1]}")
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} of tiny-lumina is missing: run `softcfg fetch"):
        load_generator(entry)


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 500.0}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": None, "head_dim": None, "hidden_act": "silu"}, 500.0),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "tie_word_embeddings": False}, 500.0),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0}}, None),
        ({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
        ({"rope_scaling": "linear"}, None),
        ({"hidden_act": "gelu"}, None),
        ({"head_dim": 64}, None),
        ({"attention_bias": True}, None),
        ({"mlp_bias": True}, None),
        ({"tie_word_embeddings": True}, None),
    ],
)
def test_config_json_is_obeyed_or_refused(
    entry: ModelEntry, downloads: Path, config: dict[str, object], theta: float | None
) -> None:
    path = downloads / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if theta is None:
        with pytest.raises(CheckpointError, match=r"config\.json describes another model than a lumina-mgpt-2"):
            fetch(entry, downloads)
    else:
        fetch(entry, downloads)
        assert load_generator(entry).config.rope_theta == theta


def test_an_index_without_its_parts_is_not_here(
    entry: ModelEntry, folder: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub has them all, index and parts."""
    (folder / "tiny-lumina").mkdir(parents=True)
    for name in (INDEX, SHARDS[0]):
        shutil.copy(downloads / name, folder / "tiny-lumina" / name)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]} of tiny-lumina is missing"):
        load_generator(entry)
    for client in ("hf_hub_download", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, client, lambda repository, name, **_: str(downloads / name))
    assert fetch(entry)[:4] == [downloads / name for name in (INDEX, *SHARDS)]
    assert load_generator(entry).cache_shape[0] == 2


@pytest.mark.slow
def test_the_hub(entry: ModelEntry, downloads: Path, tmp_path: Path) -> None:
    hub = Hub()
    for path in downloads.iterdir():
        hub.add("someone/movq" if path.name == "movq.ckpt" else "someone/lumina", path.name, path.read_bytes())
    script = """
from softcfg.zoo import fetch, load_generator
from tiny_models import lumina_on_hub
entry = lumina_on_hub()
print(*fetch(entry), sep="\\n")
print(load_generator(entry).cache_shape[0])
"""
    with serving(hub):
        environment = client_environment(hub, tmp_path / "hf")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stderr
    *paths, layers = done.stdout.splitlines()
    assert layers == "2"
    assert [Path(path).name for path in paths] == [INDEX, *SHARDS, "config.json", "movq.ckpt", "tokenizer.json"]
    assert all(tmp_path / "hf" in Path(path).parents for path in paths)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / SHARDS[0]).unlink(), rf"{SHARDS[0]} does not exist"),
        (lambda d: (d / SHARDS[2]).write_bytes(b"x"), rf"{SHARDS[2]} is truncated"),
        (lambda d: (d / INDEX).write_text("{"), "damaged or no JSON file"),
        (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'), "not a file beside it"),
        (lambda d: (d / SHARDS[0]).write_bytes((d / SHARDS[1]).read_bytes()), "tensors that its files lack"),
        (lambda d: (d / "config.json").write_text('{"num_hidden_layers": 3}'), "does not fit the configured Lumina"),
        (
            lambda d: (d / "config.json").write_text('{"hidden_act": "gelu"}'),
            r"config\.json describes another model .*gelu",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is damaged"),
    ],
)
def test_damaged_files_are_not_taken(
    entry: ModelEntry, folder: Path, downloads: Path, damage: object, message: str
) -> None:
    damage(downloads)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        fetch(entry, downloads)
    assert not folder.exists()


def test_each_part_holds_what_the_index_says(downloads: Path) -> None:
    where = json.loads((downloads / INDEX).read_text())["weight_map"]
    expected = reading.read_state_dict(downloads / INDEX)
    stale = next(name for name, file in where.items() if file == SHARDS[0])
    for shard in SHARDS[1:]:
        part = {name: tensor.clone() for name, tensor in reading.read_state_dict(downloads / shard).items()}
        save_file({**part, stale: torch.zeros_like(expected[stale])}, downloads / shard)
    found = reading.read_state_dict(downloads / INDEX)
    assert found.keys() == expected.keys()
    assert torch.equal(found[stale], expected[stale])


def test_the_hash_is_that_of_all_files(downloads: Path) -> None:
    before = reading.hash_weights(downloads / INDEX)
    content = bytearray((downloads / SHARDS[2]).read_bytes())
    content[-1] ^= 1
    (downloads / SHARDS[2]).write_bytes(content)
    assert reading.hash_weights(downloads / INDEX) != before
    assert reading.hash_weights(downloads / SHARDS[0]) == hash_file(downloads / SHARDS[0])
