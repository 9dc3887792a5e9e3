"""Pictures of a run: its first images in a grid, and the same seeds without guidance, with CFG and with SoftCFG."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from softcfg.files import write_atomically
from softcfg.guidance import CFG, SoftCFG, settings_of
from softcfg.images import grid, png_bytes, side_by_side
from softcfg.runs.export import first_images
from softcfg.runs.folder import RunFolder
from softcfg.runs.worker import BatchDrawer

GRID_IMAGES = 320
GRID_ROWS = 40
GRID_COLUMNS = 16  # where there are too many labels for a row each
COMPARED_PER_LABEL = 4

Shown = Sequence[tuple[int, np.ndarray]]  # label and pixels [H, W, 3] of images


def write_grid(run: RunFolder, names: Sequence[str] = ()) -> Image.Image:
    """Write grid.png into the folder of a run, one row per label, and return the picture.

    Args:
        names: what labels stand for (see `label_names`).

    Raises:
        UserError: a shard is missing or damaged, or the file cannot be written.
    """
    picture = _grid(_first(run), names)
    _write(run.path / "grid.png", picture)
    return picture


def write_comparison(run: RunFolder, drawer: BatchDrawer) -> tuple[Path, str]:
    """Write comparison.png into the folder of a run: three panels with the same seeds.

    The third panel is of the run's own method, or of SoftCFG where that is plain CFG. The panel of the run's own method
    shows its images; those of the other two are drawn, and not kept.

    Returns:
        The path of the picture and the name of the third panel's method.

    Raises:
        UserError: a shard is missing or damaged, the file cannot be written, or memory ran out.
    """
    shown = _first(run)
    shown = shown[: COMPARED_PER_LABEL * len({label for label, _ in shown})]
    labels = [label for label, _ in shown]
    guidance = drawer.guidance
    plain = guidance.plain()
    third = guidance
    if guidance.is_plain:
        third = SoftCFG.paper(**{name: getattr(plain, name) for name in settings_of(CFG)})
    methods = {
        "no guidance": CFG(guidance_scale=0),
        f"CFG, scale {guidance.guidance_scale:g}": plain,
        f"{third.title}, scale {guidance.guidance_scale:g}": third,
    }
    panels: list[Image.Image] = []
    for title, method in methods.items():
        images: Shown = shown
        if method != guidance:
            other = dataclasses.replace(drawer, guidance=method, batch_size=min(drawer.batch_size, len(shown)))
            images = list(zip(labels, other.draw(range(len(shown)), labels).pixels, strict=True))
        panels.append(_grid(images, () if panels else label_names(drawer), title))
    path = run.path / "comparison.png"
    _write(path, side_by_side(panels))
    return path, third.title


def label_names(drawer: BatchDrawer) -> Sequence[str]:
    """What labels stand for, short enough for the title of a row: the names of classes, or prompts."""
    if drawer.prompts is not None:
        return [drawer.prompts[label].title for label in range(len(drawer.prompts.texts))]
    labels = range(drawer.pipeline.generator.num_classes)
    return list(map(drawer.pipeline.conditioning.title if drawer.pipeline.classes else str, labels))


def _first(run: RunFolder) -> Shown:
    return list(first_images(run, GRID_IMAGES))


def _grid(shown: Iterable[tuple[int, np.ndarray]], names: Sequence[str] = (), title: str = "") -> Image.Image:
    """One row per label, in the order of their first images; plain rows where there are too many labels."""
    rows: dict[int, list[Image.Image]] = {}
    for label, pixels in shown:
        rows.setdefault(label, []).append(Image.fromarray(pixels))
    if len(rows) > GRID_ROWS:
        images = [image for row in rows.values() for image in row]
        return grid([images[i : i + GRID_COLUMNS] for i in range(0, len(images), GRID_COLUMNS)], title=title)
    return grid(list(rows.values()), row_labels=[names[label] for label in rows] if names else (), title=title)


def _write(path: Path, image: Image.Image) -> None:
    write_atomically(path, png_bytes(image), replace=True)
