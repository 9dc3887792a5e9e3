import csv
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from launching import Job
from softcfg.cli.main import main
from softcfg.evaluation import evaluate
from softcfg.runs.folder import RunFolder
from stand_in import extractor


def words(model: Path, reference: Path, out: Path, *more: str) -> list[str]:
    return [
        "sweep", str(model), "--output-dir", str(out), "--reference", str(reference), "--extractor", "stand_in:factory",
        "--cache-dir", str(out.parent / "features"), "--batch-size", "4", "--search", "guidance_scale=1:8", *more,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_and_its_files(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = words(
        model_folder, reference, out, "--search", "softcfg-strength=0,0.3", "--confidence", "entropy", "--interval",
        "2-14", "--metrics", "inception-score", "--num-samples", "8", "--top_p", "0.9", "--seed", "4",
    )  # fmt: skip
    assert main([*command, "--trials", "2"]) == 0
    output = capsys.readouterr().out
    assert main([*command, "--trials", "3"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:4] == [*output.splitlines()[:3], again[3]]  # what was there is shown, not drawn
    rows = rows_of(out)
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    content = json.loads((out / "results.json").read_text())
    ranked = sorted(content["trials"], key=lambda trial: trial["metrics"]["fid"])
    assert content["best"] == ranked[0]["trial"]
    assert content["direction"] == "minimize"
    position = again.index("the best of 3 trials")
    assert [int(line.split()[0]) for line in again[position + 2 : position + 5]] == [row["trial"] for row in ranked]
    assert again[position + 6] == ranked[0]["command"]
    assert again[position + 8 :] == [
        str(out / name) for name in ("results.csv", "results.json", "settings.png", "front.png")
    ]
    for row, trial in zip(rows, content["trials"], strict=True):
        drawn = tmp_path / f"again-{row['trial']}"
        assert main([*shlex.split(row["command"])[1:], "--output-dir", str(drawn)]) == 0
        run, kept = RunFolder.open(drawn), RunFolder.open(out / "trials" / f"{trial['trial']:04d}")
        assert all(np.array_equal(run.read(n).pixels, kept.read(n).pixels) for n in range(2))
        guidance = run.settings["guidance"]
        assert (guidance["confidence"], guidance["interval"], run.settings["seed"]) == ("entropy", [2, 14], 4)
        assert guidance["guidance_scale"] == float(row["guidance_scale"]) == trial["settings"]["guidance_scale"]
        assert guidance["strength"] == float(row["strength"])
        assert run.settings["sampling"]["top_p"] == 0.9
        report = evaluate(drawn, reference, extractor(), ["fid", "inception_score"])
        assert report.metrics == pytest.approx(trial["metrics"])
        assert {name: float(row[name]) for name in trial["metrics"]} == trial["metrics"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--search", "guidance_scale=2,3"], "guidance_scale is searched twice"),
        (["--guidance-scale", "3"], "guidance_scale is both fixed and searched"),
        (["--search", "guidance=1:2"], "there is no setting named 'guidance'"),
        (["--objective", "kid"], "there is no metric named 'kid'"),
        (["--objective", "class-accuracy"], "class accuracy cannot be computed"),
        (["--rungs", "8,x"], "--rungs must be numbers of samples such as 500,2000, got '8,x'"),
        (["--labels", "9"], "label 9 is out of range"),
        (["--storage", "nonsense"], "is not a storage URL"),
        (["--trials", "0"], "the number of trials must be at least 1"),
        (["--sampler", "grid"], "such as guidance_scale=1.0:8.0:STEP"),
        (["--interval", "5"], "'5' is not START-STOP"),
        (["--interval", "16-20"], "the interval 16-20 holds none of the 16 steps, 0 to 15, of an image"),
        (["--search", "interval=0-8,16-20"], "the interval 16-20 holds none of the 16 steps"),
    ],
)
def test_mistakes_are_one_sentence(
    model_folder: Path, reference: Path, tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words(model_folder, reference, tmp_path / "sweep", *more))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("softcfg: error: ")
    assert error.count("\n") == 1
    assert text in error


def test_without_optuna_one_sentence_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['optuna'] = None\n"
        "from softcfg.cli.main import main\n"
        "sys.exit(main(['sweep', 'fashion', '--search', 'strength=0:1']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("softcfg: error: sweeps need optuna: pip install '.[tune]' in the clone, or ")


# ---- several processes, and their deaths

TRIALS = 8
LONG = ["--num-samples", "16", "--trials", str(TRIALS), "--search", "confidence=max,entropy"]


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    assert Job(1, words(model_folder, reference, folder, *LONG, "--early-stop", "0.5")).join() == [0]
    assert len({row["samples"] for row in rows_of(folder)}) > 1
    return folder


def finished(folder: Path) -> int:
    return len(rows_of(folder)) if (folder / "results.csv").exists() else 0


def owners_of_ended_trials(storage: str) -> set[int]:
    study = optuna.load_study(study_name="sweep", storage=storage)
    return {trial.user_attrs["owner"]["pid"] for trial in study.trials if trial.state == TrialState.COMPLETE}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_sweep_ends_with_the_same_table(
    model_folder: Path, reference: Path, tmp_path: Path, undisturbed: Path
) -> None:
    chance = random.Random(0)
    folder = tmp_path / "sweep"
    command = words(model_folder, reference, folder, *LONG, "--early-stop", "0.5")
    kills = in_the_middle = 0
    while finished(folder) < TRIALS:
        job = Job(1, command)
        before = len(list(folder.glob("trials/*/shards/*")))
        until = time.monotonic() + 60
        # Wait for shards of its own, whatever the machine's pace; then for a moment in the middle of something.
        more = chance.randint(0, 2)
        while job.alive() and time.monotonic() < until and len(list(folder.glob("trials/*/shards/*"))) < before + more:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        kills += job.kill([0])
        in_the_middle += 0 < finished(folder) < TRIALS
    assert Job(1, command).join() == [0]
    assert kills >= 5
    assert in_the_middle >= 2
    for name in ("results.csv", "results.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_share_a_sweep(model_folder: Path, reference: Path, tmp_path: Path, shared: bool) -> None:
    """In one folder, or each in its own with one storage; one is killed, and the other does its work as well."""
    more = [*LONG, "--sampler", "random", "--trials", "16"]
    alone = tmp_path / "alone" / "sweep"
    assert Job(1, words(model_folder, reference, alone, *more)).join() == [0]
    folders = [tmp_path / "a" / "sweep", tmp_path / ("a" if shared else "b") / "sweep"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{tmp_path}/shared.db"
    jobs = [Job(1, words(model_folder, reference, folder, *more, "--storage", storage)) for folder in folders]
    owners = {job.processes[0].pid for job in jobs}
    until = time.monotonic() + 120
    # Whichever process is slow to start, it has ended a trial of its own before one is killed.
    while not finished(folders[0]) and time.monotonic() < until:
        time.sleep(0.02)
    while jobs[1].alive() and owners_of_ended_trials(storage) != owners and time.monotonic() < until:
        time.sleep(0.02)
    assert jobs[1].kill([0]) == 1, "it ended before it could be killed"
    assert jobs[0].join() == [0]
    # Its own folder has the whole table, though it drew but a part where the other had a folder of its own.
    assert (folders[0] / "results.csv").read_bytes() == (alone / "results.csv").read_bytes()
    assert owners_of_ended_trials(storage) == owners


@pytest.mark.slow
def test_the_processes_of_a_launch_share_a_sweep(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    more = [*LONG, "--sampler", "random"]
    assert Job(2, words(model_folder, reference, tmp_path / "both" / "sweep", *more, "--device", "cpu")).join() == [
        0,
        0,
    ]
    assert Job(1, words(model_folder, reference, tmp_path / "one" / "sweep", *more)).join() == [0]
    tables = [(tmp_path / name / "sweep" / "results.csv").read_bytes() for name in ("both", "one")]
    assert tables[0] == tables[1]
