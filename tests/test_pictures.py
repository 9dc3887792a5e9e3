"""Pictures as people hand them in: every kind, through every door, gives the same pixels or one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from softcfg import UserError
from softcfg.cli.main import main
from softcfg.evaluation import open_source
from softcfg.images import read_picture
from softcfg.models.lumina import encode_upper_half
from softcfg.prompts import Prompt
from softcfg.runs.plan import Prompts
from softcfg.tokenizers import MoVQ, MoVQConfig
from softcfg.tokenizers.base import Tokenizer
from tiny_models import MOVQ

NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16)
PICTURE = Image.fromarray(NOISE)
GREY = PICTURE.convert("L")


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # PIL keeps the settings of the last file in the image
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def palette(alpha: bytes) -> bytes:
    image = Image.new("P", (8, 6))
    image.putpalette([9, 8, 7, 1, 2, 3])
    return saved(image, transparency=alpha)


def png(bits: int, colour: int, row: bytes, clear: bytes = b"") -> bytes:
    """A PNG file of one row of four pixels, in a kind that PIL does not write; `clear` is the transparent colour."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + row))]
    chunks[1:1] = [(b"tRNS", clear)] if clear else []
    written = [(kind, data, zlib.crc32(kind + data)) for kind, data in [*chunks, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum) for kind, data, checksum in written
    )


class Whole(Tokenizer):
    """Codes are the red of single pixels, so codes show what the tokenizer was given."""

    patch_size = 1

    def encode(self, pixels: Any) -> Tensor:
        return (pixels[:, 0] * 255).round().long().flatten(1)


# ---- doors: a picture as bytes or an object -> its red channel


def through_the_function(picture: Any) -> np.ndarray:
    return np.asarray(read_picture(picture))[..., 0]


def through_a_prompt(picture: Any) -> np.ndarray:
    prompt = Prompt("a", task="depth", image=picture)
    assert prompt.image is not None
    width, height = read_picture(prompt.image).size
    return encode_upper_half(prompt.image, width, 2 * height, Whole()).numpy()


def through_evaluation(picture: Any) -> np.ndarray:
    (batch,) = open_source([picture]).batches(4)
    return batch[0, ..., 0].numpy()


DOORS: dict[str, Callable[[Any], np.ndarray]] = {
    "function": through_the_function,
    "prompt": through_a_prompt,
    "evaluation": through_evaluation,
}


# ---- what is read

