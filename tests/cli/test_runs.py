import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import softcfg.runs.progress
import softcfg.runs.worker
from made_runs import complete
from softcfg import Pipeline
from softcfg.cli.main import main
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import Lock


def sample(model: Path, out: Path, *flags: str) -> int:
    return main(["sample", str(model), "--output-dir", str(out), "--num-samples", "11", "--batch-size", "3", *flags])


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert sample(model_folder, folder, "--no-compare") == 0
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """The folder of a complete run of 11 images in shards of 3."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of all images drawn since."""
    indices: list[int] = []
    original = softcfg.runs.worker.BatchDrawer.draw

    def draw(self: Any, wanted: Any, *args: Any, **settings: Any) -> Any:
        indices.extend(wanted)
        return original(self, wanted, *args, **settings)

    monkeypatch.setattr(softcfg.runs.worker.BatchDrawer, "draw", draw)
    return indices


def pixels(folder: Path) -> np.ndarray:
    return np.concatenate([shard.pixels for shard in RunFolder.open(folder).shards()])


def test_shards_hold_what_the_pipeline_draws(model_folder: Path, out: Path) -> None:
    expected = Pipeline.from_pretrained(model_folder)([n % 4 for n in range(11)], batch_size=3)
    shards = list(RunFolder.open(out).shards())
    assert np.array_equal(np.concatenate([shard.pixels for shard in shards]), expected.pixels)
    assert np.array_equal(np.concatenate([shard.codes for shard in shards]), expected.tokens)
    assert [n for shard in shards for n in shard.indices] == list(range(11))


def test_the_same_command_continues(model_folder: Path, out: Path, drawn: list[int]) -> None:
    before = pixels(out)
    assert sample(model_folder, out, "--no-compare") == 0
    assert drawn == []
    run = RunFolder.open(out)
    run.shard_path(1).unlink()
    run.shard_path(3).write_bytes(run.shard_path(3).read_bytes()[:-1])
    (out / "000001.png").unlink()
    (out / "000004.png").write_bytes(b"stale")
    assert sample(model_folder, out, "--no-compare") == 0
    assert drawn == [3, 4, 5, 9, 10]
    assert np.array_equal(pixels(out), before)
    for index, image in enumerate(before):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:06d}.png")), image)


def test_a_run_grows(model_folder: Path, out: Path, drawn: list[int]) -> None:
    before = pixels(out)
    assert main(["sample", str(model_folder), "--output-dir", str(out), "--num-samples", "14", "--no-compare"]) == 0
    assert drawn == [9, 10, 11, 12, 13]
    assert np.array_equal(pixels(out)[:11], before)
    assert len(list(out.glob("0*.png"))) == 14


def test_other_weights_are_another_run(
    model_folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_folder / "generator.safetensors")
    weights["norm.weight"] = weights["norm.weight"] * 2
    save_file(weights, tmp_path / "other.safetensors")
    assert sample(model_folder, out, "--generator-checkpoint", str(tmp_path / "other.safetensors")) == 2
    assert "holds a run with another generator.sha256;" in capsys.readouterr().err
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in model_folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert sample(moved, out) == 0  # the same model elsewhere


