"""The document of the study: its tables and plots come from the results, the text around them is written by hand.

A block of the document between `<!-- begin NAME -->` and `<!-- end NAME -->` is made anew from the results.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from recipes.study.methods import NONE, WITHOUT_SOFTCFG, without_softcfg
from recipes.study.points import (
    ELSEWHERE,
    HALF_TRAINED,
    LONGER,
    METHODS,
    RANGE,
    TUNING_POWERS,
    TUNING_SCALES,
    TUNING_SEED,
    Comparison,
    Design,
    Point,
    Row,
    at_scale_of,
    definitions,
    key,
    of_patches,
    of_seeds,
    scale_range,
    targets,
    traced,
)
from softcfg import CFG, SoftCFG
from softcfg.errors import UserError
from softcfg.files import make_folder, write_atomically
from softcfg.guidance import describe
from softcfg.inspection.plots import COLOURS

METRICS = {  # title, factor, decimals
    "fid": ("FID ↓", 1, 3),
    "inception_score": ("IS ↑", 1, 3),
    "precision": ("precision ↑, %", 100, 2),
    "recall": ("recall ↑, %", 100, 2),
    "class_accuracy": ("class accuracy ↑, %", 100, 2),
}
QUANTITIES = {
    "entropy_gap": "normalised entropy, unconditional less conditional",
    "branch_distance": "distance of the branches",
}
TOLERANCE = 1.1  # a scale is usable where FID is at most this multiple of the least
MISSING = "–"
GRID = (CFG(1.5, 1.0), CFG(2.0, 2.0))  # what is tuned of CFG and SoftCFG
NOT_DRAWN = "Not drawn yet."


class Measured:
    """The results of one model, and what is asked of them."""

    def __init__(self, rows: Mapping[str, Row], design: Comparison) -> None:
        self.rows = rows
        self.design = design

    def of_seeds(self, guidance: CFG, metric: str) -> dict[int, float]:
        """Seed -> value of a metric, for the seeds that are there."""
        return {row["seed"]: row["values"][metric] for row in of_seeds(guidance, self.rows, self.design)}

    def text(self, guidance: CFG, metric: str) -> str:
        """Mean and standard deviation over the seeds."""
        _, factor, decimals = METRICS[metric]
        return spread([factor * value for value in self.of_seeds(guidance, metric).values()], decimals)

    def fid_difference(self, guidance: CFG, other: CFG) -> tuple[float, float] | None:
        """By how much the FID of two settings differs, with the standard error, if both have a seed in common."""
        one, two = (
            {row["seed"]: row["values"] for row in of_seeds(each, self.rows, self.design)} for each in (guidance, other)
        )
        seeds = sorted(one.keys() & two.keys())
        return _difference([(one[seed], two[seed]) for seed in seeds]) if seeds else None

    def tuning_pairs(self, settings: Iterable[CFG]) -> list[tuple[Row, Row]]:
        """What was measured with SoftCFG and of the same setting without it, wherever the tuning has both."""
        softcfg = dict.fromkeys(guidance for guidance in settings if isinstance(guidance, SoftCFG))
        pairs = [(self._of_tuning(guidance), self._of_tuning(without_softcfg(guidance))) for guidance in softcfg]
        return [(one, two) for one, two in pairs if one and two and "fid_without" in one and "fid_without" in two]

    def _of_tuning(self, guidance: CFG) -> Row | None:
        """What was measured of a setting in the tuning, if it was."""
        row = self.rows.get(key(self.design.tuned_with(guidance).settings()))
        return row and row["values"]

    def fid_less(self, guidance: CFG, other: CFG) -> str:
        """`fid_difference` as a text."""
        found = self.fid_difference(guidance, other)
        return f"{found[0]:+.3f} ± {found[1]:.3f}" if found else MISSING

    def table(
        self,
        settings: Mapping[str, CFG],
        first: str,
        compared: CFG,
        name: str,
        setting: tuple[str, Callable[[CFG], str]] | None = None,
    ) -> str:
        """One line a setting: its scale and power, all metrics, and how much its FID differs from another's.

        `setting` is the title of another second column, and what it says of a setting.
        """
        title, says = setting or ("scale, power", _scale)
        head = [first, title, "seeds", *(title for title, _, _ in METRICS.values()), f"FID minus that of {name}"]
        lines = []
        for title, guidance in settings.items():
            count = len(self.of_seeds(guidance, "fid"))
            metrics = [self.text(guidance, metric) for metric in METRICS]
            difference = "" if guidance == compared else self.fid_less(guidance, compared)
            lines.append([title, says(guidance), str(count), *metrics, difference])
        return markdown_table(head, lines)

    def best_table(self, others: Mapping[str, CFG]) -> str:
        """Every method at its best setting, compared with CFG; the setting is named by what was tuned of it."""
        best = {**others, **self.design.best_candidates(self.rows)}
        if "CFG" not in best:
            return NOT_DRAWN
        settings = {
            guidance: self._tuned(guidance, self.design.candidates.get(n, GRID)) for n, guidance in best.items()
        }
        return self.table(best, "method", best["CFG"], "CFG", ("setting (its FID in the tuning)", settings.__getitem__))

    def _tuned(self, guidance: CFG, candidates: Sequence[CFG]) -> str:
        """The settings in which the candidates differ, and the FID of this one among them."""
        values = self._of_tuning(guidance)
        if values is None:
            return MISSING
        names = {"guidance_scale": "scale", "guidance_scale_pow": "power"}
        every, chosen = [describe(candidate) for candidate in candidates], describe(guidance)
        varied = [name for name in chosen if len({str(each.get(name)) for each in every}) > 1]
        parts = f"{chosen.get('rule')}_", f"{chosen.get('perturbation')}_"
        texts = [f"{names.get(n, n.removeprefix(parts[0]).removeprefix(parts[1]))} {chosen[n]:g}" for n in varied]
        return f"{', '.join(texts).replace('_', ' ')} ({values['fid']:.3f})"


class Study(Measured):
    """The results of the whole study: of its own model, and of the models elsewhere by their names."""

    design: Design

    def __init__(self, rows: Mapping[str, Row], design: Design, elsewhere: Mapping[str, Mapping[str, Row]]) -> None:
        super().__init__(rows, design)
        self.best = design.best(rows)
        self.elsewhere = {model: Measured(found, ELSEWHERE[model]) for model, found in elsewhere.items()}


def write(document: Path, rows: Mapping[str, Row], design: Design, elsewhere: Mapping[str, Mapping[str, Row]]) -> None:
    """Write the plots, and the document with its blocks made anew.

    Args:
        document: has the text around the blocks.
        rows: the results of the study's model.
        design: its size.
        elsewhere: the results of the other models by their names.

    Raises:
        UserError: the document does not exist, has a block of an unknown name, or scale and power are not tuned yet.
    """
    if not all(key(point.settings()) in rows for point in design.tuning()):
        raise UserError("there are no results for all points of the tuning yet; draw them first")
    if not document.is_file():
        raise UserError(f"{document} does not exist; it holds the text around the tables")
    study = Study(rows, design, elsewhere)
    pictures = _pictures(document)

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise UserError(f"{document} has a block {name}; known are {', '.join(BLOCKS)}")
        return f"<!-- begin {name} -->\n{BLOCKS[name](study)}\n<!-- end {name} -->"

    text = document.read_text(encoding="utf-8")
    text = re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", block, text, flags=re.DOTALL)
    for name, draw in PICTURES.items():
        write_atomically(pictures / f"{name}.svg", svg(draw(study)))
    write_atomically(document, text.encode())


def write_picture(document: Path, picture: Image.Image) -> None:
    """Write the picture of samples that the document shows."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    write_atomically(_pictures(document) / "samples.png", buffer.getvalue())


