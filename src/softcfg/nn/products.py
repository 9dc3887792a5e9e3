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
import platform
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from softcfg.errors import UserError
from softcfg.files import make_folder, read_text
from softcfg.nn.settings import holding

PRODUCT_VARIABLE = "SOFTCFG_PRODUCT"
FOLDER_VARIABLE = "SOFTCFG_PRODUCTS"
GAIN = 1.1  # by which a laid out product must be faster than the plain one to be worth its memory
LOSS = 1.5  # by which one may be slower where the weights are small
SMALL = 1 << 20  # bytes
TURNS = 5
SECONDS = 0.05  # after which a second turn is enough
# Layers of one shape are measured one after the other, as many as this many bytes of weights take, and at least three:
# in a step they come from memory, and products that read them from caches can change places.
MEASURED = 64 << 20
LEAST_LAYERS = 3


class Product(ABC):
    """A way to compute x W^T + b. Register a subclass without arguments by `@register_product`.

    Attributes:
        name: for `use_product` and `SOFTCFG_PRODUCT`.
        serves_any_rows: whether weights laid out for one number of rows serve all others as well; the layer then need
            not keep them twice.
        depends_on_threads: whether the bits of the result may depend on the number of threads.
    """

    name: str
    serves_any_rows = False
    depends_on_threads = False

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


PRODUCTS: dict[str, Product] = {}
CHOICES: dict[str, str] = {}  # of this process: shape -> name of the product
_forced: ContextVar[str | None] = ContextVar("forced_product", default=None)


def register_product(product: type[Product]) -> type[Product]:
    """Class decorator that makes a product known."""
    PRODUCTS[product.name] = product()
    return product


