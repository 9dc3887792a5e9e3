"""The same seeds under several guidance methods and scales: drawn, measured and shown side by side.

Every method, scale and seed is a run folder of `softcfg.runs.job`, so a comparison that was stopped goes on where it
was, and any number of processes share it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softcfg.errors import UserError, require_kind
from softcfg.evaluation import Extractor, evaluate
from softcfg.evaluation.report import DECIMALS, TITLES
from softcfg.files import as_path, make_folder, refuse_foreign, remove_file, remove_temporary, write_atomically
from softcfg.guidance import CFG, PERTURBATIONS, PRESETS, RULES, compose, describe
from softcfg.images import grid, png_bytes
from softcfg.pipeline import Pipeline
from softcfg.runs.export import first_images
from softcfg.runs.folder import OTHER_FOLDER, RunFolder
from softcfg.runs.job import DrawnRun, RunRequest, draw_run
from softcfg.runs.pictures import label_names
from softcfg.runs.plan import Prompts
from softcfg.runs.processes import Processes
from softcfg.runs.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = "runs"
RESULTS = ("grid.png", "comparison.json", "table.md")
SHOWN = 10  # images of a method in the picture
PROBE_IMAGES = 4  # to see which metrics there are; precision needs as many
FIGURES = {"recall.png": ("recall", "fid"), "front.png": ("inception_score", "fid")}  # what is on which axis
NONE = "none"
WEAK = "weak"
KINDS: dict[str, Collection[str]] = {"preset": PRESETS, "rule": RULES, "perturbation": PERTURBATIONS, WEAK: (WEAK,)}


@dataclass(frozen=True)
class Entry:
    """One method at one scale.

    Attributes:
        name: of the method, as it was asked for.
        scale: of the guidance; None for the conditional branch alone.
        metrics: by name, a value for each seed.
    """

    name: str
    scale: float | None
    guidance: CFG
    metrics: dict[str, list[float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The method and its scale."""
        return self.name if self.scale is None else f"{self.name}, {_scale_text(self.scale)}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.name if self.scale is None else f"{self.name}-{_scale_text(self.scale)}"

    def mean(self, metric: str) -> float:
        """The mean over the seeds."""
        return math.fsum(self.metrics[metric]) / len(self.metrics[metric])

    def error(self, metric: str) -> float | None:
        """The standard error of the mean, from the spread of the seeds; None for a single seed."""
        values = self.metrics[metric]
        return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def method_named(name: str, pipeline: Pipeline, scale: float | None, settings: Mapping[str, Any]) -> CFG:
    """The guidance called "none", RULE, PERTURBATION, PERTURBATION+RULE or by a preset, such as "released".

    With "weak", alone or as in "softcfg+weak", it is away from the weak model; else it takes none.

    Args:
        scale: of the guidance; None for the model's own.
        settings: by name, on top of what suits the model; those of rules and perturbations that it does
            not have are left out.

    Raises:
        UserError: there is no such method, or a setting is out of its range.
    """
    if name == NONE:
        return pipeline.default_guidance(CFG, guidance_scale=1.0, weak_share=0.0)
    parts: dict[str, Any] = {}
    for word in name.split("+"):
        kinds = [kind for kind, names in KINDS.items() if word in names and word != NONE]
        if not kinds or kinds[0] in parts:
            known = [NONE, *RULES, *(p for p in PERTURBATIONS if p != NONE), *PRESETS, WEAK]
            raise UserError(f"there is no method {name!r}; it is one of {', '.join(known)}, or PERTURBATION+RULE")
        parts[kinds[0]] = word
    if "preset" not in parts:
        parts.setdefault("perturbation", NONE)
    share = settings.get("weak_share", 1.0) if parts.pop(WEAK, None) else 0.0
    if scale is not None:
        settings = {**settings, "guidance_scale": scale}
    made = pipeline.default_guidance(compose, drop_unused=True, **{**settings, **parts, "weak_share": share})
    pipeline.check_guidance(made)
    return made


