"""The matrix products of linear layers: each computes the same, and the choice among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import softcfg
from softcfg import UserError
from softcfg.decoding import throughput
from softcfg.nn import choices, precision, products
from softcfg.nn.choices import forget_choices
from softcfg.nn.linear import Linear, prepared_linear_layers
from softcfg.nn.products import PRODUCTS, OneDNN, Plain, choose, keeps_bits, use_product


@pytest.fixture(autouse=True)
def own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path / "products"))
    monkeypatch.setattr(choices, "MADE", {})
    return tmp_path / "products"


def able(dtype: torch.dtype) -> list[str]:
    return [name for name, product in PRODUCTS.items() if product.can_serve(torch.empty(2, 2, dtype=dtype))]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_computes_the_same(name: str, rows: int, bias: bool, dtype: torch.dtype) -> None:
    if name not in able(dtype):
        pytest.skip("not on this machine")
    torch.manual_seed(rows)
    layer = Linear(48, 96, bias=bias, dtype=dtype).requires_grad_(False)
    before, exact = layer.weight.clone(), layer.weight.double()
    for shape in ((rows, 48), (rows, 1, 48), (-(-rows // 2), 1, 48), (rows + 1, 48), (2, rows, 48), (rows, 0, 48)):
        x = torch.randn(shape).to(dtype)
        expected = x.double() @ exact.T + (layer.bias.double() if bias else 0)
        with use_product(name), prepared_linear_layers(layer, rows):
            got = layer(x)
            assert (layer.product is None) == (name == "plain")
        assert got.shape == expected.shape
        assert got.is_contiguous()  # what follows looks at channels in pairs
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert layer.product is layer.laid_out is None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_are_not_kept_twice_where_the_laid_out_ones_serve(name: str) -> None:
    layer = Linear(48, 96).requires_grad_(False)
    with use_product(name), torch.inference_mode(), prepared_linear_layers(layer, 4):
        assert bool(layer.weight.numel()) == (layer.product is None or not layer.product.serves_any_rows)
    layer.requires_grad_(True)
    layer(torch.randn(2, 48)).sum().backward()  # no tensor of inference mode is left behind


@pytest.mark.parametrize("name", PRODUCTS)
def test_shared_weights_stay_where_they_are(name: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(96, 48), "head": Linear(48, 96, bias=False)})
    model["head"].weight = model["embedding"].weight
    with use_product(name), torch.no_grad(), prepared_linear_layers(model, 2):
        hidden = model["embedding"](torch.tensor([3, 5]))
        torch.testing.assert_close(model["head"](hidden), hidden @ model["embedding"].weight.T)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_context_within_another_leaves_the_layers_to_that_one(name: str) -> None:
    layer = Linear(48, 96).requires_grad_(False)
    x, before = torch.randn(5, 48), layer.weight.clone()
    with use_product(name), prepared_linear_layers(layer, 4):
        product = layer.product
        with prepared_linear_layers(layer, 5):
            assert layer.product is product
            torch.testing.assert_close(layer(x), x @ before.T + layer.bias)
        assert layer.product is product
    assert torch.equal(layer.weight, before)


def test_memory_is_given_back_after_an_error() -> None:
    layer = Linear(16, 16)
    before = layer.weight.clone()
    with pytest.raises(KeyError), prepared_linear_layers(layer, 4):
        raise KeyError
    assert layer.product is None
    assert torch.equal(layer.weight, before)


class Failing(OneDNN):
    """A product that lays out one layer and fails at the next."""

    def __init__(self, error: BaseException) -> None:
        self.name, self.error, self.done = "failing", error, 0

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        self.done += 1
        if self.done == 2:
            raise self.error
        return super().lay_out(weight, rows)


OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes"


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (RuntimeError(OUT_OF_MEMORY), RuntimeWarning),
        (MemoryError(), RuntimeWarning),
        (RuntimeError("another"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_no_weight_is_lost_when_preparing_fails(
    error: BaseException, caught: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "onednn" not in able(torch.float32):
        pytest.skip("not on this machine")
    model = nn.Sequential(Linear(16, 16), Linear(16, 16), Linear(16, 16)).requires_grad_(False)
    before, x = [weight.clone() for weight in model.parameters()], torch.randn(4, 16)
    expected = model(x)
    monkeypatch.setitem(PRODUCTS, "failing", Failing(error))
    expectation = pytest.warns(caught, match="no memory") if caught is RuntimeWarning else pytest.raises(caught)
    with use_product("failing"), expectation, prepared_linear_layers(model, 4):
        torch.testing.assert_close(model(x), expected)
        assert [layer.product is None for layer in model] == [False, True, True]
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_model_made_in_inference_mode_computes_as_before(name: str) -> None:
    with torch.inference_mode():
        layers = torch.nn.Sequential(Linear(64, 96))
        x = torch.randn(8, 64)
        with use_product(name), prepared_linear_layers(layers, 8):
            prepared = layers(x)
        torch.testing.assert_close(layers(x), prepared)


def test_weights_are_prepared_as_they_are_now() -> None:
    layer = Linear(16, 16, bias=False).requires_grad_(False)
    x = torch.randn(4, 16)
    for _ in range(2):
        expected = x @ layer.weight.normal_().T
        with prepared_linear_layers(layer, 4):
            torch.testing.assert_close(layer(x), expected)


def test_float64_stays_as_it_is() -> None:
    layer = Linear(16, 16, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(4, 16, dtype=torch.float64)
    plain = layer(x)
    with prepared_linear_layers(layer, 4):
        assert torch.equal(layer(x), plain)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", PRODUCTS)
def test_bits_do_not_depend_on_threads_where_it_is_said(name: str) -> None:
    product = PRODUCTS[name]
    if name not in able(torch.float32):
        pytest.skip("not on this machine")
    for rows, inputs, outputs in ((2, 96, 288), (6, 344, 128), (16, 1024, 512), (20, 2048, 96)):
        weight = torch.randn(outputs, inputs)
        said, laid_out = keeps_bits(product, [weight], None, rows), product.lay_out(weight, rows)
        for _ in range(4 if said else 0):
            x, found = torch.randn(rows, inputs), []
            for count in (1, 2):
                torch.set_num_threads(count)
                with torch.inference_mode():
                    found.append(product.multiply(x, laid_out, weight, None, rows))
            assert torch.equal(*found)


class Divided(Plain):
    """A product whose bits depend on the number of threads from 256 columns on."""

    tried = 0

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        self.tried += 1
        return super().multiply(x, laid_out, weight, bias, rows) + (x.shape[1] >= 256) * torch.get_num_threads()


@pytest.mark.usefixtures("threads")
def test_whether_threads_change_the_bits_is_tried_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    divided = Divided()
    small, large = [torch.randn(96, 64)] * 2, [torch.randn(96, 256)] * 2
    for _ in range(2):
        assert keeps_bits(divided, small, None, 4)
        assert not keeps_bits(divided, large, None, 4)
        assert divided.tried == 2 * (2 + 2)
        choices.MADE.clear()  # another process reads what was kept
    monkeypatch.setitem(PRODUCTS, "plain", divided)
    with use_product("plain"):
        for width, same in ((64, True), (256, False)):
            layer = Linear(width, 96, bias=False)
            with prepared_linear_layers(layer, 4):
                assert layer.keeps_bits is same
            assert not layer.keeps_bits


WHICH = "product-float32-8x64x64", ("other", "plain")


class Counted(Plain):
    """A product that takes as many seconds as it says, by a clock of its own, and counts what it lays out.

    Args:
        speed_up: how many times as fast it is on several threads.
    """

    now = 0.0

    def __init__(self, name: str, seconds: float, speed_up: float = 1) -> None:
        self.name, self.seconds, self.speed_up, self.laid_out, self.largest = name, seconds, speed_up, 0, 0

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        self.laid_out, self.largest = self.laid_out + 1, max(self.largest, weight.nbytes)
        return weight

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        Counted.now += self.seconds / (self.speed_up if torch.get_num_threads() > 1 else 1)
        return super().multiply(x, laid_out, weight, bias, rows)


class TestChoice:
    @pytest.fixture
    def both(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Counted]:
        plain, other = Counted("plain", 20), Counted("other", 1)
        monkeypatch.setattr(products, "PRODUCTS", {"plain": plain, "other": other})
        for clock in ("thread_time", "perf_counter"):
            monkeypatch.setattr(choices.time, clock, lambda: Counted.now)
        monkeypatch.setattr(choices, "cores", lambda: 2)
        return plain, other

    def test_the_fastest_is_chosen_and_kept(self, both: tuple[Counted, Counted], own_choices: Path) -> None:
        weights = [torch.randn(64, 64) for _ in range(2)]
        assert choose(weights, None, 8) is both[1]
        assert [each.laid_out for each in both] == [2, 2]
        choices.MADE.clear()  # another process reads what was kept
        assert choose(weights, None, 8) is both[1]
        assert both[1].laid_out == 2
        assert [path.read_text() for path in own_choices.iterdir()] == ["other"]
        forget_choices()
        choose(weights, None, 8)
        assert both[1].laid_out == 4

    def test_layers_are_measured_from_memory_as_in_a_step(self, both: tuple[Counted, Counted]) -> None:
        weight = torch.randn(1024, 1024)  # 4 MiB; the caches of a core hold a few
        choose([weight] * 40, None, 8)
        assert both[1].laid_out * weight.nbytes == products.MEASURED
        both[1].laid_out = 0
        choose([torch.randn(64, 64)] * 40, None, 8)
        assert both[1].laid_out == 40  # small ones all, as a step has no more of them

    def test_a_layer_alone_is_measured_from_memory_too(self, both: tuple[Counted, Counted]) -> None:
        """A head, which has a shape of its own, in a model of 40 times its size, and in one of three times."""
        for rows, times, measured in ((8, 40, 16), (7, 3, 3)):
            both[1].laid_out = 0
            weight = torch.randn(1024, 1024)
            choose([weight], None, rows, in_all=times * weight.nbytes)
            assert both[1].laid_out == measured

    def test_of_a_huge_layer_a_part_is_measured(
        self, both: tuple[Counted, Counted], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All products lay it out at the same time, and a head may have gigabytes."""
        monkeypatch.setattr(products, "MEASURED", 1 << 16)
        weight, bias = torch.randn(4096, 128), torch.randn(4096)
        assert choose([weight], bias, 8, in_all=100 * weight.nbytes) is both[1]
        assert (both[1].laid_out, both[1].largest) == (1, 1 << 16)
        products.faster_dtype({(4096, 128): 1}, 8)
        assert (both[1].laid_out, both[1].largest) == (1 + 2, 1 << 16)

    def test_a_product_that_gains_nothing_is_not_worth_its_memory(self, both: tuple[Counted, Counted]) -> None:
        both[1].seconds = 19
        assert choose([torch.randn(64, 64)], None, 8) is both[0]
        both[1].serves_any_rows = True  # then it takes no more memory
        assert choose([torch.randn(64, 64)], None, 7) is both[1]

    @pytest.mark.parametrize(("one", "all_", "name"), [(22, 4, "other"), (8, 30, "other"), (30, 10, "plain")])
    def test_the_better_number_of_threads_counts(
        self, both: tuple[Counted, Counted], one: float, all_: float, name: str
    ) -> None:
        both[0].speed_up = 2  # 20 and 10 seconds
        both[1].seconds, both[1].speed_up = one, one / all_
        assert choose([torch.randn(64, 64)], None, 8).name == name

    @pytest.mark.parametrize(("pace", "name"), [(1.0, "other"), (1.1, "other"), (1.5, "plain")])
    def test_beside_other_work_the_time_of_the_processor_decides_alone(
        self, both: tuple[Counted, Counted], pace: float, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both[1].seconds, both[1].speed_up = 22, 5
        monkeypatch.setattr(choices.time, "perf_counter", lambda: pace * Counted.now)
        assert choose([torch.randn(64, 64)], None, 8).name == name

    def test_a_layer_is_measured_for_its_usual_rows(
        self, both: tuple[Counted, Counted], own_choices: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = nn.ModuleList([Linear(16, 16), Linear(16, 16)])
        module[1].usual_rows = 64
        x, measured, seconds = torch.randn(64, 16), [], products._seconds
        monkeypatch.setattr(
            products,
            "_seconds",
            lambda able, weights, bias, rows: measured.append(rows) or seconds(able, weights, bias, rows),
        )
        wanted = [layer(x) for layer in module]
        with prepared_linear_layers(module, 2):
            assert [layer.product for layer in module] == [both[1]] * 2
            torch.testing.assert_close([layer(x) for layer in module], wanted)
        assert measured == [2, 64]

    def test_who_writes_first_decides(self, both: tuple[Counted, Counted], own_choices: Path, monkeypatch) -> None:
        measured = products._fastest

        def another_is_first(*args: object) -> products.Product:
            own_choices.mkdir(exist_ok=True)
            choices._path(WHICH).write_text("plain")
            return measured(*args)

        monkeypatch.setattr(products, "_fastest", another_is_first)
        assert choose([torch.randn(64, 64)], None, 8) is both[0]

    def test_who_forgets_meanwhile_does_no_harm(self, both: tuple[Counted, Counted], monkeypatch) -> None:
        def link(*_: object) -> None:
            raise FileExistsError

        monkeypatch.setattr(choices.os, "link", link)
        assert choose([torch.randn(64, 64)], None, 8) is both[1]

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xff", b"x" * 1000])
    def test_a_damaged_choice_is_measured_again(
        self, both: tuple[Counted, Counted], own_choices: Path, content: bytes
    ) -> None:
        own_choices.mkdir()
        choices._path(WHICH).write_bytes(content)
        assert choose([torch.randn(64, 64)], None, 8) is both[1]

    def test_a_home_that_cannot_be_written_to(
        self, both: tuple[Counted, Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path / "file" / "products"))
        assert choose([torch.randn(64, 64)], None, 8) is both[1]

    def test_a_home_of_nobody(
        self, both: tuple[Counted, Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(choices.FOLDER_VARIABLE, "~nobody-of-this-name/products")  # a folder, as for a shell
        assert choose([torch.randn(64, 64)], None, 8) is both[1]
        assert choices._kept(WHICH) == "other"

    def test_the_variable_and_the_context(self, both: tuple[Counted, Counted], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(products.PRODUCT_VARIABLE, "plain")
        assert choose([torch.randn(64, 64)], None, 8) is both[0]
        with use_product("other"):
            assert choose([torch.randn(64, 64)], None, 8) is both[1]
        monkeypatch.setenv(products.PRODUCT_VARIABLE, "fastest")
        with pytest.raises(UserError, match="PRODUCT: there is no matrix product 'fastest'; there are plain, other"):
            choose([torch.randn(64, 64)], None, 8)


class Wrong(Plain):
    """Takes no time, for it computes something else, or nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if self.name == "failing":
            raise RuntimeError("could not create a primitive")
        return x if self.name == "narrow" else x.new_zeros(rows, len(weight))


@pytest.mark.parametrize("name", ["zero", "narrow", "failing"])
def test_a_product_that_does_not_work_on_this_processor_is_not_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PRODUCTS", {name: Wrong(name), "plain": PRODUCTS["plain"]})
    assert choose([torch.randn(512, 256)] * 3, torch.randn(512), 4).name == "plain"


class Instant(Plain):
    """Takes no time, in one dtype, but for the first time with a weight."""

    name = "instant"
    dtype = torch.float32

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], Tensor] = {}

    def can_serve(self, weight: Tensor) -> bool:
        return weight.dtype == self.dtype

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        key = weight.data_ptr(), weight.shape, weight.dtype, rows  # another weight may lie where one has lain
        if key not in self.known:
            self.known[key] = super().multiply(x, laid_out, weight, bias, rows)
        return self.known[key]


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says whether the processor has some for bfloat16."""

    def pretend(there: bool) -> None:
        precision.has_bfloat16.cache_clear()
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: there)

    yield pretend
    precision.has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("multiplies", "steps"), [("float32", None), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_fastest_dtype_is_that_of_faster_products_and_faster_steps(
    multiplies: str, steps: str | None, monkeypatch: pytest.MonkeyPatch, instructions: Callable[[bool], None]
) -> None:
    """Kernels between the products are of float32 alone, so products do not say it all."""
    instructions(True)
    fast, dtype = Instant(), getattr(torch, steps or multiplies)
    fast.dtype = getattr(torch, multiplies)
    taken = []

    def time_steps(sides: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        taken.extend(sides)
        return {name: 1.0 + (name != steps) for name in sides}

    monkeypatch.setattr(throughput, "time_sides", time_steps)
    monkeypatch.setitem(PRODUCTS, "instant", fast)
    loaded = softcfg.Pipeline.from_pretrained("fashion-small", device="cpu", dtype="fastest", weak="fashion-small")
    assert loaded.dtype == dtype
    assert loaded.weak is not None
    assert loaded.weak.dtype == dtype
    monkeypatch.setitem(PRODUCTS, "instant", Plain())
    fast.dtype = torch.float16
    assert softcfg.load_generator("fashion-small", dtype="fastest").dtype == dtype  # it was kept
    assert softcfg.Pipeline.with_random_weights("fashion-small", device="cpu", dtype="fastest").dtype == dtype
    assert taken == ([] if steps is None else ["float32", "bfloat16"])  # once


def test_a_product_that_is_new_is_measured_although_there_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(512, 512)
    assert choose([weight], None, 2).name != "instant"
    monkeypatch.setitem(PRODUCTS, "instant", Instant())
    choices.MADE.clear()  # as in a process that starts with it
    assert choose([weight], None, 2).name == "instant"


def test_weights_that_are_no_numbers_decide_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCTS, "instant", Instant())
    assert choose([torch.full((512, 512), torch.nan)], None, 2).name == "instant"


def test_without_instructions_for_bfloat16_float32_is_the_fastest_and_bfloat16_warns(
    monkeypatch: pytest.MonkeyPatch, instructions: Callable[[bool], None]
) -> None:
    instructions(False)
    fast = Instant()
    fast.dtype = torch.bfloat16
    monkeypatch.setitem(PRODUCTS, "instant", fast)
    pipeline = softcfg.Pipeline.from_pretrained("fashion-small", device="cpu", dtype="fastest")
    assert pipeline.dtype == torch.float32
    with pytest.warns(RuntimeWarning, match="no instructions for bfloat16"):
        pipeline.to(torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="no instructions for bfloat16"):
        assert softcfg.load_generator("fashion-small", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match="'fastest' does not go with quantize"):
        softcfg.Pipeline.from_pretrained("fashion-small", dtype="fastest", quantize="int8")


def test_a_processor_with_instructions_for_bfloat16_does_not_warn(instructions: Callable[[bool], None]) -> None:
    instructions(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        softcfg.load_generator("fashion-small", dtype="bfloat16")