def test_a_rounded_cache_is_another_run(
    model_folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounded = ["--kv-cache-dtype", "int8"]
    assert sample(model_folder, out, *rounded) == 2
    assert "another kv_cache_dtype (None there, 'int8' here)" in capsys.readouterr().err
    assert sample(model_folder, tmp_path / "rounded", *rounded) == 0
    assert RunFolder.open(tmp_path / "rounded").settings["kv_cache_dtype"] == "int8"
    assert sample(model_folder, tmp_path / "rounded", *rounded, "--num-samples", "12") == 0  # it grows
    assert sample(model_folder, tmp_path / "rounded") == 2


def test_a_tokenizer_of_another_dtype_is_another_run(
    model_folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounded = ["--tokenizer-dtype", "bfloat16"]
    assert sample(model_folder, out, *rounded) == 2
    assert "another tokenizer_dtype (None there, 'bfloat16' here)" in capsys.readouterr().err
    assert sample(model_folder, tmp_path / "rounded", *rounded) == 0
    for name, options, dtype in (("again", rounded, "bfloat16"), ("in-full", [], None)):
        assert main(["decode", str(tmp_path / "rounded"), "--output-dir", str(tmp_path / name), *options]) == 0
        assert RunFolder.open(tmp_path / name).settings.get("tokenizer_dtype") == dtype
    runs = [RunFolder.open(path) for path in (out, tmp_path / "in-full", tmp_path / "rounded", tmp_path / "again")]
    full, in_full, bfloat16, again = (np.concatenate([shard.pixels for shard in run.shards()]) for run in runs)
    assert np.array_equal(full, in_full)  # the tokens are the same
    assert np.array_equal(bfloat16, again)
    assert 0 < np.abs(full.astype(int) - bfloat16).mean() < 2


def test_a_second_job_is_refused(model_folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(out):
        assert sample(model_folder, out) == 2
        assert f"{out} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert main(["runs", "status", str(out)]) == 0
        assert f"at work: process {os.getpid()}" in capsys.readouterr().out
        assert main(["runs", "verify", "--discard", str(out)]) == 2
    assert sample(model_folder, out) == 0


def end_after(monkeypatch: pytest.MonkeyPatch, shards: int, signum: int) -> None:
    """Send this process a signal in the middle of a shard."""
    original = softcfg.runs.progress.ProgressWatch.update
    calls = [0]

    def update(self: Any, own: float = 0.0) -> None:
        calls[0] += 1
        if calls[0] == 16 * shards + 5:
            os.kill(os.getpid(), signum)
            time.sleep(5)  # the signal arrives here
        original(self, own)

    monkeypatch.setattr(softcfg.runs.progress.ProgressWatch, "update", update)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_cleanly(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    drawn: list[int], signum: int, code: int,
) -> None:  # fmt: skip
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        end_after(patch, 2, signum)
        started = time.monotonic()
        assert sample(model_folder, tmp_path / "my run", "--no-compare") == code
        assert time.monotonic() - started < 5
    error = capsys.readouterr().err
    assert "6 of 11 images are done and kept; continue with: softcfg sample" in error
    assert f"--output-dir '{tmp_path}/my run' --num-samples 11" in error
    assert "Traceback" not in error
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list((tmp_path / "my run" / "shards").iterdir())) == 2
    drawn.clear()
    assert sample(model_folder, tmp_path / "my run", "--no-compare") == 0
    assert drawn == [6, 7, 8, 9, 10]


def test_the_command_that_continues_does_not_begin_anew(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    drawn: list[int],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        end_after(patch, 2, signal.SIGTERM)
        assert sample(model_folder, tmp_path / "out", "--overwrite", "--no-compare") == 143
    printed = capsys.readouterr().err.partition("continue with: ")[2].strip()
    assert main(["runs", "status", str(tmp_path / "out")]) == 0
    assert f"continue with: {printed}\n" in capsys.readouterr().out
    drawn.clear()
    assert main(shlex.split(printed)[1:]) == 0
    assert drawn == [6, 7, 8, 9, 10]
    assert sample(model_folder, tmp_path / "out", "--overwrite", "--no-compare") == 0
    assert drawn == [6, 7, 8, 9, 10, *range(11)]


def test_older_runs_kept_the_flag_that_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, shown in {
        "softcfg sample 'made up' --overwrite --seed 1": "softcfg sample 'made up' --seed 1",
        "python draw.py  it's --overwrite": "python draw.py  it's --overwrite",  # not words of a shell
    }.items():
        complete(tmp_path / shown, command=command).shard_path(1).unlink()
        assert main(["runs", "status", str(tmp_path / shown)]) == 0
        assert f"continue with: {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SOFTCFG_PRODUCT", "nonsense", "SOFTCFG_PRODUCT: there is no matrix product 'nonsense'; there are plain, "),
        ("WORLD_SIZE", "x", "WORLD_SIZE must be the number of processes, got 'x'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be the number of processes, got '0'"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE must be the number of processes, got '999"),
        (
            "WORLD_SIZE",
            "2",
            "WORLD_SIZE is 2, but no launcher said where these processes meet: start them with torchrun ",
        ),
    ],
)
def test_variables_that_say_nothing_leave_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variable: str, value: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    assert sample(model_folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"softcfg: error: {message}")
    assert len(error.splitlines()) == 1
    assert "continue with" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_number_of_processes_is_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert sample(model_folder, tmp_path / "out", "--no-compare") == 0


def test_a_full_disk_ends_a_run_cleanly(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = os.fsync
    written = [0]

    def fsync(descriptor: int) -> None:
        written[0] += ".safetensors." in os.readlink(f"/proc/self/fd/{descriptor}")
        if written[0] == 3:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert sample(model_folder, tmp_path, "--no-compare") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "shard-000002.safetensors: No space left on device; 6 of 11 images are done and kept" in error
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert sample(model_folder, tmp_path, "--no-compare") == 0


def test_random_labels_and_label_files(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(model_folder, tmp_path / "random", "--labels", "random", "--no-compare") == 0
    run = RunFolder.open(tmp_path / "random")
    assert run.settings["labels"] == "random"
    labels = [label for shard in run.shards() for label in shard.labels]
    assert labels == run.plan.labels_of(range(11))
    file = tmp_path / "labels.txt"
    file.write_text("3\nCircle\n\n1-2\n3\n")
    flags = ["--labels", f"@{file}", "--no-compare", "--output-dir", str(tmp_path / "file")]
    assert main(["sample", str(model_folder), *flags]) == 0
    (shard,) = RunFolder.open(tmp_path / "file").shards()
    assert shard.labels.tolist() == [3, 0, 1, 2, 3]
    assert main(["sample", str(model_folder), "--labels", "random", "--output-dir", str(tmp_path / "x")]) == 2
    assert "--labels random needs --num-samples" in capsys.readouterr().err
    assert main(["sample", str(model_folder), "--labels", "@/nowhere", "--output-dir", str(tmp_path / "x")]) == 2
    assert "/nowhere cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_status_and_verify(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "11 of 11 images, 4 of 4 shards of 3 images" in text
    assert "at work: nobody" in text
    assert "continue with" not in text
    assert main(["runs", "verify", str(out)]) == 0
    assert "4 of 4 shards of 3 images sound, 0 damaged, 0 missing" in capsys.readouterr().out

    run = RunFolder.open(out)
    content = bytearray(run.shard_path(1).read_bytes())
    content[-5] ^= 4
    run.shard_path(1).write_bytes(content)
    run.shard_path(2).unlink()
    assert main(["runs", "status", str(out)]) == 0
    assert "continue with: softcfg sample" in capsys.readouterr().out
    assert main(["runs", "verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert "shard-000001.safetensors is altered: its checksum is wrong" in text
    assert "2 of 4 shards of 3 images sound, 1 damaged, 1 missing" in text
    assert run.shard_path(1).exists()


def test_damaged_shards_are_redrawn_on_request(model_folder: Path, out: Path, drawn: list[int]) -> None:
    before = pixels(out)
    run = RunFolder.open(out)
    content = bytearray(run.shard_path(1).read_bytes())
    content[-5] ^= 4
    run.shard_path(1).write_bytes(content)
    assert main(["runs", "verify", str(out), "--discard"]) == 1
    assert not run.shard_path(1).exists()
    assert not (out / "000003.png").exists()
    assert (out / "000002.png").exists()
    assert sample(model_folder, out, "--no-compare") == 0
    assert drawn == [3, 4, 5]
    assert np.array_equal(pixels(out), before)
    assert main(["runs", "verify", str(out)]) == 0


def test_smaller_batches_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from softcfg.runs.shards import write_shard

    run = complete(tmp_path)
    write_shard(run.shard_path(1), replace(run.read(1), drawn_at_once=2))
    assert main(["runs", "verify", str(tmp_path)]) == 0
    assert "1 shards were drawn with fewer images at once" in capsys.readouterr().out


def test_export(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "export", str(out), "--npz", str(tmp_path / "a.npz"), "--png", str(tmp_path / "png")]) == 0
    assert main(["runs", "export", str(out)]) == 0
    for path in (tmp_path / "a.npz", tmp_path / "out.npz"):
        with np.load(path) as content:
            assert np.array_equal(content["arr_0"], pixels(out))
    assert len(list((tmp_path / "png").iterdir())) == 11
    assert "arr_0 uint8 [11, 8, 8, 3]" in capsys.readouterr().out
    assert main(["runs", "export", str(out), "--npz", "all.zip"]) == 2


def test_sample_writes_an_npz_and_no_pngs_on_request(model_folder: Path, tmp_path: Path) -> None:
    assert sample(model_folder, tmp_path / "run", "--npz", "--no-png", "--no-compare") == 0
    with np.load(tmp_path / "run.npz") as content:
        assert np.array_equal(content["arr_0"], pixels(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["grid.png", "run.json", "run.lock", "shards"]


def test_decode_gives_the_same_images_again(out: Path, tmp_path: Path, drawn: list[int]) -> None:
    again = tmp_path / "again"
    assert main(["decode", str(out), "--output-dir", str(again), "--npz"]) == 0
    assert np.array_equal(pixels(again), pixels(out))
    assert drawn == []
    assert (tmp_path / "again.npz").exists()
    assert (again / "000010.png").read_bytes() == (out / "000010.png").read_bytes()
    run = json.loads((again / "run.json").read_text())
    assert run["decoded_from"] == str(out)


def test_the_command_that_decodes_on_does_not_begin_anew(out: Path, tmp_path: Path) -> None:
    assert main(["decode", str(out), "--output-dir", str(tmp_path / "again"), "--overwrite"]) == 0
    assert "--overwrite" not in RunFolder.open(tmp_path / "again").settings["command"]


def test_a_part_of_a_run_is_not_decoded(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = out
    sorted((part / "shards").iterdir())[-1].unlink()
    assert main(["decode", str(part), "--output-dir", str(tmp_path / "new")]) == 2
    assert f"shards of {part} are missing; continue the run first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_decode_with_another_tokenizer(
    model_folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_folder / "tokenizer.safetensors")
    name = next(name for name in weights if name.startswith("decoder.conv_out") and name.endswith("bias"))
    save_file({**weights, name: weights[name] + 0.25}, tmp_path / "bright.safetensors")
    flags = ["--tokenizer-checkpoint", str(tmp_path / "bright.safetensors"), "--output-dir", str(tmp_path / "bright")]
    assert main(["decode", str(out), *flags]) == 0
    assert pixels(tmp_path / "bright").mean() > pixels(out).mean() + 10
    run = RunFolder.open(tmp_path / "bright")
    run.shard_path(2).unlink()
    assert main(["decode", str(out), *flags]) == 0  # it continues
    assert run.missing() == []
    tokens = [np.concatenate([s.codes for s in RunFolder.open(f).shards()]) for f in (out, tmp_path / "bright")]
    assert np.array_equal(*tokens)
    capsys.readouterr()
    assert main(["decode", str(out), "--output-dir", str(tmp_path / "bright")]) == 2
    assert "holds a run with another tokenizer.sha256" in capsys.readouterr().err
    assert main(["decode", str(out), "--output-dir", str(out)]) == 2
    assert "is the run itself" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["runs", "status"], ["runs", "verify"], ["runs", "export"]])
def test_folders_without_a_run(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run: there is no run.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tracking_asks_for_what_is_not_installed(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else original(name))
    assert sample(model_folder, tmp_path, "--track", "wandb") == 2
    assert "--track wandb needs wandb: pip install '.[wandb]'" in capsys.readouterr().err


def test_tensorboard(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sample(model_folder, tmp_path, "--track", "tensorboard", "--no-compare") == 0
    events = EventAccumulator(str(tmp_path / "tracking")).Reload()
    assert [event.value for event in events.Scalars("images")][-1] == 11
    assert events.Scalars("images_per_second")[-1].value > 0
    assert events.Tags()["images"] == ["samples"]
    hparams = next((tmp_path / "tracking").rglob("hparams.yml")).read_text()
    assert "guidance.guidance_scale: 3.0" in hparams
