"""Every family of text-to-image models through the page, by the requests that a browser makes."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from published import place, write
from softcfg.cli.main import main
from softcfg.guidance import compose
from softcfg.pipeline import Pipeline
from softcfg.ui.fragments import EMPTY_STAGE
from softcfg.ui.page import application
from softcfg.ui.studio import Studio
from softcfg.zoo import MODELS

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
FAMILIES = ["janus-pro-1b", "emu3-gen", "llamagen-t2i-xl-256", "words"]
SIZES = {"emu3-gen": (48, 24), "words": (12, 8)}  # other sizes, where there are any


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, prompt_model_folder: Path) -> Iterator[dict[str, Pipeline]]:
    """A small model of each family, fetched from files as they are published."""
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path_factory.mktemp("checkpoints")))
        patch.setenv("SOFTCFG_CAPTIONS", str(tmp_path_factory.mktemp("captions")))
        found = {"words": Pipeline.from_pretrained(prompt_model_folder)}
        for name in FAMILIES[:-1]:
            folder = tmp_path_factory.mktemp(name)
            entry = write(name, folder)
            patch.setitem(MODELS, name, entry)
            for repository in {place(folder, file).parent for file in entry.files}:
                main(["fetch", name, "--from", str(repository)])
            found[name] = Pipeline.from_pretrained(name)
        yield found


class Visitor:
    """Uses the page as a browser does: events by HTTP, with the values that the fields have."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        assert client.get("/").status_code == 200
        config = client.get("/config").json()
        self.names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.numbers = {name: number for number, name in self.names.items() if name}
        self.values = {part["id"]: part["props"].get("value") for part in config["components"]}
        self.shown = {part["id"]: part["props"].get("visible", True) for part in config["components"]}
        self.events = [event for event in config["dependencies"] if event["backend_fn"]]

    def fill(self, **fields: Any) -> None:
        self.values |= {self.numbers[name.replace("_", "-")]: value for name, value in fields.items()}

    def value(self, name: str) -> Any:
        return self.values[self.numbers[name.replace("_", "-")]]

    def visible(self, name: str) -> bool:
        return bool(self.shown[self.numbers[name]])

    def send(self, elem_id: str | None, trigger: str, query: str = "", **about: Any) -> None:
        """An event and what it changes."""
        number = self.numbers.get(elem_id or "")
        event = next(
            event
            for event in self.events
            if any(target[1] == trigger and number in (None, target[0]) for target in event["targets"])
        )
        body = {
            "data": [self.values[each] for each in event["inputs"]], "event_data": about or None,
            "fn_index": event["id"], "trigger_id": number, "session_hash": "page",
        }  # fmt: skip
        assert self.client.post(f"{JOIN}?{query}", json=body).status_code == 200
        with self.client.stream("GET", f"{DATA}?session_hash=page") as response:
            messages = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        # Of several answers the first and the last are whole, the others say what is different.
        whole = [message for message in messages if message["msg"] == "process_generating"][:1]
        for message in [*whole, *(message for message in messages if message["msg"] == "process_completed")]:
            assert message["success"], message
            for each, change in zip(event["outputs"], message["output"]["data"], strict=True):
                if not isinstance(change, dict):
                    self.values[each] = change
                else:
                    self.values[each] = change.get("value", self.values[each])
                    self.shown[each] = change.get("visible", self.shown[each])

    def choose(self, name: str) -> None:
        """Another model."""
        self.fill(model=name)
        self.send("model", "input")

    def draw(self, query: str | None = None) -> list[np.ndarray]:
        """Draw what the form says, or open a link; the pictures on the stage."""
        if query is None:
            self.send("draw", "click")
        else:
            self.send(None, "load", query)
        assert "Drawn in" in self.value("status"), self.value("status")
        return [np.asarray(image.convert("RGB")) for image in self.pictures()]

    def pictures(self) -> list[Image.Image]:
        """The files behind the links below the pictures."""
        found = re.findall(r'download="[^"]+\.png" href="data:image/png;base64,([^"]+)"', self.value("stage"))
        return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]

    @property
    def link(self) -> str:
        """The query of the link to the settings."""
        (address,) = re.findall(r'<a href="\./\?([^"]+)"', self.value("share"))
        return html.unescape(address)