READ: dict[str, tuple[Any, np.ndarray]] = {
    **{
        f"turned {n}, {kind}": (data, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))[..., 0])
        for n in range(1, 9)
        for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))
        for data in [saved(PICTURE, kind, exif=turned(n), **options)]
    },
    "16 bits": (saved(Image.fromarray(DEEP)), np.rint(DEEP / 257)),
    "16 bits, turned": (saved(Image.fromarray(DEEP), exif=turned(6)), np.rint(np.rot90(DEEP, -1) / 257)),
    "16 bits, TIFF": (saved(Image.fromarray(DEEP), "TIFF"), np.rint(DEEP / 257)),
    "16 bits, opened": (Image.fromarray(DEEP), np.rint(DEEP / 257)),
    "grey": (saved(GREY), np.asarray(GREY)),
    "1 bit": (saved(GREY.point(lambda level: 255 * (level > 99), "1")), 255 * (np.asarray(GREY) > 99)),
    "2 bits": (png(2, 0, b"\x1b"), np.array([[0, 85, 170, 255]])),
    "4 bits without their transparent level": (png(4, 0, b"\x05\x5f", b"\0\x01"), np.array([[0, 85, 85, 255]])),
    "BMP": (saved(PICTURE, "BMP"), NOISE[..., 0]),
    "opened": (Image.open(io.BytesIO(saved(PICTURE))), NOISE[..., 0]),
    "opened and turned": (Image.open(io.BytesIO(saved(PICTURE, exif=turned(3)))), NOISE[::-1, ::-1, 0]),
    "array": (NOISE, NOISE[..., 0]),
    "backwards": (NOISE[::-1, ::-1], NOISE[::-1, ::-1, 0]),
    "tensor": (torch.from_numpy(NOISE), NOISE[..., 0]),
    "RGBA that hides nothing": (saved(PICTURE.convert("RGBA")), NOISE[..., 0]),
    "palette that hides nothing": (palette(b"\xff\xff"), np.full((6, 8), 9)),
    "a transparent grey that is not there": (saved(Image.new("L", (8, 6), 5), transparency=7), np.full((6, 8), 5)),
    "a photo with a second picture": (
        saved(PICTURE, "MPO", save_all=True, append_images=[GREY.copy()], quality=95, subsampling=0),
        np.asarray(Image.open(io.BytesIO(saved(PICTURE, "JPEG", quality=95, subsampling=0))))[..., 0],
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", READ)
def test_pictures_that_are_read(name: str, door: str) -> None:
    picture, red = READ[name]
    np.testing.assert_array_equal(DOORS[door](picture), red)


# ---- what is refused

TRANSPARENT = "is partly transparent; put it on a background first"
REFUSED: dict[str, tuple[Any, str]] = {
    "RGBA": (saved(Image.new("RGBA", (8, 6), (1, 2, 3, 254))), TRANSPARENT),
    "RGBA, opened": (Image.new("RGBA", (8, 6), (1, 2, 3, 254)), TRANSPARENT),
    "RGBA, WebP": (saved(Image.new("RGBA", (8, 6)), "WEBP"), TRANSPARENT),
    "RGBA, TIFF": (saved(Image.new("RGBA", (8, 6)), "TIFF"), TRANSPARENT),
    "premultiplied": (Image.new("RGBA", (8, 6)).convert("RGBa"), TRANSPARENT),
    "LA": (saved(Image.new("LA", (8, 6), (1, 2))), TRANSPARENT),
    "PA": (Image.new("PA", (8, 6)), TRANSPARENT),
    "palette": (palette(b"\x80\xff"), TRANSPARENT),
    "palette, opened": (Image.open(io.BytesIO(palette(b"\x80\xff"))), TRANSPARENT),
    "one colour": (saved(Image.new("RGB", (8, 6)), transparency=(0, 0, 0)), TRANSPARENT),
    "one grey": (saved(Image.new("L", (8, 6)), transparency=0), TRANSPARENT),
    "one grey of 16 bits": (saved(Image.new("I;16", (8, 6)), transparency=0), TRANSPARENT),
    "one of 2 bits": (png(2, 0, b"\x1b", b"\0\x01"), TRANSPARENT),
    "one of 4 bits": (png(4, 0, b"\x05\x5f", b"\0\x05"), TRANSPARENT),
    "RGB of 16 bits": (png(16, 2, bytes(24)), "has 16 bits a channel; images must be RGB or grey, 8 bits a channel"),
    "RGB of 16 bits, transparent": (png(16, 2, bytes(24), bytes(6)), "has 16 bits a channel"),
    "RGBA of 16 bits": (png(16, 6, b"\xff" * 32), "has 16 bits a channel"),
    "one of 1 bit": (saved(Image.new("1", (8, 6)), transparency=0), TRANSPARENT),
    "CMYK": (saved(Image.new("CMYK", (8, 6)), "JPEG"), "has the mode CMYK"),
    "floats": (saved(Image.new("F", (8, 6)), "TIFF"), "has the mode F"),
    "32 bits": (Image.new("I", (8, 6)), "has the mode I;"),
    "white at 0": (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), "has the mode I;16"),
    "frames": (saved(PICTURE, "WEBP", save_all=True, append_images=[GREY.copy()]), "has several frames"),
    "pages": (saved(PICTURE, "TIFF", save_all=True, append_images=[GREY.copy()]), "has several frames"),
    "GIF": (saved(PICTURE, "GIF"), "is no PNG, JPEG, WEBP, BMP, TIFF file"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n", "is no PNG"),
    "half a file": (saved(PICTURE)[:90], "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "no pixels": (Image.new("RGB", (0, 6)), "has no pixels"),
    "a path": ("gone.png", "gone.png cannot be read as an image: No such file"),
    "a folder": (Path(), "it is a folder"),
    "a list of pictures": ([PICTURE], "must be a path"),
    "nested lists": (NOISE.tolist(), "must be a path"),
    "a number": (3, "must be a path"),
    "floats in an array": (NOISE / 255, r"got float64 \[6, 8, 3\]"),
    "channels first": (NOISE.transpose(2, 0, 1), r"got uint8 \[3, 6, 8\]"),
    "a batch": (torch.from_numpy(NOISE)[None], r"got uint8 \[1, 6, 8, 3\]"),
    "no values": (torch.zeros(6, 8, 3, dtype=torch.uint8, device="meta"), "cannot be read"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_are_refused(name: str, door: str) -> None:
    picture, text = REFUSED[name]
    with pytest.raises(UserError, match=text) as caught:
        DOORS[door](picture)
    assert len(str(caught.value)) < 400


def test_a_closed_image_is_refused() -> None:
    image = Image.open(io.BytesIO(saved(PICTURE)))
    image.close()
    with pytest.raises(UserError, match="cannot be read"):
        read_picture(image)


def test_a_damaged_exif_turns_nothing() -> None:
    data = saved(PICTURE, exif=b"Exif\x00\x00no such thing")
    np.testing.assert_array_equal(np.asarray(read_picture(data)), NOISE)


def test_a_run_needs_the_path_of_its_picture() -> None:
    with pytest.raises(UserError, match="must be the path of a file"):
        Prompts(("a",), 8, 8, "depth", PICTURE)  # type: ignore[arg-type]


def test_pictures_on_the_command_line(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(palette(b"\x80\xff"))
    words = ["plot", str(model_folder), "--labels", "0", "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--image", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == f"softcfg: error: {tmp_path}/a.png {TRANSPARENT}\n"


@pytest.mark.parametrize(
    "pixels",
    [PICTURE, [PICTURE], NOISE, saved(PICTURE), "a.png", None, torch.zeros(1, 3, 8, 8, device="meta")],
    ids=lambda value: type(value).__name__,
)
def test_what_a_tokenizer_does_not_encode(pixels: Any) -> None:
    with pytest.raises(UserError, match=r"pixels (must be|have no values)"):
        MoVQ(MoVQConfig(**MOVQ)).encode(pixels)
