"""Prompt suites: what their scorers read is what was drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_runs import of_images
from softcfg.errors import UserError
from softcfg.runs.folder import RunFolder
from softcfg.runs.suites import DPGBench, GenEval


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8))


def test_dpg_bench_finds_four_crops_under_the_name_of_the_prompt(tmp_path: Path, images: list[np.ndarray]) -> None:
    source, out = tmp_path / "prompts", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "b_2.txt").write_text("a dog\nwith a hat \n")
    (source / "a1.txt").write_text("red apple")
    suite = DPGBench(source)
    assert suite.prompts == ["red apple", "a dog with a hat"]
    assert not suite.is_written(out, 1, images)
    suite.write(out, 1, images)
    assert suite.is_written(out, 1, images)
    assert [path.name for path in out.iterdir()] == ["b_2.png"]
    picture = Image.open(out / "b_2.png")
    # The crops of the scorer at resolution 6, in its order.
    for image, (x, y) in zip(images, [(0, 0), (6, 0), (0, 6), (6, 6)], strict=True):
        assert np.array_equal(np.asarray(picture.crop((x, y, x + 6, y + 6))), image)


def test_geneval_finds_the_line_and_four_samples(tmp_path: Path, images: list[np.ndarray]) -> None:
    lines = [{"tag": "single_object", "prompt": "a photo of a bench"}, {"tag": "colors", "prompt": "a red apple"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    suite = GenEval(tmp_path)
    assert suite.prompts == ["a photo of a bench", "a red apple"]
    out = tmp_path / "out"
    suite.write(out, 1, images)
    assert suite.is_written(out, 1, images)
    assert not suite.is_written(out, 0, images)
    assert [path.name for path in out.iterdir()] == ["00001"]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == lines[1]
    found = sorted((out / "00001" / "samples").iterdir())
    assert [path.name for path in found] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    for path, image in zip(found, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)


@pytest.mark.parametrize("suite", [DPGBench, GenEval])
def test_pictures_of_another_run_and_damaged_files_are_written_anew(tmp_path: Path, suite: type) -> None:
    """As after a kill between a shard and its pictures."""
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in ("a", "b", "c")))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = suite(tmp_path)

    def run_of(seed: int) -> RunFolder:
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
        labels = [label for label in range(3) for _ in range(4)]
        return of_images(tmp_path / f"run-{seed}", pixels, labels=labels, seed=seed)

    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    one, other, expected = run_of(1), run_of(2), tmp_path / "expected"
    found.write_missing(expected, other)
    out = tmp_path / "out"
    found.write_missing(out, one)
    assert content(out) != content(expected)
    kept, *damaged = sorted(path for path in out.rglob("*") if path.is_file())
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-3])
    found.write_missing(out, other)
    assert content(out) == content(expected)
    before = kept.stat().st_ino
    found.write_missing(out, other)
    assert kept.stat().st_ino == before  # what is right stays


@pytest.mark.parametrize(
    ("suite", "files", "message"),
    [
        (DPGBench, {"readme.md": "no"}, "holds no prompts: DPG-Bench has one .txt file for each"),
        (DPGBench, {"a.txt": b"\xff\xfe\xfa"}, "a.txt cannot be read"),
        (DPGBench, {"a.txt": " \n"}, "a.txt is empty"),
        (GenEval, {}, "evaluation_metadata.jsonl cannot be read"),
        (GenEval, {"evaluation_metadata.jsonl": "\n"}, "is empty"),
        (GenEval, {"evaluation_metadata.jsonl": '{"prompt": "a"}\n{"tag": 1}'}, "line 2 is not a JSON object with a"),
        (GenEval, {"evaluation_metadata.jsonl": '{"prompt": 3}'}, "line 1 is not a JSON object with a prompt"),
    ],
)
def test_unusable_prompts_are_one_sentence(
    tmp_path: Path, suite: type, files: dict[str, str | bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        suite(tmp_path)
