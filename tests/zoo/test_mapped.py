"""Weights that are converted while they are loaded are not in memory twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softcfg.zoo import load_generator
from softcfg.zoo.mapped import MAPS, MappedFiles
from tiny_models import ON_DRIVE, weights

NUMBERS = 1 << 22  # 16 MiB in float32

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")


def of_files() -> int:
    """MiB of mapped files that are in memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) >> 10


def mapped(folder: Path, suffix: str) -> Tensor:
    state = {"a": torch.arange(NUMBERS, dtype=torch.float32), "b": torch.ones(10)}
    if suffix == ".safetensors":
        save_file(state, folder / "weights.safetensors")
        return load_file(folder / "weights.safetensors")["a"]
    torch.save(state, folder / "weights.pt")
    loaded: Tensor = torch.load(folder / "weights.pt", weights_only=True, mmap=True)["a"]
    return loaded


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pages_of_files_are_given_back(tmp_path: Path, suffix: str) -> None:
    tensor = mapped(tmp_path, suffix)
    total = tensor.double().sum()
    before = of_files()
    MappedFiles().forget(tensor)
    assert before - of_files() >= 12
    assert tensor.double().sum() == total


def test_other_memory_is_left_alone() -> None:
    files = MappedFiles()
    for tensor in (torch.ones(NUMBERS), nn.Parameter(torch.ones(NUMBERS)).detach(), torch.ones(0), torch.ones(8, 8).T):
        files.forget(tensor)
        assert (tensor == 1).all()


def test_a_state_dict_of_one_s_own_is_left_alone(tmp_path: Path) -> None:
    """It may have been changed since it was read."""
    save_file(weights(ON_DRIVE.generator), tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    for tensor in state.values():
        tensor.fill_(0.5)
    generator = load_generator("alitok", ON_DRIVE.generator.config, state, dtype=torch.float64)
    assert all((tensor == 0.5).all() for tensor in state.values())
    assert all((tensor == 0.5).all() for tensor in generator.state_dict().values() if tensor.is_floating_point())
