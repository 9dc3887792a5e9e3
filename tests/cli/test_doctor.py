"""`softcfg doctor` says what there is, tests it, and sees what is wrong."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from softcfg import doctor
from softcfg.cli.main import main
from softcfg.nn import choices as nn_choices
from softcfg.nn import products
from softcfg.nn.backends import BACKENDS, AttentionCall, numba_decode
from softcfg.nn.backends.math import Math
from softcfg.nn.kernels import available

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of the memory is measured on few bytes."""
    monkeypatch.setattr(doctor, "bandwidth", lambda device: doctor_bandwidth(device, 2**20))


doctor_bandwidth = doctor.bandwidth


@pytest.mark.usefixtures("quick")
def test_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--no-test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["device"] == "cpu"
    assert "not triton_decode: it runs on GPUs alone" in found["choices"]["attention, float32"]
    assert {"fashion", "fashion-small", "emoji"} <= found["models"].keys()
    assert found["models"]["fashion"]["largest batch"] > 1
    assert found["checks"] == []
    assert found["ok"]


@pytest.mark.parametrize("name", ["numba_decode", "embedding_bag", "math"])
def test_the_attention_is_that_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradient is asked for, which some backends do not have."""
    if name == "numba_decode":
        pytest.importorskip("numba")
    monkeypatch.setattr(numba_decode, "is_faster", lambda: name == "numba_decode")
    for dtype in ("float32", "bfloat16"):
        key = f"attention-{dtype}", ("embedding_bag", "math")
        monkeypatch.setitem(nn_choices.MADE, key, "math" if name == "math" else "embedding_bag")
    found = doctor.choices(CPU)
    assert found["attention, float32"].startswith(f"{name}; ")
    assert ("not embedding_bag: it is slower" in found["attention, bfloat16"]) == (name == "math")
    assert ("not numba_decode: it is slower" in found["attention, float32"]) == (
        name != "numba_decode" and available.has_numba()
    )


def test_what_is_forced_or_turned_off_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("SOFTCFG_PRODUCT", "plain")
    monkeypatch.setattr(available, "has_numba", lambda: False)
    found = doctor.choices(CPU)
    assert found["matrix product, 2 rows"] == "plain, as was asked for"
    assert found["steps"].endswith("Numba's kernels are turned off by SOFTCFG_CPU_KERNELS")
    monkeypatch.setattr(available, "has_numba", lambda: True)
    monkeypatch.setattr(available, "cpu_kernels", lambda: None)
    assert doctor.choices(CPU)["steps"].endswith("Numba's kernels do not run here")


def test_a_product_is_measured_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen here is kept for the models, whose weights come from there."""
    measured: list[int] = []

    def fastest(able: object, weights: list[Tensor], *_: object) -> products.Product:
        measured.append(sum(weight.nbytes for weight in weights))
        return products.PRODUCTS["plain"]

    monkeypatch.setattr(products, "MEASURED", 2**26)
    monkeypatch.setattr(products, "_fastest", fastest)
    monkeypatch.setattr(products, "choose_once", lambda key, names, measure: measure())
    doctor.choices(CPU)
    assert min(measured) > products.MEASURED // 2


@pytest.mark.usefixtures("quick")
def test_a_sound_machine_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "fitting_batches", lambda device: {})
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "attention against float64  ok: " in out
    assert "repeated steps             ok: 100.0%" in out
    assert "tokens against the CPU's   -: the device is the CPU" in out
    assert "images/s" in out


def test_wrong_attention_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def off(call: AttentionCall) -> Tensor:
        out = Math.attend(BACKENDS["math"], call)  # type: ignore[arg-type]
        return out if call.query.dtype == torch.float64 else out + 1e-4

    monkeypatch.setattr(available, "has_numba", lambda: False)
    monkeypatch.setattr(BACKENDS["math"], "attend", off)
    monkeypatch.setattr(doctor, "TESTS", {"attention": doctor.TESTS["attention against float64"]})
    for other in ("choices", "fitting_batches"):
        monkeypatch.setattr(doctor, other, lambda device: {})
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [check["ok"] for check in found["checks"]] == [False]


def test_other_tokens_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = doctor.decode

    def other(*args: Any, static: bool | None = None, **kwargs: Any) -> Tensor:
        return decode(*args, static=static, **kwargs) + int(bool(static))

    monkeypatch.setattr(doctor, "decode", other)
    ok, detail = doctor.TESTS["repeated steps"](CPU)
    assert not ok
    assert detail.startswith("0.0%")


def test_the_tokens_of_another_device_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU whose weights are off; its model is loaded on the CPU."""
    load = doctor.load_generator

    def loaded(name: str, device: Any) -> Any:
        generator = load(name)
        if str(device) == "meta" and off:
            with torch.no_grad():
                next(iter(generator.blocks[0].parameters())).add_(1)
        return generator

    monkeypatch.setattr(doctor, "load_generator", loaded)
    monkeypatch.setattr(doctor, "COMPARED", ("fashion-small",))
    for off in (False, True):
        ok, detail = doctor.TESTS["tokens against the CPU's"](torch.device("meta"))
        assert ok is not off
        assert ("100.0% of the tokens" in detail) is not off


def test_steps_of_one_image_that_draw_others_are_found_where_logits_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    load, decode = doctor.load_generator, doctor.decode
    there: list[Any] = []

    def loaded(name: str, device: Any) -> Any:
        generator = load(name)
        there.extend([generator] if str(device) == "meta" else [])
        return generator

    def other(generator: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens = decode(generator, inputs, *args, **kwargs)
        return tokens ^ 1 if generator in there and len(inputs) == 1 else tokens

    monkeypatch.setattr(doctor, "load_generator", loaded)
    monkeypatch.setattr(doctor, "decode", other)
    monkeypatch.setattr(doctor, "COMPARED", ("fashion-small",))
    ok, detail = doctor.TESTS["tokens against the CPU's"](torch.device("meta"))
    assert not ok
    assert detail == "fashion-small: 0.0% of the tokens are the CPU's, logits differ by up to 0"


def test_errors_and_warnings_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(device: torch.device) -> tuple[bool, str]:
        warnings.warn("the kernel does not run", RuntimeWarning, stacklevel=1)
        return True, "fine"

    monkeypatch.setattr(doctor, "TESTS", {"breaks": lambda device: 1 / 0, "warns": warns})
    assert list(doctor.self_test(CPU)) == [
        doctor.Check("breaks", False, "ZeroDivisionError: division by zero"),
        doctor.Check("warns", True, "fine; the kernel does not run"),
    ]


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:77"]) == 2
    assert "device 'cuda:77' is not available here" in capsys.readouterr().err
