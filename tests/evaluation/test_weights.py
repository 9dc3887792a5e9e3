"""Weights of feature networks: downloaded once, whole, as published; or refused."""

import hashlib
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from goldens import golden
from softcfg import CheckpointError
from softcfg.evaluation import evaluate, extractors, load_extractor
from softcfg.evaluation.fashion_classifier import FashionClassifier
from softcfg.evaluation.inception import InceptionV3
from softcfg.evaluation.weights import INCEPTION_WEIGHTS, PublishedFile, download, load_network, require_weights

CONTENT = bytes(range(256)) * 20_000


class Web(ThreadingHTTPServer):
    """A web site with one file in several states of health."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Page)

    def file(self, path: str) -> PublishedFile:
        return PublishedFile(f"http://127.0.0.1:{self.server_port}{path}", hashlib.sha256(CONTENT).hexdigest())


class Page(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/moved/weights.pth":
            self.send_response(302)
            self.send_header("Location", "/weights.pth")
            self.end_headers()
            return
        if "weights" not in self.path:
            self.send_error(404)
            return
        body = CONTENT if self.path != "/other-weights.pth" else CONTENT[::-1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-1000] if self.path == "/cut-weights.pth" else body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Web() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints folder; it does not exist yet."""
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "some" / "checkpoints"))
    return tmp_path / "some" / "checkpoints"


@pytest.mark.parametrize("path", ["/weights.pth", "/moved/weights.pth"])
def test_a_file_is_downloaded_once(web: Web, folder: Path, path: str) -> None:
    assert require_weights(web.file(path)) == folder / "weights.pth"
    assert [found.read_bytes() for found in folder.iterdir()] == [CONTENT]
    asked = len(web.asked)
    assert require_weights(web.file(path)) == folder / "weights.pth"
    assert len(web.asked) == asked


def test_a_folder_that_cannot_be_written(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "file" / "folder"))
    file = web.file("/weights.pth")
    with pytest.warns(UserWarning, match=r"weights\.pth is not kept: cannot write into folder"):
        path = require_weights(file)
    assert path.read_bytes() == CONTENT
    assert require_weights(file) == path  # until the process ends


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/other-weights.pth", "its SHA-256 is .* and not .*: it is damaged or not the published file"),
        ("/cut-weights.pth", "its SHA-256 is|cannot be downloaded"),
        ("/gone.pth", r"cannot be downloaded \(Not Found\); download it by other means, and put it into"),
    ],
)
def test_what_is_not_the_file_is_not_kept(web: Web, folder: Path, path: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        require_weights(web.file(path))
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_no_network(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        file = PublishedFile(f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pth", "0" * 64)
        with pytest.raises(CheckpointError, match=r"cannot be downloaded \(.*refused"):
            require_weights(file)
    assert list(folder.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(web.file("/weights.pth"), folder / "weights.pth")
    assert list(folder.iterdir()) == []


def test_inception_weights_from_the_web_the_folder_and_a_path(
    web: Web, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = golden("inception/golden-features")
    path = tmp_path / "mine.pth"
    torch.save(case.weights(), path)
    content = path.read_bytes()
    monkeypatch.setitem(globals(), "CONTENT", content)
    monkeypatch.setattr(extractors, "INCEPTION_WEIGHTS", web.file("/weights.pth"))
    images = case.arrays["images_64x64"]
    expected = case.arrays["pool_64x64"]

    for _ in range(2):  # downloaded; found
        extractor = load_extractor("inception")
        assert extractor.identity == hashlib.sha256(content).hexdigest()
        assert extractor.note == ""
    assert web.asked == ["/weights.pth"]
    with torch.inference_mode():
        error = (extractor.describe(images).pooled - expected).abs().max() / expected.abs().max()
    assert error < 1e-5

    # Weights that were not published are used, and the report says so.
    monkeypatch.setattr(extractors, "INCEPTION_WEIGHTS", PublishedFile("http://127.0.0.1:1/x.pth", "0" * 64))
    report = evaluate(images.permute(0, 2, 3, 1), weights=path, metrics=["inception_score"])
    assert report.notes == [f"{path} is not the published file of Inception weights: figures compare with no paper's"]


def test_the_published_file() -> None:
    assert INCEPTION_WEIGHTS.name == "weights-inception-2015-12-05-6726825d.pth"
    assert INCEPTION_WEIGHTS.name.endswith(f"-{INCEPTION_WEIGHTS.sha256[:8]}.pth")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    cpu, float32 = torch.device("cpu"), torch.float32
    state = FashionClassifier().state_dict()
    save_file(state, tmp_path / "good.safetensors")
    module, digest = load_network(FashionClassifier, tmp_path / "good.safetensors", cpu, torch.float64)
    assert module.head.weight.dtype == torch.float64
    assert not module.training
    assert digest == hashlib.sha256((tmp_path / "good.safetensors").read_bytes()).hexdigest()

    with pytest.raises(CheckpointError, match="does not exist"):
        load_network(FashionClassifier, tmp_path / "gone.safetensors", cpu, float32)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated, damaged or not a weights file"):
        load_network(FashionClassifier, tmp_path / "cut.safetensors", cpu, float32)
    with pytest.raises(CheckpointError, match=r"does not fit the configured InceptionV3: 566 missing \("):
        load_network(InceptionV3, tmp_path / "good.safetensors", cpu, float32)
    state["head.bias"] = torch.zeros(11)
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias is \[11\], expected \[10\]"):
        load_network(FashionClassifier, tmp_path / "wide.safetensors", cpu, float32)
