"""The matrix products that a linear layer can use on a CPU, and which of them is fastest on this machine.

A decoding step multiplies a few dozen rows with every weight of the model. At such sizes a CPU's matrix product spends
much of its time copying the weights into its kernel's own layout; a product that keeps them laid out saves that. How
much depends on the processor: on some, MKL's layout is as slow as none, and oneDNN's twice as fast; on others the two
change places with the shape. So they are measured, each shape once, and the choices are kept per machine: processes
that choose alike compute the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.errors import UserError, quote
from softcfg.nn.choices import choose_once, on_threads, time_sides
from softcfg.nn.kernels import available
from softcfg.nn.launches import recorded
from softcfg.nn.memory import is_out_of_memory
from softcfg.nn.precision import dtype_name
from softcfg.nn.settings import holding

PRODUCT_VARIABLE = "SOFTCFG_PRODUCT"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GAIN = 1.1  # by which a product that keeps weights twice must be faster than the plain one, and bfloat16 than float32
# Seconds that replay saves with each linear layer and what stands around it: 0.05 to 0.07 ms in `fashion-small` with
# one image, 0.2 in AliTok-B with four.
REPLAY = 1e-4
# Layers of one shape are measured one after the other, as many as this many bytes of weights take, and at least three:
# in a step they come from memory, and products that read them from caches can change places.
MEASURED = 64 << 20
LEAST_LAYERS = 3
UNLIKE = 0.02  # share of a plain product by which another may differ from it; bfloat16 rounds by 0.004


class Product(ABC):
    """A way to compute x W^T + b. Register a subclass without arguments by `@register_product`.

    Attributes:
        name: for `use_product` and `SOFTCFG_PRODUCT`.
        serves_any_rows: whether weights laid out for one number of rows serve all others as well; the layer then need
            not keep them twice.
        replays: whether it is a kernel that `nn.replay` launches again without Python.
    """

    name: str
    serves_any_rows = False
    replays = False

    @abstractmethod
    def can_serve(self, weight: Tensor) -> bool:
        """Whether it runs here on weights of this dtype."""

    @abstractmethod
    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """Lay out weights [out, in] for inputs of `rows` rows."""

    @abstractmethod
    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """[..., in] -> [..., out]."""

    def restore(self, laid_out: Tensor) -> Tensor:
        """The weights [out, in] again, bit by bit, of a product that serves any rows."""
        return laid_out

    def as_in_steps(
        self, x: Tensor, laid_out: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, rows: int
    ) -> Callable[[], object]:
        """What multiplies `x` with all weights, one after the other, as steps do; for a measurement."""

        def run() -> None:
            for packed, weight in zip(laid_out, weights, strict=True):
                self.multiply(x, packed, weight, bias, rows)

        return run


PRODUCTS: dict[str, Product] = {}
_forced: ContextVar[str | None] = ContextVar("forced_product", default=None)


def register_product(product: type[Product]) -> type[Product]:
    """Class decorator that makes a product known."""
    PRODUCTS[product.name] = product()
    return product


@register_product
class Plain(Product):
    """`torch.nn.functional.linear` on the weights as they are."""

    name = "plain"

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return True

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        return weight

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        return F.linear(x, weight, bias)


@register_product
class Columns(Product):
    """W x^T, with the inputs as columns: of few columns it can read the weights faster than x W^T."""

    name = "columns"

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return weight.dtype in (torch.float32, torch.bfloat16)

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`: as they are."""
        return weight

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        if x.numel() != rows * weight.shape[1]:
            return F.linear(x, weight, bias)
        if rows == 1:  # PyTorch has a faster routine for one column
            found = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
            return found.view(*x.shape[:-1], -1)
        columns = x.reshape(rows, -1).t()
        found = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
        return found.t().contiguous().view(*x.shape[:-1], -1)


