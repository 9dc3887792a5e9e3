"""`${...}` in configurations means what OmegaConf makes of it."""

from pathlib import Path
from typing import Any

import pytest

from softcfg import UserError
from softcfg.cli.main import main
from softcfg.configuration import load_config, parse_yaml
from softcfg.interpolation import interpolated
from softcfg.models.alitok import AliTokConfig

TEXT = r"""
a: {b: 3, c: "${.b}", d: "${..e}", list: [1, "${a.b}"], f: 0.5, g: true, h: null}
e: text
name: b
x: "${a.b}"
nested: "${a.${name}}"
mixed: "${oc.env:SOFTCFG_HERE}/runs/${a.b}-${e}-${a.f}-${a.g}-${a.h}"
env: "${oc.env:SOFTCFG_HERE}"
default: "${oc.env:SOFTCFG_ABSENT,there}"
quoted: "${oc.env:SOFTCFG_ABSENT,'a, b'}"
null: "${oc.env:SOFTCFG_ABSENT,null}"
number: "${oc.env:SOFTCFG_NUMBER}"
item: "${a.list.1}"
bracket: "${a[list][0]}"
section: {s: "${a}"}
through: "${section.s.b}"
chain: "${x}"
escaped: \${a.b}
plain: $HOME and {a}
absent: "${nothing.here}"
circle: "${circle2}"
circle2: "${circle}"
variable: "${oc.env:SOFTCFG_ABSENT}"
resolver: "${hydra:runtime.cwd}"
"""
GOOD = ("a.c", "a.d", "a.list", "x", "nested", "mixed", "env", "default", "quoted", "null", "number", "item", "bracket",
        "section.s", "through", "chain", "escaped", "plain")  # fmt: skip
BAD = ("absent", "circle", "variable", "resolver")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCFG_HERE", "/data")
    monkeypatch.setenv("SOFTCFG_NUMBER", "7")
    monkeypatch.delenv("SOFTCFG_ABSENT", raising=False)


def content() -> Any:
    values = parse_yaml(TEXT)
    return {"null" if name is None else name: value for name, value in values.items()}


@pytest.mark.parametrize("name", GOOD)
def test_as_omegaconf(name: str) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(content())
    expected = omegaconf.OmegaConf.select(config, name)
    if omegaconf.OmegaConf.is_config(expected):
        expected = omegaconf.OmegaConf.to_container(expected, resolve=True)
    found = interpolated(content(), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_resolved(name: str) -> None:
    with pytest.raises(UserError, match=name):
        interpolated(content(), name)
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(content())
    with pytest.raises((omegaconf.errors.OmegaConfBaseException, RecursionError)):
        omegaconf.OmegaConf.select(config, name, throw_on_resolution_failure=True)


@pytest.mark.parametrize("text", ["${a", "${a ${b}", "${}", "${a b}", "${.}", "${....a}"])
def test_what_is_no_interpolation(text: str) -> None:
    with pytest.raises(UserError, match="x: "):
        interpolated({"x": text, "b": "}"}, "x")


def test_values_without_much_to_say() -> None:
    config = {"a": "${b}${b}${b}${b}", "b": "${c}${c}${c}${c}" * 40, "c": "x" * 10}
    assert len(interpolated(config, "a")) == 6400
    with pytest.raises(UserError, match="too much"):
        interpolated({**config, "b": "${c}" * 2000}, "a")


def test_configurations_of_models() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": "${.num_hidden_layers}",
             "codebook_size": "${model.vq_model.codebook_size}", "condition_num_classes": 3, "image_seq_len": 6,
             "grid_size": 2}  # fmt: skip
    config = {"model": {"generator": sizes, "vq_model": {"codebook_size": 16}}, "experiment": {"x": "${now:%Y}"}}
    loaded = load_config(AliTokConfig, config, ("model.vq_model", "model.generator"))
    assert (loaded.codebook_size, loaded.num_attention_heads) == (16, 2)


def test_a_released_command_line(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "experiment: {name: trial, output_dir: '${oc.env:HOME}/${.name}', log: '${hydra:x}'}\n"
        "model: {generator: {seed: '${training.seed}'}}\ntraining: {seed: 5}\n"
    )
    words = ["sample", str(model_folder), "--config", "c.yaml", "--num-samples", "2", "--no-npz"]
    assert main([*words, "experiment.name=other", "model.generator.guidance_scale=2"]) == 0
    assert (tmp_path / "other" / "run.json").exists()
    assert '"seed": 5' in (tmp_path / "other" / "run.json").read_text()
    assert main([*words, "experiment.output_dir=~/home"]) == 0
    assert (tmp_path / "home" / "run.json").exists()
    assert not (tmp_path / "~").exists()
