"""Tables and plots of what guidance does on the text-to-image model, from its results (`evidence`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.emoji.evaluate import KINDS
from recipes.emoji.evidence import METHODS, SCALES, Plan, at, title
from recipes.study import report as study
from recipes.study.points import NONE, Row, key
from recipes.study.report import (
    MISSING,
    QUANTITIES,
    curve,
    errors,
    fid_difference,
    markdown_table,
    of_traces,
    spread,
    svg,
)
from softcfg import CFG
from softcfg.errors import UserError
from softcfg.files import make_folder, write_atomically
from softcfg.inspection.plots import COLOURS

METRICS = {**study.METRICS, "fid": (study.METRICS["fid"][0], 1, 2)}  # the judge's features are large numbers
SHOWN = {  # of each kind of prompts: what counts
    "seen": ("seen", ("name", "style", "colour", "all")),
    "style": ("held-out styles", ("name", "style", "all")),
    "colour": ("held-out colours", ("name", "colour", "all")),
}
ALL_COLOURS = (*COLOURS, "black")
LINES = {"seen": "-", "style": "--", "colour": ":"}
DISTANCES = ("fid", "precision", "recall")
FIDS = (1, 2, 3, 4, 6, 10, 15, 20, 25, 30, 40, 50, 70, 100, 200, 400, 1000)  # that an axis shows


class Evidence:
    """The results, and what is asked of them."""

    def __init__(self, rows: Mapping[str, Row], plan: Plan) -> None:
        self.rows = rows
        self.plan = plan
        self.best = plan.best(rows)

    def values(self, guidance: CFG, kind: str, metric: str) -> list[float]:
        """The values of a metric, one a seed."""
        return [values[metric] for values in self.plan.of_seeds(guidance, kind, self.rows).values() if metric in values]

    def tuned(self, guidance: CFG, metric: str) -> float | None:
        """The value of a metric in the tuning."""
        row = self.rows.get(key(self.plan.tuning([guidance])[0].settings()))
        return None if row is None else row["values"][metric]

    def text(self, guidance: CFG, kind: str, metric: str) -> str:
        """Mean and standard deviation over the seeds; shares as percentages."""
        _, factor, decimals = METRICS.get(metric, ("", 100, 1))
        return spread([factor * value for value in self.values(guidance, kind, metric)], decimals)

    def shares(self, guidance: CFG, kinds: Sequence[str] = tuple(SHOWN)) -> list[str]:
        """What is right, for each kind of prompts."""
        return [self.text(guidance, kind, metric) for kind in kinds for metric in SHOWN[kind][1]]

    def fid_less(self, guidance: CFG, other: CFG) -> str:
        """By how much the FID of two settings differs, with the standard error, over seeds that both have."""
        one, two = (self.plan.of_seeds(each, "seen", self.rows) for each in (guidance, other))
        return fid_difference(one, two, METRICS["fid"][2])

    def drawn(self, name: str, kind: str, metric: str) -> list[CFG]:
        """A method at the scales that are there."""
        return [at(name, scale) for scale in SCALES if self.values(at(name, scale), kind, metric)]


def report(rows: Mapping[str, Row], plan: Plan, plots: Path | None = None) -> str:
    """The part of the study in Markdown; the plots are written into a folder if one is given.

    Raises:
        UserError: there are no results yet.
    """
    evidence = Evidence(rows, plan)
    if not any(evidence.values(NONE, kind, "all") for kind in KINDS):
        raise UserError(f"there are no results of {plan.samples:,} images per point yet; draw them first")
    parts = [about(evidence), bounds(evidence), best(evidence), over_scales(evidence), held_out(evidence)]
    parts += [tuning(evidence), of_temperatures(evidence), steps(evidence)]
    if plots is not None:
        make_folder(plots)
        for name, (draw, _) in PICTURES.items():
            write_atomically(plots / f"emoji-{name}.svg", svg(draw(evidence)))
        parts += [f"![{words}](images/study/emoji-{name}.svg)" for name, (_, words) in PICTURES.items()]
    return "\n\n".join(filter(None, parts))


# ---- tables


def about(evidence: Evidence) -> str:
    """What was drawn, with what."""
    points = {key(point.settings()): point for point in evidence.plan.points(evidence.rows)}
    drawing = [point for point in points.values() if point.measure in KINDS]
    found = [row for name, row in evidence.rows.items() if name in points]
    devices = sorted({row["device"] for row in found})
    versions = sorted({f"softcfg {row['versions']['softcfg']}, PyTorch {row['versions']['torch']}" for row in found})
    drawn = [row["samples"] for row in found if row["measure"] in KINDS]
    return (
        f"Model `{found[0]['model']}`, {evidence.plan.samples:,} images per point and kind of prompts, temperature "
        f"{evidence.plan.temperatures[0]:g}; {sum(drawn):,} images in {len(drawn)} of {len(drawing)} points, "
        "with those of the tuning and of other temperatures, without traces and real pictures "
        f"({', '.join(devices)}; {'; '.join(versions)})."
    )


def bounds(evidence: Evidence) -> str:
    """What the judge says of real pictures."""
    found = {point.measure: evidence.rows.get(key(point.settings())) for point in evidence.plan.bounds()}
    lines = [
        [label, words, *(_percent(row, metric) for metric in ("name", "style", "colour", "all"))]
        for what, label in (("real", "the pictures"), ("tokens", "the same through the tokenizer"))
        for kind, (words, _) in SHOWN.items()
        if (row := found[f"{what} {kind}"])
    ]
    head = ["", "kind", *(f"{metric} right, %" for metric in ("name", "style", "colour", "all"))]
    if not lines:
        return ""
    table = markdown_table(head, lines)
    if row := found["tokens seen"]:
        values = [spread([METRICS[m][1] * row["values"][m]], METRICS[m][2]) for m in DISTANCES]
        table += (
            f"\n\nSeen pictures through the tokenizer: FID {values[0]}, precision {values[1]} %, recall {values[2]} %."
        )
    return table


def best(evidence: Evidence) -> str:
    """Each method at the scales that the tuning chose, where these were drawn."""
    if not evidence.best:
        return ""
    head = ["method", "best in", "scale", "seeds", *(METRICS[m][0] for m in DISTANCES)]
    head += [f"{words}: all right, %" for words, _ in SHOWN.values()] + ["FID minus that of CFG"]
    lines = []
    for name, found in {"no guidance": {MISSING: NONE}, **evidence.best}.items():
        for what, guidance in found.items():
            seeds = len(evidence.values(guidance, "seen", "all"))
            if not seeds:
                continue
            reference = evidence.best.get("CFG", {}).get("FID" if what == MISSING else what)
            scale = MISSING if guidance == NONE else f"{guidance.guidance_scale:g}"
            line = [name, what, scale, str(seeds)]
            line += [evidence.text(guidance, "seen", metric) for metric in DISTANCES]
            line += [evidence.text(guidance, kind, "all") for kind in SHOWN]
            other = "" if reference in (None, guidance) else evidence.fid_less(guidance, reference)
            lines.append([*line, other])
    return markdown_table(head, lines)


def over_scales(evidence: Evidence) -> str:
    """A line a method and scale, of prompts of seen pictures."""
    head = ["method, scale", "seeds", *(METRICS[m][0] for m in DISTANCES), "FID minus that of CFG"]
    head += [f"{metric} right, %" for metric in SHOWN["seen"][1]]
    lines = []
    for guidance in every(evidence, ["seen"]):
        line = [title(guidance), str(len(evidence.values(guidance, "seen", "all")))]
        line += [evidence.text(guidance, "seen", metric) for metric in DISTANCES]
        plain = at("CFG", guidance.guidance_scale)
        line.append("" if guidance in (NONE, plain) else evidence.fid_less(guidance, plain))
        lines.append([*line, *evidence.shares(guidance, ["seen"])])
    return markdown_table(head, lines)


def held_out(evidence: Evidence) -> str:
    """A line a method and scale, of prompts that were held out."""
    kinds = ["style", "colour"]
    head = ["method, scale", *(f"{words} seeds" for words in ("styles:", "colours:"))]
    head += [f"{SHOWN[kind][0]}: {metric} right, %" for kind in kinds for metric in SHOWN[kind][1]]
    lines = []
    for guidance in every(evidence, kinds):
        seeds = [str(len(evidence.values(guidance, kind, "all"))) for kind in kinds]
        lines.append([title(guidance), *seeds, *evidence.shares(guidance, kinds)])
    return markdown_table(head, lines) if lines else ""


def tuning(evidence: Evidence) -> str:
    """Every method at every scale, as the tuning drew it."""
    if not evidence.best:
        return ""

    def cell(guidance: CFG) -> str:
        fid, name = (evidence.tuned(guidance, metric) for metric in ("fid", "name"))
        return MISSING if fid is None or name is None else f"{fid:.2f}, {100 * name:.1f}"

    lines = [[name, *(cell(at(name, scale)) for scale in SCALES)] for name in METHODS]
    samples = evidence.plan.tuning([NONE])[0].samples
    table = markdown_table(["method, at scale", *(f"{scale:g}" for scale in SCALES)], lines)
    return (
        f"The tuning: FID, and names right in %, of {samples:,} images for seen prompts, of a seed of its own; "
        f"without guidance {cell(NONE)}.\n\n{table}"
    )


def of_temperatures(evidence: Evidence) -> str:
    """The other temperatures, where these were drawn."""
    lines = []
    for temperature in evidence.plan.temperatures[1:]:
        other = Evidence(evidence.rows, Plan(evidence.plan.samples, evidence.plan.seeds, (temperature,)))
        for guidance in every(other, list(KINDS)):
            line = [f"{temperature:g}", title(guidance), str(len(other.values(guidance, "seen", "fid")))]
            line += [other.text(guidance, "seen", metric) for metric in (*DISTANCES, "name")]
            lines.append([*line, *(other.text(guidance, kind, "all") for kind in SHOWN)])
    head = ["temperature", "method, scale", "seeds", *(METRICS[m][0] for m in DISTANCES), "seen: name right, %"]
    head += [f"{words}: all right, %" for words, _ in SHOWN.values()]
    return markdown_table(head, lines) if lines else ""


def steps(evidence: Evidence) -> str:
    """What guidance does over the steps, and whether the confidence lies on the object."""
    traces = traced(evidence)
    if not traces:
        return ""
    head = ["method", "mean 1 - w at the last step on white patches", "on other patches", "share of white patches"]
    lines = [
        [
            name,
            *(f"{values[f'{where}_weakened']:.4f}" for where in ("background", "object")),
            f"{1 - np.mean(values['object']):.3f}",
        ]
        for name, values in traces.items()
        if "object_weakened" in values
    ]
    return "\n\n".join([of_traces(traces, QUANTITIES, "white"), markdown_table(head, lines)])


def every(evidence: Evidence, kinds: Sequence[str]) -> list[CFG]:
    """No guidance and the methods at all scales, where there is a result."""
    settings = [NONE, *(at(name, scale) for name in METHODS for scale in SCALES)]
    return [each for each in settings if any(evidence.values(each, kind, "all") for kind in kinds)]


def traced(evidence: Evidence) -> dict[str, Row]:
    """The values of the traces by the name of their method, if all are there."""
    keys = {name: key(point.settings()) for name, point in evidence.plan.traces().items()}
    there = evidence.rows.keys() >= {*keys.values()}
    return {name: evidence.rows[k]["values"] for name, k in keys.items()} if there else {}


def _percent(row: Row, metric: str) -> str:
    return f"{100 * row['values'][metric]:.1f}" if metric in row["values"] else MISSING


# ---- plots


def plot_scales(evidence: Evidence) -> Figure:
    """FID, and what is right, against the scale: CFG and SoftCFG, seen and held out."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for colour, name in zip(ALL_COLOURS, list(METHODS)[:3], strict=False):
        _over_scales(axes[0], evidence, name, "seen", "fid", color=colour, label=name)
        for axis, metric in zip(axes[1:], ("name", "style", "colour"), strict=True):
            for kind, line in LINES.items():
                _over_scales(axis, evidence, name, kind, metric, color=colour, linestyle=line)
    for line, (words, _) in zip(LINES.values(), SHOWN.values(), strict=True):
        axes[1].plot([], [], color="0.5", linestyle=line, label=words)
    metrics = ("fid", "name", "style", "colour")
    _finish(axes, metrics, {m: float(np.mean(none)) for m in metrics if (none := evidence.values(NONE, "seen", m))})
    return figure