def entries(
    pipeline: Pipeline, methods: Sequence[str], scales: Sequence[float] | None, settings: Mapping[str, Any]
) -> list[Entry]:
    """Every method at every scale, at the model's own by default.

    Raises:
        UserError: as `method_named`, or a method or scale is named twice.
    """
    for what, values in (("method", methods), ("scale", scales or [0])):
        if not values or len(set(values)) < len(values):
            raise UserError(f"name each {what} once, got {', '.join(map(str, values)) or 'none'}")
    found = []
    for name in methods:
        at: Sequence[float | None] = [None] if name == NONE or not scales else scales
        for scale in at:
            guidance = method_named(name, pipeline, scale, settings)
            found.append(Entry(name, None if name == NONE else guidance.guidance_scale, guidance))
    return found


def compare(
    request: RunRequest,
    chosen: Sequence[Entry],
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    reference: str | Path | None = None,
    extractor: Extractor | None = None,
    cache: str | Path | None = None,
    processes: Processes | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_entry: Callable[[Entry], None] | None = None,
) -> list[Entry]:
    """Draw and measure what is missing, and write table.md, comparison.json and the pictures into the folder.

    Args:
        request: what to draw; its guidance and seed are those of the entries.
        chosen: the methods and scales, see `entries`.
        seeds: each gives a run of every entry; the spread of their metrics is the uncertainty.
        reference: images or statistics, as in `evaluate`.
        extractor: describes images for the metrics; without it nothing is measured.
        cache: folder for features, as in `evaluate`.
        on_progress: called in the first process, see `draw_run`.
        on_entry: called in the first process with every entry that is done.

    Returns:
        The entries with their metrics; in other processes than the first without.

    Raises:
        UserError: something cannot be drawn or measured. The same call goes on with the rest.
    """
    require_kind(request, "request", RunRequest)
    require_kind(seeds, "seeds", Sequence)
    folder, processes = as_path(folder), processes or Processes()
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("name each seed once, and at least one")
    pipeline = request.load(processes.device)

    against: str | None = None  # hash of the reference

    def measure(images: Any, labels: Sequence[int] | None = None) -> dict[str, float]:
        nonlocal against
        if extractor is None:
            return {}
        report = evaluate(images, reference, extractor, labels=labels, device=extractor.device, cache=cache)
        if report.reference_hash != (against or report.reference_hash):
            raise UserError(f"{reference} changed since the first method was measured against it; begin again")
        against = report.reference_hash
        return report.metrics

    def probe() -> None:  # what cannot be measured or has no effect is refused before anything is drawn
        side = pipeline.tokenizer.decoded_size
        measure(np.zeros((PROBE_IMAGES, side, side, 3), dtype=np.uint8), [0] * PROBE_IMAGES)
        prompts = request.prompts
        size = (prompts.width, prompts.height) if isinstance(prompts, Prompts) else (None, None)
        for entry in chosen:
            pipeline.check_guidance(entry.guidance, pipeline.num_tokens(*size))
        remove_temporary(make_folder(folder))
        refuse_foreign(folder, RUNS, (*RESULTS, *FIGURES))

    names: Sequence[str] = ()  # of what is drawn

    def finish(drawn: DrawnRun) -> None:
        nonlocal names
        names = label_names(drawn.drawer)

    processes.agree(probe)
    for entry in chosen:
        for seed in seeds:
            one = dataclasses.replace(request, model=pipeline, guidance=entry.guidance, seed=seed)
            place = run_folder(folder, entry, seed)
            run = draw_run(
                one, place, processes=processes, advice=OTHER_FOLDER, on_progress=on_progress, on_finish=finish
            )
            for name, value in processes.agree(lambda run=run: measure(run.path)).items():  # type: ignore[misc]
                entry.metrics.setdefault(name, []).append(value)
        if processes.first and on_entry is not None:
            on_entry(entry)

    processes.agree(lambda: _write_results(folder, chosen, seeds, names))
    return list(chosen)