def _pictures(document: Path) -> Path:
    return make_folder(document.parent / "images" / "study")


# ---- blocks


def about(study: Study) -> str:
    """What was drawn, with what."""
    wanted = {key(point.settings()) for point in study.design.points(study.rows)}
    missing = wanted - study.rows.keys()
    every = [row for name, row in study.rows.items() if name in wanted]
    images = [row for row in every if row["measure"] == "images"]
    devices = sorted({row["device"] for row in every})
    versions = sorted({f"softcfg {row['versions']['softcfg']}, PyTorch {row['versions']['torch']}" for row in every})
    full = [len(study.of_seeds(guidance, "fid")) for guidance in _reported(study)]
    seeds = f"{min(full)} to {max(full)}" if min(full) < max(full) else str(min(full))
    lines = [
        f"- Model `{every[0]['model']}`; {study.design.samples:,} images per point, the classes in turn.",
        f"- {seeds} of {study.design.seeds} seeds per point; the column *seeds* says how many a line has.",
        f"- {sum(row['samples'] for row in images):,} images in {len(images)} points "
        f"({', '.join(devices)}; {'; '.join(versions)}).",
    ]
    if missing:
        lines.append(f"- {len(missing)} of {len(wanted)} points are not there yet.")
    return "\n".join(lines)