def plot_methods(evidence: Evidence) -> Figure:
    """FID and what is right against the scale, every method, as the tuning drew it."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    metrics = ("fid", "name", "style", "all")
    for colour, name in zip(ALL_COLOURS, METHODS, strict=True):
        for axis, metric in zip(axes, metrics, strict=True):
            found = {scale: evidence.tuned(at(name, scale), metric) for scale in SCALES}
            there = {scale: _factor(metric) * value for scale, value in found.items() if value is not None}
            label = name if metric == "fid" else None
            axis.plot(there.keys(), there.values(), marker="o", markersize=3, color=colour, label=label)
    _finish(axes, metrics, {metric: value for metric in metrics if (value := evidence.tuned(NONE, metric)) is not None})
    return figure


def plot_steps(evidence: Evidence) -> Figure:
    """How far the branches are apart over the steps, and where confidence and object are."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, *maps = figure.subplots(1, 4)
    traces = traced(evidence)
    for colour, (name, values) in zip(COLOURS, traces.items(), strict=False):
        curve(left, {"values": values}, "entropy_gap", colour, name)
        curve(middle, {"values": values}, "branch_distance", colour, name)
    left.set(xlabel="code", title="Entropy gap")
    middle.set(xlabel="code", title="Distance of the branches", ylim=(0, None))
    if traces:
        middle.legend(frameon=False, fontsize=7)
        for axis, quantity, words in zip(
            maps, ("confidence", "object"), ("Mean p_max", "Share of object"), strict=True
        ):
            grid = np.array(traces["SoftCFG"][quantity])
            side = round(len(grid) ** 0.5)
            shown = axis.imshow(grid.reshape(side, side), vmin=0, vmax=1)
            axis.set(title=f"{words}, SoftCFG", xticks=[], yticks=[])
            figure.colorbar(shown, ax=axis, shrink=0.8)
    return figure


