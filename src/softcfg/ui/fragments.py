"""The parts of the page that are not form fields, as HTML. Pictures are embedded as data addresses, so that the server
serves no files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from PIL import Image

from softcfg.guidance import CONFIDENCES
from softcfg.images import png_bytes
from softcfg.ui.settings import METHODS
from softcfg.ui.studio import Inspection, Model, Panel, Picture, Session

HEAT = matplotlib.colormaps["viridis"]
BRANCHES = ("conditional", "unconditional", "guided")
THUMBNAIL = 128  # pixels, at most, of the gallery's pictures
CURVE = (300, 92)  # size of the weight curve's drawing area

EMPTY_STAGE = """
<div class="hint">
  <p>Nothing drawn yet.</p>
  <p>Choose what to draw and press <b>Draw</b>, or pick an example. Every method starts from the same seed, so what
  differs between the pictures is the guidance alone.</p>
</div>"""
EMPTY_INSPECTOR = """
<p class="hint small">Click a place in a finished picture, or move to it with Tab and choose a token with the arrow
keys: its confidence, its weights and its candidates appear here.</p>"""
EMPTY_GALLERY = '<p class="hint small">Finished pictures of this session gather here.</p>'


def data_address(content: bytes, kind: str) -> str:
    """The content as a `data:` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def examples(model: Model) -> str:
    """Buttons that draw the examples of a model."""
    if not model.examples:
        return ""
    chips = "".join(
        f'<button type="button" data-example="{number}">{escape(model.name_of(subject))}</button>'
        for number, (subject, _) in enumerate(model.examples)
    )
    return f'<div class="chips" role="group" aria-label="Examples on which methods differ">{chips}</div>'


def stage(panels: Sequence[Panel], maps: dict[int, str] | None = None) -> str:
    """The pictures of one drawing side by side, under way or finished.

    Args:
        maps: address of a map to lay over each finished picture, by its number.
    """
    if not panels:
        return EMPTY_STAGE
    seeds = len({panel.seed for panel in panels})
    shown = "".join(_panel(panel, maps or {}, seeds > 1) for panel in panels)
    # Of several seeds each has a column.
    style = f'seeds" style="--seeds:{seeds}' if seeds > 1 else f"count-{len(panels)}"
    return f'<div class="panels {style}">{shown}</div>'


def _panel(panel: Panel, maps: dict[int, str], with_seed: bool) -> str:
    title, total, picture = escape(METHODS[panel.method].title), panel.grid.num_tokens, panel.picture
    shape = f'style="aspect-ratio: {panel.grid.columns} / {panel.grid.rows}"'
    name = f"{title}, seed {panel.seed}" if with_seed else title
    head = f"<b>{title}</b> seed {panel.seed}" if with_seed else f"<b>{title}</b>"
    if picture is None:
        shown = ""
        if panel.pixels is not None:
            address = data_address(png_bytes(Image.fromarray(panel.pixels)), "image/png")
            shown = f'<img src="{address}" alt="{name}, {panel.done} of {total} tokens">'
        return f"""<figure class="panel">
<figcaption><span>{head}</span><span class="count">{panel.done} of {total}</span></figcaption>
<div class="picture unfinished" {shape}>{shown}</div>
<progress max="{total}" value="{panel.done}" aria-label="{name}: tokens drawn"></progress></figure>"""
    grid = picture.grid
    address = data_address(picture.png(), "image/png")
    settings = data_address(picture.json().encode(), "application/json")
    laid = f'<img class="map" src="{maps[picture.number]}" alt="">' if picture.number in maps else ""
    front = "".join(f'<span data-token="{token}"></span>' for token in range(grid.front))
    front = f'<div class="front" aria-hidden="true">{front}</div>' if front else ""
    file, caption = escape(picture.file_name), escape(picture.caption)
    return f"""<figure class="panel">
<figcaption><span>{head}</span><span class="count">{total} tokens</span></figcaption>
<div class="picture{" mapped" if laid else ""}" tabindex="0" role="slider" data-picture="{picture.number}"
 data-front="{grid.front}" data-rows="{grid.rows}" data-columns="{grid.columns}" data-stride="{grid.stride}"
 aria-valuemin="0" aria-valuemax="{total - 1}" aria-label="Token of the picture {caption}; choose with the arrow keys"
>{front}<div class="canvas" {shape}><img src="{address}" alt="{caption}">{laid}<i class="cursor"></i></div></div>
<div class="links"><a download="{file}.png" href="{address}">PNG<span class="hidden"> of {name}</span></a>
<a download="{file}.json" href="{settings}">Settings<span class="hidden"> of {name}</span></a></div></figure>"""


def share(query: str) -> str:
    """The link to the settings of the drawing on the stage."""
    address = escape(f"./?{query}")
    return f"""<div class="share"><a href="{address}">Link to these settings</a>
<button type="button" data-copy="{address}">Copy link</button></div>"""