@contextlib.contextmanager
def serving(pipelines: dict[str, Pipeline]) -> Iterator[TestClient]:
    with TestClient(application(Studio(pipelines)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def server(pipelines: dict[str, Pipeline]) -> Iterator[TestClient]:
    with serving(pipelines) as client:
        yield client


@pytest.fixture(scope="module")
def other_server(pipelines: dict[str, Pipeline]) -> Iterator[TestClient]:
    with serving(pipelines) as client:
        yield client


@pytest.fixture
def visitor(server: TestClient) -> Visitor:
    server.cookies.clear()
    return Visitor(server)


@pytest.fixture
def another(other_server: TestClient) -> Visitor:
    """A visitor of another server with the same models."""
    other_server.cookies.clear()
    return Visitor(other_server)


@pytest.mark.parametrize(
    "name", [name if name in ("emu3-gen", "words") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family(visitor: Visitor, another: Visitor, pipelines: dict[str, Pipeline], name: str) -> None:
    """Methods, seeds, sizes, the schedule and the link: as the pipeline draws them."""
    pipe = pipelines[name]
    visitor.choose(name)
    assert visitor.visible("prompt")
    assert visitor.visible("size-row") == (name in SIZES)
    assert visitor.visible("ratio") == (name == "emu3-gen")
    assert visitor.value("scale") == pipe.sampling_defaults["guidance_scale"]
    assert visitor.value("top_k") == pipe.sampling_defaults["top_k"]
    width, height = SIZES.get(name, (None, None))
    rules = {"softcfg": {}, "softcfg+apg": {"rule": "apg"}} if name == "words" else {"softcfg": {}}
    visitor.fill(prompt="a red star", methods=list(rules), seeds=2, seed=5, top_k=12, schedule="linear")
    visitor.fill(width=width, height=height)
    drawn = visitor.draw()
    expected = [
        pipe(
            prompt="a red star", guidance=pipe.default_guidance(compose, schedule="linear", **parts), seed=seed,
            width=width, height=height, top_k=12,
        ).pixels[0]
        for parts in rules.values()
        for seed in (5, 6)
    ]  # fmt: skip
    assert len(drawn) == 2 * len(rules)
    assert all(map(np.array_equal, drawn, expected))
    assert len({image.tobytes() for image in drawn}) > len(rules)
    assert drawn[0].shape[:2] == ((height, width) if height else (pipe.tokenizer.image_size,) * 2)

    described = json.loads(visitor.pictures()[1].text["softcfg"])  # type: ignore[attr-defined]
    assert (described["subject"], described["method"], described["seed"]) == ("a red star", "softcfg", 6)
    assert (described.get("width"), described.get("height")) == (width, height)
    assert described["link"] == f"?{visitor.link}"
    assert all(map(np.array_equal, another.draw(visitor.link), drawn))
    for field in ("model", "prompt", "methods", "schedule", "seeds", "width", "height", "top_k", "negative_prompt"):
        assert another.value(field) == visitor.value(field), field
    visitor.send("stage", "choose", picture=1, token=7)
    assert "Token 7" in visitor.value("inspector")
    assert not list(Path(os.environ["SOFTCFG_CAPTIONS"]).rglob("*"))  # strangers leave nothing on the disk


def test_a_negative_prompt(visitor: Visitor, another: Visitor, tmp_path: Path) -> None:
    """It changes the picture, is in the link and the files, and draws what `softcfg sample` draws."""
    default = visitor.value("negative_prompt")
    visitor.choose("emu3-gen")
    assert visitor.visible("negative-prompt")
    usual = visitor.value("negative_prompt")
    assert usual.startswith("lowres")
    visitor.fill(prompt="a red fox", methods=["softcfg"], seed=9)
    drawn = {text: visitor.draw()[0] for text in (usual, "blurry", "") if visitor.fill(negative_prompt=text) is None}
    assert len({image.tobytes() for image in drawn.values()}) == 3
    assert json.loads(visitor.pictures()[0].text["softcfg"])["negative_prompt"] == ""  # type: ignore[attr-defined]
    assert np.array_equal(another.draw(visitor.link)[0], drawn[""])
    for number, (text, image) in enumerate(drawn.items()):
        flags = ["--negative-prompt", text] if text != usual else []
        words = ["sample", "emu3-gen", "--prompt", "a red fox", "--seed", "9", "--images-per-prompt", "1", *flags]
        out = tmp_path / str(number)
        assert main([*words, "--no-compare", "--output-dir", str(out)]) == 0
        assert np.array_equal(np.asarray(Image.open(out / "000000.png")), image)
    visitor.choose("words")
    assert not visitor.visible("negative-prompt")
    assert visitor.value("negative_prompt") == default == ""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "emu3-gen"])
def test_a_model_without_a_negative_prompt(visitor: Visitor, name: str) -> None:
    visitor.choose(name)
    assert not visitor.visible("negative-prompt")
    visitor.fill(prompt="a red fox", negative_prompt="blurry")
    visitor.send("draw", "click")
    said = f"{name} takes no negative prompt: leave it out"
    assert visitor.value("status") == f'<p class="alert" role="alert">{said[:1].upper()}{said[1:]}</p>'
    assert visitor.value("stage") == EMPTY_STAGE
    visitor.send(None, "load", f"model={name}&subject=a+fox&negative_prompt=blurry")
    assert f"This settings link does not work. {said}" in visitor.value("status")


def test_ratios_and_sizes(visitor: Visitor) -> None:
    visitor.choose("emu3-gen")
    visitor.fill(prompt="a fox", methods=["cfg"], ratio="3:2")
    visitor.send("ratio", "input")
    assert (visitor.value("width"), visitor.value("height")) == (40, 24)
    assert visitor.draw()[0].shape == (24, 40, 3)
    assert 'style="aspect-ratio: 5 / 3"' in visitor.value("stage")
    visitor.fill(width=None)
    assert visitor.draw()[0].shape == (24, 32, 3)  # the model's own width
    for model, width, said in (
        ("emu3-gen", "20", "width must be a multiple of 8"),
        ("emu3-gen", "0", "The width must be a whole number from 1"),
        ("emu3-gen", "16000", "but the model has 1024"),
        ("janus-pro-1b", "48", "draws images of 96 x 96 pixels only"),
    ):
        visitor.send(None, "load", f"model={model}&subject=a+fox&width={width}")
        assert said in visitor.value("status")