def run_folder(folder: Path, entry: Entry, seed: int) -> Path:
    """The run folder of an entry and a seed."""
    return folder / RUNS / entry.folder / f"seed-{seed}"


def table(chosen: Sequence[Entry]) -> str:
    """The metrics as a Markdown table, mean ± standard error over the seeds."""
    metrics = list(chosen[0].metrics)
    rows = [["method", "scale", *(TITLES[name] for name in metrics)], ["---"] * (2 + len(metrics))]
    for entry in chosen:
        scale = "" if entry.scale is None else _scale_text(entry.scale)
        rows.append([entry.name, scale, *(_cell(entry, name) for name in metrics)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def picture(folder: Path, chosen: Sequence[Entry], seed: int, names: Sequence[str]) -> Image.Image:
    """The first images of every entry, one row each, with the same seeds in a column.

    Args:
        names: what labels stand for, see `label_names`; above the columns.

    Raises:
        UserError: a shard is missing or damaged.
    """
    rows = []
    for entry in chosen:
        run = RunFolder.open(run_folder(folder, entry, seed))
        shown = list(first_images(run, SHOWN))
        rows.append([Image.fromarray(pixels) for _, pixels in shown])
    return grid(rows, row_labels=[entry.title for entry in chosen], column_labels=[names[label] for label, _ in shown])


def plot(chosen: Sequence[Entry], x: str, y: str) -> Figure:
    """One metric against another: a line for each method over its scales, with the standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(entry.name for entry in chosen):
        line = [entry for entry in chosen if entry.name == name]
        at = {metric: [entry.mean(metric) for entry in line] for metric in (x, y)}
        errors = {metric: [entry.error(metric) or 0.0 for entry in line] for metric in (x, y)}
        axis.errorbar(at[x], at[y], xerr=errors[x], yerr=errors[y], marker="o", markersize=4, capsize=2, label=name)
        for entry in line:
            if entry.scale is not None:
                axis.annotate(f" {_scale_text(entry.scale)}", (entry.mean(x), entry.mean(y)), fontsize=7)
    axis.set(xlabel=TITLES[x], ylabel=TITLES[y])
    axis.legend(fontsize=8)
    return figure


def _write_results(folder: Path, chosen: Sequence[Entry], seeds: Sequence[int], names: Sequence[str]) -> None:
    write_atomically(folder / "grid.png", png_bytes(picture(folder, chosen, seeds[0], names)), replace=True)
    content = [
        {
            "method": entry.name,
            "scale": entry.scale,
            "guidance": describe(entry.guidance),
            "metrics": {
                name: {"mean": entry.mean(name), "error": entry.error(name), "seeds": values}
                for name, values in entry.metrics.items()
            },
        }
        for entry in chosen
    ]
    text = json.dumps({"seeds": list(seeds), "entries": content}, indent=2, allow_nan=False)
    write_atomically(folder / "comparison.json", text.encode() + b"\n", replace=True)
    write_atomically(folder / "table.md", table(chosen).encode(), replace=True)


def write_plots(folder: Path, chosen: Sequence[Entry]) -> list[Path]:
    """Write recall.png and front.png, as far as their metrics were measured; what is there of others is removed.

    Raises:
        UserError: a file cannot be written.
        ModuleNotFoundError: Matplotlib is not installed.
    """
    wanted = {name: axes for name, axes in FIGURES.items() if set(axes) <= chosen[0].metrics.keys()}
    for name in FIGURES.keys() - wanted.keys():  # of other metrics, which were measured before
        remove_file(folder / name)
    if wanted:
        from softcfg.inspection.plots import figure_bytes

        for name, axes in wanted.items():
            write_atomically(folder / name, figure_bytes(plot(chosen, *axes)), replace=True)
    return [folder / name for name in wanted]


def _scale_text(scale: float) -> str:
    """A scale as text: short, but of two scales two texts."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(float(scale))


def _cell(entry: Entry, metric: str) -> str:
    error, places = entry.error(metric), DECIMALS[metric]
    return f"{entry.mean(metric):.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")
