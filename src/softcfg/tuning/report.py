"""The results of a sweep: lines of a table, files and figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.evaluation.report import DECIMALS, TITLES
from softcfg.files import write_atomically
from softcfg.tuning.space import format_value
from softcfg.tuning.sweep import RESULTS, Row, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9


def write_results(sweep: Sweep) -> list[Path]:
    """Write results.csv and results.json, all finished trials by number, into the sweep's folder.

    Raises:
        UserError: a file cannot be written.
    """
    rows = sweep.rows()
    best = sweep.best()
    content = {
        "objective": sweep.objective,
        "direction": "minimize" if sweep.minimize else "maximize",
        "best": best and best.trial,
        "sweep": sweep.settings,
        "trials": [asdict(row) for row in rows],
    }
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", "samples", *sweep.space.search, *sweep.metrics, "command"])
    for row in rows:
        settings = [format_value(row.settings[name]) for name in sweep.space.search]
        values = [row.metrics.get(name, "") for name in sweep.metrics]
        table.writerow([row.trial, _state(row), row.samples, *settings, *values, row.command])
    paths = [sweep.folder / name for name in RESULTS]
    # Not flushed to the disk: they can be made again from the study.
    texts = text.getvalue(), json.dumps(content, indent=2, allow_nan=False) + "\n"
    for path, written in zip(paths, texts, strict=True):
        write_atomically(path, written.encode(), durable=False, replace=True)
    return paths


class Table:
    """Lines for the terminal, one per trial; the columns are known before the first trial."""

    def __init__(self, sweep: Sweep) -> None:
        self.settings = list(sweep.space.search)
        self.metrics = sweep.metrics
        self.sweep = sweep
        self.best: float | None = None  # of the lines with a remark
        names = [*self.settings, *(TITLES[name] for name in self.metrics)]
        self.widths = [max(WIDTH, len(name) + 2) for name in names]
        self.header = "trial" + "".join(f"{name:>{width}}" for name, width in zip(names, self.widths, strict=True))

    def line(self, row: Row, *, remark: bool = False) -> str:
        """The settings and metrics of a trial; with a remark if it was stopped, or better than those before."""
        cells = [_short(row.settings[name]) for name in self.settings]
        for name in self.metrics:
            cells.append(f"{row.metrics[name]:.{DECIMALS[name]}f}" if name in row.metrics else "")
        text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True))
        return f"{row.trial:5}{text}{self._remark(row) if remark else ''}"

    def _remark(self, row: Row) -> str:
        if row.stopped:
            return f"  stopped at {row.samples} of {self.sweep.config.num_samples} samples"
        value = row.metrics[self.sweep.objective]
        if self.best is not None and (value >= self.best if self.sweep.minimize else value <= self.best):
            return ""
        self.best = value
        return "  best so far"


def plot_settings(sweep: Sweep) -> Figure:
    """Every metric against every setting that was searched; one dot per trial, the best one marked."""
    from matplotlib.figure import Figure

    from softcfg.inspection.plots import COLOURS

    rows = sweep.ranked()
    names = list(sweep.space.search)
    figure = Figure(figsize=(3.2 * len(names) + 0.6, 2.5 * len(sweep.metrics) + 0.3), layout="constrained")
    axes: Any = figure.subplots(len(sweep.metrics), len(names), squeeze=False, sharex="col", sharey="row")
    for line, metric in zip(axes, sweep.metrics, strict=True):
        for axis, name in zip(line, names, strict=True):
            places, labels = _places([row.settings[name] for row in rows], sweep.space.search[name])
            values = [row.metrics[metric] for row in rows]
            axis.plot(places, values, "o", color=COLOURS[0], alpha=0.7, markersize=4)
            axis.plot(places[:1], values[:1], "*", color=COLOURS[1], markersize=12)
            if labels is not None:
                axis.set_xticks(range(len(labels)), labels)
                axis.margins(x=0.15)
            elif getattr(sweep.space.search[name], "log", False):
                axis.set_xscale("log")
    for axis, metric in zip(axes[:, 0], sweep.metrics, strict=True):
        axis.set_ylabel(TITLES[metric])
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(name)
    figure.suptitle(f"{len(rows)} trials of {sweep.config.num_samples} samples; star: best {TITLES[sweep.objective]}")
    return figure


def plot_front(sweep: Sweep) -> Figure:
    """FID against Inception Score; the line joins the trials that no other beats in both."""
    from matplotlib.figure import Figure

    from softcfg.inspection.plots import COLOURS

    rows = sweep.ranked()
    points = [(row.metrics["inception_score"], row.metrics["fid"]) for row in rows]
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), "o", color=COLOURS[0], alpha=0.5, markersize=4)
    front = pareto_front(points)
    axis.plot(*zip(*(points[i] for i in front), strict=True), "o-", color=COLOURS[1], markersize=5)
    for i in front:
        axis.annotate(f" {rows[i].trial}", points[i], fontsize=8)
    axis.set(
        xlabel=TITLES["inception_score"], ylabel=TITLES["fid"], title=f"FID and IS, {sweep.config.num_samples} samples"
    )
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points (score, distance) that none has both a higher score and a lower distance than.

    They come by falling score; of equal points the first.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1], i)):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def write_plots(sweep: Sweep) -> list[Path]:
    """Write settings.png, and front.png where FID and Inception Score were measured, into the sweep's folder.

    Raises:
        UserError: a file cannot be written.
        ModuleNotFoundError: Matplotlib is not installed.
    """
    from softcfg.inspection.plots import figure_bytes

    rows = sweep.ranked()
    figures = {}
    if rows:
        figures["settings.png"] = plot_settings(sweep)
    if rows and {"fid", "inception_score"} <= rows[0].metrics.keys():
        figures["front.png"] = plot_front(sweep)
    for name, figure in figures.items():
        write_atomically(sweep.folder / name, figure_bytes(figure), replace=True)
    return [sweep.folder / name for name in figures]


def _state(row: Row) -> str:
    return "stopped" if row.stopped else "complete"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _places(values: Sequence[Any], searched: Any) -> tuple[list[float], list[str] | None]:
    """Positions of values on an axis, and the labels of the positions unless the values are numbers."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values], None
    names = [format_value(value) for value in searched]
    return [float(names.index(format_value(value))) for value in values], names
