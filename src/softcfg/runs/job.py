"""Drawing a run from Python: a request in, a folder of images out, by any number of processes, to be continued."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softcfg.decoding import Sampling
from softcfg.decoding.filtering import one_sampling
from softcfg.errors import UserError, quote, require_kind, require_uint64, require_whole, user_errors
from softcfg.files import as_path, is_same_file, make_folder
from softcfg.guidance import CFG, as_guidance
from softcfg.images import checked_size
from softcfg.models.ids import as_ids
from softcfg.nn.precision import as_dtype
from softcfg.nn.products import forced_product
from softcfg.pipeline import Pipeline
from softcfg.runs.folder import ADVICE, SETTINGS, RunFolder
from softcfg.runs.lock import Lock, holder
from softcfg.runs.plan import MOST_IMAGES, RANDOM, Prompts
from softcfg.runs.processes import Processes
from softcfg.runs.progress import Progress, ProgressWatch
from softcfg.runs.settings import pixel_dtype, resizing, run_settings
from softcfg.runs.shards import Shard
from softcfg.runs.signals import termination_raises
from softcfg.runs.worker import BatchDrawer, ShardMaker, decoded_shards, make_shards, require_decodable
from softcfg.zoo.files import require_file
from softcfg.zoo.loading import load_tokenizer
from softcfg.zoo.registry import resolve
from softcfg.zoo.source import ComponentSource


@dataclass(frozen=True)
class RunRequest:
    """What to draw, and how.

    Attributes:
        model: a name or folder as in `Pipeline.from_pretrained`, which every process loads onto its own device; or
            a pipeline.
        labels: class ids or names that the images take in turn, or "random": uniform, from the seed and the image's
            index. By default all classes. Where there are prompts, their numbers.
        prompts: texts for models that draw from prompts, or `Prompts`, which have a size.
        num_samples: images in all; by default one per label or prompt.
        guidance, sampling: by default those that suit the model; a number is a guidance scale.
        batch_size: images drawn at once, which make up a shard; by default that of the run that is continued, or up
            to 100.
        seed: image n draws from the random stream (seed, n).
        speculative_jacobi: the window of speculative Jacobi decoding; 0 draws token by token.
        negative_prompt: what the unconditional branch reads, for families that read a text there; not with `Prompts`,
            which have their own.
        image_size_eval: H and W that images are resized to, see `Pipeline.with_image_size`; by default as the pipeline
            says.
        command: kept in run.json, to tell people how the run is continued.
    """

    model: str | Path | Pipeline
    labels: Sequence[int | str] | str | None = None
    prompts: str | Sequence[str] | Prompts | None = None
    num_samples: int | None = None
    guidance: CFG | float | None = None
    sampling: Sampling | None = None
    batch_size: int | None = None
    seed: int = 0
    speculative_jacobi: int = 0
    negative_prompt: str | None = None
    command: str = ""
    image_size_eval: int | None = None

    def load(self, device: torch.device | str | None = None) -> Pipeline:
        """The pipeline: the given one, or the model of that name on `device`."""
        if not isinstance(self.model, Pipeline):
            return Pipeline.from_pretrained(self.model, device=device, image_size_eval=self.image_size_eval)
        return self.model if self.image_size_eval is None else self.model.with_image_size(self.image_size_eval)

    def settings(self, pipeline: Pipeline) -> dict[str, Any]:
        """The settings of the run, for `RunFolder.claim`.

        Args:
            pipeline: what `load` returned.

        Raises:
            UserError: a setting is out of its range or does not fit the model, or `SOFTCFG_PRODUCT` names no product.
        """
        num_samples = None if self.num_samples is None else _count(self.num_samples, "num_samples", 1)
        batch_size = None if self.batch_size is None else _count(self.batch_size, "batch_size", 1)
        window = _count(self.speculative_jacobi, "speculative_jacobi", 0)
        require_uint64(self.seed, "seed")
        forced_product()  # before anything is written
        prompts = self._prompts(pipeline)
        count = pipeline.generator.num_classes if prompts is None else len(prompts.texts)
        labels = self._labels(pipeline, count)
        if num_samples is None and isinstance(labels, str):
            raise UserError("random labels need num_samples")
        return run_settings(
            pipeline,
            self._guidance(pipeline),
            self._sampling(pipeline),
            labels=labels,
            num_samples=num_samples or len(labels),
            prompts=prompts,
            batch_size=batch_size,
            seed=int(self.seed),
            speculative_jacobi=window,
            command=self.command,
        )

    def drawer(self, pipeline: Pipeline, run: RunFolder) -> BatchDrawer:
        """What draws the images of `run`, the folder that was claimed with the settings of this request."""
        return BatchDrawer(
            pipeline,
            self._guidance(pipeline),
            self._sampling(pipeline),
            int(self.seed),
            run.plan.batch_size,
            int(self.speculative_jacobi),
            Prompts.of(run.settings),
        )

    def _guidance(self, pipeline: Pipeline) -> CFG:
        with user_errors():
            return as_guidance(self.guidance, pipeline.default_guidance)

    def _sampling(self, pipeline: Pipeline) -> Sampling:
        return one_sampling(self.sampling, default=pipeline.sampling)

    def _labels(self, pipeline: Pipeline, count: int) -> list[int] | str:
        if isinstance(self.labels, str):
            return RANDOM if self.labels == RANDOM else self._class_named(self.labels, pipeline)
        labels: Any = range(count) if self.labels is None else self.labels
        if not hasattr(labels, "__len__"):
            raise UserError(f"labels must be a list of class ids or {RANDOM!r}, got {quote(labels)}")
        if not len(labels):
            raise UserError("labels must name at least one class")
        if pipeline.conditioning.takes_prompts:
            return as_ids(list(labels), "labels", count).tolist()
        return pipeline.conditioning.requests(labels)

    def _class_named(self, name: str, pipeline: Pipeline) -> list[int]:
        try:
            return pipeline.conditioning.requests(name)
        except UserError as error:
            raise UserError(f"{error}; {RANDOM!r} stands for random classes") from error

    def _prompts(self, pipeline: Pipeline) -> Prompts | None:
        prompts = self.prompts
        if not pipeline.conditioning.takes_prompts:
            if prompts is not None or self.negative_prompt is not None:
                raise UserError(f"{pipeline.name} draws classes: give labels, it does not read prompts")
            return None
        if not isinstance(prompts, (Prompts, Sequence, type(None))):
            raise UserError(f"prompts must be a list of texts, got {quote(prompts)}")
        if prompts is None or not (isinstance(prompts, Prompts) or len(prompts)):
            raise UserError(f"{pipeline.name} draws from prompts: give at least one text")
        if not isinstance(prompts, Prompts):
            texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
            prompts = Prompts(texts, *pipeline.conditioning.image_size(), negative_text=self.negative_prompt)
        elif self.negative_prompt is not None:
            raise UserError("give the negative prompt in Prompts, as negative_text")
        prompts.check(pipeline)
        return prompts


@dataclass(frozen=True)
class DrawnRun:
    """A run whose images are all there.

    Attributes:
        drawer: what drew them, and can draw more.
        images: how many were drawn just now, by all processes, in `seconds`.
    """

    run: RunFolder
    drawer: BatchDrawer
    images: int
    seconds: float


def draw_run(
    request: RunRequest,
    folder: str | Path,
    *,
    processes: Processes | None = None,
    overwrite: bool = False,
    advice: str = ADVICE,
    lock: Lock | None = None,
    on_start: Callable[[RunFolder, Sequence[int]], None] | None = None,
    on_shard: Callable[[Shard], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_finish: Callable[[DrawnRun], None] | None = None,
) -> RunFolder:
    """Draw a run into a folder, from the start or from where it was left.

    The folder receives run.json and one file per shard; `softcfg.runs.export` and `softcfg.runs.pictures` make images
    of them. Whatever ends the call, the shards that were finished are kept, and the same call, without `overwrite`,
    continues the run.

    Args:
        folder: of the run. It is locked while the run is drawn.
        processes: those that share the work; by default those of the launch (torchrun, `accelerate launch`), or this
            process alone. Each returns when its own part is done, and the first one when all images are there.
        overwrite: discard the run that is in the folder, another one or this one itself.
        advice: what the message about a run with other settings in the folder says to do.
        lock: the lock of the folder, if the caller holds it already.
        on_start: called in every process with the run and the numbers of its missing shards.
        on_shard: called with every shard that this process wrote, off the main thread.
        on_progress: called in the first process with how far the run is, such as a `ProgressBar`.
        on_finish: called in the first process when all images are there, while the folder is still locked.

    Returns:
        The run. Its `shards` are read in order, one in memory at a time.

    Raises:
        UserError: the request does not fit the model, the folder is in use, holds a run with other settings or cannot
            be written, or there is no memory for a single image.
        KeyboardInterrupt: the user, or SIGTERM (`softcfg.runs.signals.Terminated`), asked for the end.
    """
    require_kind(request, "request", RunRequest)
    folder = as_path(folder)
    processes = processes or Processes()
    with termination_raises():
        if lock is None:
            refuse_if_busy(folder, processes)  # before anything is loaded
        pipeline = request.load(processes.device)
        drawers: list[BatchDrawer] = []

        def maker(run: RunFolder) -> ShardMaker:
            drawers.append(request.drawer(pipeline, run))
            return drawers[0].shards_of(run)

        def finish(run: RunFolder, images: int, seconds: float) -> None:
            if on_finish is not None:
                on_finish(DrawnRun(run, drawers[0], images, seconds))

        with pipeline.in_use():
            return _make_run(
                folder,
                lambda: request.settings(pipeline),
                maker,
                processes,
                overwrite=overwrite,
                advice=advice,
                lock=lock,
                on_start=on_start,
                on_shard=on_shard,
                on_progress=on_progress,
                on_finish=finish,
            )


def decode_run(
    source: RunFolder,
    folder: str | Path,
    *,
    model: str | Path | None = None,
    tokenizer_checkpoint: str | Path | None = None,
    tokenizer_dtype: torch.dtype | str | None = None,
    image_size_eval: int | None = None,
    processes: Processes | None = None,
    overwrite: bool = False,
    advice: str = ADVICE,
    command: str = "",
    on_shard: Callable[[Shard], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_finish: Callable[[RunFolder], None] | None = None,
) -> RunFolder:
    """Decode the codes of a run again, for example with another tokenizer, into the folder of a new run.

    Args:
        source: the run whose codes are decoded; it must be complete.
        model: the model whose tokenizer decodes; by default that of the run.
        tokenizer_checkpoint: weights in place of that tokenizer's own.
        tokenizer_dtype: of the tokenizer, float32 by default, see `Pipeline.from_pretrained`.
        image_size_eval: H and W that images are resized to, see `Pipeline.with_image_size`; by default as in the run.
        folder, processes, overwrite, advice, on_shard, on_progress, on_finish: as in `draw_run`.

    Raises:
        UserError: as `draw_run`, or a shard of `source` is missing or damaged.
    """
    require_kind(source, "source", RunFolder)
    folder = as_path(folder)
    if is_same_file(folder, source.path):
        raise UserError(f"{folder} is the run itself; give another folder (--output-dir)")
    processes = processes or Processes()
    with termination_raises():
        refuse_if_busy(folder, processes)
        processes.agree(source.require_complete)  # before anything is written
        known = source.settings.get("tokenizer", {}).get("config")
        if "model" not in source.settings or not isinstance(known, dict):
            raise UserError(f"{source.path / SETTINGS} does not say with which tokenizer the run was drawn")
        entry = resolve(model or source.settings["model"])
        checkpoint = tokenizer_checkpoint
        if checkpoint is None:
            checkpoint = require_file(entry.tokenizer.file, entry)
        device = processes.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source_of_tokenizer = ComponentSource(entry.tokenizer, entry, checkpoint)
        config = source_of_tokenizer.config if model else known
        tokenizer = load_tokenizer(entry, config, checkpoint, device, as_dtype(tokenizer_dtype, "tokenizer_dtype"))
        size = source.settings.get("image_size_eval") if image_size_eval is None else image_size_eval
        if size is not None:
            tokenizer.output_size = checked_size(size)
        resized, of_pixels = resizing(tokenizer, Prompts.of(source.settings)), ("image_size_eval", "tokenizer_dtype")

        def settings() -> dict[str, Any]:
            require_decodable(source, tokenizer)
            return {
                **{name: value for name, value in source.settings.items() if name not in of_pixels},
                **resized,
                **pixel_dtype(tokenizer),
                "tokenizer": {**source_of_tokenizer.facts, "config": dict(config)},
                "decoded_from": str(source.path.resolve()),
                "command": command,
            }

        return _make_run(
            folder,
            settings,
            lambda run: decoded_shards(source, tokenizer, run),
            processes,
            overwrite=overwrite,
            advice=advice,
            on_shard=on_shard,
            on_progress=on_progress,
            on_finish=None if on_finish is None else lambda run, images, seconds: on_finish(run),
        )


def _count(value: object, name: str, least: int) -> int:
    number = require_whole(value, name, least)
    if number > MOST_IMAGES:
        raise UserError(f"{name} must be at most {MOST_IMAGES:,}, got {quote(value)}")
    return number


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as run.json will hold them, before anything is written."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise UserError(f"the settings of the run cannot be written as JSON: {error}") from error
    return found


def refuse_if_busy(folder: Path, processes: Processes) -> None:
    """Raise `UserError` in every process if another job works in the folder."""

    def look() -> None:
        if busy := holder(folder):
            raise UserError(f"{folder} is in use by {busy}; wait for it or end it first")

    processes.agree(look)


def _make_run(
    folder: Path,
    settings: Callable[[], Mapping[str, Any]],
    maker: Callable[[RunFolder], ShardMaker],
    processes: Processes,
    *,
    overwrite: bool,
    advice: str,
    lock: Lock | None = None,
    on_start: Callable[[RunFolder, Sequence[int]], None] | None = None,
    on_shard: Callable[[Shard], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_finish: Callable[[RunFolder, int, float], None] | None = None,
) -> RunFolder:
    """Lock and claim the folder in the first process, and make the shards that it lacks in all."""
    with contextlib.ExitStack() as held:

        def claim() -> tuple[dict[str, Any], list[int]]:
            wanted = _as_json(settings())
            if lock is None:
                held.enter_context(Lock(make_folder(folder)))
            run = RunFolder.claim(folder, wanted, overwrite=overwrite, advice=advice)
            return run.settings, run.missing()

        found, todo = processes.agree(claim)
        run = RunFolder(folder, found)
        make = maker(run)
        if on_start is not None:
            on_start(run, todo)
        watch = ProgressWatch(run, todo, on_progress) if processes.first else None
        make_shards(run, todo, make, processes, on_shard=on_shard, watch=watch)
        if watch is not None and on_finish is not None:
            on_finish(run, sum(len(run.plan.indices(number)) for number in todo), watch.seconds)
    return run