def ablation(study: Study) -> str:
    """Part 1."""
    table = study.table({"no guidance": NONE, **study.best}, "method", study.best["CFG"], "CFG")
    for point, title in zip(
        study.design.bounds(), ("*training images*", "*the same through the tokenizer*"), strict=True
    ):
        if row := study.rows.get(key(point.settings())):
            values = [spread([f * row["values"][metric]], decimals) for metric, (_, f, decimals) in METRICS.items()]
            table += "\n| " + " | ".join([title, MISSING, MISSING, *values, ""]) + " |"
    return table


def sizes(study: Study) -> str:
    """The same settings with other numbers of images, where these were drawn."""
    head = ["method", "scale, power", "seed", "images", *(title for title, _, _ in METRICS.values())]
    lines = []
    for name, guidance in {"no guidance": NONE, **study.best}.items():
        settings = Point(guidance, 0, 0).settings()["guidance"]
        found = [row for row in study.rows.values() if row["guidance"] == settings and row["measure"] == "images"]
        for row in sorted(found, key=lambda row: (row["samples"], row["seed"])):
            values = [spread([f * row["values"][metric]], decimals) for metric, (_, f, decimals) in METRICS.items()]
            lines.append([name, _scale(guidance), str(row["seed"]), f"{row['samples']:,}", *values])
    return markdown_table(head, lines)


def same_scale(study: Study) -> str:
    """The methods at the scale and power of CFG."""
    settings = at_scale_of(study.best["CFG"])
    return study.table(settings, "method", study.best["CFG"], "CFG")


def over_scales(study: Study) -> str:
    """Part 2."""
    settings = scale_range(study.best)
    head = ["scale", "seeds", "FID ↓ CFG", "FID ↓ SoftCFG", "SoftCFG less CFG", "IS ↑ CFG", "IS ↑ SoftCFG"]
    head += ["class accuracy ↑ CFG, %", "SoftCFG, %"]
    lines = []
    for scale in RANGE:
        cfg, softcfg = settings["CFG", scale], settings["SoftCFG", scale]
        count = min(len(study.of_seeds(guidance, "fid")) for guidance in (cfg, softcfg))
        line = [f"{scale:g}", str(count)]
        line += [study.text(cfg, "fid"), study.text(softcfg, "fid"), study.fid_less(softcfg, cfg)]
        for metric in ("inception_score", "class_accuracy"):
            line += [study.text(cfg, metric), study.text(softcfg, metric)]
        lines.append(line)
    ranges = [_usable_range(study, name) for name in ("CFG", "SoftCFG")]
    return "\n\n".join([markdown_table(head, lines), *filter(None, ranges)])


def weighted(study: Study) -> str:
    """Part 3."""
    settings = targets(study.best)
    named = {"values (SoftCFG)": settings["value"], "keys": settings["key"], "both": settings["both"]}
    return study.table(named, "weights on", settings["value"], "values")


