import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import write_pngs
from made_runs import of_images
from softcfg import UserError
from softcfg.evaluation import Extractor, Features, extract, open_source
from softcfg.files import hash_file


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 6, 8, 3), dtype=np.uint8)


def read(source: Any, batch_size: int = 5) -> np.ndarray:
    opened = open_source(source)
    batches = list(opened.batches(batch_size))
    assert all(batch.dtype == torch.uint8 for batch in batches)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    joined = torch.cat(batches).numpy()
    assert len(opened) == len(joined)
    assert opened.size == joined.shape[1:3]
    return joined


# ---- what can be read


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_arrays(images: np.ndarray, batch_size: int) -> None:
    np.testing.assert_array_equal(read(images, batch_size), images)
    np.testing.assert_array_equal(read(torch.from_numpy(images), batch_size), images)
    np.testing.assert_array_equal(read(np.asfortranarray(images[:, ::-1]), batch_size), images[:, ::-1])


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(images: np.ndarray, tmp_path: Path, save: Any, batch_size: int) -> None:
    save(tmp_path / "a.npz", images, np.arange(23))
    np.testing.assert_array_equal(read(tmp_path / "a.npz", batch_size), images)
    assert open_source(str(tmp_path / "a.npz")).fingerprint == hash_file(tmp_path / "a.npz")
    assert open_source(tmp_path / "a.npz").labels.tolist() == list(range(23))


@pytest.mark.parametrize("other", [None, np.arange(22), np.zeros(23), np.array([{}] * 23)])
def test_what_lies_beside_the_images_need_not_be_labels(images: np.ndarray, other: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images, *(() if other is None else (other,)))
    assert open_source(tmp_path / "a.npz").labels is None


