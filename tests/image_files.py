"""Writing images as samplers do."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    """000000.png, 000001.png, ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{n:06d}.png")
    return folder
