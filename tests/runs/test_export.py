import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_runs import complete
from softcfg import UserError
from softcfg.runs.export import altered_pngs, export_npz, export_pngs, first_images, npz_beside
from softcfg.runs.folder import RunFolder


def pixels(run: RunFolder) -> np.ndarray:
    return np.concatenate([run.read(number).pixels for number in range(run.plan.num_shards)])


def test_npz_is_what_the_evaluation_reads(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    path = npz_beside(run.path)
    assert path == tmp_path / "run.npz"
    assert export_npz(run, path) == (10, 4, 4, 3)
    with np.load(path, allow_pickle=False) as content:
        assert content.files == ["arr_0"]
        assert content["arr_0"].dtype == np.uint8
        assert np.array_equal(content["arr_0"], pixels(run))


def test_no_npz_of_a_run_that_is_not_complete_or_sound(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    target = tmp_path / "all.npz"
    content = run.shard_path(1).read_bytes()
    run.shard_path(1).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum is wrong; 'softcfg runs verify"):
        export_npz(run, target)
    run.shard_path(1).unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards of .* are missing; continue the run first"):
        export_npz(run, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_pngs(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    export_pngs(run, tmp_path / "images")
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{n:06d}.png" for n in range(10)]
    for index, image in enumerate(pixels(run)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / f"{index:06d}.png")), image)


def test_no_images_of_an_earlier_export_are_among_those_of_a_run(tmp_path: Path) -> None:
    images = tmp_path / "images"
    export_pngs(complete(tmp_path / "large"), images)
    small = complete(tmp_path / "small", num_samples=6)
    before = {path: path.read_bytes() for path in images.iterdir()}
    with pytest.raises(UserError, match=r"images holds 000009\.png, and the run has only 6 images; give another"):
        export_pngs(small, images)
    assert {path: path.read_bytes() for path in images.iterdir()} == before
    for path in images.iterdir():
        path.rename(path.with_name(f"1{path.stem[-3:]}.png"))  # not names of a run's images
    export_pngs(small, images)
    export_pngs(small, images)
    assert len(list(images.glob("00000?.png"))) == 6


def test_a_part_of_a_run_is_not_exported(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    run.shard_path(2).unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards of .* are missing; continue the run first"):
        export_pngs(run, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_folder_without_a_name_has_no_npz_beside_it() -> None:
    with pytest.raises(UserError, match=r"^/ has no name for a \.npz file beside it"):
        npz_beside(Path("/"))


def test_absent_and_altered_pngs_are_written_on_request(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    export_pngs(run, run.path)
    (run.path / "000009.png").unlink()
    (run.path / "000000.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(run.path / "000001.png")
    kept = (run.path / "000005.png").stat().st_ino
    assert altered_pngs(run.read(0), run.path) == ["000000.png", "000001.png"]
    export_pngs(run, run.path, absent_only=True)
    assert all(altered_pngs(shard, run.path) == [] for shard in run.shards())
    assert len(list(run.path.glob("*.png"))) == 10
    assert (run.path / "000005.png").stat().st_ino == kept


def test_first_images_read_no_more_shards_than_needed(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    run.shard_path(2).unlink()
    shown = list(first_images(run, 5))
    assert [label for label, _ in shown] == [0, 1, 2, 0, 1]
    assert np.array_equal(
        np.stack([image for _, image in shown]), np.concatenate([run.read(0).pixels, run.read(1).pixels])[:5]
    )


MEASURE = """
import json, resource, sys
from pathlib import Path
import numpy, safetensors.numpy
from softcfg.runs.export import altered_pngs, export_npz
from softcfg.runs.folder import RunFolder
from made_runs import complete
run = complete(Path(sys.argv[1]), size=256, num_samples=int(sys.argv[2]), batch_size=10)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
shape = export_npz(run, Path(sys.argv[1] + ".npz"))
print(json.dumps([peak() - before, shape, "torch" in sys.modules]))
"""


def test_the_npz_is_made_in_the_memory_of_a_shard(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), "400"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,  # where made_runs lies
    ).stdout
    more, shape, with_torch = json.loads(output)
    assert shape == [400, 256, 256, 3]  # 79 MB in all, 2 MB a shard
    assert more < 8e6
    assert not with_torch
