"""What is built and installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import softcfg

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_installs_alone_and_samples(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("src", "tests", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, folder: Path = tmp_path) -> str:
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    # The source archive, and from it the wheel.
    run(sys.executable, "-m", "build", "--no-isolation", source)
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name == f"softcfg-{softcfg.__version__}-py3-none-any.whl"

    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"softcfg", f"softcfg-{softcfg.__version__}.dist-info"}
    # All files of the package are in it: bundled weights, the page of the browser, py.typed; and no tests.
    files = (
        path for path in (ROOT / "src" / "softcfg").rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    )
    ours = {str(path.relative_to(ROOT / "src")) for path in files}
    assert {"softcfg/py.typed", "softcfg/zoo/bundled/fashion/generator.safetensors"} <= ours
    assert {name for name in names if ".dist-info/" not in name} == ours

    # An environment of its own; what softcfg depends on is taken from this one, to spare a large download.
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert Path(run(python, "-c", "import softcfg; print(softcfg.__file__)").strip()).is_relative_to(packages)
    script = tmp_path / "venv" / "bin" / "softcfg"
    run(script, "sample", "fashion", "--labels", "Bag", "--num-samples", "1", "--no-compare", "--output-dir", "out")
    assert (tmp_path / "out" / "000000.png").stat().st_size > 100
