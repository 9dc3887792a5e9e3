import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import softcfg
from softcfg import CFG, Pipeline, SoftCFG, Trace, UserError
from softcfg.cli.main import main
from softcfg.images import grid
from softcfg.inspection import measures, plots


@pytest.fixture(scope="module")
def traced(model_folder: Path) -> tuple[Trace, np.ndarray]:
    pipe = Pipeline.from_pretrained(model_folder)
    trace = softcfg.trace(pipe.generator, labels=[0, 1, 2], guidance=SoftCFG(guidance_scale=3), temperature=0.8)
    return trace, pipe([0, 1, 2], forced_tokens=trace.tokens).pixels


def test_measures_against_brute_force(traced: tuple[Trace, np.ndarray]) -> None:
    trace, _ = traced
    gap, distance = measures.entropy_gap(trace), measures.branch_distance(trace)
    budget = measures.perturbation_budget(trace)
    unnormalised = measures.perturbation_budget(trace, step_norm=False)
    for b, t in ((0, 0), (1, 7), (2, 15)):
        p, q = ((z[b, t] / 0.8).softmax(-1).tolist() for z in (trace.cond_logits, trace.uncond_logits))

        def entropy(distribution: list[float]) -> float:
            return -sum(x * math.log(x) for x in distribution if x > 0) / math.log(20)

        assert gap[b, t].item() == pytest.approx(entropy(q) - entropy(p), abs=1e-5)
        assert distance[b, t].item() == pytest.approx(sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2, abs=1e-5)
        assert budget[b, t].item() == pytest.approx(1.0 if t else 0.0, abs=1e-5)
        assert unnormalised[b, t].item() == pytest.approx(trace.confidence[b, :t].sum().item(), abs=1e-5)


def test_tokens_on_the_grid() -> None:
    grid = measures.on_grid(torch.arange(2 * 19).view(2, 19))
    assert grid.shape == (2, 4, 4)
    assert grid[0, 0].tolist() == [3, 4, 5, 6]
    assert grid[1, 3].tolist() == [34, 35, 36, 37]


def test_figures_show_what_they_say(traced: tuple[Trace, np.ndarray]) -> None:
    trace, pixels = traced
    figure = plots.plot_confidence(trace, pixels, names=["a", "b", "c"])
    assert all(axis.images[0].get_alpha() is None for axis in figure.axes[3:6])  # the colours are those of the bar
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    maps = [axis.images[0].get_array() for axis in figure.axes[3:6]]
    for shown, confidence in zip(maps, trace.confidence, strict=True):
        assert np.allclose(shown, confidence.view(4, 4))
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]

    budget = plots.plot_budget(trace).axes[0]
    with_norm, without = (line.get_ydata() for line in budget.lines)
    assert np.allclose(with_norm, [0] + [1] * 15, atol=1e-5)
    assert np.allclose(without, measures.perturbation_budget(trace, step_norm=False).mean(0), atol=1e-5)

    heat = plots.plot_weights(trace, 1, step=5, pixels=pixels[1]).axes
    weights = heat[0].images[0].get_array()
    assert trace.value_weights is not None
    assert np.allclose(weights[9, :9], trace.value_weights[1, 9, :9])
    assert np.ma.getmaskarray(weights)[9, 9:].all()
    overlay = heat[1].images[0].get_array().ravel()
    assert np.allclose(overlay[:5], trace.value_weights[1, 5, :5])
    assert np.isnan(np.ma.filled(overlay, np.nan)[5:]).all()

    bars = plots.plot_candidates(trace, 2, token=6, top=4).axes[0].containers
    assert [container.get_label() for container in bars] == ["conditional", "unconditional", "guided"]
    conditional = (trace.cond_logits[2, 6].double() / 0.8).softmax(-1)
    heights = sorted(float(bar.get_height()) for bar in bars[0])
    assert heights[-1] == pytest.approx(conditional.max().item())

    gap = plots.plot_gap({"CFG": trace, "SoftCFG": trace}).axes
    assert [text.get_text() for text in gap[1].get_legend().get_texts()] == ["CFG", "SoftCFG"]


