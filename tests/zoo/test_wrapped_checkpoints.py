"""Checkpoints as trainings save them: wrapped in entries, with prefixes, beside things that are no weights."""

import argparse
import collections
import copy
import datetime
import pathlib
import random
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import softcfg
from goldens import golden
from softcfg import CheckpointError
from softcfg.zoo import read_state_dict

State = dict[str, Tensor]


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def marked(state: State) -> Any:
    """As FSDP, torch.compile and activation checkpointing name what they wrapped inside of a model."""
    marks = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
    made = {}
    for i, (name, tensor) in enumerate(state.items()):
        first, dot, rest = name.partition(".")
        made[f"{first}.{marks[i % 3]}{rest}" if dot else name] = tensor
    return made


def zeros(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    **{
        prefix: prefixed(prefix)
        for prefix in (
            "_orig_mod.",
            "module.",
            "_fsdp_wrapped_module.",
            "model.",
            "generator.",
            "net.",
            "_orig_mod.module.",
            "module._orig_mod.",
            "model._orig_mod.module.",
            "_fsdp_wrapped_module._orig_mod.model.generator.",
        )
    },
    "inside": marked,
    "inside and before": lambda state: prefixed("module._orig_mod.")(marked(state)),
    **{
        entry: lambda state, entry=entry: {entry: state, "epoch": 3}
        for entry in ("model", "state_dict", "ema", "model_ema", "model_state_dict", "generator", "ema_model", "foo")
    },
    "an extra epoch": lambda state: {**state, "epoch": 3},
    "nested": lambda state: {"model": {"module": state}},
    "nested, with prefixes": lambda state: {"state": {"model": prefixed("module.")(marked(state))}, "step": 1},
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **prefixed("module.")(state)},
    "averaged in an entry": lambda state: {
        "model": None,
        "ema": {"n_averaged": torch.tensor(7), **prefixed("module._orig_mod.")(state)},
    },
    "beside other models": lambda state: {
        "generator": state,
        "discriminator": {"conv.weight": torch.ones(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1}]},
    },
    "beside other models, by prefix": lambda state: {
        "state_dict": {**prefixed("net.")(state), "loss.discriminator.weight": torch.ones(3)}
    },
}
FAMILIES = [
    ("generator", "alitok", "alitok/golden-generator-cfg"),
    ("generator", "llamagen", "llamagen/golden-generator-cfg-a"),
    ("generator", "llamagen-t2i", "llamagen-t2i/golden-generator-cfg-a"),
    ("generator", "janus-pro", "janus/golden-generator-cfg-a"),
    ("generator", "janus-pro", "janus/golden-generator-original-a"),
    ("generator", "emu3", "emu3/golden-generator-original-a"),
    ("generator", "lumina-mgpt-2", "lumina/golden-generator-forward-swinnorm"),
    ("tokenizer", "alitok", "alitok/golden-tokenizer-decode"),
    ("tokenizer", "robustok", "robustok/golden-tokenizer-decode-a"),
    ("tokenizer", "llamagen-vq", "llamagen/golden-tokenizer-decode-a"),
    ("tokenizer", "janus-vq", "janus/golden-tokenizer-decode-original-a"),
]
# Of the small Lumina, whose vocabulary has no room for the published special tokens.
IDS = {
    "prompt_start_id": 60, "separator_id": 456, "image_start_id": 61, "image_end_id": 62, "new_line_id": 66,
    "size_id": 67, "first_code_id": 200, "num_codes": 256, "image_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[2])
def family(request: pytest.FixtureRequest) -> tuple[Callable[[Any], State], State]:
    """What loads a checkpoint of a family, and the weights of a small model of it under their published names."""
    kind, name, file = request.param
    known = golden(file)
    config = known.config | (IDS if name == "lumina-mgpt-2" else {})
    load = softcfg.load_generator if kind == "generator" else softcfg.load_tokenizer
    return lambda checkpoint: dict(load(name, config, checkpoint).state_dict()), known.weights()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:weights of the")
@pytest.mark.parametrize("wrap", WRAPPED)
def test_every_family_reads_wrapped_weights(family: tuple[Callable[[Any], State], State], wrap: str) -> None:
    load, weights = family
    assert same(load(WRAPPED[wrap](weights)), load(weights))


def test_what_is_as_published_is_read_without_a_word(family: tuple[Callable[[Any], State], State]) -> None:
    load, weights = family
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(weights)
        load({"model": weights})


ALITOK = golden("alitok/golden-generator-cfg")


def load_alitok(checkpoint: Any) -> State:
    return dict(softcfg.load_generator("alitok", ALITOK.config, checkpoint).state_dict())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda state: prefixed("_orig_mod.")(state), "names without _orig_mod."),
        (lambda state: {"model_ema": state}, "the entry model_ema"),
        (lambda state: {"ema": prefixed("module._orig_mod.")(state)}, "the entry ema, names without module. and _orig"),
        (lambda state: {"model": {"module": state}}, "the entry model / module"),
        (lambda state: {**prefixed("net.")(state), "n": torch.ones(1)}, "without 1 tensor that has no such prefix"),
        (lambda state: {"model": state, "ema": zeros(state)}, "the entry model"),  # there was a choice
    ],
)
def test_a_message_names_what_was_unwrapped(content: Callable[[State], Any], words: str) -> None:
    with pytest.warns(UserWarning, match=f"weights of the alitok generator were read from .*{words}"):
        load_alitok(content(ALITOK.weights()))


