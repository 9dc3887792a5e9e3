"""Trackers (TensorBoard, Weights & Biases) through Accelerate; nothing of them is imported unless asked for."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.errors import UserError, how_to_install

if TYPE_CHECKING:
    from PIL.Image import Image

TRACKERS = ("tensorboard", "wandb")
SECONDS_BETWEEN_REPORTS = 10.0  # seconds between two reports of the throughput


class Tracker:
    """Reports the settings, the throughput and pictures of a run; made in rank 0 alone."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], *, cpu: bool) -> None:
        """Start reporting.

        Args:
            name: one of `TRACKERS`.
            folder: that of the run; TensorBoard's files go into its folder `tracking`.

        Raises:
            UserError: Accelerate or the tracker is not installed.
        """
        for module in ("accelerate", name):
            if importlib.util.find_spec(module) is None:
                raise UserError(f"--track {name} needs {module}: {how_to_install(name)}")
        from accelerate import Accelerator

        self.name = name
        self._accelerator = Accelerator(cpu=cpu, log_with=name, project_dir=str(folder))
        project = "softcfg" if name == "wandb" else "tracking"
        options = {"wandb": {"dir": str(folder)}} if name == "wandb" else {}
        self._accelerator.init_trackers(project, config=flat(settings), init_kwargs=options)
        self._reported = time.monotonic()

    def throughput(self, done: int, rate: float) -> None:
        """Report the images done and the images per second, every few seconds."""
        if time.monotonic() - self._reported > SECONDS_BETWEEN_REPORTS:
            self._report(done, rate)

    def finish(self, done: int, rate: float, picture: Image | None) -> None:
        """Report the end of the run, with a picture of its images."""
        self._report(done, rate)
        if picture is not None:
            tracker: Any = self._accelerator.get_tracker(self.name)
            if self.name == "wandb":
                tracker.log_images({"samples": [picture]}, step=done)
            else:
                import numpy as np

                pixels = np.asarray(picture.convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=done, dataformats="NHWC")
        self._accelerator.end_training()

    def _report(self, done: int, rate: float) -> None:
        self._reported = time.monotonic()
        self._accelerator.log({"images": done, "images_per_second": rate}, step=done)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with dotted names and values that every tracker takes: numbers, truth values and texts."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            simple = value is not None and isinstance(value, (bool, int, float, str))
            result[f"{prefix}{name}"] = value if simple else str(value)[:200]
    return result