def confidences(study: Study) -> str:
    """Part 4."""
    settings = definitions(study.best)
    names = {
        "max": "`max` (the paper's definition)",
        "sampled": "`sampled`",
        "entropy": "`entropy`",
        "margin": "`margin`",
        "released": "`SoftCFG.released` (the released definition)",
    }
    named = {title: settings[name] for name, title in names.items()}
    return study.table(named, "confidence", settings["max"], "`max`")


def over_steps(study: Study) -> str:
    """Part 5."""
    traces = _traces(study)
    if not traces:
        return NOT_DRAWN
    quantities = {**QUANTITIES, "brightness": "brightness of the patch"}
    return of_traces({name: row["values"] for name, row in traces.items()}, quantities, "black")


def patches(study: Study) -> str:
    """Part 6."""
    settings, same = of_patches(study.best), at_scale_of(study.best["CFG"])
    named = {
        "none (CFG)": same["CFG"],
        "all (SoftCFG)": same["SoftCFG"],
        "black patches alone": settings["black"],
        "all but black patches": settings["other"],
    }
    return study.table(named, "weakened", same["CFG"], "CFG")


def tuning(study: Study) -> str:
    """The grid: least FID of every method in bold."""
    seed = study.design.tuning()[0].seed
    head = ["method", "power", *(f"scale {scale:g}" for scale in TUNING_SCALES)]
    lines = []
    for name in METHODS:
        grid = _grid(study, name)
        for power in TUNING_POWERS:
            best = study.best[name]
            values = [
                f"**{value:.3f}**"
                if (best.guidance_scale, best.guidance_scale_pow) == (scale, power)
                else f"{value:.3f}"
                for scale, value in grid[power].items()
            ]
            lines.append([name, f"{power:g}", *values])
    return f"FID of {study.design.tuning_samples:,} images, seed {seed}:\n\n{markdown_table(head, lines)}"


def methods(study: Study) -> str:
    """Part 7: all methods."""
    return study.best_table({"no guidance": NONE, "CFG": study.best["CFG"], "SoftCFG": study.best["SoftCFG"]})


def with_softcfg(study: Study) -> str:
    """Part 7: what SoftCFG adds to a method, each at its best."""
    best = {**study.best, **study.design.best_candidates(study.rows)}
    head = ["with SoftCFG", "without", "FID ↓ with", "FID ↓ without", "difference"]
    lines = []
    for name, without in {"SoftCFG": "CFG", **WITHOUT_SOFTCFG}.items():
        if name in best and without in best and study.of_seeds(best[name], "fid"):
            one, two = best[name], best[without]
            lines.append([name, without, study.text(one, "fid"), study.text(two, "fid"), study.fid_less(one, two)])
    return markdown_table(head, lines)


def same_setting(study: Study) -> str:
    """Part 7: what SoftCFG adds at every setting that was tuned."""
    grid = [g for point in study.design.tuning() if isinstance(g := point.guidance, SoftCFG) and g.step_norm]
    return _same_setting(study, {"SoftCFG": grid, **study.design.candidates})


def _same_setting(measured: Measured, candidates: Mapping[str, Sequence[CFG]]) -> str:
    head = ["method", "settings", "mean difference", "least", "greatest", "lower by two errors", "higher by two errors"]
    best = measured.design.best_candidates(measured.rows)
    lines = []
    for name, settings in candidates.items():
        if pairs := measured.tuning_pairs(settings):
            found = sorted(_difference([pair]) for pair in pairs)
            shown = (_difference(pairs, same_images=True), found[0], found[-1])
            counts = [sum(sign * difference > 2 * error for difference, error in found) for sign in (-1, 1)]
            line = [name, str(len(found)), *(f"{d:+.3f} ± {error:.3f}" for d, error in shown), *map(str, counts)]
            guidance = best.get(name)
            final = isinstance(guidance, SoftCFG) and measured.fid_less(guidance, without_softcfg(guidance))
            lines.append([*line, final or MISSING])
    return markdown_table([*head, "at its best, other seeds"], lines)


def half_trained(study: Study) -> str:
    """Part 8: a model that is trained for a quarter of the steps."""
    return _elsewhere(study, HALF_TRAINED)