PICTURES = {
    "scales": (plot_scales, "FID and what is right against the scale, CFG and SoftCFG, seen and held out"),
    "methods": (plot_methods, "FID and what is right against the scale, all methods, in the tuning"),
    "steps": (plot_steps, "Distance of the branches over the codes, and maps of confidence and object"),
}


def _over_scales(axis: Axes, evidence: Evidence, name: str, kind: str, metric: str, **line: Any) -> None:
    """A line with the spread over the seeds, at the scales that are there, if any."""
    drawn = evidence.drawn(name, kind, metric)
    if not drawn:
        return
    values, spreads = errors([[_factor(metric) * v for v in evidence.values(each, kind, metric)] for each in drawn])
    scales = [each.guidance_scale for each in drawn]
    axis.errorbar(scales, values, spreads, marker="o", markersize=3, capsize=2, **line)


def _finish(axes: Sequence[Axes], metrics: Sequence[str], levels: Mapping[str, float]) -> None:
    """Labels, and the levels without guidance."""
    for axis, metric in zip(axes, metrics, strict=True):
        if metric in levels:
            label = "no guidance" if metric == "fid" else None
            axis.axhline(_factor(metric) * levels[metric], color="0.5", linewidth=0.8, zorder=0, label=label)
        axis.set(xscale="log", xlabel="guidance scale", ylabel="FID" if metric == "fid" else f"{metric} right, %")
        axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        if metric == "fid":  # what bends images does so by a factor of ten
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.set_ylim(low, high := 2 * high)  # room for the legend
            axis.set_yticks(inside := [fid for fid in FIDS if low < fid < high], [str(fid) for fid in inside])
        axis.minorticks_off()
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=7)


def _factor(metric: str) -> float:
    """100 for shares, which are shown as percentages."""
    return METRICS[metric][1] if metric in METRICS else 100
