"""Runs that are drawn from Python."""

import copy
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.utils import prune

from launching import Job, python_call
from made_runs import complete
from softcfg import CFG, Pipeline, RunRequest, Sampling, SoftCFG, UserError, draw_run
from softcfg.cli.main import main
from softcfg.files import hash_file
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.products import PRODUCTS, use_product
from softcfg.runs import (
    DrawnRun,
    Progress,
    RunFolder,
    Shard,
    decode_run,
    export_npz,
    write_comparison,
    write_grid,
    write_pngs,
)  # fmt: skip
from softcfg.runs.lock import Lock, holder
from softcfg.runs.signals import Terminated
from softcfg.zoo.source import describe_module

IMAGES, BATCH = 11, 3


@pytest.fixture
def request_of(pipe: Pipeline) -> Any:
    return partial(RunRequest, pipe, num_samples=IMAGES, batch_size=BATCH)


def pixels(run: RunFolder) -> np.ndarray:
    return np.concatenate([shard.pixels for shard in run.shards()])


def test_a_run_holds_what_the_pipeline_draws(model_folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    guidance, sampling = SoftCFG(guidance_scale=4.0), Sampling(0.8, top_k=9)
    request = RunRequest(
        model_folder, [3, 1], num_samples=IMAGES, guidance=guidance, sampling=sampling, batch_size=BATCH, seed=7
    )
    run = draw_run(request, tmp_path / "run")
    expected = pipe([3, 1] * 5 + [3], guidance, seed=7, sampling=sampling, batch_size=BATCH)
    assert np.array_equal(pixels(run), expected.pixels)
    assert np.array_equal(np.concatenate([shard.codes for shard in run.shards()]), expected.codes)
    assert holder(tmp_path / "run") is None
    assert export_npz(run, tmp_path / "run.npz") == (IMAGES, 8, 8, 3)
    assert write_grid(run).size == Image.open(tmp_path / "run" / "grid.png").size


def test_the_command_line_continues_a_run_of_python(
    model_folder: Path, request_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_run(request_of(), tmp_path).shard_path(2).unlink()
    assert main(["runs", "status", str(tmp_path)]) == 0
    assert "continue with: the same call of softcfg.draw_run" in capsys.readouterr().out
    words = ["sample", str(model_folder), "--output-dir", str(tmp_path), "--num-samples", str(IMAGES), "--no-compare"]
    assert main(words) == 0
    assert f"8 of {IMAGES} images are there already" in capsys.readouterr().out


def test_defaults_are_the_models(pipe: Pipeline, tmp_path: Path) -> None:
    run = draw_run(RunRequest(pipe), tmp_path)
    assert np.array_equal(pixels(run), pipe([0, 1, 2, 3]).pixels)
    assert (run.plan.num_samples, run.plan.batch_size, run.settings["command"]) == (4, 4, "")


def test_prompts(prompt_model_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(prompt_model_folder)
    run = draw_run(RunRequest(pipe, prompts=["red apple", "dog"], num_samples=3), tmp_path / "two")
    assert np.array_equal(pixels(run), pipe(["red apple", "dog", "red apple"]).pixels)
    run = draw_run(RunRequest(pipe, prompts="red apple"), tmp_path / "one")
    assert run.settings["prompts"] == ["red apple"]
    assert run.plan.num_samples == 1


def test_what_callers_are_told(request_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started: list[Any] = []
    reports: list[Progress] = []
    written: list[tuple[int, str]] = []
    finished: list[DrawnRun] = []

    def on_shard(shard: Shard) -> None:
        written.append((shard.number, threading.current_thread().name))
        write_pngs(shard, folder)

    def on_finish(drawn: DrawnRun) -> None:
        with pytest.raises(UserError, match="is in use by process"):
            Lock(folder)
        write_comparison(drawn.run, drawn.drawer)
        finished.append(drawn)

    def draw(images: int = IMAGES) -> RunFolder:
        for told in (started, reports, written, finished):
            told.clear()
        return draw_run(
            request_of(num_samples=images),
            folder,
            on_start=lambda run, todo: started.append((run.path, list(todo))),
            on_shard=on_shard,
            on_progress=reports.append,
            on_finish=on_finish,
        )

    draw()
    assert started == [(folder, [0, 1, 2, 3])]
    assert [number for number, _ in written] == [0, 1, 2, 3]
    assert {name for _, name in written}.isdisjoint({threading.current_thread().name})
    assert (reports[0].done, reports[0].total, reports[-1].done, reports[-1].ended) == (0, IMAGES, IMAGES, True)
    assert [drawn.images for drawn in finished] == [IMAGES]
    assert len(list(folder.glob("0*.png"))) == IMAGES
    assert (folder / "comparison.png").exists()
    draw(14)
    assert started == [(folder, [3, 4])]
    assert (reports[0].before, reports[-1].done, finished[0].images) == (9, 14, 5)
    draw(14)
    assert started == [(folder, [])]
    assert (written, finished[0].images) == ([], 0)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError, Terminated])
def test_whatever_ends_the_call_the_same_call_continues(
    request_of: Any, tmp_path: Path, pipe: Pipeline, ending: type[BaseException]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    reports: list[Progress] = []

    def end(progress: Progress) -> None:
        reports.append(progress)
        if progress.done >= 5 and not progress.ended:  # a report that a shard is there may skip a number
            if ending is Terminated:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)  # the signal arrives here
            raise ending

    with pytest.raises(ending):
        draw_run(request_of(), tmp_path, on_progress=end)
    assert signal.getsignal(signal.SIGTERM) == before
    assert holder(tmp_path) is None
    kept = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    # A slow machine sees the first shard before the second batch is drawn, and reports the fifth image a batch earlier.
    assert sorted(kept) in (["shard-000000.safetensors"], ["shard-000000.safetensors", "shard-000001.safetensors"])
    assert (reports[-1].done, reports[-1].ended) == (BATCH * len(kept), True)
    run = draw_run(request_of(), tmp_path)
    assert np.array_equal(pixels(run), pipe([n % 4 for n in range(IMAGES)], batch_size=BATCH).pixels)
    assert {name: (tmp_path / "shards" / name).read_bytes() for name in kept} == kept


def test_two_processes_killed_and_continued(model_folder: Path, tmp_path: Path, pipe: Pipeline) -> None:
    images = 60
    words = [str(model_folder), str(tmp_path), str(images), str(BATCH)]
    job = Job(2, words, python_call)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("shards/shard-*"))) < 3 and job.alive() and time.monotonic() < until:
        time.sleep(0.002)
    assert job.kill([0, 1]) == 2
    run = RunFolder.open(tmp_path)
    missing = run.missing()
    assert 0 < len(missing) <= run.plan.num_shards - 3
    kept = {path: path.stat().st_mtime_ns for path in map(run.shard_path, range(run.plan.num_shards)) if path.exists()}
    assert Job(2, words, python_call).join() == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    expected = pipe(run.plan.labels_of(range(images)), batch_size=BATCH)
    assert np.array_equal(pixels(run), expected.pixels)


