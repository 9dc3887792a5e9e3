"""PNG files and the .npz of the ADM evaluation, made from shards in the memory of one shard."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from softcfg.errors import UserError, require_kind
from softcfg.files import as_path, is_same_file, make_folder, open_atomically, remove_temporary, write_atomically
from softcfg.images import png_bytes, read_picture
from softcfg.runs.folder import RunFolder, image_index, image_name
from softcfg.runs.shards import Shard


def write_pngs(shard: Shard, folder: str | Path) -> None:
    """Write the images of a shard as 000123.png into a folder that exists."""
    for index, pixels in zip(shard.indices.tolist(), shard.pixels, strict=True):
        write_atomically(Path(folder) / image_name(index), png_bytes(Image.fromarray(pixels)), replace=True)


def altered_pngs(shard: Shard, folder: Path) -> list[str]:
    """The PNG files in `folder` that do not show the images of a shard: empty, torn, or other images."""

    def is_altered(index: int, pixels: np.ndarray) -> bool:
        path = folder / image_name(index)
        if not os.path.lexists(path):
            return False
        try:
            return not np.array_equal(np.asarray(read_picture(path)), pixels)
        except UserError:
            return True

    pairs = zip(shard.indices.tolist(), shard.pixels, strict=True)
    return [image_name(index) for index, pixels in pairs if is_altered(index, pixels)]


def export_pngs(run: RunFolder, folder: str | Path, *, absent_only: bool = False) -> None:
    """Write all images as PNG files; with `absent_only`, those of shards of which one is absent or altered.

    Raises:
        UserError: a shard is missing or damaged, a file cannot be written, or a folder that is not the run's own has
            numbered files which the run does not replace, so that it would be taken for more images.
    """
    require_kind(run, "run", RunFolder)
    run.require_complete()
    folder = make_folder(folder)
    remove_temporary(folder)
    if not is_same_file(folder, run.path):
        numbers = [index for path in folder.glob("*.png") if (index := image_index(path.name)) is not None]
        if (last := max(numbers, default=-1)) >= run.plan.num_samples:
            raise UserError(
                f"{folder} holds {image_name(last)}, and the run has only {run.plan.num_samples} images; give another "
                "folder, or remove the images that are there"
            )
    there = {path.name for path in folder.glob("*.png")} if absent_only else set()
    for number in range(run.plan.num_shards):
        shard = run.require(number)
        if any(image_name(index) not in there for index in run.plan.indices(number)) or altered_pngs(shard, folder):
            write_pngs(shard, folder)


def npz_beside(folder: Path) -> Path:
    """Where the released samplers put the .npz of DIR: DIR.npz beside it; raises `UserError` if DIR has no name."""
    folder = folder.resolve()
    if not folder.name:
        raise UserError(
            f"{folder} has no name for a .npz file beside it; write one with 'softcfg runs export --npz FILE'"
        )
    return folder.with_name(f"{folder.name}.npz")


def export_npz(run: RunFolder, path: str | Path) -> tuple[int, ...]:
    """Write all images as the entry arr_0, uint8 [N, H, W, 3], of an uncompressed .npz file; returns its shape.

    Raises:
        UserError: a shard is missing or damaged, or the file cannot be written.
    """
    require_kind(run, "run", RunFolder)
    path = as_path(path)
    run.require_complete()
    shape = (run.plan.num_samples, *run.require(0).pixels.shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    make_folder(path.parent)
    with (
        open_atomically(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for shard in run.shards():
            member.write(np.ascontiguousarray(shard.pixels).data)
    return shape


def first_images(run: RunFolder, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Label and pixels [H, W, 3] of the first `count` images."""
    for number in range(run.plan.num_shards):
        if number * run.plan.batch_size >= count:
            return
        shard = run.require(number)
        kept = min(len(shard.indices), count - number * run.plan.batch_size)
        yield from zip(shard.labels[:kept].tolist(), shard.pixels[:kept], strict=True)