def test_what_is_not_there_is_not_drawn(traced: tuple[Trace, np.ndarray]) -> None:
    trace, images = traced
    count, total = trace.tokens.shape
    for said, draw in {
        f"image must be a whole number in 0..{count - 1}, got {count}": lambda: plots.plot_weights(trace, image=count),
        f"step must be a whole number in 0..{total - 1}, got {total}": lambda: plots.plot_weights(trace, step=total),
        "got -1": lambda: plots.plot_weights(trace, step=-1, pixels=images[0]),
        f"token must be a whole number in 0..{total - 1}, got -1": lambda: plots.plot_candidates(trace, token=-1),
        "got 1.5": lambda: plots.plot_candidates(trace, token=1.5),  # type: ignore[arg-type]
        "top must be at least 1, got 0": lambda: plots.plot_candidates(trace, top=0),
        "trace must be a Trace, got 'trace'": lambda: plots.plot_budget("trace"),  # type: ignore[arg-type]
        "traces must be a Mapping": lambda: plots.plot_gap(trace),  # type: ignore[arg-type]
        f"of the {count} images of the trace": lambda: plots.plot_confidence(trace, np.concatenate([images, images])),
        "there is no format of figures named 'gif'; known: png, svg": lambda: plots.figure_bytes(
            plots.plot_budget(trace), "gif"
        ),
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            draw()


def test_plain_guidance_can_be_drawn_too(traced: tuple[Trace, np.ndarray], model_folder: Path) -> None:
    generator = softcfg.load_generator(model_folder)
    trace = softcfg.trace(generator, labels=[0], guidance=CFG(guidance_scale=3))
    assert (measures.perturbation_budget(trace) == 0).all()
    for figure in (plots.plot_weights(trace), plots.plot_budget(trace), plots.plot_gap({"CFG": trace})):
        assert plots.figure_bytes(figure).startswith(b"\x89PNG")


def test_command_writes_every_figure(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(model_folder), "--labels", "0,Star", "--output-dir", str(tmp_path / "a")]) == 0
    names = ("budget", "candidates", "confidence", "gap", "weights")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{name}.png" for name in names]
    for name in names:
        assert Image.open(tmp_path / "a" / f"{name}.png").size[0] > 500
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    flags = ["--image", str(tmp_path / "x.png"), "--figures", "weights,gap", "--format", "svg", "--step", "3"]
    assert main(["plot", str(model_folder), "--labels", "1", *flags, "--output-dir", str(tmp_path / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["gap.svg", "weights.svg"]
    assert "<svg" in (tmp_path / "b" / "gap.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "0", "--figures", "pie"], "there is no figure 'pie'"),
        (["--labels", "0", "--step", "16"], "--step must be a whole number in 0..15, got 16"),
        (["--labels", "0", "--token", "-1"], "--token must be a whole number in 0..15, got -1"),
        (["--labels", "0,1", "--image", "x.png"], "needs one label, got 2"),
        (["--labels", "0", "--image", "missing.png"], "missing.png cannot be read as an image"),
        (["--labels", ",".join("0" * 17)], "at most 16"),
    ],
)
def test_bad_input(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["plot", str(model_folder), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_heading_is_as_wide_as_it_needs() -> None:
    image, title = Image.new("RGB", (8, 8), "black"), "SoftCFG + APG, scale 2.5"
    narrow, wide = grid([[image]], title=title), grid([[image] * 6], title=title)
    ink = [np.flatnonzero((np.asarray(picture)[:20] < 128).any(axis=(0, 2))) for picture in (narrow, wide)]
    assert ink[0].max() == ink[1].max() < narrow.width - 1


def test_columns_have_labels_that_fit_above_them() -> None:
    images = [Image.new("RGB", (64, 64), "black")] * 3
    plain, labelled = grid([images]), grid([images], column_labels=["a", "flag of japan, flat style", "w" * 100])
    assert labelled.width == plain.width
    lines = (labelled.height - plain.height) / (grid([images], column_labels=["a"] * 3).height - plain.height)
    assert lines == 3
    above = (np.asarray(labelled)[: labelled.height - plain.height] < 128).any(axis=(0, 2))
    centres = [8 + 66 * column for column in range(3)]
    assert all(above[x : x + 64].any() for x in centres)
    assert not above[8 + 64 : 8 + 66].any()  # nothing between them
    assert not above[8 + 130 : 8 + 132].any()
