"""A sweep: trials of settings, each a run folder that is drawn and measured, shared by any number of processes.

All state is in an Optuna study, so a process may end at any moment. A trial that nobody works on any more is resumed
where it stopped, under its own number: its parameters are stored or proposed again, its images are continued like any
run, and metrics that were measured are not measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from softcfg import plugins
from softcfg.errors import UserError, clean, quote, require_kind, require_name, require_uint64, require_whole
from softcfg.evaluation import METRICS, Extractor, Report, evaluate, load_extractor
from softcfg.evaluation.protocol import FRECHET
from softcfg.files import as_path, make_folder, refuse_foreign, remove_temporary
from softcfg.nn.precision import dtype_name
from softcfg.pipeline import Pipeline
from softcfg.runs.folder import OTHER_FOLDER, SHARDS
from softcfg.runs.job import RunRequest, draw_run
from softcfg.runs.lock import Lock, holder
from softcfg.runs.plan import NOT_IN_IMAGES, RANDOM, differences
from softcfg.runs.processes import Processes
from softcfg.runs.progress import ProgressBar
from softcfg.runs.settings import resizing
from softcfg.tuning.space import SAMPLERS, Space, Values, methods, quiet, sample_flags, setting_named

# What Optuna raises where a storage holds what it did not write.
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, AssertionError)
CHECKSUM = "sha256"  # the attribute of a finished trial
TRIALS = "trials"  # the folder of the run folders
DATABASE = "study.db"
RESULTS = ("results.csv", "results.json")
FIGURES = ("settings.png", "front.png")
RUNG_DIVISORS = (8, 4, 2)  # a trial may be stopped at these fractions (1/8, 1/4, 1/2) of its samples
LEAST_COMPARED = 4  # trials that must have come as far before one is stopped
DEFAULT_TRIALS = 50
LONGEST_LABELS = 10_000  # characters
PROBE_IMAGES = 4  # to see which metrics there are; precision needs as many
SECONDS_BETWEEN_SIGNS_OF_LIFE = 20.0  # of a process
SECONDS_OF_GRACE = 120.0  # without a sign of life, after which a trial of another machine is taken up
SECONDS_BETWEEN_LOOKS = 1.0  # at the other processes' trials


@dataclass(frozen=True)
class Row:
    """A finished trial.

    Attributes:
        trial: its number.
        stopped: whether it was stopped early.
        samples: images that the metrics are of; those of a stopped trial compare only with others of as many.
        settings: the settings that were searched.
        metrics: by name; of a stopped trial the objective alone.
        command: what draws its images again.
    """

    trial: int
    stopped: bool
    samples: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    command: str


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep searches, draws and measures.

    Attributes:
        model: a name or folder as in `Pipeline.from_pretrained`, or a pipeline that was loaded from files.
        search: the settings to search, fields of `SoftCFG` and `Sampling`, or "preset": a `Range` or a list each.
        fixed: settings that all trials share, on top of what suits the model.
        objective: the metric to improve.
        metrics: what else to measure; by default all that can be measured.
        reference, extractor: as in `evaluate`; so are `cache` and `feature_batch_size`, there `batch_size`.
        num_samples: images per trial.
        batch_size: images drawn at once; at most 100 by default.
        labels: class ids or names that the images take in turn, all by default, or "random".
        seed: all trials draw image n from the same random stream (seed, n).
        sampler: "tpe", "random" or "grid"; `sampler_seed` decides the proposals.
        early_stop: stop a trial at a rung unless it is among the best of this share of the trials that came as far,
            in (0, 1); None stops none.
        rungs: numbers of samples at which to look, rounded up to whole batches; an eighth, a quarter and half.
        discard_images: keep the settings of finished trials, but not their images.
    """

    model: str | Path | Pipeline
    search: Mapping[str, Values]
    fixed: Mapping[str, Any] | None = None
    objective: str = "fid"
    metrics: Sequence[str] | None = None
    reference: str | Path | None = None
    extractor: str | Extractor = "inception"
    num_samples: int = 1000
    batch_size: int | None = None
    labels: Sequence[int | str] | str | None = None
    seed: int = 0
    sampler: str = "tpe"
    sampler_seed: int = 0
    early_stop: float | None = None
    rungs: Sequence[int] | None = None
    discard_images: bool = False
    cache: str | Path | None = None
    feature_batch_size: int = 64