def longer(study: Study) -> str:
    """Part 8: a model with 256 tokens."""
    return _elsewhere(study, LONGER)


def _elsewhere(study: Study, model: str) -> str:
    measured = study.elsewhere.get(model)
    if not measured or not measured.rows:
        return NOT_DRAWN
    design = measured.design
    choices = max(len(settings) for settings in design.candidates.values())
    about = (
        f"{design.samples:,} images per point. Tuned: the best of {choices} settings of each method, "
        f"of {design.tuning_samples:,} images each of seed {TUNING_SEED}."
    )
    pairs = "At the same settings, in the tuning, with SoftCFG less without it:"
    return "\n\n".join([about, measured.best_table({}), pairs, _same_setting(measured, design.candidates)])


BLOCKS: Mapping[str, Callable[[Study], str]] = {
    block.__name__: block
    for block in (
        *(about, ablation, sizes, same_scale, over_scales, weighted, confidences, over_steps, patches, tuning),
        *(methods, with_softcfg, same_setting, half_trained, longer),
    )
}


# ---- plots


def plot_range(study: Study) -> Figure:
    """FID and IS against the scale, and FID against class accuracy."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    settings = scale_range(study.best)
    for colour, name in zip(COLOURS, ("CFG", "SoftCFG"), strict=False):
        drawn = [settings[name, scale] for scale in RANGE if study.of_seeds(settings[name, scale], "fid")]
        scales = [guidance.guidance_scale for guidance in drawn]
        for axis, metric in zip(axes, ("fid", "inception_score"), strict=False):
            values, errors = _errors(study, drawn, metric)
            axis.errorbar(scales, values, errors, color=colour, marker="o", markersize=3, capsize=2, label=name)
        accuracy, fid = (_errors(study, drawn, metric)[0] for metric in ("class_accuracy", "fid"))
        axes[2].plot(100 * accuracy, fid, color=colour, marker="o", markersize=3, label=name)
    for axis, metric in zip(axes, ("fid", "inception_score"), strict=False):
        none = _errors(study, [NONE], metric)[0]
        if len(none):
            axis.axhline(none[0], color="0.5", linestyle=":", label="no guidance")
        axis.set(xscale="log", xlabel="guidance scale", ylabel=METRICS[metric][0].split()[0])
        axis.set_xticks(RANGE, [f"{scale:g}" for scale in RANGE])
        axis.minorticks_off()
    accuracy, fid = (_errors(study, [NONE], metric)[0] for metric in ("class_accuracy", "fid"))
    axes[2].plot(100 * accuracy, fid, color="0.5", marker="o", linestyle="", label="no guidance")
    axes[2].set(xlabel="class accuracy, %", ylabel="FID")
    axes[0].legend(frameon=False)
    return figure


def plot_tuning(study: Study) -> Figure:
    """FID over the grid."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(METHODS), sharey=True)
    for axis, name in zip(axes, METHODS, strict=True):
        for colour, (power, values) in zip(COLOURS, _grid(study, name).items(), strict=False):
            axis.plot(
                *zip(*values.items(), strict=True), color=colour, marker="o", markersize=3, label=f"power {power:g}"
            )
        axis.set(title=name, xlabel="guidance scale", xscale="log")
        axis.set_xticks(TUNING_SCALES, [f"{scale:g}" for scale in TUNING_SCALES])
        axis.minorticks_off()
    axes[0].set_ylabel("FID")
    axes[0].legend(frameon=False)
    return figure


