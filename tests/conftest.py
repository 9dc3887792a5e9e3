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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from softcfg.configuration import load_config
    from softcfg.models.alitok import AliTok, AliTokConfig
    from softcfg.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = AliTok(load_config(AliTokConfig, GENERATOR))
        for parameter in generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        tokenizer = MaskGITVQ(load_config(MaskGITVQConfig, TOKENIZER))
    save_file(generator.state_dict(), folder / "generator.safetensors")
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    description = {
        "name": "tiny",
        "description": "random weights",
        "generator": {"family": "alitok", "config": GENERATOR, "checkpoint": "generator.safetensors"},
        "tokenizer": {"family": "maskgit-vq", "config": TOKENIZER, "checkpoint": "tokenizer.safetensors"},
        "sampling": {"guidance_scale": 3.0, "guidance_scale_pow": 0.5, "temperature": 0.9},
        "classes": CLASSES,
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    return folder


@pytest.fixture(scope="session")
def prompt_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from softcfg.configuration import load_config
    from softcfg.models.lumina import Lumina, LuminaConfig
    from softcfg.tokenizers import MoVQ, MoVQConfig
    from tiny_models import LUMINA, MOVQ, text_tokenizer

    folder = tmp_path_factory.mktemp("models") / "words"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = Lumina(load_config(LuminaConfig, LUMINA))
        for parameter in generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        tokenizer = MoVQ(load_config(MoVQConfig, MOVQ))
    save_file(generator.state_dict(), folder / "generator.safetensors")
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    text_tokenizer().save(str(folder / "tokenizer.json"))
    description = {
        "name": "words",
        "description": "random weights",
        "generator": {"family": "lumina-mgpt-2", "config": LUMINA, "checkpoint": "generator.safetensors"},
        "tokenizer": {"family": "movq", "config": MOVQ, "checkpoint": "tokenizer.safetensors"},
        "text": {"tokenizer": "tokenizer.json", "template": "{prompt}"},
        "sampling": {"guidance_scale": 3.0, "schedule": "constant", "temperature": 0.9, "top_k": 15},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
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
