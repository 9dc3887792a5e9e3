from pathlib import Path
from typing import Any

import pytest

from small_families import load
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.cli.main import main
from softcfg.decoding import throughput
from softcfg.decoding.throughput import batch_bytes, largest_batch, seconds_ahead, time_steps
from softcfg.models import rar
from softcfg.nn import memory


def test_bench_recommends_a_batch_size(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model_folder), "--batch-sizes", "4", "1", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line[:5].strip().isdigit()]
    assert [row[0] for row in rows] == ["1", "4"]
    for batch, set_up, step, tokens, _, images, _ in (map(float, row) for row in rows):
        assert tokens == pytest.approx(batch / (step / 1e3), rel=0.05, abs=1)
        assert 0 <= set_up < 5
        assert 0 < images < batch / (step / 1e3 * 16)
    assert lines[-1] in ("recommended: --batch-size 1", "recommended: --batch-size 4")


def test_bench_without_files(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yaml").write_text((model_folder / "model.yaml").read_text())
    arguments = ["bench", str(tmp_path), "--batch-sizes", "1", "--repeats", "1", "--no-pixels"]
    assert main(arguments) == 2
    assert "generator.safetensors" in capsys.readouterr().err
    assert main([*arguments, "--random-weights"]) == 0
    assert main([*arguments, "--random-weights", "--quantize", "int8"]) == 2
    assert "--quantize" in capsys.readouterr().err
    assert main([*arguments, "--batch-sizes", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main([*arguments, "--batch-sizes", "1", "99999999999"]) == 2
    assert "--batch-sizes must be at most 4,096, got 99999999999" in capsys.readouterr().err


def test_bench_prints_the_memory_of_the_cache(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mebibytes = []
    for more in ([], ["--kv-cache-dtype", "int8"]):
        command = ["bench", str(model_folder), "--batch-sizes", "512", "--repeats", "1", "--no-pixels"]
        assert main([*command, *more]) == 0
        (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip() == "512")
        mebibytes.append(int(row[-1]))
    assert 0 < mebibytes[1] < mebibytes[0] / 2


def test_a_batch_that_does_not_fit_is_left_out(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, guidance = Pipeline.with_random_weights(model_folder).generator, SoftCFG(3.0)
    needs = [batch_bytes(generator, batch, guidance) for batch in (1, 2, 4)]
    assert needs[2] - needs[1] == 2 * (needs[1] - needs[0])
    monkeypatch.setattr(memory, "free_memory", lambda device: needs[1])
    monkeypatch.setattr(memory, "LOOKED_AFTER", 1 << 40)  # what chooses the attention takes more
    assert largest_batch(generator, guidance, needs[1]) == 2
    assert largest_batch(generator, guidance, needs[0] - 1) == 0
    command = ["bench", str(model_folder), "--repeats", "1", "--no-pixels", "--batch-sizes"]
    assert main([*command, "1", "4"]) == 0
    out = capsys.readouterr().out
    assert "    4 needs " in out
    assert out.endswith("recommended: --batch-size 1\n")
    assert main([*command, "64"]) == 2
    assert "not enough memory for any of --batch-sizes" in capsys.readouterr().err


@pytest.mark.parametrize(("images", "steps"), [(15, 4), (31, 2), (300, 1)])
def test_what_is_computed_ahead_is_shared_by_the_steps(
    images: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAR's modulations: here 64 rows at once, a class in each, and once the null class."""
    generator, now, modulate = load("rar"), [0.0], rar.RAR._modulate

    def slow(*arguments: Any) -> Any:
        now[0] += 8.0
        return modulate(*arguments)

    monkeypatch.setattr(rar, "WINDOW_ROWS", 64)
    monkeypatch.setattr(rar.RAR, "_modulate", slow)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    condition = generator.condition(generator.example_inputs(images), guided=True)
    assert generator.steps_ahead(condition) == steps
    assert seconds_ahead(generator, condition) == 8 / steps
    plain = load("alitok")
    assert seconds_ahead(plain, plain.condition([0], guided=True)) == 0


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (CFG(1.0), [2]),
        (CFG(3.0), [4]),
        (SoftCFG(3.0, perturbation_scale=1.0), [4, 2]),
        (CFG(3.0, weak_share=0.5), [4, 2]),
    ],
)
def test_every_pass_computes_its_own_ahead(guidance: CFG, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(throughput, "seconds_ahead", lambda _, condition: timed.append(condition.rows) or 50.0)
    weak = load("rar") if guidance.has_weak_model else None
    assert time_steps(load("rar"), 2, guidance, repeats=1, weak=weak).step > 50 * len(rows)
    assert timed == rows


@pytest.mark.parametrize("guidance", [CFG(guidance_scale=0), CFG(), SoftCFG(), SoftCFG(target="both")], ids=str)
def test_a_step_is_timed_for_every_method(model_folder: Path, guidance: CFG) -> None:
    generator = Pipeline.with_random_weights(model_folder).generator
    times = time_steps(generator, 2, guidance, repeats=1)
    assert 0 < times.step < 5
    assert 0 < times.set_up < 5
