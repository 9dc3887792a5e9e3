"""Text-to-image benchmarks: their prompts, and pictures laid out as their own scorers expect.

DPG-Bench (https://github.com/TencentQQGYLab/ELLA): a text file per prompt; a picture of 2 x 2 images, without gaps,
under the name of the prompt's file. GenEval (https://github.com/djghosh13/geneval): the lines of
`evaluation_metadata.jsonl`; a numbered folder per line with the line itself and four images.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softcfg.errors import UserError
from softcfg.files import as_path, iterate_lines, make_folder, read_bounded, read_text, write_atomically

if TYPE_CHECKING:
    import numpy as np

    from softcfg.runs.folder import RunFolder
    from softcfg.runs.shards import Shard

IMAGES_PER_PROMPT = 4
LARGEST_TEXT = 1 << 24  # bytes of a file of prompts


class Suite(ABC):
    """The prompts of a benchmark.

    Args:
        source: the folder of the prompts.

    Attributes:
        prompts: their texts.
        scorer: the command that scores the pictures in {folder}, of {size} pixels.

    Raises:
        UserError: no prompts there, or a file that cannot be read.
    """

    scorer: str

    def __init__(self, source: str | Path) -> None:
        self.prompts = self.read(as_path(source))

    @abstractmethod
    def read(self, source: Path) -> list[str]:
        """Read the prompts."""

    @abstractmethod
    def files(self, folder: Path, number: int) -> list[Path]:
        """Where the pictures of a prompt go."""

    @abstractmethod
    def contents(self, number: int, images: Sequence[np.ndarray]) -> list[np.ndarray | bytes]:
        """What is in the files of a prompt, in the order of `files`: pictures, uint8 [H, W, 3], or bytes.

        Args:
            images: the four images, uint8 [H, W, 3].
        """

    def write(self, folder: Path, number: int, images: Sequence[np.ndarray]) -> None:
        """Write the four images, uint8 [H, W, 3], of a prompt; every file whole or not at all."""
        files = self.files(folder, number)
        for parent in {path.parent for path in files}:
            make_folder(parent)
        for path, content in zip(files, self.contents(number, images), strict=True):
            write_atomically(path, content if isinstance(content, bytes) else _png(content), replace=True)

    def write_shard(self, folder: Path, shard: Shard) -> None:
        """Write the pictures of a shard, which holds all images of its prompts."""
        for number, images in _prompts_of(shard):
            self.write(folder, number, images)

    def write_missing(self, folder: Path, run: RunFolder) -> None:
        """Write the pictures of a complete run that are not there yet, are damaged or show something else."""
        for shard in run.shards():
            for number, images in _prompts_of(shard):
                if not self.is_written(folder, number, images):
                    self.write(folder, number, images)

    def strangers(self, folder: Path) -> list[str]:
        """The names of what is in the folder and is no place of these prompts; hidden files do not count.

        Raises:
            UserError: the folder cannot be read.
        """
        own = {path.relative_to(folder).parts[0] for n in range(len(self.prompts)) for path in self.files(folder, n)}
        try:
            return sorted(name for name in os.listdir(folder) if name not in own and not name.startswith("."))
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from error

    def is_written(self, folder: Path, number: int, images: Sequence[np.ndarray]) -> bool:
        """Whether all files of a prompt are there and hold its four images, uint8 [H, W, 3]."""
        return all(map(_holds, self.files(folder, number), self.contents(number, images)))


class DPGBench(Suite):
    """DPG-Bench."""

    scorer = "bash dpg_bench/dist_eval.sh {folder} {size}"

    def read(self, source: Path) -> list[str]:
        """See `Suite.read`."""
        paths = sorted(source.glob("*.txt"))
        if not paths:
            raise UserError(f"{source} holds no prompts: DPG-Bench has one .txt file for each")
        self.names = [path.stem for path in paths]
        prompts = [" ".join(_text(path).split()) for path in paths]
        if "" in prompts:
            raise UserError(f"{paths[prompts.index('')]} is empty")
        return prompts

    def files(self, folder: Path, number: int) -> list[Path]:
        """See `Suite.files`."""
        return [folder / f"{self.names[number]}.png"]

    def contents(self, number: int, images: Sequence[np.ndarray]) -> list[np.ndarray | bytes]:
        """See `Suite.contents`."""
        import numpy as np

        return [np.concatenate([np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)])]


class GenEval(Suite):
    """GenEval."""

    scorer = "python evaluation/evaluate_images.py {folder} --outfile results.jsonl --model-path DETECTOR"

    def read(self, source: Path) -> list[str]:
        """See `Suite.read`."""
        path = source / "evaluation_metadata.jsonl"
        self.lines = [line for line in iterate_lines(_text(path)) if line.strip()]
        if not self.lines:
            raise UserError(f"{path} is empty")
        prompts = [_prompt_of(line) for line in self.lines]
        if None in prompts:
            raise UserError(f"{path}: line {prompts.index(None) + 1} is not a JSON object with a prompt")
        return [prompt for prompt in prompts if prompt is not None]

    def files(self, folder: Path, number: int) -> list[Path]:
        """See `Suite.files`."""
        place = folder / f"{number:05d}"
        samples = [place / "samples" / f"{i:04d}.png" for i in range(IMAGES_PER_PROMPT)]
        return [*samples, place / "metadata.jsonl"]

    def contents(self, number: int, images: Sequence[np.ndarray]) -> list[np.ndarray | bytes]:
        """See `Suite.contents`."""
        return [*images, f"{self.lines[number]}\n".encode()]


SUITES: dict[str, type[Suite]] = {"dpg": DPGBench, "geneval": GenEval}


def _text(path: Path) -> str:
    try:
        return read_text(path, LARGEST_TEXT)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _prompt_of(line: str) -> str | None:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return prompt if isinstance(prompt, str) else None


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    from softcfg.images import png_bytes

    return png_bytes(Image.fromarray(image))


def _prompts_of(shard: Shard) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The number of every prompt of a shard and its four images."""
    for start in range(0, len(shard.labels), IMAGES_PER_PROMPT):
        yield int(shard.labels[start]), list(shard.pixels[start : start + IMAGES_PER_PROMPT])


def _holds(path: Path, content: np.ndarray | bytes) -> bool:
    """Whether a file is there and holds just that; however a picture is compressed."""
    import numpy as np

    from softcfg.images import read_picture

    try:
        if isinstance(content, bytes):
            return read_bounded(path, LARGEST_TEXT) == content
        return np.array_equal(np.asarray(read_picture(path)), content)
    except (OSError, UserError):
        return False
