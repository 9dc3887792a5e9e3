"""Files and words that people and programs hand in: what is hostile is refused, with one sentence and within bounds."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attacks import MEMORY, NODES, bounded, refused
from softcfg import UserError
from softcfg.cli.main import main
from softcfg.configuration import load_config, read_yaml
from softcfg.evaluation import Extractor, Features, evaluate, extract, load_extractor, open_source, read_statistics
from softcfg.evaluation.emoji_judge import Vocabulary
from softcfg.images import read_picture
from softcfg.models.alitok import AliTokConfig
from softcfg.models.lumina import PromptReader
from softcfg.models.text import TextTokenizer
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import Lock, holder
from softcfg.runs.shards import glance, read_shard
from softcfg.runs.suites import DPGBench, GenEval
from softcfg.zoo import load_generator, read_state_dict, resolve
from softcfg.zoo.reading import read_json
from tiny_models import text_tokenizer

pytestmark = pytest.mark.timeout(60)  # a reader that hangs is ended

ALITOK = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": 20,
    "condition_num_classes": 4, "image_seq_len": 16, "grid_size": 4,
}  # fmt: skip


def first_batch(path: Path) -> None:
    next(open_source(path).batches(64))


def all_batches(path: Path) -> None:
    for _ in open_source(path).batches(64):
        pass


def prompts(path: Path) -> None:
    TextTokenizer(path).ids(["red apple"])


# ---- nodes that are no files: name of the node below a folder, and what reads it

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "safetensors": ("a.safetensors", read_state_dict),
    "checkpoint": ("a.pth", read_state_dict),
    "index": ("a.safetensors.index.json", read_state_dict),
    "json": ("config.json", read_json),
    "yaml": ("a.yaml", read_yaml),
    "config": ("a.yaml", lambda path: load_config(AliTokConfig, str(path))),
    "model folder": ("model.yaml", lambda path: resolve(path.parent)),
    "samples": ("a.npz", evaluate),
    "picture": ("a.png", read_picture),
    "tokenizer": ("tokenizer.json", TextTokenizer),
    "prompt reader": ("tokenizer.json", PromptReader),
    "run": ("run.json", lambda path: RunFolder.open(path.parent)),
    "lock": ("run.lock", lambda path: Lock(path.parent)),
    "shard": ("shard-000000.safetensors", read_shard),
    "header of a shard": ("shard-000000.safetensors", glance),
    "dpg": ("a.txt", lambda path: DPGBench(path.parent)),
    "vocabulary": ("judge.json", Vocabulary.load),
    "geneval": ("evaluation_metadata.jsonl", lambda path: GenEval(path.parent)),
}


@pytest.mark.parametrize("node", [name for name in NODES if name != "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_nodes_that_are_no_files(tmp_path: Path, reader: str, node: str) -> None:
    name, read = READERS[reader]
    NODES[node](tmp_path / name)
    with refused():
        read(tmp_path / name)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "samples"])
def test_folders_in_place_of_files(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).mkdir()
    with refused():
        read(tmp_path / name)


@pytest.mark.parametrize("flag", ["--labels", "--config", "--generator-checkpoint"])
@pytest.mark.parametrize("node", [name for name in NODES if name != "folder"])
def test_nodes_on_the_command_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, node: str
) -> None:
    path = tmp_path / "node.pth"
    NODES[node](path)
    value = f"@{path}" if flag == "--labels" else str(path)
    with bounded():
        assert main(["sample", str(model_folder), flag, value, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "regular file" in error or "No such device" in error


@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
def test_nodes_in_the_cache_of_features(tmp_path: Path, node: Callable[[Path], None]) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    extractor = Extractor("mean", lambda pixels: Features(pixels.float().mean(dim=(2, 3))), "0")
    extract(extractor, open_source(images), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    node(path)
    if path.is_dir():
        with pytest.warns(UserWarning, match="features are not kept"):
            extract(extractor, open_source(images), cache=tmp_path)
    else:
        assert extract(extractor, open_source(images), cache=tmp_path).pooled.tolist() == [[0, 0, 0]] * 2
        assert path.is_file()


def test_a_lock_that_nobody_can_take_says_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    assert holder(tmp_path) is None


# ---- archives


def npz(path: Path, name: str, header: bytes, data: bytes = b"", **more: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, header + data)
        for other, array in more.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            archive.writestr(f"{other}.npy", buffer.getvalue())


def header(shape: tuple[int, ...], dtype: str = "|u1", fortran: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_2_0(buffer, {"descr": dtype, "fortran_order": fortran, "shape": shape})
    return buffer.getvalue()


def long_header(path: Path) -> None:
    npz(path, "arr_0.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), b" " * (1 << 20))


def zeros(shape: tuple[int, ...], name: str = "arr_0.npy", dtype: str = "|u1", fortran: bool = False) -> Callable:
    def make(path: Path) -> None:
        size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(name, "w", force_zip64=True) as member,
        ):
            member.write(header(shape, dtype, fortran))
            for _ in range(min(size, 1 << 25) >> 20):  # the rest is missing, which must not matter
                member.write(bytes(1 << 20))

    return make


def many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(20_000):
            archive.writestr(f"\x1b[31m{n}.npy", b"")


def encrypted(path: Path) -> None:
    npz(path, "arr_0.npy", header((1, 2, 2, 3)), bytes(12))
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.find(mark) + offset] |= 1
    path.write_bytes(content)


def unknown_compression(path: Path) -> None:
    npz(path, "arr_0.npy", header((1, 2, 2, 3)), bytes(12))
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        content[content.find(mark) + offset] = 77
    path.write_bytes(content)


def huge_directory(path: Path) -> None:
    npz(path, "arr_0.npy", header((1, 2, 2, 3)), bytes(12))
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\5\6")
    content[at + 12 : at + 16] = struct.pack("<I", 1 << 30)
    path.write_bytes(content)


ARCHIVES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "a header of 2 GiB": (long_header, first_batch),
    "an image of 3 GiB": (zeros((1, 32768, 32768, 3)), first_batch),
    "more images than can be": (zeros((10**9, 1, 1, 3)), first_batch),
    "a shape beyond all bounds": (zeros((10**30, 9, 9, 3)), first_batch),
    "images that end early": (zeros((10**4, 64, 64, 3)), all_batches),
    "columns of 3 GiB": (zeros((1000, 1024, 1024, 3), fortran=True), first_batch),
    "encrypted": (encrypted, first_batch),
    "unknown compression": (unknown_compression, first_batch),
    "a name without .npy": (zeros((1, 2, 2, 3), name="arr_0"), first_batch),
    "20,000 members": (many_members, first_batch),
    "a huge directory": (huge_directory, first_batch),
    "statistics of 3 GiB": (zeros((20_000, 20_000), name="mu.npy", dtype="<f8"), read_statistics),
    "statistics of text": (
        lambda path: npz(path, "mu.npy", header((4,), "<U9"), bytes(144), sigma=np.eye(4)), read_statistics,
    ),
    "an origin of 3 GiB": (
        lambda path: np.savez_compressed(path, mu=np.zeros(4), sigma=np.eye(4), extractor=np.zeros(1 << 20, "U9")),
        read_statistics,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str) -> None:
    make, read = ARCHIVES[name]
    make(tmp_path / "a.npz")
    with refused(r"a\.npz"):
        read(tmp_path / "a.npz")


# ---- pictures


def png_of(width: int, height: int) -> bytes:
    """A black picture of any size in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    data = b"".join(packer.compress(row) for _ in range(min(height, 1000))) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def palette(path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(path, transparency=bytes([128, 255]))


PICTURES: dict[str, Callable[[Path], Any]] = {
    "13,000 x 13,000": lambda path: path.write_bytes(png_of(13_000, 13_000)),
    "one row of 2^31": lambda path: path.write_bytes(png_of(3, 2**31 - 1)),
    "6,000 x 6,000": lambda path: path.write_bytes(png_of(6000, 6000)),
    "PostScript": lambda path: path.write_bytes(POSTSCRIPT),
    "GIF": lambda path: Image.new("P", (8, 8)).save(path, format="GIF"),
    "several frames": lambda path: Image.new("RGB", (8, 8)).save(
        path, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    ),
    "CMYK": lambda path: Image.new("CMYK", (8, 8)).save(path, format="JPEG"),
    "32 bits": lambda path: Image.new("I", (8, 8)).save(path, format="TIFF"),
    "empty": lambda path: path.write_bytes(b""),
    "partly transparent": lambda path: Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(path),
    "a transparent palette": palette,
    "grey and transparent": lambda path: Image.new("LA", (8, 8), (1, 2)).save(path),
    "a transparent colour": lambda path: Image.new("RGB", (8, 8)).save(path, transparency=(0, 0, 0)),
    "a transparent grey of 16 bits": lambda path: Image.new("I;16", (8, 8)).save(path, transparency=0),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path: Path, name: str) -> None:
    PICTURES[name](tmp_path / "a.png")
    with refused(r"a\.png"):
        first_batch(tmp_path)


def test_many_large_pictures_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    for n in range(4):
        Image.new("RGB", (4000, 4000), (n, 0, 0)).save(tmp_path / f"{n:02d}.png", compress_level=1)
    batches = open_source(tmp_path).batches(64)
    batch = next(batches)
    assert len(batch) == 1  # of 48 MB
    assert 3 * 4000 * 4000 * len(batch) < MEMORY / 8


def test_shadows_of_pictures_do_not_count(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"shadow")
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("._b.png" if folder == "__MACOSX" else "b.png")).write_bytes(b"shadow")
    (tmp_path / "folder.png").mkdir()
    assert len(open_source(tmp_path)) == 1