def legend(title: str, low: float, high: float) -> str:
    """The scale of a map's colours."""
    return f"""<div class="legend"><span>{escape(title)}</span>
<span class="scale">{low:.2f}<i></i>{high:.2f}</span></div>"""


def heat_map(values: np.ndarray, low: float, high: float) -> str:
    """Address of a map of values [rows, columns] in [low, high]; NaN stays clear."""
    span = max(high - low, 1e-9)
    colours = (HEAT(np.clip(np.nan_to_num((values - low) / span), 0, 1)) * 255).astype(np.uint8)
    colours[..., 3] = np.where(np.isnan(values), 0, 255)
    return data_address(png_bytes(Image.fromarray(colours)), "image/png")


def inspector(picture: Picture, inspection: Inspection, token: int) -> str:
    """One token: its confidence, the weights it got, and its candidates in the three distributions."""
    grid = picture.grid
    place = grid.place(token)
    where = f"row {place[0] + 1}, column {place[1] + 1}" if place else "in front of the grid"
    drawn = int(picture.tokens[token])
    confidence = float(inspection.confidence[token])
    facts = [
        ("Confidence", f"{confidence:.3f}", CONFIDENCES.description(inspection.guidance.weak_branch.confidence)),
        ("Guidance scale", f"{float(inspection.scale[token]):.2f}", "at this step"),
        ("Code", str(drawn), f"step {token + 1} of {grid.num_tokens}"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{escape(note)}</small></dd></div>" for name, value, note in facts
    )
    return f"""<section class="inspector" aria-label="Token {token}">
<h2>Token {token} <small>{where} · {escape(METHODS[picture.method].title)}</small></h2>
<dl>{cells}</dl>
<div class="columns">{_weights(inspection, token)}{_candidates(inspection, token, drawn)}</div></section>"""


def _weights(inspection: Inspection, token: int) -> str:
    guidance = inspection.guidance
    title = "<h3>Its weight at later steps</h3>"
    if not guidance.perturbs:
        return f'<div>{title}<p class="hint small">This method leaves every token at its full weight of 1.</p></div>'
    weights = inspection.weights_of(token)
    if not len(weights):
        return f'<div>{title}<p class="hint small">It is the last token; no step comes after it.</p></div>'
    width, height = CURVE
    # With Step Normalisation the weights are close to 1: the axis begins where they do.
    low = max(0.0, 1 - 1.2 * max(1 - float(weights.min()), 1e-3))
    x = np.linspace(0, width, len(weights)) if len(weights) > 1 else np.array([0.0])
    y = (1 - weights) / (1 - low) * height
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    text = f"from {weights[0]:.3f} at step {token + 2} to {weights[-1]:.3f} at the last step"
    return f"""<div>{title}
<svg class="curve" viewBox="-34 -8 {width + 40} {height + 30}" role="img" aria-label="Weight {text}">
<path class="axis" d="M0 0V{height}H{width}"/>
<text x="-6" y="4" text-anchor="end">1</text><text x="-6" y="{height + 3}" text-anchor="end">{low:.3f}</text>
<text x="0" y="{height + 17}">step {token + 2}</text>
<text x="{width}" y="{height + 17}" text-anchor="end">{token + 1 + len(weights)}</text>
<polyline points="{points}"/></svg>
<p class="small">{text[0].upper() + text[1:]}.</p></div>"""


def _candidates(inspection: Inspection, token: int, drawn: int) -> str:
    head = "".join(f'<th scope="col" class="{branch}">{branch.capitalize()}</th>' for branch in BRANCHES)
    rows = []
    for place, code in enumerate(inspection.codes[token].tolist()):
        cells = "".join(
            f'<td class="{branch}"><i style="width:{value * 100:.1f}%"></i><span>{value:.3f}</span></td>'
            for branch, value in zip(BRANCHES, inspection.probabilities[token, :, place].tolist(), strict=True)
        )
        mark = "<b>drawn</b>" if code == drawn else ""
        rows.append(f'<tr{" class=drawn" if mark else ""}><th scope="row">{code} {mark}</th>{cells}</tr>')
    return f"""<div><h3>Likeliest codes</h3><table class="candidates">
<thead><tr><th scope="col">Code</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def gallery(session: Session) -> str:
    """The session's pictures, the newest first; each opens its drawing."""
    if not session.pictures:
        return EMPTY_GALLERY
    items = "".join(
        f"""<li><button type="button" data-open="{picture.number}" title="Show again">
<img src="{_thumbnail(picture)}" alt="{escape(picture.caption)}"></button>
<span>{escape(_shortened(picture.subject))}<br>
{escape(METHODS[picture.method].title)}, seed {picture.seed}</span></li>"""
        for picture in reversed(session.pictures.values())
    )
    return f'<ul class="gallery">{items}</ul>'


def _shortened(text: str, most: int = 32) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _thumbnail(picture: Picture) -> str:
    image = Image.fromarray(picture.pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_address(png_bytes(image), "image/png")