def plot_steps(study: Study) -> Figure:
    """How far the branches are apart over the steps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for colour, (name, row) in zip(COLOURS, _traces(study).items(), strict=False):
        curve(left, row, "entropy_gap", colour, name)
        curve(middle, row, "branch_distance", colour, name)
        curve(right, row, "brightness", colour, name)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="step", ylabel="normalised entropy", title="Unconditional less conditional entropy")
    middle.set(xlabel="step", ylabel="total variation distance", title="Distance of the branches", ylim=(0, None))
    right.set(xlabel="step", ylabel="mean gray value", title="Brightness of the token's patch", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return figure


def plot_budget(study: Study) -> Figure:
    """What the perturbation sums up to, and the mean confidence."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    traces = _traces(study)
    if traces:
        curve(left, traces["SoftCFG"], "budget", COLOURS[0], "SoftCFG")
        without = "SoftCFG without Step Normalisation"
        curve(left, traces[without], "budget_without", COLOURS[1], without)
        curve(right, traces["SoftCFG"], "confidence", COLOURS[0], "SoftCFG")
    left.set(xlabel="step", ylabel="sum of (1 - w)", title="Perturbation of a step", ylim=(0, None))
    left.legend(frameon=False)
    right.set(xlabel="token", ylabel="p_max", title="Mean confidence in the tokens", ylim=(0, 1))
    return figure


