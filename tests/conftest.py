"""Model folders small enough for every test.

One draws classes: 16 tokens of 20 codes, 4 named classes, 8 x 8 pixels. One reads prompts: 20 codes of 2 x 2 pixels,
4 to a grid cell of 4 x 4 pixels, 8 x 8 pixels by default.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

# Tests run beside each other, and their models are too small for several threads; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from softcfg import Pipeline
from softcfg.nn import choices, products

GENERATOR = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": 20,
    "condition_num_classes": 4, "image_seq_len": 16, "grid_size": 4,
}  # fmt: skip
TOKENIZER = {
    "channel_mult": [1, 1], "hidden_channels": 32, "num_res_blocks": 1, "resolution": 8, "z_channels": 4,
    "codebook_size": 20,
}  # fmt: skip
NEEDED = {  # by tests that are left out where it is missing, as in `make test-floor`
    "gradio": ["ui", "ui/*", "attack/test_web.py", "cli/test_ui.py"],
    "nbformat": ["test_notebooks.py"],
}
collect_ignore_glob = [files for module, tests in NEEDED.items() if find_spec(module) is None for files in tests]
AT_LENGTH = {"test_products.py"}  # where it matters what a measurement finds
CLASSES = ["Circle", "Square", "T-shirt/top", "Star"]


def pytest_configure() -> None:
    """Listen to SIGINT, which tests send: a shell starts its background jobs with their ears closed."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while modules are imported, nor for any in them later, where each search took a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_products(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave alone what this machine keeps; all processes of a session share what they measure and encode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTCFG_PRODUCTS", str(tmp_path_factory.mktemp("products")))
        patch.setenv("SOFTCFG_CAPTIONS", str(tmp_path_factory.mktemp("captions")))
        yield


@pytest.fixture(scope="module", autouse=True)
def short_measurements(request: pytest.FixtureRequest) -> Iterator[None]:
    """Choose among matrix products in passing: a test holds whichever is chosen, and most have shapes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in AT_LENGTH:
            patch.setattr(choices, "FEWEST", 2)
            patch.setattr(choices, "TURNS", 2)
            patch.setattr(choices, "cores", lambda: 1)  # several threads wait long for cores where other tests run
            patch.setattr(products, "MEASURED", 2**18)
        yield


def write_model(folder: Path, std: float, halves: dict[str, tuple[str, dict[str, object]]], **more: object) -> Path:
    """Write a model folder of random weights; `halves` are families and configurations, `more` is for model.yaml."""
    from softcfg.configuration import load_config
    from softcfg.zoo import GENERATORS, TOKENIZERS

    folder.mkdir()
    described = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind, families in (("generator", GENERATORS), ("tokenizer", TOKENIZERS)):
            family, config = halves[kind]
            module_class, config_class = families[family].classes()
            module = module_class(load_config(config_class, config))
            for parameter in module.parameters() if kind == "generator" else ():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=std)
            save_file(module.state_dict(), folder / f"{kind}.safetensors")
            described[kind] = {"family": family, "config": config, "checkpoint": f"{kind}.safetensors"}
    card = {"name": folder.name, "description": "random weights", **described, **more}
    (folder / "model.yaml").write_text(yaml.safe_dump(card))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    halves = {"generator": ("alitok", GENERATOR), "tokenizer": ("maskgit-vq", TOKENIZER)}
    sampling = {"guidance_scale": 3.0, "guidance_scale_pow": 0.5, "temperature": 0.9}
    return write_model(tmp_path_factory.mktemp("models") / "tiny", 0.5, halves, sampling=sampling, classes=CLASSES)


@pytest.fixture(scope="session")
def prompt_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import LUMINA, MOVQ, text_tokenizer

    halves = {"generator": ("lumina-mgpt-2", LUMINA), "tokenizer": ("movq", MOVQ)}
    text = {"tokenizer": "tokenizer.json", "template": "{prompt}"}
    sampling = {"guidance_scale": 3.0, "schedule": "constant", "temperature": 0.9, "top_k": 15}
    folder = tmp_path_factory.mktemp("models") / "words"
    write_model(folder, 0.3, halves, text=text, sampling=sampling)
    text_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def prompt_pipe(prompt_model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(prompt_model_folder)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the size that `model_folder` draws, to compare with."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    return path