def test_so_does_the_refusal_of_weights_that_do_not_fit() -> None:
    state = ALITOK.weights()
    state.pop("norm.weight")
    with (
        pytest.warns(UserWarning, match="the entry ema"),
        pytest.raises(CheckpointError, match=r"entry ema, names without module.\).*1 missing"),
    ):
        load_alitok({"ema": prefixed("module.")(state)})


@pytest.mark.filterwarnings("ignore:weights of the")
def test_an_unexpected_tensor_among_the_weights_is_still_refused() -> None:
    for state in (
        {**ALITOK.weights(), "lora.weight": torch.ones(2)},
        prefixed("module.")({**ALITOK.weights(), "lora.weight": torch.ones(2)}),
    ):
        with pytest.raises(CheckpointError, match=r"1 unexpected \((module\.)?lora\.weight\)"):
            load_alitok(state)


@pytest.mark.filterwarnings("ignore:weights of the")
def test_what_torch_itself_makes() -> None:
    """Of the wrappers that exist on one processor."""
    plain = softcfg.load_generator("alitok", ALITOK.config, ALITOK.weights())
    weights = dict(plain.state_dict())
    compiled = torch.compile(plain)
    averaged = torch.optim.swa_utils.AveragedModel(plain)
    both = torch.optim.swa_utils.AveragedModel(nn.DataParallel(copy.deepcopy(plain)))
    for module in (compiled, averaged, both):
        assert module.state_dict().keys() != weights.keys()
        assert same(load_alitok(module.state_dict()), weights)


def settings() -> argparse.Namespace:
    return argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), nested=argparse.Namespace(deep=None))


HARMLESS: dict[str, Any] = {
    "a Namespace": settings(),
    "a SimpleNamespace": types.SimpleNamespace(a=1),
    "a float of numpy": np.float64(0.5),
    "an integer of numpy": np.int64(3),
    "a bool of numpy": np.bool_(True),
    "an array of numpy": np.ones((2, 3), dtype=np.float32),
    "random states": {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()},
    "a path": pathlib.Path("out"),
    "a time": datetime.datetime(2026, 1, 2),
    "a defaultdict": collections.defaultdict(list),
    "a set of types": {"dtype": torch.bfloat16, "device": torch.device("cpu"), "size": torch.Size([1])},
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_types_beside_the_weights(tmp_path: Path, kind: str, old_format: bool) -> None:
    path = tmp_path / "weights.pt"
    content = {"model": ALITOK.weights(), "other": HARMLESS[kind], "loss": [HARMLESS[kind]]}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    assert same(load_alitok(path), load_alitok(ALITOK.weights()))


def test_harmless_types_in_every_family(tmp_path: Path, family: tuple[Callable[[Any], State], State]) -> None:
    load, weights = family
    path = tmp_path / "weights.pt"
    torch.save({"model": weights, "args": settings(), "loss": np.float32(2)}, path)
    assert same(load(path), load(weights))


def omegaconf_stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Classes with the names of OmegaConf's, for files like those it makes; none of their code may run in reading."""

    def refuse(self: Any, state: Any) -> None:
        raise AssertionError("code of the class was run")

    made = {}
    for module, names in {
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
        "omegaconf.nodes": ["AnyNode"],
    }.items():
        fake = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (), {"__module__": module, "__setstate__": refuse})
            setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    return made


def test_containers_of_omegaconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    made = omegaconf_stand_ins(monkeypatch)
    node, metadata, config = made["AnyNode"](), made["ContainerMetadata"](), made["DictConfig"]()
    node.__dict__.update(_metadata=made["Metadata"](), _val=3)
    metadata.__dict__.update(ref_type=Any, object_type=dict, resolver_cache=collections.defaultdict(dict))
    config.__dict__.update(_metadata=metadata, _parent=None, _content={"lr": node, "list": made["ListConfig"]()})
    torch.save({"model": ALITOK.weights(), "config": config}, path)
    monkeypatch.undo()  # whoever reads the file need not have OmegaConf
    assert same(load_alitok(path), load_alitok(ALITOK.weights()))


def test_containers_of_the_real_omegaconf(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": {"b": [1, 2.5, "x", None, True]}, "c": "${a.b}", "d": {}})
    torch.save({"model": ALITOK.weights(), "config": config}, tmp_path / "weights.pt")
    assert same(load_alitok(tmp_path / "weights.pt"), load_alitok(ALITOK.weights()))


@pytest.mark.parametrize("name", ["weights.PT", "weights.Pth", "weights.BIN", "weights.CKPT", "weights.SafeTensors"])
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    state = {"weight": torch.ones(2)}
    (save_file if name.endswith("Tensors") else torch.save)(state, tmp_path / name)
    assert same(read_state_dict(tmp_path / name), state)


def test_a_mapping_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content.update(dict.fromkeys(("model", "ema", *map(str, range(20))), content))
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        load_alitok(tmp_path / "weights.pt")