@register_product
class MKL(Product):
    """The packed GEMM of Intel's MKL, for exactly the rows it was laid out for."""

    name = "mkl"

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return (
            weight.dtype == torch.float32
            and torch.backends.mkl.is_available()
            and hasattr(torch.ops.mkl, "_mkl_linear")
            and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")
        )

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        if x.numel() != rows * weight.shape[1]:
            return F.linear(x, weight, bias)
        return torch.ops.mkl._mkl_linear(x, laid_out, weight, bias, rows)


@register_product
class OneDNN(Product):
    """oneDNN's inner product on weights in its blocked layout."""

    name = "onednn"
    serves_any_rows = True

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return _has_onednn(weight, "_reorder_linear_weight", "_linear_pointwise")

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")

    def restore(self, laid_out: Tensor) -> Tensor:
        """See `Product.restore`."""
        return laid_out.to_dense()


@register_product
class Convolution(Product):
    """oneDNN's 1 x 1 convolution of the rows as pixels, which reads large weights faster than its inner product.

    Another number of rows may want another layout. So fewer rows are padded with zeros, and more of them, such as a
    prefix, use the weights in their original layout.
    """

    name = "convolution"
    serves_any_rows = True

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return _has_onednn(weight, "_reorder_convolution_weight", "_convolution_pointwise")

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        shape = (1, weight.shape[1], 1, rows)
        return torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *_ONE_BY_ONE, shape)

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        shape, width = x.shape, x.shape[-1]
        given = x.numel() // width
        if given > rows:
            return F.linear(x, self.restore(laid_out), bias)
        if given < rows:
            x = F.pad(x.reshape(given, width), (0, 0, 0, rows - given))
        pixels = x.contiguous().as_strided((1, width, 1, rows), (rows * width, 1, rows * width, width))
        found = torch.ops.mkldnn._convolution_pointwise(pixels, laid_out, bias, *_ONE_BY_ONE, "none", [], "")
        if given < rows:
            found = found[..., :given]
        return found.permute(0, 2, 3, 1).view(*shape[:-1], found.shape[1])

    def restore(self, laid_out: Tensor) -> Tensor:
        """See `Product.restore`."""
        return laid_out.to_dense()[:, :, 0, 0]


@register_product
class Panels(Product):
    """A kernel by Numba, an extra (`kernels.cpu.product`): a few rows at once with panels of 16 outputs."""

    name = "panels"
    serves_any_rows = True
    replays = True

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        if weight.dtype != torch.float32 or not available.may_use_cpu_kernels():
            return False
        return available.cpu_kernels().can_pack(weight)

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        return available.cpu_kernels().pack(weight)

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        if x.dtype is not torch.float32 or not available.on_cpu(x):
            return F.linear(x, self.restore(laid_out), bias)
        return available.cpu_kernels().product(x, laid_out, bias)

    def restore(self, laid_out: Tensor) -> Tensor:
        """See `Product.restore`."""
        return available.cpu_kernels().unpack(laid_out)

    def as_in_steps(
        self, x: Tensor, laid_out: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, rows: int
    ) -> Callable[[], object]:
        """See `Product.as_in_steps`: launched by one call."""
        launched: list[tuple[int, ...]] = []
        bias = None if bias is None else bias.detach()
        with holding(recorded, launched):
            results = [available.cpu_kernels().product(x, packed, bias) for packed in laid_out]
        program = available.cpu_kernels().Program(launched, [x, results, laid_out, bias])
        return program.launch


# Padding, stride, dilation and groups.
_ONE_BY_ONE: tuple[list[int], list[int], list[int], int] = ([0, 0], [1, 1], [1, 1], 1)