def test_a_transparent_palette_that_hides_nothing(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([9, 8, 7, 255, 255, 255])
    image.save(tmp_path / "a.png", transparency=bytes([255, 255]))
    assert next(open_source(tmp_path).batches(1))[0, 0, 0].tolist() == [9, 8, 7]


def test_a_folder_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcfg.evaluation.sources.MOST_OTHER_FILES", 10)
    for n in range(12):
        (tmp_path / str(n)).touch()
    with refused("more than 10 files that are no images"):
        open_source(tmp_path)


# ---- checkpoints


class Small:
    """Tensors of many numbers in few bytes."""

    def __init__(self, *shape: int) -> None:
        self.tensor = torch.zeros(1).expand(shape)


def many_times(path: Path) -> None:
    one = torch.zeros(1 << 18)
    torch.save({f"layer.{n}": one for n in range(1000)}, path)


def nested(content: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        content = {"model": content, "state_dict": content}
    return content


def in_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "stride 0": ("a.pth", lambda path: torch.save({"w": Small(1 << 17, 1 << 17).tensor}, path)),
    "one tensor many times": ("a.pth", many_times),
    "sparse": ("a.pth", lambda path: torch.save({"w": torch.eye(9).to_sparse()}, path)),
    "billion laughs": ("a.pth", lambda path: torch.save(nested({"w": torch.ones(1)}, 60), path)),
    "a mapping in itself": ("a.pth", lambda path: torch.save(in_itself(), path)),
    "names that are no names": ("a.pth", lambda path: torch.save({"\x1b[2J" * 2000: 3}, path)),
    "numbers for names": ("a.pth", lambda path: torch.save({3: torch.ones(2)}, path)),
    "an index that names itself": (
        "a.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {"w": path.name}})),
    ),
    "an index out of its folder": (
        "a.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {"w": "../a.safetensors"}})),
    ),
    "an index with a NUL": (
        "a.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {"w": "a\0.safetensors"}})),
    ),
    "an index of very many": (
        "a.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {str(n): f"{n}.bin" for n in range(5000)}})),
    ),
    "an index nested deeply": ("a.safetensors.index.json", lambda path: path.write_text("[" * 100_000)),
    "a long index": ("a.safetensors.index.json", lambda path: path.write_text("[" + "[],\n" * 9_000_000)),
    "a long header": (
        "a.safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", 1 << 25) + b"{" + b" " * (1 << 26)),
    ),
    "not UTF-8": ("a.safetensors.index.json", lambda path: path.write_bytes(b'{"weight_map": "\xff"}')),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(tmp_path: Path, name: str) -> None:
    file, make = CHECKPOINTS[name]
    make(tmp_path / file)
    with refused():
        read_state_dict(tmp_path / file)