@register_product
class Plain(Product):
    """`torch.nn.functional.linear` on the weights as they are."""

    name = "plain"
    depends_on_threads = True

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
    """W x^T, with the inputs as columns: of few columns in bfloat16 it reads the weights faster than x W^T."""

    name = "columns"
    depends_on_threads = True

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        return weight.dtype == torch.bfloat16

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
    depends_on_threads = torch.__version__ < TorchVersion("2.13")  # of older ones it is known of 2.6

    def can_serve(self, weight: Tensor) -> bool:
        """See `Product.can_serve`."""
        ops = torch.ops.mkldnn
        return (
            torch.backends.mkldnn.is_available()
            and hasattr(ops, "_reorder_linear_weight")
            and hasattr(ops, "_linear_pointwise")
            and (
                weight.dtype == torch.float32
                or (weight.dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
            )
        )

    def lay_out(self, weight: Tensor, rows: int) -> Tensor:
        """See `Product.lay_out`."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def multiply(self, x: Tensor, laid_out: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """See `Product.multiply`."""
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")

    def restore(self, laid_out: Tensor) -> Tensor:
        """See `Product.restore`."""
        return laid_out.to_dense()


@contextlib.contextmanager
def use_product(name: str | None) -> Iterator[None]:
    """Use the named product for all linear layers that it can serve while the context is open; None: the fastest.

    Raises:
        UserError: there is no product of this name.
    """
    with holding(_forced, None if name is None else _known(name)):
        yield


def choose(weights: Sequence[Tensor], bias: Tensor | None, rows: int) -> Product:
    """Choose the fastest product for weights [out, in] of one shape and dtype, and inputs of `rows` rows.

    `use_product` and the variable `SOFTCFG_PRODUCT` come first. Else it is what was kept for this machine, or what a
    measurement finds now: processor time on one thread, which other work on the machine hardly changes.

    Raises:
        UserError: `SOFTCFG_PRODUCT` names no product.
    """
    weight = weights[0]
    plain = PRODUCTS["plain"]
    if weight.device.type != "cpu" or type(weight.data) is not Tensor:  # elsewhere, or quantized
        return plain
    wanted = _forced.get() or os.environ.get(PRODUCT_VARIABLE)
    if wanted:
        product = PRODUCTS[_known(wanted)]
        return product if product.can_serve(weight) else plain
    able = _able(weight)
    if len(able) == 1:
        return able[0]
    dtype = str(weight.dtype).removeprefix("torch.")
    shape = f"{dtype}-{rows}x{weight.shape[1]}x{weight.shape[0]}{'' if bias is None else '+bias'}"
    if shape not in CHOICES:
        names = [product.name for product in able]
        CHOICES[shape] = _once(shape, names, lambda: _fastest(able, weights[: _layers(weight)], bias, rows).name)
    return PRODUCTS[CHOICES[shape]]


def forget_choices() -> None:
    """Measure again from now on: drop what was kept for this machine."""
    CHOICES.clear()
    for path in _folder().glob(f"{_machine_key()}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _known(name: str) -> str:
    if name not in PRODUCTS:
        raise UserError(f"there is no matrix product {name!r}; there are {', '.join(PRODUCTS)}")
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
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    text = f"{rows} {sorted(shapes.items())}"
    key = f"dtype-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def faster() -> str:
        seconds = dict.fromkeys(dtypes, 0.0)
        for (out, width), count in shapes.items():
            for name, dtype in dtypes.items():
                weights = [torch.ones(out, width, dtype=dtype)]
                weights += [weights[0].clone() for _ in range(1, min(count, _layers(weights[0])))]
                times = _seconds(_able(weights[0]), weights, None, rows).values()
                seconds[name] += count * min(times) / len(weights)
        return "bfloat16" if seconds["bfloat16"] * GAIN < seconds["float32"] else "float32"

    return dtypes[_once(key, dtypes, faster)]


def _layers(weight: Tensor) -> int:
    return max(LEAST_LAYERS, -(-MEASURED // max(1, weight.nbytes)))


def _fastest(able: Sequence[Product], weights: Sequence[Tensor], bias: Tensor | None, rows: int) -> Product:
    least, plain = _seconds(able, weights, bias, rows), PRODUCTS["plain"]
    best = min((product for product in able if product is not plain), key=least.__getitem__)
    small = weights[0].numel() * weights[0].element_size() <= SMALL
    return best if least[best] < least[plain] * (LOSS if small else 1 / GAIN) else plain


@torch.inference_mode()
def _seconds(
    able: Sequence[Product], weights: Sequence[Tensor], bias: Tensor | None, rows: int
) -> dict[Product, float]:
    """Processor time of each product with all of the weights, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype)
        sides = [(product, [product.lay_out(weight.detach(), rows) for weight in weights]) for product in able]
        least = dict.fromkeys(able, float("inf"))
        begun = time.thread_time()
        for turn in range(TURNS):  # all products in each, so that a change of the clock's pace meets them alike
            if turn > 1 and time.thread_time() - begun > SECONDS:
                break
            for product, laid_out in sides:
                started = time.thread_time()
                for weight, packed in zip(weights, laid_out, strict=True):
                    product.multiply(x, packed, weight, bias, rows)
                least[product] = min(least[product], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return least


# ---- what was chosen on this machine: a file for each shape, and the first process to write it decides


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/softcfg/products").expanduser()


@cache
def machine() -> str:
    """Processor, instructions and torch, on which the choices depend."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _machine_key() -> str:
    """Of the machine, the products to choose from and the measurement: with another one, shapes are measured anew."""
    return hashlib.sha256(f"{machine()} {sorted(PRODUCTS)} {MEASURED}".encode()).hexdigest()[:12]


def _kept(shape: str) -> str:
    try:
        return read_text(_folder() / f"{_machine_key()}-{shape}", 64).strip()
    except OSError:
        return ""


def _once(key: str, known: Container[str], measure: Callable[[], str]) -> str:
    """What was chosen on this machine, of the names that are `known`, or what a measurement finds now."""
    kept = _kept(key)
    return kept if kept in known else _keep(key, measure(), known)


def _keep(shape: str, name: str, known: Container[str]) -> str:
    """Write a choice down and return it; if another process was first, return what that one chose, if it is known."""
    path = _folder() / f"{_machine_key()}-{shape}"
    try:
        make_folder(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".") as file:
            file.write(name.encode())
            file.flush()
            if _kept(shape) not in known:
                path.unlink(missing_ok=True)
            os.link(file.name, path)
    except FileExistsError:
        return _kept(shape)
    except (OSError, UserError):  # a home that cannot be written to: the next process measures again
        return name
    return name