class Sweep:
    """A search for the settings with the best metric; `Sweep.open` begins or continues one.

    Attributes:
        folder: where the runs, the study and the results are.
        config: what is searched, drawn and measured.
        objective: the metric to improve, and `minimize`, whether less of it is better.
        metrics: all that are measured, the objective first.
    """

    @classmethod
    def open(
        cls, folder: str | Path, config: SweepConfig, *, storage: str | None = None, study: str | None = None
    ) -> Sweep:
        """Begin a sweep, or join or continue the one of that name.

        Args:
            folder: for the results and the images.
            storage: an Optuna storage URL; by default an SQLite file in `folder`.
            study: name of the study in the storage; by default that of the folder.

        Raises:
            UserError: a setting is out of its range, the metric cannot be measured, or the study is another sweep's.
        """
        return cls(folder, config, storage, study)

    def __init__(
        self, folder: str | Path, config: SweepConfig, storage: str | None = None, study: str | None = None
    ) -> None:
        require_kind(config, "config", SweepConfig)
        self.folder = as_path(folder)
        self.config = config
        self.space = Space(config.search)
        self.fixed = {setting_named(name): value for name, value in (config.fixed or {}).items()}
        self.objective = require_name(config.objective, METRICS, "there is no metric named")
        self.minimize = self.objective in FRECHET
        if both := self.fixed.keys() & self.space.search.keys():
            raise UserError(f"{min(both)} is both fixed and searched")
        require_name(config.sampler, SAMPLERS, "there is no sampler named")
        require_uint64(config.sampler_seed, "the seed of the sampler")
        self.points = math.prod(map(len, self.space.grid())) if config.sampler == "grid" else None
        num_samples = require_whole(config.num_samples, "num_samples", 1)
        batch_size = config.batch_size
        batch_size = min(num_samples, 100) if batch_size is None else require_whole(batch_size, "batch_size", 1)
        self.rungs = _rungs(num_samples, batch_size, config.early_stop, config.rungs)

        request = RunRequest(
            config.model, config.labels, num_samples=config.num_samples, batch_size=batch_size, seed=config.seed
        )
        self.pipeline = request.load()
        generator = self.pipeline.generator
        weak = self.pipeline.weak
        if self.pipeline.source is None or (weak is not None and weak.source is None):
            raise UserError("a sweep needs a pipeline that was loaded from files, with Pipeline.from_pretrained")
        if not generator.num_classes:
            raise UserError(f"{self.pipeline.name} draws from prompts; a sweep needs a model that draws classes")
        self.space.check_parts(self.fixed)
        for corner in self.space.corners():
            methods(self.pipeline, {**self.fixed, **corner})
        guidance, sampling = methods(self.pipeline, self.fixed)
        self._request = dataclasses.replace(request, model=self.pipeline, guidance=guidance, sampling=sampling)
        run = self._request.settings(self.pipeline)
        self._words = _words_of(self.pipeline, self._request)
        extractor = config.extractor
        self._extractor = load_extractor(extractor, None, generator.device) if isinstance(extractor, str) else extractor
        # What cannot be measured is refused before anything is drawn.
        wanted = None if config.metrics is None else [self.objective, *config.metrics]
        side = self.pipeline.tokenizer.decoded_size
        black = np.zeros((PROBE_IMAGES, side, side, 3), dtype=np.uint8)
        report = self._measure(black, wanted, labels=[0] * PROBE_IMAGES)
        if self.objective not in report.metrics:
            self._measure(black, [self.objective], labels=[0] * PROBE_IMAGES)  # says why
        self.metrics = list(dict.fromkeys([self.objective, *report.metrics]))
        remove_temporary(make_folder(self.folder))
        refuse_foreign(self.folder, TRIALS, (*RESULTS, *FIGURES))
        self.settings = self._describe(run, report)
        self.study = _open_study(
            _url_of((self.folder / DATABASE).resolve()) if storage is None else storage,
            self.folder.resolve().name if study is None else study,
            self.minimize,
            self.settings,
        )

    def _describe(self, run: Mapping[str, Any], measured: Report) -> dict[str, Any]:
        """All that decides the results; `run` are the settings of a run."""
        settings = {
            "run": {name: value for name, value in run.items() if name not in NOT_IN_IMAGES},
            "search": self.space.describe(),
            "objective": self.objective,
            "metrics": self.metrics,
            "sampler": self.config.sampler,
            "sampler_seed": self.config.sampler_seed,
            "early_stop": self.config.early_stop,
            "samples": [*self.rungs, self.config.num_samples],
            "reference_sha256": measured.reference_hash,
            "extractor": {name: measured.settings["extractor"][name] for name in ("name", "identity", "dtype")},
        }
        return json.loads(json.dumps(settings))

    def _measure(self, samples: Any, metrics: Sequence[str] | None, labels: Sequence[int] | None = None) -> Report:
        return evaluate(
            samples,
            self.config.reference,
            self._extractor,
            metrics,
            labels=labels,
            device=self._extractor.device,
            batch_size=self.config.feature_batch_size,
            cache=self.config.cache,
        )

    def run(
        self, trials: int | None = None, *, on_trial: Callable[[Row], None] | None = None, progress: bool = False
    ) -> None:
        """Work on the trials 0 .. `trials` - 1 until all are finished, by this process or another.

        Args:
            trials: in all, of all processes and starts; by default the whole grid, or 50.
            on_trial: called with every trial that is finished, those of other processes included.
            progress: show bars.

        Raises:
            UserError: a trial cannot be drawn or measured; it is taken up by the next start.
        """
        from sqlalchemy.exc import SQLAlchemyError

        limit = DEFAULT_TRIALS if trials is None else require_whole(trials, "the number of trials", 1)
        if self.points is not None:
            limit = self.points if trials is None else min(limit, self.points)
        told: set[int] = set()

        def tell() -> None:
            for row in self.rows():
                if row.trial < limit and row.trial not in told:
                    told.add(row.trial)
                    if on_trial is not None:
                        on_trial(row)

        tell()
        while not self._all_finished(limit):
            if (claim := self._take(limit)) is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            else:
                trial, lock = claim
                with lock, contextlib.suppress(UpdateFinishedTrialError):  # another machine was faster
                    try:
                        self._work(trial, lock, progress=progress)
                    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                        raise UserError(f"the study is damaged or out of reach: {clean(error, 200)}") from error
            tell()

    def rows(self) -> list[Row]:
        """The finished trials by number."""
        with self._reading_study():
            finished = (TrialState.PRUNED, TrialState.COMPLETE)
            return [self._row(trial) for trial in self._trials() if trial.last_step and trial.state in finished]

    def _row(self, trial: FrozenTrial) -> Row:
        samples, stopped = trial.last_step, trial.state == TrialState.PRUNED
        assert samples is not None
        if trial.user_attrs.get(CHECKSUM, _checksum(trial)) != _checksum(trial):  # older sweeps have none
            raise UserError(f"trial {trial.number} of the study was altered: its checksum is wrong")
        return Row(
            trial.number,
            stopped,
            samples,
            self.space.settings(trial.params),
            {self.objective: trial.intermediate_values[samples]} if stopped else trial.user_attrs["metrics"],
            trial.user_attrs["command"],
        )

    def _trials(self) -> list[FrozenTrial]:
        """All trials as they are stored now."""
        with self._reading_study():
            return self.study.get_trials(deepcopy=False)

    @contextlib.contextmanager
    def _reading_study(self) -> Iterator[None]:
        """Turn what goes wrong with a storage that is damaged or out of reach into one sentence."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except UserError:
            raise
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, *DAMAGED) as error:
            raise UserError(f"the study is damaged or out of reach: {clean(error, 200)}") from error

    def best(self) -> Row | None:
        """The trial with the best objective of those that were not stopped; the first of equal ones."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[Row]:
        """The trials that were not stopped, the best first."""
        sign = 1 if self.minimize else -1
        return sorted(
            (row for row in self.rows() if not row.stopped), key=lambda row: sign * row.metrics[self.objective]
        )

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / TRIALS / f"{number:04d}"

    # ---- which trial

    def _all_finished(self, limit: int) -> bool:
        trials = self._trials()[:limit]
        return len(trials) == limit and all(trial.state.is_finished() for trial in trials)

    def _take(self, limit: int) -> tuple[Trial, Lock] | None:
        """A trial to work on: one that nobody works on any more, or a new one; None if there is none now."""
        trials = self._trials()
        for trial in trials[:limit]:
            if not trial.state.is_finished() and self._is_abandoned(trial) and (claim := self._claim(trial)):
                return claim
        if len(trials) >= limit:
            return None
        owner = self._owner()
        self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"owner": owner}))
        trial = next(trial for trial in reversed(self._trials()) if trial.user_attrs.get("owner") == owner)
        # Several processes may begin the last trial at once. The surplus waits for a start with more trials.
        return self._claim(trial) if trial.number < limit else None

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner is None:
            return True
        if owner["host"] == socket.gethostname() and Path(owner["folder"]).is_dir():
            return holder(Path(owner["folder"]) / TRIALS / f"{trial.number:04d}") is None
        return abs(time.time() - owner["beat"]) > SECONDS_OF_GRACE  # clocks of hosts differ

    def _claim(self, trial: FrozenTrial) -> tuple[Trial, Lock] | None:
        """Lock the trial's folder; None if another process was faster."""
        folder = make_folder(self.trial_folder(trial.number))
        try:
            lock = Lock(folder)
        except UserError:
            if holder(folder) is None:
                raise
            return None
        claimed = Trial(self.study, trial._trial_id)
        if self._trials()[trial.number].state.is_finished():
            lock.release()
            return None
        return claimed, lock

    def _owner(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(self.folder.resolve()),
            "beat": time.time(),
        }

    @contextlib.contextmanager
    def _alive(self, trial: Trial) -> Iterator[None]:
        """Give signs of life, for processes of other machines; those of this one look at the lock."""
        over = threading.Event()
        trial.set_user_attr("owner", self._owner())

        def beat() -> None:
            while not over.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE):
                with contextlib.suppress(Exception):  # the storage may be out of reach for a while
                    trial.set_user_attr("owner", self._owner())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # ---- its work

    def _work(self, trial: Trial, lock: Lock, *, progress: bool) -> None:
        with self._alive(trial):
            found = self._trials()[trial.number]
            guidance, sampling = methods(self.pipeline, {**self.fixed, **self._settings_of(trial, found)})
            words = [*self._words, *sample_flags(guidance, sampling)]
            if self.pipeline.weak is not None and not guidance.weak_share:
                words += ["--weak-share", "0"]
            trial.set_user_attr("command", shlex.join(words))
            folder = self.trial_folder(trial.number)
            request = dataclasses.replace(
                self._request,
                guidance=guidance,
                sampling=sampling,
                command=shlex.join([*words, "--output-dir", str(folder)]),
            )
            for samples in (*self.rungs, self.config.num_samples):
                last = samples == self.config.num_samples
                value = found.intermediate_values.get(samples)
                if value is None:
                    draw_run(
                        dataclasses.replace(request, num_samples=samples),
                        folder,
                        processes=Processes(alone=True),
                        advice=OTHER_FOLDER,
                        lock=lock,
                        on_progress=ProgressBar(f"trial {trial.number}", keep=False) if progress else None,
                    )
                    report = self._measure(folder, self.metrics if last else [self.objective])
                    if report.reference_hash != self.settings["reference_sha256"]:
                        raise UserError(
                            f"{self.config.reference} is not what the other trials were measured against; put that "
                            "back, or begin another sweep"
                        )
                    value = report[self.objective]
                    if last:
                        trial.set_user_attr("metrics", report.metrics)
                    trial.report(value, samples)
                if not last and self._is_hopeless(trial.number, samples, value):
                    break
            trial.set_user_attr(CHECKSUM, _checksum(self._trials()[trial.number]))
            if self.config.discard_images:
                shutil.rmtree(folder / SHARDS, ignore_errors=True)
        if last:
            self.study.tell(trial, value, skip_if_finished=True)
        else:
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)

    def _settings_of(self, trial: Trial, found: FrozenTrial) -> dict[str, Any]:
        """The searched settings of a trial, proposed unless all are stored."""
        params = found.params
        if params.keys() != self.space.distributions.keys():
            others = [other for other in self._trials() if other.number != trial.number]
            sampler, seed = self.config.sampler, self.config.sampler_seed
            params = self.space.propose(sampler, seed, trial.number, others, minimize=self.minimize)
            self.space.store(trial, params)
        return self.space.settings(params)

    def _is_hopeless(self, number: int, samples: int, value: float) -> bool:
        """Whether too many of the trials that came as far were better at this number of samples."""
        if self.config.early_stop is None:
            return False
        others = [
            trial.intermediate_values[samples]
            for trial in self._trials()
            if trial.number != number and samples in trial.intermediate_values
        ]
        better = sum(other < value if self.minimize else other > value for other in others)
        return len(others) >= LEAST_COMPARED and better >= self.config.early_stop * (len(others) + 1)