def test_tied_weights_are_no_attack(tmp_path: Path) -> None:
    one = torch.arange(1000.0)
    torch.save({"a": one, "b": one, "c": torch.zeros(3)}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")["b"].tolist() == one.tolist()


# ---- configurations

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGED = "a0: &a0 {x: y}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))

CONFIGS: dict[str, str] = {
    "billion laughs": LAUGHS,
    "billion laughs in merged keys": MERGED,
    "a cycle": "a: &a [*a]\n",
    "10 MB": "a: " + "b " * 5_000_000,
    "nested deeply": "[" * 100_000,
    "nested deeply in blocks": "".join(" " * n + "a:\n" for n in range(600)),
    "a number of very many digits": "a: " + "9" * 100_000,
    "no date": "a: 2001-99-99",
    "a tag": "a: !!python/object/apply:os.system [ls]",
    "a list": "[1, 2]",
    "a key that is no name": "? [a]\n: b",
    "not text": "a: \x00",
    "an escape sequence": "\x1b[2J: b",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_yaml_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.yaml").write_text(CONFIGS[name])
    with refused(r"a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x:\n  a: {c: 1, c: 2}\n", "'a': 1\na: 1\n"])
def test_a_key_that_is_given_twice(tmp_path: Path, text: str) -> None:
    """The last one would win without a word."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"it says '[ac]' twice, again in line \d$"):
        read_yaml(tmp_path / "a.yaml")


def test_aliases_are_no_attack(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**7}, {"hidden_size": 2**40}, {"hidden_size": 2**31}, {"codebook_size": 10**5000},
        {"num_hidden_layers": -1}, {"num_hidden_layers": float("nan")}, {"image_seq_len": 2**30, "grid_size": 2**15},
        {"hidden_size": "\x1b[2J" * 999}, {3: 4}, {"hidden_size": [[[["x" * 9999] * 999] * 999] * 999]},
    ],
    ids=lambda change: next(f"{name}-{type(value).__name__}" for name, value in change.items()),
)  # fmt: skip
def test_configurations_beyond_measure(change: dict[str, Any]) -> None:
    with refused():
        load_generator("alitok", config={**ALITOK, **change}, checkpoint={"w": torch.zeros(1)})


MODEL = """\
name: a
generator: {family: alitok, config: {}}
tokenizer: {family: maskgit-vq, config: {}}
"""


@pytest.mark.parametrize(
    "change",
    [
        "name: 3", f"name: [{'9, ' * 9999}]", "name: !!binary aaaa", "sampling: {temperature: [[[[1]]]]}", "classes: 7",
        "sampling: {temperature: .nan}", f"sampling: {{top_k: {'9' * 4000}}}", f"sampling: {{schedule: {[[1] * 999]}}}",
        "generator: {family: \"\\e[2J\"}",
        "fid: best",
        "generator: {family: alitok, dtype: load}",
        f"generator: {{family: {'x' * 9999}}}", "generator: {family: alitok, config: 3}",
    ],
)  # fmt: skip
def test_model_folders(tmp_path: Path, change: str) -> None:
    (tmp_path / "model.yaml").write_text(
        "".join(line for line in MODEL.splitlines(keepends=True) if line.split(":")[0] != change.split(":")[0]) + change
    )
    with refused(r"model\.yaml"):
        resolve(tmp_path)


# ---- text tokenizers and templates


def tokenizer_with(path: Path, **changes: Any) -> Path:
    text_tokenizer().save(str(path))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def grows(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    return {"type": "Sequence", "normalizers": [step] * times}


def splits(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "replacements that grow": {"normalizer": grows(12)},
    "a long replacement": {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000_000},
    },
    "very many steps": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 100_000}},
    "no model": {"model": 3},
    "an unknown model": {"model": {"type": "\x1b[2J"}},
    "steps of no kind": {"normalizer": [[{"type": 3}]]},
}  # fmt: skip


@pytest.mark.parametrize("read", [TextTokenizer, PromptReader])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_tokenizers(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    path = tokenizer_with(tmp_path / "tokenizer.json", **TOKENIZERS[name])
    with refused(r"tokenizer\.json"):
        read(path)


@pytest.mark.parametrize(
    "text", ["a" * 40 + "!", ("a" * 20 + "!") * 400, "x" * 100_000, "half \ud800"], ids=lambda text: text[:9]
)
def test_patterns_without_end_and_texts_that_are_none(tmp_path: Path, text: str) -> None:
    path = tokenizer_with(tmp_path / "tokenizer.json", pre_tokenizer=splits("(a+)+$"))
    tokenizer = TextTokenizer(path)
    with pytest.raises(UserError, match="prompt"):
        tokenizer.ids([text])


def test_padding_is_no_attack(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    path = tokenizer_with(tmp_path / "tokenizer.json", padding=padding)
    with bounded():
        assert len(TextTokenizer(path).ids(["red"])) < 10


@pytest.mark.parametrize(
    "template", ["{prompt:>1000000000}", "{unknown}", "{prompt!r}", "{prompt.__class__}", "{}", "{", "{0}", "x" * 10**6]
)
def test_templates(tmp_path: Path, template: str) -> None:
    path = tokenizer_with(tmp_path / "tokenizer.json")
    with refused("template"):
        PromptReader(path, template)


# ---- words on the command line

WORDS: dict[str, list[str]] = {
    "labels of a long range": ["--labels", "0-99999999999"],
    "labels of very many digits": ["--labels", "9" * 100_000],
    "other digits": ["--labels", "٣"],
    "very many images": ["--num-samples", str(10**15)],
    "very large batches": ["--batch-size", str(10**15)],
    "an escape sequence": ["--labels", "\x1b[2J"],
    "half a character": ["--labels", "\udc80"],
    "a long name": ["--labels", "x" * 5000],
    "a long file": ["--labels", "@" + "x" * 5000],
    "a long folder": ["--output-dir", "x" * 5000],
    "no number": ["--seed", "9" * 5000],
}


@pytest.mark.parametrize("name", WORDS)
def test_words(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = ["sample", str(model_folder), "--output-dir", str(tmp_path / "out"), *WORDS[name]]
    with bounded():
        try:
            code = main(words)
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
    error = capsys.readouterr().err.rstrip("\n")
    assert code == 2
    assert error.isprintable()
    assert error.startswith("softcfg: error: ")
    assert len(error) < 2500


@pytest.mark.parametrize("command", ["sample", "eval", "trace", "plot", "runs status", "models", "fetch", "decode"])
@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "\x1b[2J", "\udc80"], ids=["long", "deep", "escape", "half"])
def test_names_of_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"trace": ["--labels", "0"], "plot": ["--labels", "0"], "decode": ["--output-dir", "new"]}
    with bounded():
        assert main([*command.split(), name, *more.get(command, [])]) == 2
    error = capsys.readouterr().err.rstrip("\n")
    assert error.isprintable()
    assert len(error) < 2500


def test_a_label_file_of_10_million_lines(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lines in (1_500_000, 10_000_000):
        (tmp_path / "labels").write_text("0\n" * lines)
        with bounded():
            assert main(["sample", str(model_folder), "--labels", f"@{tmp_path}/labels"]) == 2
        assert "limit" in capsys.readouterr().err


@pytest.mark.parametrize("name", [":x", "os:system", "os:nothing", "nothing:x", "os.path:", "softcfg:__version__", ":"])
def test_extractors_that_are_none(name: str) -> None:
    with refused("extractor"):
        load_extractor(name)
