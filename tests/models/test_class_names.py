"""Which classes people mean by numbers and names."""

from pathlib import Path

import pytest
import yaml

from softcfg import Pipeline, UserError
from softcfg.cli.main import main
from softcfg.models.class_names import ClassNames
from softcfg.runs.folder import RunFolder
from softcfg.runs.pictures import label_names
from softcfg.runs.worker import BatchDrawer

# As in ImageNet: two cranes, and names with commas.
NAMES = ["Crane", "tench, Tinca tinca", "crane", "7", "maillot", "maillot", "all", "a", "b", "a, b", "it's"]


@pytest.fixture
def names() -> ClassNames:
    return ClassNames(NAMES, len(NAMES), "birds")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0,3-5, 2", [0, 3, 4, 5, 2]),
        ("7", [7]),
        ('"7"', [3]),
        ("'7',7", [3, 7]),
        ('"tench, Tinca tinca",0', [1, 0]),
        ("0,Tench,  tinca TINCA,1", [0, 1, 1]),
        ("Crane", [0]),
        (' "crane" , crane', [2, 2]),
        ('"all"', [6]),
        ('"a, b",a', [9, 7]),
        ('a,0,"b"', [7, 0, 8]),
        ("it's", [10]),
        ('"it\'s",0', [10, 0]),
    ],
)
def test_lists_of_labels(names: ClassNames, text: str, ids: list[int]) -> None:
    assert names.read(text) == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maillot", "classes 4 and 5 are both called 'maillot': give the number of the one you mean"),
        ("CRANE", "classes 0 and 2 are both called 'Crane'"),
        ("a,b", "'a,b' may be one class or 2: put names with commas in quotes"),
        ("heron", "'heron' is no class, .*; birds has classes 0 to 10, called Crane, tench"),
        ("0,", "'' is no class"),
        ('"tench', "'\"tench' is no class"),
        ("11", "label 11 is out of range"),
        ("0,3-1", "the range 3-1 names no class"),
        ("5-11", "label 11 is out of range"),
        ("²", "'²' is no class"),
    ],
)
def test_what_is_no_list_of_labels(names: ClassNames, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("²", ".*")):
        names.read(text)


@pytest.mark.parametrize("given", [NAMES[:-1], [*NAMES, "more"], "abcdefghijk", list(range(len(NAMES)))])
def test_names_that_do_not_fit(given: list) -> None:
    with pytest.raises(UserError, match="names of classes"):
        ClassNames(given, len(NAMES), "birds")


def test_titles_tell_classes_apart(names: ClassNames) -> None:
    assert [names.title(label) for label in (1, 4, 5)] == ["tench, Tinca tinca", "maillot (4)", "maillot (5)"]
    assert ClassNames((), 3, "birds").title(2) == "class 2"


def renamed(folder: Path, model: Path, classes: list) -> Path:
    """The model in another folder, with other names of its classes."""
    folder.mkdir()
    for file in model.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    content = yaml.safe_load((model / "model.yaml").read_text())
    (folder / "model.yaml").write_text(yaml.safe_dump({**content, "classes": classes}))
    return folder


def test_names_everywhere(model_folder: Path, tmp_path: Path) -> None:
    model = renamed(tmp_path / "named", model_folder, ["crane, bird", "crane", "Crane", "0"])
    pipe = Pipeline.from_pretrained(model)
    assert pipe(["crane", 3, "0"]).labels.tolist() == [1, 3, 3]  # type: ignore[union-attr]
    assert pipe("crane, bird").labels.tolist() == [0]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="both called"):
        pipe(["CRANE"])
    drawer = BatchDrawer(pipe, pipe.default_guidance(), pipe.sampling(), 0, 1)
    assert label_names(drawer) == ["crane, bird", "crane (1)", "Crane (2)", "0"]
    (tmp_path / "labels").write_bytes('\ufeffcrane, bird\r\n"0"\n\n0\n'.encode())
    words = ["sample", str(model), "--labels", f"@{tmp_path}/labels", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert RunFolder.open(tmp_path / "out").settings["labels"] == [0, 3, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["one"], "named has 4 classes, but 1 names of classes were given"),
        (["no", "one", "is", True], "classes must be texts, got True; put names in quotes"),
    ],
)
def test_names_are_counted_before_anything_is_drawn(
    model_folder: Path, tmp_path: Path, classes: list, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = renamed(tmp_path / "named", model_folder, classes)
    content = (model / "model.yaml").read_text().replace("name: tiny", "name: named")
    (model / "model.yaml").write_text(content)
    assert main(["sample", str(model), "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_that_a_pipeline_is_given(model_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    with pytest.raises(UserError, match="4 classes, but 2 names"):
        Pipeline(pipe.generator, pipe.tokenizer, classes=["a", "b"])
    assert Pipeline(pipe.generator, pipe.tokenizer, classes=list("abcd")).conditioning.requests(["d"]) == [3]