def _checksum(trial: FrozenTrial) -> str:
    """SHA-256 over what a row shows of a trial."""
    shown = {name: trial.user_attrs.get(name) for name in ("metrics", "command")}
    numbers = [[samples, repr(value)] for samples, value in sorted(trial.intermediate_values.items())]
    text = json.dumps([trial.number, trial.params, numbers, shown], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _rungs(num_samples: int, batch_size: int, early_stop: float | None, given: Sequence[int] | None) -> tuple[int, ...]:
    """Whole batches, so that no image is drawn twice."""
    if early_stop is None:
        if given:
            raise UserError("rungs mean nothing without early_stop, the share of the trials that go on")
        return ()
    if not isinstance(early_stop, (int, float)) or not 0 < early_stop < 1:
        raise UserError(f"early_stop must be a share between 0 and 1, got {quote(early_stop)}")
    require_kind([] if given is None else given, "rungs", Sequence)
    looks = [num_samples / part for part in RUNG_DIVISORS] if given is None else list(given)
    rungs = sorted({math.ceil(look / batch_size) * batch_size for look in looks})
    if given is None:
        rungs = [rung for rung in rungs if rung < num_samples]
    if not rungs or rungs[0] < 1 or rungs[-1] >= num_samples:
        raise UserError(
            f"early_stop needs rungs between 0 and {num_samples} samples, in whole batches of {batch_size}; give a "
            "smaller batch size, or other rungs"
        )
    return tuple(rungs)


def _words_of(pipeline: Pipeline, request: RunRequest) -> list[str]:
    """The command that draws a run, up to its guidance, sampling and folder."""
    source = pipeline.source
    assert source is not None  # `Sweep` has refused it
    words = ["softcfg", "sample", source.model, *plugins.options()]
    for flag, given in (
        ("--generator-checkpoint", source.generator_checkpoint),
        ("--tokenizer-checkpoint", source.tokenizer_checkpoint),
    ):
        words += [flag, str(given)] if given else []
    if pipeline.weak is not None and pipeline.weak.source is not None:
        words += ["--weak-model", pipeline.weak.source.model]
    kind = dtype_name(pipeline.generator.dtype)
    words += ["--dtype", kind] if kind != "float32" else []
    size = resizing(pipeline.tokenizer, None).get("image_size_eval")
    words += ["--image-size-eval", str(size)] if size is not None else []
    words += ["--labels", _labels_text(request.labels, pipeline), "--num-samples", str(request.num_samples)]
    return [*words, "--batch-size", str(request.batch_size), "--seed", str(request.seed), "--no-png", "--no-compare"]


def _labels_text(labels: Sequence[int | str] | str | None, pipeline: Pipeline) -> str:
    """The labels as `softcfg sample` takes them."""
    if labels is None:
        return "all"
    if isinstance(labels, str) and labels == RANDOM:
        return RANDOM
    ids = pipeline.conditioning.requests(labels)
    text = ",".join(map(str, ids))
    if len(text) > LONGEST_LABELS:
        raise UserError(f"{len(ids)} labels do not fit into the command of a row; take all in turn, or random ones")
    return text


def _url_of(database: Path) -> str:
    """The storage URL of an SQLite file, whatever is in its path.

    Raises:
        UserError: the installed SQLAlchemy cannot write the path in a URL.
    """
    from sqlalchemy.engine import URL, make_url

    url = URL.create("sqlite", database=str(database)).render_as_string(hide_password=False)
    if make_url(url).database != str(database):  # before SQLAlchemy 2.1
        raise UserError(
            f"{database.parent} cannot be the folder of a sweep with this SQLAlchemy: it has a ? in its path"
        )
    return url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a template


def _in_order_of(found: Any, names: list[str]) -> list[str]:
    """The names, in the order of those that were found, if they are the same ones."""
    return found if isinstance(found, list) and sorted(map(str, found)) == sorted(names) else names


def _open_study(storage: str, name: str, minimize: bool, settings: Mapping[str, Any]) -> optuna.Study:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise UserError(f"{quote(storage)} is not a storage URL such as sqlite:///study.db") from error
    # SQLite's own patience of 5 s is short for many processes.
    engine = {"connect_args": {"timeout": 60}} if url.get_backend_name() == "sqlite" else {}
    for patience in (1, 2, 4, 0):
        try:
            with quiet():
                study = optuna.create_study(
                    storage=optuna.storages.RDBStorage(storage, engine_kwargs=engine),
                    study_name=name,
                    direction="minimize" if minimize else "maximize",
                    load_if_exists=True,
                )
            found = study.user_attrs.get("sweep")
            if found is None:
                study.set_user_attr("sweep", settings)
            break
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, RuntimeError) as error:
            # Of processes that make the tables of a new storage at the same moment, all but one fail.
            if not patience:
                problem = " ".join(str(error).split())[:200]
                shown = url.render_as_string(hide_password=True)
                raise UserError(f"the storage {shown} cannot be used: {problem}") from error
            time.sleep(patience)
        except DAMAGED as error:
            raise UserError(f"the study in {quote(storage)} is damaged: {clean(error, 200)}") from error
    if found is None:
        return study
    differing = differences(found, {**settings, "metrics": _in_order_of(found.get("metrics"), settings["metrics"])})
    if not differing and list(found["search"]) != list(settings["search"]):  # a grid is taken in this order
        differing = ["order of --search"]
    if differing:
        raise UserError(f"{name} is a sweep with another {', '.join(differing)}; give another folder or study name")
    return study