def test_npz_in_fortran_order_and_later_formats(images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    np.testing.assert_array_equal(read(tmp_path / "fortran.npz"), images)
    for version in ((2, 0), (3, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, images, version)
        with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
            archive.writestr("arr_0.npy", buffer.getvalue())
        np.testing.assert_array_equal(read(tmp_path / "v.npz"), images)


def test_npz_is_not_loaded_as_a_whole(tmp_path: Path) -> None:
    import tracemalloc

    np.savez(tmp_path / "large.npz", np.zeros((400, 128, 128, 3), dtype=np.uint8))
    tracemalloc.start()
    total = sum(int(batch.numel()) for batch in open_source(tmp_path / "large.npz").batches(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 400 * 128 * 128 * 3
    assert peak < total / 5


def test_folders_of_images(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", images)
    (folder / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(read(folder), images)
    # In folders, in another format, grey, with a palette or an alpha channel that hides nothing.
    write_pngs(tmp_path / "b" / "0", images[:3])
    mixed = tmp_path / "b" / "1"
    mixed.mkdir()
    Image.fromarray(images[3]).save(mixed / "3.WEBP", lossless=True)
    Image.fromarray(images[4]).convert("L").save(mixed / "4.png")
    Image.fromarray(images[5]).convert("RGBA").save(mixed / "5.png")
    expected = [*images[:4], np.repeat(np.array(Image.fromarray(images[4]).convert("L"))[..., None], 3, 2), images[5]]
    np.testing.assert_array_equal(read(tmp_path / "b"), np.stack(expected))
    for name in ("6.jpg", "7.png"):
        plain = Image.new("RGB", (8, 6), (200, 30, 90))
        (plain.convert("P", palette=Image.Palette.ADAPTIVE) if name == "7.png" else plain).save(mixed / name)
    assert np.abs(read(tmp_path / "b")[6:].astype(int) - (200, 30, 90)).max() <= 2


def test_pictures_that_sample_writes_are_not_samples(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "out", images)
    Image.new("RGB", (100, 50)).save(folder / "grid.png")
    Image.new("RGB", (100, 50)).save(folder / "comparison.png")
    with pytest.raises(UserError, match="differ in size"):
        read(folder)
    (folder / "run.json").write_text("{}")
    np.testing.assert_array_equal(read(folder), images)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
@pytest.mark.parametrize("in_a_shard", [4, 8, 23])
def test_runs(images: np.ndarray, tmp_path: Path, batch_size: int, in_a_shard: int) -> None:
    folder = of_images(tmp_path / "run", images, in_a_shard).path
    write_pngs(folder / "images", images[::-1])  # as an export would
    np.testing.assert_array_equal(read(folder, batch_size), images)
    np.testing.assert_array_equal(read(folder / "shards", batch_size), images)
    assert open_source(folder).labels.tolist() == [0, 1, 2] * 7 + [0, 1]


def test_the_fingerprint_follows_the_content(images: np.ndarray, tmp_path: Path) -> None:
    changed = images.copy()
    changed[11, 3, 4, 1] ^= 1
    seen = set()
    for n, given in enumerate((images, changed, images[::-1], images.reshape(23, 8, 6, 3))):
        seen.add(open_source(np.ascontiguousarray(given)).fingerprint)
        seen.add(open_source(write_pngs(tmp_path / f"folder{n}", given)).fingerprint)
        seen.add(open_source(of_images(tmp_path / f"run{n}", given).path).fingerprint)
    assert len(seen) == 12
    assert open_source(images.copy()).fingerprint in seen
    assert open_source(write_pngs(tmp_path / "elsewhere", images)).fingerprint in seen


# ---- what cannot


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.full((4, 6, 8, 3), np.nan), "must be uint8, 0 to 255, got float64; convert"),
        (np.zeros((4, 6, 8, 3), dtype=np.float32), "got float32"),
        (np.zeros((4, 6, 8, 3), dtype=np.int64), "got int64"),
        (np.zeros((4, 3, 6, 8), dtype=np.uint8), r"must be images \[N, height, width, 3\], got \[4, 3, 6, 8\]"),
        (np.zeros((6, 8, 3), dtype=np.uint8), r"got \[6, 8, 3\]"),
        (np.zeros((0, 6, 8, 3), dtype=np.uint8), "holds no images"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        open_source(array)
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(UserError, match=rf"arr_0 of .*a\.npz .*{text}"):
        open_source(tmp_path / "a.npz")


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    np.savez(tmp_path / "a.npz", np.array([Trap()] * 12, dtype=object).reshape(1, 2, 2, 3))
    with pytest.raises(UserError, match="got object"):
        open_source(tmp_path / "a.npz")
    assert not (tmp_path / "trapped").exists()


def test_npz_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(UserError, match="no array arr_0, the images; it holds images, labels"):
        open_source(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz")
    with pytest.raises(UserError, match="it holds nothing"):
        open_source(tmp_path / "b.npz")


def test_damaged_npz(images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(content[:2000])
    with pytest.raises(UserError, match="truncated"):
        open_source(tmp_path / "short.npz")
    content[1500] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.npz is damaged: its array arr_0 cannot be read \(Bad CRC"):
        read(tmp_path / "flipped.npz", 5)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, images)
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-1])
    with pytest.raises(UserError, match="it ends early"):
        read(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "junk.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"not an array")
    with pytest.raises(UserError, match="damaged"):
        open_source(tmp_path / "junk.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_the_checksum_is_compared(images: np.ndarray, tmp_path: Path, save: Any, batch_size: int) -> None:
    save(tmp_path / "a.npz", images)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        checksum = archive.getinfo("arr_0.npy").CRC
    content = (tmp_path / "a.npz").read_bytes()
    swapped = content.replace(checksum.to_bytes(4, "little"), (checksum ^ 1).to_bytes(4, "little"))
    (tmp_path / "a.npz").write_bytes(swapped)
    with pytest.raises(UserError, match="Bad CRC"):
        read(tmp_path / "a.npz", batch_size)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_header_that_claims_less(tmp_path: Path, order: str) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((23, 32, 32, 3), dtype=np.uint8, order=order))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content.replace(b"'shape': (23,", b"'shape': (13,"))
    with pytest.raises(UserError, match=r"a\.npz is damaged: .* \(it is longer than its header says"):
        read(tmp_path / "a.npz", 5)


def test_paths_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "gone")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=r"a\.txt is no \.npz file"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(UserError, match="holds no images"):
        open_source(tmp_path)


def test_images_of_several_sizes(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", images)
    Image.fromarray(images[0]).resize((16, 16)).save(folder / "000007.png")
    with pytest.raises(UserError, match=r"000000\.png is 6 x 8, 000007\.png is 16 x 16"):
        read(folder)


# ---- lists of pictures, and what is left out of folders


def test_lists_of_pictures(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", images)
    pictures = [Image.fromarray(image) for image in images]
    mixed = [
        folder / "000000.png", str(folder / "000001.png"), (folder / "000002.png").read_bytes(), images[3],
        torch.from_numpy(images[4]), *pictures[5:],
    ]  # fmt: skip
    for given in (pictures, tuple(pictures), list(images), mixed):
        np.testing.assert_array_equal(read(given), images)
        assert open_source(given).fingerprint == open_source(pictures).fingerprint
    np.testing.assert_array_equal(read([pictures[0]] * 9), images[[0] * 9])
    with pytest.raises(UserError, match="picture 0 of the list is 6 x 8, picture 5 of the list is 8 x 6"):
        read([*pictures[:5], pictures[5].rotate(90, expand=True)])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "must be the path of"),
        (3, "must be the path of"),
        (b"PNG", "must be the path of"),
        ({"images": []}, "must be the path of"),
        (Image.new("RGB", (8, 6)), "or a list of pictures, got <PIL"),
        (iter([]), "or a list of pictures"),
        ([], "the list of pictures holds no images"),
        ([None], "picture 0 of the list must be a path"),
        ([Image.new("RGB", (8, 6)), Image.new("RGBA", (8, 6))], "picture 1 of the list is partly transparent"),
        ([np.zeros((2, 6, 8, 3), dtype=np.uint8)], r"got uint8 \[2, 6, 8, 3\]"),
        ([[1, 2]], "picture 0 of the list must be a path"),
        (["gone.png"], "gone.png cannot be read"),
        (torch.zeros(2, 6, 8, 3, dtype=torch.bfloat16), "got bfloat16"),
        (torch.zeros(2, 6, 8, 3, dtype=torch.uint8, device="meta"), "on meta"),
        (np.array([None, 1]), r"got \[2\]"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_holds_no_images(given: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        read(given)


def test_links_to_folders_are_followed_once(images: np.ndarray, tmp_path: Path) -> None:
    write_pngs(tmp_path / "set" / "a", images[:3])
    write_pngs(tmp_path / "elsewhere" / "deep", images[3:6])
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    np.testing.assert_array_equal(read(tmp_path / "set"), images[:6])
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "c").symlink_to("a")
    with pytest.warns(UserWarning, match=r"6 images are read; left out: links to folders that are read already \(2\)"):
        np.testing.assert_array_equal(read(tmp_path / "set"), images[:6])


def test_folders_that_cannot_be_read_are_not_left_out(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pngs(tmp_path / "a", images[:1])
    write_pngs(tmp_path / "b", images[:1])
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"b cannot be read: Permission denied"):
        open_source(tmp_path)


def test_what_is_left_out_of_folders_is_said(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", images[:1])
    for n, suffix in enumerate((".bmp", ".tif", ".TIFF"), 1):
        Image.fromarray(images[n]).save(folder / f"00000{n}{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read(folder), images[:4])
    for name in ("a.heic", "b.HEIC", "notes", "._000000.png", ".DS_Store"):
        (folder / name).touch()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "000000-checkpoint.png").touch()
    (folder / "n01440764").symlink_to("gone")
    left_out = (
        r"a: 4 images are read; left out: files of other kinds \(2 \.heic, 1 without a suffix\), "
        r"hidden files and folders \(2\), links to what is not there \(1\)"
    )
    with pytest.warns(UserWarning, match=left_out) as caught:
        np.testing.assert_array_equal(read(folder), images[:4])
    assert len(caught) == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.heic").touch()
    with pytest.raises(UserError, match=r"holds no images .* left out: files of other kinds \(1 \.heic\)"):
        read(tmp_path / "b")


def test_damaged_images(images: np.ndarray, tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "a", images)
    os.truncate(folder / "000012.png", 60)
    with pytest.raises(UserError, match=r"000012\.png cannot be read as an image"):
        read(folder)


def test_images_that_are_replaced_meanwhile_are_refused(images: np.ndarray, tmp_path: Path) -> None:
    """Their features would be kept under the hash of those that were there before."""
    write_pngs(tmp_path / "images", images)
    np.savez(tmp_path / "images.npz", images)

    for path in (tmp_path / "images", tmp_path / "images.npz"):
        source = open_source(path)

        def describe(pixels: torch.Tensor, path: Path = path) -> Features:
            changed = next(path.iterdir()) if path.is_dir() else path
            changed.with_name("new").write_bytes(changed.read_bytes())
            changed.with_name("new").replace(changed)
            return Features(pixels.float().mean((2, 3)))

        with pytest.raises(UserError, match="changed while it was read; measure it again"):
            extract(Extractor("own", describe, "1"), source, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
