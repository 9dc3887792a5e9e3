"""Reading the golden files: numbers that the released code gave, with weights made by `filling`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from filling import fill_state_dict

FOLDER = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """One golden file: how it was made and its arrays."""

    about: dict[str, Any]
    arrays: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    @property
    def call(self) -> dict[str, Any]:
        return self.about["call"]

    def weights(self) -> dict[str, Tensor]:
        """The filled state dict."""
        return fill_state_dict(self.about["tensors"], self.about["fill_seed"], self.about.get("fill_gain", 1.0))


def golden(name: str) -> Golden:
    """Read `golden/NAME.json` and `.safetensors`."""
    path = FOLDER / name
    return Golden(json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))
