"""Figures of traces. Each function returns a Matplotlib figure; colours are safe for the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import figure as matplotlib_figure

from softcfg.decoding.perturbed import step_weights
from softcfg.errors import UserError, require_index, require_kind, require_name, require_whole
from softcfg.guidance import CONFIDENCES
from softcfg.inspection import measures
from softcfg.inspection.trace import Trace
from softcfg.models.geometry import Geometry
from softcfg.nn.precision import as_float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
HEAT = "viridis"
FORMATS = ("png", "svg")
SMOOTHING = 9  # steps, of curves over the sequence


class Figure(matplotlib_figure.Figure):
    """A figure that notebooks show as a picture, without pyplot."""

    def _repr_png_(self) -> bytes:
        return figure_bytes(self, "png")


def plot_confidence(
    trace: Trace, pixels: np.ndarray, *, names: list[str] | None = None, geometry: Geometry | None = None
) -> Figure:
    """The images, and over them the confidence in each token (the paper's Fig. 5).

    Args:
        pixels: uint8 [B, H, W, 3], the images of the trace's tokens.
        names: what to write above each image.
        geometry: where the tokens stand in the image; see `measures.on_grid`.
    """
    require_kind(trace, "trace", Trace)
    count, images = len(pixels), len(trace.confidence)
    if count > images or (names and len(names) < count):
        raise UserError(f"pixels and names must be of the {images} images of the trace, got {count}")
    figure = Figure(figsize=(1.9 * count + 0.9, 4.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    maps = measures.on_grid(trace.confidence, geometry).cpu()
    shown: Any = None
    for column in range(count):
        label = "" if trace.labels is None else f"class {int(trace.labels[column])}"
        _image(axes[0, column], pixels[column], names[column] if names else label)
        shown = _overlay(axes[1, column], pixels[column], maps[column].numpy(), 0.0, 1.0)
    axes[1, 0].set_ylabel("confidence")
    figure.colorbar(
        shown,
        ax=axes[1, :].tolist(),
        label=f"confidence ({CONFIDENCES.label(trace.guidance.weak_branch.confidence)})",
        shrink=0.85,
    )
    figure.suptitle("Confidence in the tokens")
    return figure


def plot_gap(traces: Mapping[str, Trace]) -> Figure:
    """How far the branches are apart over the steps: entropy and distance (the paper's Fig. 3), mean over images."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    require_kind(traces, "traces", Mapping)
    for colour, (name, trace) in zip(COLOURS, traces.items(), strict=False):
        require_kind(trace, "a trace", Trace)
        for axis, values in ((left, measures.entropy_gap(trace)), (right, measures.branch_distance(trace))):
            _curve(axis, values.cpu().numpy(), name, colour)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="step", ylabel="normalised entropy", title="Unconditional less conditional entropy")
    right.set(xlabel="step", ylabel="total variation distance", title="Distance of the branches", ylim=(0, None))
    right.legend(frameon=False)
    return figure


def plot_budget(trace: Trace) -> Figure:
    """The perturbation that each step carries, with and without Step Normalisation (the paper's Fig. 7)."""
    require_kind(trace, "trace", Trace)
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = figure.subplots()
    curves = {"with Step Normalisation": True, "without": False}
    if trace.guidance.perturbs and not measures.has_step_norm(trace):
        curves = {trace.guidance.title: True}
    for colour, (name, step_norm) in zip(COLOURS, curves.items(), strict=False):
        values = measures.perturbation_budget(trace, step_norm=step_norm).cpu().numpy()
        _curve(axis, values, name, colour, smooth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="step", ylabel="sum of (1 - w)", title="Perturbation of a step", ylim=(0, None))
    axis.legend(frameon=False)
    return figure


def plot_weights(
    trace: Trace,
    image: int = 0,
    *,
    step: int | None = None,
    pixels: np.ndarray | None = None,
    geometry: Geometry | None = None,
) -> Figure:
    """The weight that every step puts on every earlier token of an image, and one step's weights over the picture.

    Args:
        step: the step shown over the picture; the last by default.
        pixels: uint8 [H, W, 3], the picture; without it only the heat map is drawn.
        geometry: where the tokens stand in the picture; see `measures.on_grid`.
    """
    require_kind(trace, "trace", Trace)
    images, total = trace.confidence.shape
    image = require_index(image, "image", images)
    step = total - 1 if step is None else require_index(step, "step", total)
    confidence = trace.confidence[image : image + 1]
    weights = step_weights(confidence, trace.guidance.weak_branch, torch.arange(total))[0].cpu().numpy()
    future = np.arange(total)[None, :] >= np.arange(total)[:, None]
    lowest = float(np.quantile(weights[~future], 0.01))
    figure = Figure(figsize=(5.2 if pixels is None else 9.4, 4.3), layout="constrained")
    axes = figure.subplots(1, 1 if pixels is None else 2, squeeze=False)[0]
    shown = axes[0].imshow(
        np.ma.masked_array(weights, future), cmap=HEAT, vmin=lowest, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes[0].set(xlabel="token", ylabel="step", title="Weights on the tokens so far")
    if pixels is not None:
        axes[0].axhline(step, color=COLOURS[1], linewidth=1)
        at_step = np.where(future[step], np.nan, weights[step])
        grid = measures.on_grid(torch.from_numpy(at_step), geometry).numpy()
        _overlay(axes[1], pixels, grid, lowest, 1.0)
        axes[1].set_title(f"at step {step}")
    figure.colorbar(shown, ax=axes.tolist(), label="weight", shrink=0.85)
    return figure


def plot_candidates(trace: Trace, image: int = 0, *, token: int = 0, top: int = 8) -> Figure:
    """The likeliest codes of a token under the conditional, unconditional and guided distributions."""
    require_kind(trace, "trace", Trace)
    images, total = trace.confidence.shape
    image, token = require_index(image, "image", images), require_index(token, "token", total)
    top = require_whole(top, "top", 1)
    branches = {"conditional": trace.cond_logits, "unconditional": trace.uncond_logits, "guided": trace.guided_logits}
    probabilities = {
        name: (as_float64(logits[image, token]) / trace.temperature).softmax(-1).cpu().numpy()
        for name, logits in branches.items()
    }
    ranked = np.argsort(-np.max(list(probabilities.values()), axis=0))[:top]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, (colour, (name, values)) in enumerate(zip(COLOURS, probabilities.items(), strict=False)):
        axis.bar(np.arange(len(ranked)) + (place - 1) * 0.27, values[ranked], 0.25, color=colour, label=name)
    drawn = int(trace.tokens[image, token])
    axis.set_xticks(np.arange(len(ranked)), [f"{code}{' (drawn)' if code == drawn else ''}" for code in ranked])
    axis.set(
        xlabel="code", ylabel="probability", title=f"Token {token}, scale {float(trace.guidance_scale[token]):.2f}"
    )
    axis.tick_params(axis="x", rotation=30)
    axis.legend(frameon=False)
    return figure


def figure_bytes(figure: matplotlib_figure.Figure, kind: str = "png") -> bytes:
    """The figure as a "png" (150 dots per inch) or "svg" file."""
    require_kind(figure, "figure", matplotlib_figure.Figure)
    require_name(kind, FORMATS, "there is no format of figures named")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def _image(axis: Axes, pixels: np.ndarray, title: str = "") -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])


def _overlay(axis: Axes, pixels: np.ndarray, grid: np.ndarray, low: float, high: float) -> Any:
    """A map in the colours of its bar, and the outlines of the picture over it."""
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axis.imshow(grid, cmap=HEAT, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    gray = pixels.mean(axis=-1)
    if gray.min() < gray.max():
        axis.contour(gray, levels=[(gray.min() + gray.max()) / 2], colors="white", linewidths=0.8)
    axis.set_xticks([])
    axis.set_yticks([])
    return shown


def _curve(axis: Axes, values: np.ndarray, name: str, colour: str, smooth: int = SMOOTHING) -> None:
    """Mean over images, with the quartiles as a band; both smoothed over neighbouring steps."""
    kernel = np.ones(smooth) / smooth

    def smoothed(line: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(line, smooth // 2, mode="edge"), kernel, mode="valid")

    low, high = np.quantile(values, (0.25, 0.75), axis=0)
    steps = np.arange(values.shape[1])
    axis.plot(steps, smoothed(values.mean(axis=0)), color=colour, label=name)
    if len(values) > 1:
        axis.fill_between(steps, smoothed(low), smoothed(high), color=colour, alpha=0.15, linewidth=0)