def _has_onednn(weight: Tensor, *operations: str) -> bool:
    """Whether PyTorch has these operations of oneDNN here, for weights of this dtype."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(ops, name) for name in operations)
        and (
            weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
        )
    )


@contextlib.contextmanager
def use_product(name: str | None) -> Iterator[None]:
    """Use the named product for all linear layers that it can serve while the context is open; None: the fastest.

    Raises:
        UserError: there is no product of this name.
    """
    with holding(_forced, _known(name)):
        yield


def forced_product() -> str | None:
    """The product that `use_product` or the variable `SOFTCFG_PRODUCT` asks for; None for the fastest.

    Raises:
        UserError: the variable names no product.
    """
    return _forced.get() or _known(os.environ.get(PRODUCT_VARIABLE) or None, f"{PRODUCT_VARIABLE}: ")


def choose(
    weights: Sequence[Tensor], bias: Tensor | None, rows: int, in_all: int = 0, *, replayed: bool = False
) -> Product:
    """Choose the fastest product for weights [out, in] of one shape and dtype, and inputs of `rows` rows.

    `use_product` and the variable `SOFTCFG_PRODUCT` come first. Else it is what was kept for this machine, or what a
    measurement finds now (see `time_sides`).

    Args:
        weights: of the layers of this shape.
        bias: of one of them.
        rows: of the inputs.
        in_all: bytes of all weights of the model. A step reads all of them before it needs the same one again; where a
            shape has few layers, copies of them are measured too, so that none stays in the caches.
        replayed: whether a step of kernels alone would be replayed (`nn.replay`). One layer with another product then
            costs all layers that, so a product that is replayed may take `REPLAY` seconds longer.

    Raises:
        UserError: `SOFTCFG_PRODUCT` names no product.
    """
    weight = weights[0]
    plain = PRODUCTS["plain"]
    if weight.device.type != "cpu" or type(weight.data) is not Tensor:  # elsewhere, or quantized
        return plain
    wanted = forced_product()
    if wanted:
        product = PRODUCTS[wanted]
        return product if product.can_serve(weight) else plain
    able = _able(weight)
    if len(able) == 1:
        return able[0]

    def measured() -> str:
        most = _outputs(weight)
        layers = [each.detach()[:most] for each in weights[: _layers(weight)]]
        copies = min(MEASURED, in_all) // max(1, weight.nbytes) - len(layers)
        layers += [layers[0].clone() for _ in range(copies)]
        return _fastest(able, layers, None if bias is None else bias.detach()[:most], rows, replayed).name

    names = [product.name for product in able]
    key = f"product-{_shape(weight, bias, rows)}{'-replayed' if replayed else ''}"
    return PRODUCTS[choose_once(key, names, measured)]


def keeps_bits(product: Product, weights: Sequence[Tensor], bias: Tensor | None, rows: int) -> bool:
    """Whether a product of these weights is the same to the bit on one thread and on as many as are set.

    It is not where threads share the terms of a sum. Whether they do depends on the product, its version, the shape and
    the processor (in MKL's packed product they do on AMD, and not on Intel), so it is tried, once for each shape.
    """
    weight, threads = weights[0], torch.get_num_threads()
    if weight.device.type != "cpu" or type(weight.data) is not Tensor:
        return False

    def tried() -> str:
        x = _inputs(weight, rows)
        layers = [(product.lay_out(each.detach(), rows), each) for each in weights[:LEAST_LAYERS]]
        one, several = (
            on_threads(count, lambda: [product.multiply(x, laid_out, each, bias, rows) for laid_out, each in layers])
            for count in (1, threads)
        )
        return "same" if all(map(torch.equal, one, several)) else "different"

    key = f"bits-{threads}-{product.name}-{_shape(weight, bias, rows)}"
    return threads == 1 or choose_once(key, ("same", "different"), tried) == "same"


def _shape(weight: Tensor, bias: Tensor | None, rows: int) -> str:
    dtype = dtype_name(weight.dtype)
    return f"{dtype}-{rows}x{weight.shape[1]}x{weight.shape[0]}{'' if bias is None else '+bias'}"


def _known(name: str | None, where: str = "") -> str | None:
    if name is not None and name not in PRODUCTS:
        raise UserError(f"{where}there is no matrix product {quote(name)}; there are {', '.join(PRODUCTS)}")
    return name


def _able(weight: Tensor) -> list[Product]:
    return [product for product in PRODUCTS.values() if product.can_serve(weight)]


def faster_dtype(shapes: Mapping[tuple[int, int], int], rows: int) -> torch.dtype:
    """float32, or bfloat16 if the processor multiplies the weights of a model faster in it.

    It is found once per machine, by a measurement like that of `choose`.

    Args:
        shapes: how many weights [out, in] there are of each shape.
        rows: of the inputs.
    """

    def measure() -> dict[str, float]:
        seconds = dict.fromkeys(DTYPES, 0.0)
        for (out, width), count in shapes.items():
            for name, dtype in DTYPES.items():
                whole = torch.empty(out, width, dtype=dtype, device="meta")
                some = torch.ones(_outputs(whole), width, dtype=dtype)
                weights = [some] + [some.clone() for _ in range(1, min(count, _layers(whole)))]
                times = _seconds(_able(some), weights, None, rows).values()
                seconds[name] += count * min(times) / len(weights) * out / len(some)
        return seconds

    return choose_dtype("dtype", f"{rows} {sorted(shapes.items())}", measure)


def choose_dtype(kind: str, what: str, measure: Callable[[], Mapping[str, float]]) -> torch.dtype:
    """float32, or bfloat16 if it is clearly faster; found once per machine.

    Args:
        kind, what: of what is measured, see `choose_once`.
        measure: the seconds that it takes in each of `DTYPES`.
    """

    def faster() -> str:
        seconds = measure()
        return "bfloat16" if seconds["bfloat16"] * GAIN < seconds["float32"] else "float32"

    key = f"{kind}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    return DTYPES[choose_once(key, DTYPES, faster)]


def _layers(weight: Tensor) -> int:
    return max(LEAST_LAYERS, -(-MEASURED // max(1, weight.nbytes)))


def _outputs(weight: Tensor) -> int:
    """How many of a layer's outputs are measured: every product lays them out, and some heads have gigabytes."""
    return max(1, min(len(weight), MEASURED * len(weight) // max(1, weight.nbytes)))


def _fastest(
    able: Sequence[Product], weights: Sequence[Tensor], bias: Tensor | None, rows: int, replayed: bool
) -> Product:
    least, plain = _seconds(able, weights, bias, rows), PRODUCTS["plain"]

    def worth(product: Product) -> float:
        seconds = least[product] * (1 if product is plain or product.serves_any_rows else GAIN)
        return seconds - REPLAY * len(weights) if replayed and product.replays else seconds

    return min(least, key=worth)


def _inputs(weight: Tensor, rows: int) -> Tensor:
    """Some inputs [rows, in], without a change to PyTorch's random numbers."""
    return torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def _seconds(
    able: Sequence[Product], weights: Sequence[Tensor], bias: Tensor | None, rows: int
) -> dict[Product, float]:
    """Seconds that each product takes for all of the weights.

    A product that fails, or computes something else than the plain one, is left out: nobody has tried every product on
    every processor.
    """
    x = _inputs(weights[0], rows)
    expected = F.linear(x, weights[0], bias)
    sides = {}
    for product in able:
        try:
            laid_out = [product.lay_out(weight, rows) for weight in weights]
            found = product.multiply(x, laid_out[0], weights[0], bias, rows)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            continue
        if _are_close(found, expected):
            sides[product] = product.as_in_steps(x, laid_out, weights, bias, rows)
    return time_sides(sides)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether a product differs from the plain one by rounding alone; one that is not finite tells nothing."""
    if found.shape != expected.shape:
        return False
    difference, whole = torch.linalg.vector_norm(found.double() - expected), torch.linalg.vector_norm(expected.double())
    return bool(difference <= UNLIKE * whole) or not bool(whole.isfinite())
