import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softcfg import UserError, plugins
from softcfg.cli.main import main

WORDS = "WORDS = []\n"


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    before = set(sys.modules)
    plugins._loaded.clear()
    yield
    for name in [name for name in sys.modules if name.startswith("plugged_") and name not in before]:
        del sys.modules[name]
    plugins._loaded.clear()


def test_modules_and_files_are_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugged_module.py").write_text(WORDS)
    (tmp_path / "plugged_file.py").write_text(WORDS)
    module = plugins.load("plugged_module")
    assert plugins.load("plugged_module") is module
    file = plugins.load(str(tmp_path / "plugged_file.py"))
    monkeypatch.chdir(tmp_path)
    assert plugins.load("./plugged_file.py") is file
    assert plugins.options() == ["--plugin", "plugged_module", "--plugin", str(tmp_path / "plugged_file.py")]


def test_the_command_line_and_the_environment_name_them(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"plugged_{name}.py").write_text(f"print('{name} is here')\n")
    environment = {"SOFTCFG_PLUGINS": "plugged_one", "PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    words = ["models", "--plugin", "plugged_two", f"--plugin={tmp_path / 'plugged_three.py'}"]
    shown = subprocess.run(
        [sys.executable, "-m", "softcfg", *words], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert shown.startswith("one is here\ntwo is here\nthree is here\n")


def test_a_module_may_lie_in_the_working_directory(tmp_path: Path) -> None:
    """Where an installed command does not look."""
    (tmp_path / "plugged_here.py").write_text("import plugged_beside\nprint('here')\n")
    (tmp_path / "plugged_beside.py").write_text(WORDS)
    begin = "import sys; sys.path = [each for each in sys.path if each]; from softcfg.cli.main import main; "
    words = [sys.executable, "-c", f"{begin}sys.exit(main(['models', '--plugin', 'plugged_here']))"]
    environment = {"PYTHONPATH": ":".join(each for each in sys.path if each)}
    shown = subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert shown.startswith("here\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plugged_missing", None, "the plugin plugged_missing cannot be imported: ModuleNotFoundError"),
        ("missing.py", None, "the plugin missing.py cannot be imported: FileNotFoundError"),
        ("plugged_broken.py", "1 / 0\n", "cannot be imported: ZeroDivisionError"),
        ("json.py", WORDS, "has the name of another module, json; rename the file"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["models", "--plugin", name]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "plugged_broken" not in sys.modules
    with pytest.raises(UserError):
        plugins.load(name)
