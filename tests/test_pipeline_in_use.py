"""What may be done with a pipeline while it draws, in a callback or another thread: never with half of its weights."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softcfg import Pipeline, UserError
from softcfg.nn.products import PRODUCTS, use_product
from softcfg.zoo.source import describe_module

IN_USE = "the weights of the model are in use, as it draws at the moment"


@pytest.fixture
def pipe(model_folder: Path) -> Iterator[Pipeline]:
    """A pipeline of its own, whose weights lie nowhere but laid out while it draws."""
    pipeline = Pipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    weight = torch.empty(32, 32)
    names = [name for name, product in PRODUCTS.items() if product.serves_any_rows and product.can_serve(weight)]
    if not names:
        pytest.skip("no product runs here that takes the weights' place")
    with use_product(names[0]):
        yield pipeline


def here(do: Callable[[], object]) -> None:
    do()


def in_a_thread(do: Callable[[], object]) -> None:
    thread = threading.Thread(target=do)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()


def while_drawing(pipe: Pipeline, do: Callable[[], Any], run: Callable[[Callable[[], object]], None]) -> Any:
    """What `do` gives, or raises, in the middle of a drawing, which is not disturbed by it."""
    found: list[Any] = []

    def keep() -> None:
        try:
            found.append(do())
        except Exception as error:
            found.append(error)

    before = pipe([0, 1], seed=1).tokens
    drawn = pipe([0, 1], seed=1, on_step=lambda step: run(keep) if step == 3 else None).tokens
    assert torch.equal(drawn, before)
    assert torch.equal(pipe([0, 1], seed=1).tokens, before)
    return found[0]


@pytest.mark.parametrize("run", [here, in_a_thread])
def test_saving(pipe: Pipeline, tmp_path: Path, run: Callable) -> None:
    pipe.save_pretrained(tmp_path / "at-rest")
    assert while_drawing(pipe, lambda: pipe.save_pretrained(tmp_path / "drawing"), run) == tmp_path / "drawing"
    for name in ("generator.safetensors", "tokenizer.safetensors", "model.yaml"):
        assert (tmp_path / "drawing" / name).read_bytes() == (tmp_path / "at-rest" / name).read_bytes()


@pytest.mark.parametrize("run", [here, in_a_thread])
def test_what_is_written_down_of_the_model(pipe: Pipeline, run: Callable) -> None:
    assert while_drawing(pipe, lambda: describe_module(pipe.generator), run) == describe_module(pipe.generator)
    assert while_drawing(pipe, lambda: repr(pipe), run) == repr(pipe)


@pytest.mark.parametrize("run", [here, in_a_thread])
def test_copies(pipe: Pipeline, run: Callable) -> None:
    again = while_drawing(pipe, lambda: copy.deepcopy(pipe), run)
    assert torch.equal(again([0, 1], seed=1).tokens, pipe([0, 1], seed=1).tokens)
    shapes = {name: parameter.shape for name, parameter in pipe.generator.named_parameters()}
    assert {name: parameter.shape for name, parameter in again.generator.named_parameters()} == shapes


@pytest.mark.parametrize("run", [here, in_a_thread])
@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.to("float64"),
        lambda pipe: pipe.to("cpu"),
        lambda pipe: pipe.generator.double(),
        lambda pipe: pipe.generator.load_state_dict(pipe.generator.state_dict()),
    ],
    ids=["dtype", "device", "cast", "load"],
)
def test_changes_are_refused(pipe: Pipeline, change: Callable, run: Callable) -> None:
    error = while_drawing(pipe, lambda: change(pipe), run)
    assert isinstance(error, UserError)
    assert str(error).startswith(IN_USE)
    assert {parameter.dtype for parameter in pipe.generator.parameters()} == {torch.float32}
    change(pipe)


def test_nothing_is_moved_where_the_weak_model_cannot_be(pipe: Pipeline, model_folder: Path) -> None:
    other = Pipeline.from_pretrained(model_folder, weak=pipe)
    assert str(while_drawing(pipe, lambda: other.to("float64"), here)).startswith(IN_USE)
    assert other.dtype == pipe.dtype == torch.float32
    other.to("float64")
    assert other.dtype == pipe.dtype == torch.float64


def test_changes_are_refused_until_the_call_ends(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for half, name in ((pipe.generator, "new_cache"), (pipe.tokenizer, "decode")):  # before and after the steps
        usual = getattr(half, name)
        monkeypatch.setattr(half, name, lambda *args, usual=usual: (pipe.to("float64"), usual(*args)))
        with pytest.raises(UserError, match=IN_USE):
            pipe([0])
        monkeypatch.undo()
    assert pipe([0]).tokens.shape == (1, 16)


def test_threads_draw_with_one_pipeline(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts or ends meanwhile, and however many images each draws."""
    if not PRODUCTS["panels"].can_serve(torch.empty(32, 32)):
        pytest.skip("there are no kernels")
    monkeypatch.setenv("SOFTCFG_PRODUCT", "panels")  # a context is of one thread
    sizes = (1, 2, 3, 5)
    expected = {size: pipe([1] * size, seed=2).tokens for size in sizes}
    found: list[bool] = []

    def draw(size: int) -> None:
        found.extend(torch.equal(pipe([1] * size, seed=2).tokens, expected[size]) for _ in range(12))

    threads = [threading.Thread(target=draw, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12 * len(sizes)
    assert not any(hasattr(part, "is_prepared") and part.is_prepared for part in pipe.generator.modules())