def plot_methods(study: Study) -> Figure:
    """How much the FID of every method differs from that of CFG, the least first, with two standard errors."""
    best = {"SoftCFG": study.best["SoftCFG"], **study.design.best_candidates(study.rows)}
    found = {name: study.fid_difference(guidance, study.best["CFG"]) for name, guidance in best.items()}
    drawn = sorted(((name, *pair) for name, pair in found.items() if pair), key=lambda each: -each[1])
    figure = Figure(figsize=(8, 1 + 0.22 * len(drawn)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="0.6", linewidth=0.8)
    for row, (name, difference, error) in enumerate(drawn):
        colour = COLOURS["SoftCFG" in name]
        axis.errorbar(difference, row, xerr=2 * error, color=colour, marker="o", markersize=4, capsize=2)
    axis.set_yticks(range(len(drawn)), [name for name, _, _ in drawn])
    axis.set(xlabel="FID minus that of CFG")
    return figure


PICTURES: Mapping[str, Callable[[Study], Figure]] = {
    "range": plot_range,
    "tuning": plot_tuning,
    "steps": plot_steps,
    "budget": plot_budget,
    "methods": plot_methods,
}


# ---- pieces


def fid_difference(one: Mapping[int, Row], two: Mapping[int, Row], decimals: int = 3) -> str:
    """By how much the FID of two settings differs, seed -> values of each, with its standard error by the jackknife."""
    if not (seeds := sorted(one.keys() & two.keys())):
        return MISSING
    difference, error = _difference([(one[seed], two[seed]) for seed in seeds])
    return f"{difference:+.{decimals}f} ± {error:.{decimals}f}"


def of_traces(traces: Mapping[str, Row], quantities: Mapping[str, str], background: str) -> str:
    """Tables of what was traced: means over thirds of the steps, and the confidence on the background.

    Args:
        traces: values by the name of the method, "SoftCFG" with and without Step Normalisation among them.
        quantities: titles by name.
        background: its colour.
    """
    total = len(next(iter(traces.values()))["entropy_gap"])
    thirds = [slice(round(i * total / 3), round((i + 1) * total / 3)) for i in range(3)]
    head = ["method", "quantity", *(f"steps {part.start + 1} to {part.stop}" for part in thirds)]
    lines = [
        [name, title, *(f"{mean(values[quantity][part]):.4f}" for part in thirds)]
        for quantity, title in quantities.items()
        for name, values in traces.items()
    ]
    lines += [
        ["SoftCFG" + suffix, "sum of (1 - w)", *(f"{mean(values[part]):.2f}" for part in thirds)]
        for suffix, values in (
            ("", traces["SoftCFG"]["budget"]),
            (" without Step Normalisation", traces["SoftCFG without Step Normalisation"]["budget_without"]),
        )
    ]
    shares = ["method", f"mean p_max of {background} patches", "of other patches"]
    shares += [f"share of all p_max on {background} patches"]
    of_patches = [
        [name, *(f"{values[k]:.3f}" for k in ("background_confidence", "object_confidence", "background_share"))]
        for name, values in traces.items()
    ]
    return "\n\n".join([markdown_table(head, lines), markdown_table(shares, of_patches)])


def _traces(study: Study) -> dict[str, Row]:
    """The traces by the name of their method, if all are there."""
    points = {point.guidance: point for point in study.design.points(study.rows) if point.measure == "trace"}
    keys = {name: key(points[guidance].settings()) for name, guidance in traced(study.best).items()}
    there = study.rows.keys() >= {*keys.values()}
    return {name: study.rows[k] for name, k in keys.items()} if there else {}


def _grid(study: Study, name: str) -> dict[float, dict[float, float]]:
    """Power -> scale -> FID."""
    found: dict[float, dict[float, float]] = {power: {} for power in TUNING_POWERS}
    for point in study.design.tuning():
        if at_scale_of(point.guidance)[name] == point.guidance:
            fid = study.rows[key(point.settings())]["values"]["fid"]
            found[point.guidance.guidance_scale_pow][point.guidance.guidance_scale] = fid
    return found


def _usable_range(study: Study, name: str) -> str:
    """Between which scales FID is near its least, interpolated on a logarithmic axis."""
    settings = scale_range(study.best)
    scales = [scale for scale in RANGE if study.of_seeds(settings[name, scale], "fid")]
    if len(scales) < len(RANGE):
        return ""
    fine = np.geomspace(RANGE[0], RANGE[-1], 2000)
    values = np.interp(np.log(fine), np.log(scales), _errors(study, [settings[name, s] for s in scales], "fid")[0])
    usable = fine[values <= TOLERANCE * values.min()]
    low = f"below {RANGE[0]:g}" if math.isclose(usable[0], RANGE[0]) else f"{usable[0]:.1f}"
    high = f"above {RANGE[-1]:g}" if math.isclose(usable[-1], RANGE[-1]) else f"{usable[-1]:.1f}"
    return f"{name}: FID is within {TOLERANCE - 1:.0%} of its least from scale {low} to {high}."


def _reported(study: Study) -> Iterable[CFG]:
    points = [point for point in study.design.points(study.rows) if point.samples == study.design.samples]
    return dict.fromkeys(point.guidance for point in points if point.measure == "images")


def _errors(study: Study, settings: Sequence[CFG], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations over the seeds, of the settings that are there."""
    return errors([list(study.of_seeds(guidance, metric).values()) for guidance in settings])


def errors(found: Iterable[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of values that belong together, where there are any."""
    found = list(filter(None, found))
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in found]
    return np.array([mean(values) for values in found]), np.array(spreads)


def curve(axis: Axes, row: Row, quantity: str, colour: str, name: str) -> None:
    """Mean over images, with two standard errors as a band."""
    values, errors = np.array(row["values"][quantity]), np.array(row["values"][f"{quantity}_error"])
    steps = np.arange(1, len(values) + 1)
    axis.plot(steps, values, color=colour, label=name)
    axis.fill_between(steps, values - 2 * errors, values + 2 * errors, color=colour, alpha=0.2, linewidth=0)


def _difference(pairs: Sequence[tuple[Row, Row]], *, same_images: bool = False) -> tuple[float, float]:
    """By how much the FID of the first of a pair differs from that of the second, mean and standard error.

    The error is that of the jackknife over tenths of the images, the same tenths on both sides. Pairs are of different
    seeds, or of different settings with the same images' random numbers.
    """
    without = np.array([np.subtract(one["fid_without"], two["fid_without"]) for one, two in pairs])
    if same_images:
        without = without.mean(axis=0, keepdims=True)
    variances = (without.shape[1] - 1) * without.var(axis=1)
    return mean(one["fid"] - two["fid"] for one, two in pairs), float(variances.sum() ** 0.5 / len(without))


def _scale(guidance: CFG) -> str:
    return f"{guidance.guidance_scale:g}, {guidance.guidance_scale_pow:g}" if guidance.is_active else MISSING


def spread(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean and standard deviation."""
    if not values:
        return MISSING
    text = f"{mean(values):{sign}.{decimals}f}"
    return f"{text} ± {stdev(values):.{decimals}f}" if len(values) > 1 else text


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def svg(figure: Figure) -> bytes:
    """The same file for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "softcfg", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