def test_a_folder_in_use_is_refused_unless_the_caller_locked_it(request_of: Any, tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            draw_run(request_of(), tmp_path)
        with pytest.raises(UserError, match="is in use by process"):
            decode_run(complete(tmp_path / "made-up"), tmp_path)
        assert draw_run(request_of(), tmp_path, lock=lock).missing() == []
        assert holder(tmp_path) is not None


def test_another_request_needs_another_folder_or_overwrite(request_of: Any, tmp_path: Path) -> None:
    draw_run(request_of(), tmp_path)
    other = request_of(guidance=CFG(guidance_scale=2.0))
    with pytest.raises(UserError, match=r"holds a run with another guidance\.method"):
        draw_run(other, tmp_path)
    assert draw_run(other, tmp_path, overwrite=True).settings["guidance"]["method"] == "CFG"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not readable") as caught:
        draw_run(other, tmp_path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"speculative_jacobi": -1}, "speculative_jacobi must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be a whole number in 0\.\.2"),
        ({"labels": [0, 4]}, r"labels holds 4, which is outside of 0\.\.3"),
        ({"labels": []}, "labels must name at least one class"),
        ({"labels": "Circel"}, r"'Circel' is no class.* did you mean Circle\?; 'random' stands for random classes"),
        ({"labels": "random", "num_samples": None}, "random labels need num_samples"),
        ({"prompts": ["red apple"]}, "tiny draws classes: give labels, it does not read prompts"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    request_of: Any, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw_run(request_of(**fields), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_is_no_json_leaves_nothing(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampling, "describe", lambda _: {"temperature": {1.0}})
    with pytest.raises(UserError, match="the settings of the run cannot be written as JSON: Object of type set"):
        draw_run(request_of(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_any_kind_are_those_of_python(pipe: Pipeline, tmp_path: Path) -> None:
    def request(whole: Callable[[int], Any], real: Callable[[int], Any], interval: Any) -> RunRequest:
        return RunRequest(
            pipe,
            [whole(1)],
            num_samples=whole(2),
            guidance=SoftCFG(whole(3), real(2), interval=interval, strength=real(4)),
            sampling=Sampling(real(2), whole(4)),
            batch_size=whole(2),
            seed=whole(7),
            speculative_jacobi=whole(4),
        )

    run = draw_run(request(int, lambda n: 1 / n, (0, 9)), tmp_path)
    for whole, real in ((np.int64, lambda n: np.float32(1 / n)), (np.uint8, lambda n: Fraction(1, n))):
        again = draw_run(request(whole, real, [whole(0), whole(9)]), tmp_path)
        assert (again.fingerprint, again.missing()) == (run.fingerprint, [])


def rounded(pipe: Pipeline) -> None:
    pipe.to("bfloat16").to("float32")


def scaled(pipe: Pipeline) -> None:
    next(pipe.generator.parameters()).data.mul_(0.5)  # which no counter of PyTorch's tells


def pruned(pipe: Pipeline) -> None:
    prune.random_unstructured(pipe.generator.get_submodule("norm"), "weight", 0.5)


def tuned(pipe: Pipeline) -> None:
    state = {name: weight + 1 for name, weight in pipe.tokenizer.state_dict().items()}
    pipe.tokenizer.load_state_dict(state)


def partly_rounded(pipe: Pipeline) -> None:
    pipe.generator.get_submodule("norm").bfloat16()  # of values that bfloat16 has


@pytest.mark.parametrize("change", [rounded, scaled, pruned, tuned, partly_rounded])
@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
def test_weights_that_were_changed_are_another_run(
    model_folder: Path, tmp_path: Path, change: Callable[[Pipeline], None]
) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    request = RunRequest(pipe, num_samples=1)
    before = draw_run(request, tmp_path).settings
    assert draw_run(request, tmp_path).missing() == []  # what steps did to the weights has been undone
    change(pipe)
    changed, kept = ("tokenizer", "generator") if change is tuned else ("generator", "tokenizer")
    with pytest.raises(UserError, match=rf"holds a run with another {changed}\.sha256; give another") as refused:
        draw_run(request, tmp_path)
    assert kept not in str(refused.value)
    after = request.settings(pipe)
    assert (after["model"], after[kept]) == (before["model"], before[kept])
    assert after[changed]["sha256"] == describe_module(getattr(pipe, changed))["sha256"]


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
def test_weights_of_the_file_are_those_of_the_file(model_folder: Path, pipe: Pipeline) -> None:
    """In whatever dtype, on whichever way, and while layers keep their weights laid out."""
    loaded, moved = Pipeline.from_pretrained(model_folder, dtype="bfloat16"), Pipeline.from_pretrained(model_folder)
    assert RunRequest(moved.to("bfloat16")).settings(moved) == RunRequest(loaded).settings(loaded)
    settings = RunRequest(pipe).settings(pipe)
    assert settings["generator"]["sha256"] == hash_file(model_folder / "generator.safetensors")
    for product in PRODUCTS.values():
        with use_product(product.name), prepared_linear_layers(pipe.generator, 4):
            assert RunRequest(pipe).settings(pipe) == settings


def test_integers_that_were_changed_are_refused(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pipe = Pipeline.from_pretrained(model_folder, quantize="int8")
    request = RunRequest(pipe, num_samples=1)
    assert request.settings(pipe)["generator"]["sha256"] == hash_file(model_folder / "generator.safetensors")
    pipe.generator.get_parameter("norm.weight").data.mul_(2)
    with pytest.raises(UserError, match=r"the weights of the generator are not those of .* load the model anew"):
        draw_run(request, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_guidance_without_a_name_or_an_effect(request_of: Any, tmp_path: Path) -> None:
    class Mine(CFG):
        def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor | float) -> Tensor:
            return cond

    for guidance, message in (
        (Mine(), r"the method .*Mine has no name; register it"),
        (type("SoftCFG", (CFG,), {})(), r"the method .*SoftCFG has no name; register it"),
        (CFG(perturbation_scale=1.0), "perturbation_scale 1 takes a perturbation, and there is none"),
    ):
        with pytest.raises(UserError, match=message):
            draw_run(request_of(guidance=guidance), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_draw_a_run(prompt_model_folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="words draws from prompts: give at least one text"):
        draw_run(RunRequest(prompt_model_folder), tmp_path / "run")
    with pytest.raises(UserError, match="no model named 'fashoin'"):
        draw_run(RunRequest("fashoin"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_made_in_memory_is_known_by_its_weights(pipe: Pipeline, request_of: Any, tmp_path: Path) -> None:
    in_memory = Pipeline(pipe.generator, pipe.tokenizer, name="mine", sampling_defaults=pipe.sampling_defaults)
    run = draw_run(replace(request_of(), model=in_memory), tmp_path / "run")
    assert np.array_equal(pixels(run), pixels(draw_run(request_of(), tmp_path / "loaded")))
    assert (run.settings["model"], run.settings["generator"]["family"]) == ("mine", "AliTok")
    other = copy.deepcopy(pipe.generator)
    next(other.parameters()).add_(1e-3)
    with pytest.raises(UserError, match=r"generator\.sha256"):
        draw_run(replace(request_of(), model=Pipeline(other, pipe.tokenizer, name="mine")), tmp_path / "run")
    with pytest.raises(UserError, match="no model named 'mine'"):
        decode_run(run, tmp_path / "decoded")


def test_codes_are_decoded_again(request_of: Any, tmp_path: Path) -> None:
    run = draw_run(request_of(), tmp_path / "run")
    reports: list[Progress] = []
    again = decode_run(run, tmp_path / "again", on_progress=reports.append)
    assert np.array_equal(pixels(again), pixels(run))
    assert reports[-1].done == IMAGES
    content = run.shard_path(1).read_bytes()
    run.shard_path(1).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard-000001.*its checksum is wrong"):
        decode_run(run, tmp_path / "half")
    run.shard_path(1).unlink()
    with pytest.raises(UserError, match=r"1 of 4 shards of .* are missing; continue the run first"):
        decode_run(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in (tmp_path / "half" / "shards").iterdir()) == ["shard-000000.safetensors"]


def test_codes_of_another_tokenizer_leave_nothing(request_of: Any, tmp_path: Path) -> None:
    run = draw_run(request_of(), tmp_path / "run")
    with pytest.raises(UserError, match=r"this image tokenizer does not decode the codes of .*run: tokens must have"):
        decode_run(run, tmp_path / "other", model="fashion-small")
    assert not (tmp_path / "other").exists()


def test_weights_that_changed_since_they_were_loaded_have_no_hash(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    pipe = Pipeline.from_pretrained(folder)
    path = folder / "generator.safetensors"
    (tmp_path / "new").write_bytes(path.read_bytes())
    (tmp_path / "new").replace(path)
    with pytest.raises(UserError, match=r"generator\.safetensors changed since it was loaded; load it again"):
        draw_run(RunRequest(pipe, [0], num_samples=1), tmp_path / "run")


def test_another_config_json_is_another_run(prompt_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(prompt_model_folder, folder)
    card = yaml.safe_load((folder / "model.yaml").read_text())
    card["generator"]["config_file"] = "config.json"
    (folder / "model.yaml").write_text(yaml.safe_dump(card))

    def draw(config: dict[str, Any]) -> RunFolder:
        (folder / "config.json").write_text(json.dumps(config))
        return draw_run(RunRequest(folder, prompts=["a red apple"]), tmp_path / "run")

    expected = {**card["generator"]["config"], "rope_theta": 50.0}
    assert draw({"rope_theta": 50.0, "model_type": "any"}).settings["generator"]["config"] == expected
    with pytest.raises(UserError, match=r"generator\.config\.rope_theta"):
        draw({"rope_theta": 500.0})
    pipe = Pipeline.from_pretrained(folder)
    (folder / "config.json").write_text('{"rope_theta": 50.0}')
    with pytest.raises(UserError, match=r"config\.json changed since it was loaded; load it again"):
        draw_run(RunRequest(pipe, prompts=["a red apple"]), tmp_path / "run")


def test_texts_are_not_read_with_one_file_and_recorded_with_another(prompt_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(prompt_model_folder, folder)
    pipe = Pipeline.from_pretrained(folder)
    path = folder / yaml.safe_load((folder / "model.yaml").read_text())["text"]["tokenizer"]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match="changed since it was loaded; load the model again"):
        draw_run(RunRequest(pipe, prompts=["a red apple"]), tmp_path / "run")
