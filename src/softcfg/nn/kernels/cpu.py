"""Kernels of a CPU: what stands between the matrix products of a step, one call for each place, compiled by Numba.

A small step takes as long as its operations, each of which costs PyTorch some microseconds, and a large one reads its
key/value cache faster by a kernel that reads nothing else. No compiler is needed on the machine: Numba brings its own.
The first process compiles them, in some seconds, and keeps what it made beside this file or in the user's cache.

All compute in float32, run on PyTorch's own threads, and give the same bits on any number of them. They are in one
file, for Numba would not notice that a function of another file has changed. `softcfg.nn.fused` and the attention
backend `numba_decode` choose between them and the operations that they replace.

A kernel is a function of one address, that of its parameters, 64-bit integers: first the number of items, which its
threads share, then addresses, sizes and steps. So one function launches all of them, within two microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from softcfg.nn import launches
from softcfg.nn.norm import LAYER

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # functions would stay Python's, and know no addresses
    raise ImportError("NUMBA_DISABLE_JIT is set")

# Sums may be taken in any order. A NaN stays one, and an infinity too: scores of -inf hide slots.
# A division by zero gives an infinity or NaN, for a loop that could raise an error has no vector instructions.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
GRAIN = 1 << 15  # numbers that are worth a thread, as in PyTorch
MOST = 38  # parameters of a kernel
PIECE = 1 << 12  # numbers of a row that are an item
FIRST = 3  # index of the first one of its own
_WORD, _FLOAT = ir.IntType(64), ir.FloatType()
_CONTRACT = ("contract",)
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic


def compiled(*signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`; with a signature at once, and kept on disk, else as a part of the kernels that call it."""
    compiler = partial(_kept, numba.njit) if signature else numba.njit
    return compiler(*signature, nogil=True, **OPTIONS | options)


def kernel(function: Callable[[int], None]) -> int:
    """Compile a kernel; its address."""
    made = _kept(numba.cfunc, types.void(types.int64), **OPTIONS)(function)
    _MADE.append(made)  # its code lives as long as it does
    return made.address


_MADE: list[Any] = []


def _kept(compiler: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return compiler(*signature, cache=True, **options)(function)
        except Exception:
            # There is no folder for it, or what is kept there is damaged: this process compiles for itself.
            return compiler(*signature, **options)(function)

    return compile_


def _pointer_to(number: types.Type) -> Any:
    """An address as a pointer to numbers of a type."""

    @_intrinsic
    def pointer(typing: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), generate

    return pointer


integers = _pointer_to(types.int64)
floats = _pointer_to(types.float32)
bools = _pointer_to(types.boolean)
doubles = _pointer_to(types.float64)
bytes_ = _pointer_to(types.int8)


@_intrinsic
def _run(typing: Any, kernel: types.Type, parameters: types.Type) -> Any:
    """Run a kernel on this thread."""
    return types.void(types.int64, types.int64), _caller(ir.VoidType())


@_intrinsic
def _run_on(typing: Any, parallel: types.Type, kernel: types.Type, parameters: types.Type, threads: types.Type) -> Any:
    """Run a kernel on so many threads, by GOMP_parallel(kernel, parameters, threads, flags)."""
    run = _caller(ir.VoidType())

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        parallel, kernel, parameters, threads = given
        number = builder.trunc(threads, ir.IntType(32))
        return run(context, builder, signature, (parallel, kernel, parameters, number, ir.IntType(32)(0)))

    return types.void(*[types.int64] * 4), generate


@_intrinsic
def _ask(typing: Any, function: types.Type) -> Any:
    """The integer that a C function without arguments returns."""
    return types.int32(types.int64), _caller(ir.IntType(32))


def _caller(returned: Any) -> Callable[..., Any]:
    """Generate the call of the C function at the first of the given addresses with the others."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        address, *arguments = given
        function = ir.FunctionType(returned, [argument.type for argument in arguments])
        found = builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
        return context.get_dummy_value() if isinstance(returned, ir.VoidType) else found

    return generate


@compiled()
def share(parameters: Any) -> tuple[int, int]:
    """Which items are this thread's, from the first up to the second."""
    items, thread_number, thread_count = parameters[0], parameters[1], parameters[2]
    if thread_number == 0:
        return 0, items
    mine, threads = np.int64(_ask(thread_number)), np.int64(_ask(thread_count))
    return items * mine // threads, items * (mine + 1) // threads


@compiled(types.int64(types.int64, types.int64, types.int64, types.UniTuple(types.int64, MOST)))
def _launch(kernel: int, parallel: int, threads: int, given: tuple[int, ...]) -> int:
    parameters = np.empty(MOST, np.int64)
    for index in range(MOST):
        parameters[index] = given[index]
    if threads > 1:
        _run_on(parallel, kernel, parameters.ctypes.data, threads)
    else:
        _run(kernel, parameters.ctypes.data)
    return parameters[0]  # Numba frees an array after its last use


def launch(kernel: int, items: int, numbers: int, *parameters: int) -> None:
    """Run a kernel on as many of PyTorch's threads as so many `numbers` are worth, at most one for each item."""
    (parallel, *queries), threads, recorded = _openmp(), 1, launches.recorded.get()
    if recorded is not None:
        recorded.append(as_recorded(kernel, items, numbers, *parameters))
    parameters += _ZEROS[FIRST + len(parameters) :]
    if numbers > GRAIN and parallel:
        threads = min(torch.get_num_threads(), items, -(-numbers // GRAIN))
    if threads > 1:
        _launch(kernel, parallel, threads, (items, *queries, *parameters))
    else:
        _launch(kernel, 0, 1, (items, 0, 0, *parameters))


@compiled(types.void(*[types.int64] * 8))
def _launch_all(
    table: int, count: int, times: int, moves: int, most: int, parallel: int, thread_number: int, thread_count: int
) -> None:
    rows, by = carray(integers(table), (count, 2 + MOST)), carray(integers(moves), (count, 2 + MOST))
    for turn in range(times):
        for row in range(count):
            if turn:
                for place in range(1, 2 + MOST):
                    rows[row, place] += by[row, place]
            numbers, items = rows[row, 1], rows[row, 2]
            threads = 1
            if most > 1 and numbers > GRAIN:
                threads = min(most, items, (numbers + GRAIN - 1) // GRAIN)
            parameters = table + 8 * (row * (2 + MOST) + 2)
            if threads > 1:
                rows[row, 3], rows[row, 4] = thread_number, thread_count
                _run_on(parallel, rows[row, 0], parameters, threads)
            else:
                rows[row, 3], rows[row, 4] = 0, 0
                _run(rows[row, 0], parameters)


def as_recorded(kernel: int, items: int, numbers: int, *parameters: int) -> tuple[int, ...]:
    """A launch as `launch` would record it."""
    return (kernel, numbers, items, 0, 0, *parameters, *_ZEROS[FIRST + len(parameters) :])


class Program:
    """A list of launches that is run by one call.

    Args:
        recorded: what `launch` has recorded (`softcfg.nn.launches.recorded`).
        kept: what owns the memory at the addresses in it.
    """

    def __init__(self, recorded: Sequence[tuple[int, ...]], kept: object) -> None:
        self._kept = kept
        self._table = np.array(recorded, dtype=np.int64)
        kernels = self._table[:, 0]
        self._rotations = np.flatnonzero(kernels == _rotate_and_cache)
        self._attentions = np.flatnonzero(kernels == _attention)
        some = self._table[self._attentions]
        self._per_slot = 2 * some[:, 2] * some[:, 2 + DIM]
        self._address, self._count = self._table.ctypes.data, len(self._table)
        self._tables: list[tuple[int, int]] = []

    def set_slot(self, slots: int, cos: Tensor | None, sin: Tensor | None, tables: Sequence[Tensor | None]) -> None:
        """Make it that of the last of so many slots.

        Args:
            cos, sin: as of `rotate_and_cache`.
            tables: value weights, key weights, logarithms and visible slots, as of `attention`.
        """
        table, rotations, attentions = self._table, self._rotations, self._attentions
        table[rotations, 2 + SLOT] = slots - 1
        if cos is not None:
            table[rotations, 2 + COS] = _address(cos)
            table[rotations, 2 + SIN], table[rotations, 2 + ROTARY_ROW] = _shared_rows(sin)
        table[attentions, 1] = self._per_slot * slots
        table[attentions, 2 + SLOTS] = slots
        of_tables = [_shared_rows(each) for each in tables]
        if of_tables != self._tables:  # mostly they stay where they are
            for place, each in zip((VALUE_WEIGHTS, KEY_WEIGHTS, LOGARITHMS, VISIBLE), of_tables, strict=True):
                table[attentions, 2 + place], table[attentions, 3 + place] = each
            self._tables = of_tables

    def parameters_of(self, index: int) -> np.ndarray:
        """The parameters of a launch, int64 [MOST], to be changed before the next run."""
        return self._table[index, 2:]

    def parameters(self) -> np.ndarray:
        """A copy of the parameters of all launches."""
        return self._table.copy()

    def launch(self, times: int = 1, moves: np.ndarray | None = None) -> None:
        """Run all of it as it is, and again with parameters that have moved, `times` in all.

        Args:
            moves: what is added to the parameters from one time to the next: the difference of two `parameters`.
        """
        omp = _openmp()
        by = self._address if moves is None else moves.ctypes.data
        _launch_all(self._address, self._count, times, by, torch.get_num_threads() if omp[0] else 1, *omp)


def _with_rows(x: Tensor | None) -> Tensor | None:
    """Itself, if its rows [..., n], the entries of one side by side, follow each other in equal steps; or a copy."""
    if x is None or x.is_contiguous() or (x.stride(-1) == 1 and (x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1))):
        return x
    return x.contiguous()


def _rows_of(x: Tensor | None) -> tuple[int, int]:
    """Address, and step from row to row, of what `_with_rows` gives; zeros for None."""
    if x is None:
        return 0, 0
    return x.data_ptr(), x.shape[-1] if x.is_contiguous() else x.stride(0)


def _shared_rows(x: Tensor | None) -> tuple[int, int]:
    """The same of a table [rows or 1, n], the entries of a row side by side, of which one row may serve all."""
    if x is None:
        return 0, 0
    return x.data_ptr(), x.stride(0) if x.size(0) > 1 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(256)
def _bits(number: float) -> int:
    """A float as an integer parameter of the same bits."""
    return int.from_bytes(struct.pack("d", number), sys.byteorder, signed=True)


@compiled()
def _float(bits: int) -> np.float32:
    """The float of such a parameter."""
    return np.float32(np.int64(bits).view(np.float64))


@functools.cache
def _openmp() -> tuple[int, int, int]:
    """Addresses in the OpenMP that PyTorch uses, whose threads are waiting already; zeros where it cannot be found.

    The functions are those that GCC calls: `GOMP_parallel`, `omp_get_thread_num`, `omp_get_num_threads`.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        parallel, number, threads = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in functions)
        return parallel, number, threads
    return 0, 0, 0


_ZEROS = (0,) * MOST


_LOWEST = np.float32(-87)  # below it the exponential leaves the normal numbers, and is 0 here
_HIGHEST = np.float32(89)  # here it is infinite
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_PER_LOG2 = np.float32(1 / math.log(2))
_HIGH = np.float32(355 / 512)  # of log 2: its multiples are exact
_LOW = np.float32(math.log(2) - 355 / 512)
_TERMS = [np.float32(1 / math.factorial(power)) for power in range(8)]
_C2, _C3, _C4, _C5, _C6, _C7 = _TERMS[2:]


@compiled(fastmath={"contract"})  # in another order the two parts of log 2 would become one
def exp(x: np.float32) -> np.float32:
    """e^x of a float32, to a unit or two in the last place: 2^k e^r, with e^r by Taylor and r within half of log 2."""
    clipped = min(max(x, _LOWEST), _HIGHEST)
    doublings = clipped * _PER_LOG2
    power = np.int32(doublings + (_HALF if doublings > _ZERO else -_HALF))  # a floor would be in 64 bits
    whole = np.float32(power)
    rest = clipped - whole * _HIGH - whole * _LOW
    series = _C2 + rest * (_C3 + rest * (_C4 + rest * (_C5 + rest * (_C6 + rest * _C7))))
    found = _ONE + (rest + rest * rest * series)
    found *= np.int32((power + np.int32(127)) << np.int32(23)).view(np.float32)
    return _ZERO if x < _LOWEST else found


(
    QUERY, KEYS, VALUES, OUT, KEY_HEADS, GROUP, SLOTS, DIM, QUERY_ROW, QUERY_HEAD, CACHE_ROW, CACHE_HEAD, CACHE_SLOT,
    VALUE_WEIGHTS, VALUE_WEIGHTS_ROW, KEY_WEIGHTS, KEY_WEIGHTS_ROW, LOGARITHMS, LOGARITHMS_ROW, VISIBLE, VISIBLE_ROW,
    KEY_SCALES, VALUE_SCALES, SCALES_HEAD, SCALES_SLOT,
) = range(FIRST, FIRST + 25)  # fmt: skip
_NOTHING, _NAN = np.float32(-np.inf), np.float32(np.nan)
_LARGEST_BYTE = np.float32(127)


def _shuffled(builder: Any, one: Any, other: Any, lanes: Sequence[int]) -> Any:
    """A vector of these lanes of two others; those of the second are counted on from those of the first."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    single = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return _shuffled(builder, single, undefined, [0] * lanes)


LANES = 8  # numbers of a vector of channels, a register or half of one; and slots that are read at once
SUMS = 4  # vectors whose sums are taken at once
RUN = 128  # slots of a head that are read at once where they lie side by side
BLOCK = 32  # numbers of a turn of a compiled loop
_LANES = ir.VectorType(_FLOAT, LANES)


def _load(builder: Any, address: Any, size: int = 4, lanes: int = LANES) -> Any:
    """A vector of floats, or of what are integers of one byte in memory."""
    if size == 4:
        return builder.load(builder.inttoptr(address, ir.VectorType(_FLOAT, lanes).as_pointer()), align=4)
    stored, wide = (ir.VectorType(ir.IntType(bits), LANES) for bits in (8, 32))
    integers = builder.load(builder.inttoptr(address, stored.as_pointer()), align=1)
    return builder.sitofp(builder.sext(integers, wide), _LANES)


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, _LANES.as_pointer()), align=4)


def _multiplied_and_added(builder: Any, one: Any, other: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=_CONTRACT), flags=_CONTRACT)


def _loop(builder: Any, turns: Any, starts: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """What the vectors `starts` become in so many turns, at least one, of `body(turn, vectors)`."""
    before, loop, end = builder.block, *(builder.append_basic_block(name) for name in ("loop", "end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    turn = builder.phi(_WORD)
    vectors = [builder.phi(_LANES) for _ in starts]
    found = body(turn, list(vectors))
    following = builder.add(turn, _WORD(1))
    for phi, start, next_ in zip([turn, *vectors], [_WORD(0), *starts], [following, *found], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(next_, loop)
    builder.cbranch(builder.icmp_signed("<", following, turns), loop, end)
    builder.position_at_end(end)
    return found


def _pairs_added(builder: Any, one: Any, other: Any, apart: int) -> Any:
    """Of two vectors the sums of lanes that are `apart`: those of the first and of the second vector in turn."""
    places = range(0, LANES, 2 * apart)
    halves = [
        [lane for place in places for start in (place, LANES + place) for lane in range(start + by, start + by + apart)]
        for by in (0, apart)
    ]
    return builder.fadd(*(_shuffled(builder, one, other, half) for half in halves))


def _scores_of_eight(size: int) -> Any:
    """Write the products of a query with eight keys of numbers of so many bytes.

    Its arguments are the addresses of the query, of the keys and of the products; how many vectors of channels there
    are; and the bytes from key to key.
    """

    @_intrinsic
    def score(typing: Any, query: Any, keys: Any, scores: Any, parts: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, keys, scores, parts, row = arguments
            starts = [builder.add(keys, builder.mul(row, _WORD(key))) for key in range(LANES)]

            def body(turn: Any, sums: list[Any]) -> list[Any]:
                part = _load(builder, builder.add(query, builder.mul(turn, _WORD(4 * LANES))))
                place = builder.mul(turn, _WORD(size * LANES))
                return [
                    _multiplied_and_added(builder, part, _load(builder, builder.add(start, place), size), total)
                    for start, total in zip(starts, sums, strict=True)
                ]

            sums = _loop(builder, parts, [ir.Constant(_LANES, [0.0] * LANES)] * LANES, body)
            for apart in (1, 2, 4):
                neighbours = zip(sums[::2], sums[1::2], strict=True)
                sums = [_pairs_added(builder, one, other, apart) for one, other in neighbours]
            _store(builder, sums[0], scores)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return score


def _weighted_sum(vectors: int, size: int) -> Any:
    """Add to some neighbouring vectors of channels the values of pairs of slots, each with its factor.

    The numbers of values are of so many bytes. Its arguments are the addresses of the vectors, of the factors and of
    the values; the number of pairs, at least one; and the bytes from slot to slot.
    """

    @_intrinsic
    def add(typing: Any, out: Any, factors: Any, values: Any, pairs: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            out, factors, values, pairs, row = arguments
            places, stored = ([_WORD(each * LANES * vector) for vector in range(vectors)] for each in (4, size))
            starts = [_load(builder, builder.add(out, place)) for place in places]
            zeros = [ir.Constant(_LANES, [0.0] * LANES)] * vectors

            def body(turn: Any, sums: list[Any]) -> list[Any]:
                slot, found = builder.mul(turn, _WORD(2)), []
                for each in range(2):
                    this = builder.add(slot, _WORD(each))
                    address = builder.inttoptr(builder.add(factors, builder.mul(this, _WORD(4))), _FLOAT.as_pointer())
                    factor = _spread(builder, builder.load(address), LANES)
                    start = builder.add(values, builder.mul(this, row))
                    found += [
                        _multiplied_and_added(builder, factor, _load(builder, builder.add(start, place), size), total)
                        for place, total in zip(stored, sums[each * vectors : (each + 1) * vectors], strict=True)
                    ]
                return found

            sums = _loop(builder, pairs, starts + zeros, body)
            for place, one, other in zip(places, sums[:vectors], sums[vectors:], strict=True):
                _store(builder, builder.fadd(one, other), builder.add(out, place))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return add


def _ask_for(builder: Any, address: Any) -> None:
    """Ask for the line at an address, which need not be there, into the second level of caches."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    builder.call(fetch, [builder.inttoptr(address, pointer), number(0), number(2), number(1)])


def _larger(builder: Any, one: Any, other: Any) -> Any:
    """Of the lanes of two vectors the larger ones; the second's where one of them is no number."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


@_intrinsic
def _largest_of_blocks(typing: Any, numbers: Any, blocks: Any) -> Any:
    """The largest of so many times `BLOCK` numbers, at least once, from an address on; but for those that are none.

    A compiler finds no vectors for it: it would have to know that all are numbers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, blocks = arguments

        def body(turn: Any, found: list[Any]) -> list[Any]:
            start = builder.add(numbers, builder.mul(turn, _WORD(4 * BLOCK)))
            places = [builder.add(start, _WORD(4 * LANES * each)) for each in range(len(found))]
            return [_larger(builder, _load(builder, place), each) for place, each in zip(places, found, strict=True)]

        nothing = ir.Constant(_LANES, [-math.inf] * LANES)
        found = _loop(builder, blocks, [nothing] * (BLOCK // LANES), body)
        vector = functools.reduce(partial(_larger, builder), found)
        lanes = [builder.extract_element(vector, ir.IntType(32)(lane)) for lane in range(LANES)]
        return functools.reduce(partial(_larger, builder), lanes)

    return types.float32(types.int64, types.int64), generate


@compiled()
def _largest(numbers: Any) -> np.float32:
    """The largest number of a row; -inf if there is none."""
    blocks, largest = len(numbers) // BLOCK, _NOTHING
    if blocks:
        largest = _largest_of_blocks(numbers.ctypes.data, blocks)
    for place in range(blocks * BLOCK, len(numbers)):
        largest = max(largest, numbers[place])
    return largest


def _score_of(numbers: Any, size: int) -> Any:
    """The function that multiplies a query with keys of such numbers, of so many bytes."""
    of_eight = _scores_of_eight(size)

    @compiled()
    def score(query: int, keys: int, scores: int, slots: int, dim: int, step: int) -> None:
        """Products of a query with the keys of some slots, so many bytes apart."""
        found, vector, channels = floats(scores), floats(query), dim // LANES * LANES
        whole = slots // LANES * LANES if channels else 0
        for slot in range(0, whole, LANES):
            of_eight(query, keys + slot * step, scores + 4 * slot, dim // LANES, step)
        for slot in range(whole if channels == dim else 0, slots):
            key, done, total = numbers(keys + slot * step), 0, _ZERO
            if slot < whole:
                done, total = channels, found[slot]
            for channel in range(done, dim):
                total += vector[channel] * np.float32(key[channel])
            found[slot] = total

    return score


def _sum_weighted_of(numbers: Any, size: int) -> Any:
    """The function that sums values of such numbers, of so many bytes."""
    add_one, add_two, add_three, add_four = (_weighted_sum(vectors, size) for vectors in range(1, SUMS + 1))

    @compiled()
    def sum_weighted(out: int, factors: int, values: int, slots: int, dim: int, step: int) -> None:
        """Add the values of some slots, so many bytes apart, each with its factor."""
        vector, weights = floats(out), floats(factors)
        pairs, parts, part = slots // 2, dim // LANES, 0
        while pairs and part < parts:
            to, source = out + 4 * LANES * part, values + size * LANES * part
            left = min(parts - part, SUMS)
            if left == 4:
                add_four(to, factors, source, pairs, step)
            elif left == 3:
                add_three(to, factors, source, pairs, step)
            elif left == 2:
                add_two(to, factors, source, pairs, step)
            else:
                add_one(to, factors, source, pairs, step)
            part += left
        done = part * LANES
        for slot in range(2 * pairs if done == dim else 0, slots):
            value = numbers(values + slot * step)
            for channel in range(done if slot < 2 * pairs else 0, dim):
                vector[channel] += weights[slot] * np.float32(value[channel])

    return sum_weighted


_score_floats, _score_bytes = _score_of(floats, 4), _score_of(bytes_, 1)
_sum_floats, _sum_bytes = _sum_weighted_of(floats, 4), _sum_weighted_of(bytes_, 1)


@compiled()
def _multiply(x: Any, address: int, width: int) -> None:
    """Multiply a vector by the one at an address."""
    factors = carray(floats(address), (width,))
    for channel in range(width):
        x[channel] *= factors[channel]


@compiled()
def _multiply_by_scales(x: Any, address: int, width: int, step: int) -> None:
    """Multiply a vector by numbers so many places apart."""
    if step == 1:
        _multiply(x, address, width)
    else:
        scales = floats(address)
        for slot in range(width):
            x[slot] *= scales[slot * step]


@compiled()
def _prepare(p: Any, scores: Any, row: int, slots: int, scale: np.float32) -> bool:
    """Scale the scores, and apply to them what acts before the softmax; whether the query sees any slot."""
    for slot in range(slots):
        scores[slot] *= scale
    if p[KEY_WEIGHTS]:
        weights = carray(floats(p[KEY_WEIGHTS] + 4 * row * p[KEY_WEIGHTS_ROW]), (slots,))
        for slot in range(slots):
            scores[slot] *= weights[slot]
    if p[LOGARITHMS]:
        logarithms = carray(floats(p[LOGARITHMS] + 4 * row * p[LOGARITHMS_ROW]), (slots,))
        for slot in range(slots):
            scores[slot] += logarithms[slot]
    if not p[VISIBLE]:
        return True
    visible = carray(bools(p[VISIBLE] + row * p[VISIBLE_ROW]), (slots,))
    sees = False
    for slot in range(slots):
        sees |= visible[slot]
        scores[slot] = scores[slot] if visible[slot] else _NOTHING
    return sees


@compiled()
def _softmax(scores: Any, slots: int, scale: np.float32) -> np.float32:
    """Make of the scores the exponentials of their multiples, the largest of them 1; their sum.

    There is room for whole blocks: the last numbers of a loop that fill no vectors take as long as many vectors.
    """
    padded = -(-slots // BLOCK) * BLOCK
    for slot in range(slots, padded):
        scores[slot] = _NOTHING
    largest = _largest(scores[:padded])
    total = _ZERO
    for slot in range(padded):
        power = exp((scores[slot] - largest) * scale)
        scores[slot] = power
        total += power
    return total


@kernel
def _attention(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    slots, dim, group, key_heads = p[SLOTS], p[DIM], p[GROUP], p[KEY_HEADS]
    scale = np.float32(1 / math.sqrt(dim))
    rounded = p[KEY_SCALES] != 0
    size = 1 if rounded else 4
    plain = not (p[KEY_WEIGHTS] or p[LOGARITHMS] or p[VISIBLE])
    items, padded, step = last - first, -(-slots // BLOCK) * BLOCK, size * p[CACHE_SLOT]
    of_queries = items * group
    scores, totals = np.empty((of_queries, padded), np.float32), np.empty(of_queries, np.float32)
    queries, places = np.empty(items, np.int64), np.empty(items, np.int64)
    for item in range(items):
        row, key_head = (first + item) // key_heads, (first + item) % key_heads
        queries[item] = p[QUERY] + 4 * (row * p[QUERY_ROW] + key_head * group * p[QUERY_HEAD])
        places[item] = size * (row * p[CACHE_ROW] + key_head * p[CACHE_HEAD])
    out = p[OUT] + 4 * first * group * dim
    # All heads of some slots before the next slots: in a cache by slot that is from one end to the other, without the
    # gaps that heads which are not full leave, at which the processor stops to fetch what comes next.
    at_once = LANES if p[CACHE_SLOT] > p[CACHE_HEAD] else RUN
    for slot in range(0, slots, at_once):
        some = min(at_once, slots - slot)
        for item in range(items):
            keys = p[KEYS] + places[item] + slot * step
            for each in range(group):
                to = scores.ctypes.data + 4 * ((item * group + each) * padded + slot)
                query = queries[item] + 4 * each * p[QUERY_HEAD]
                if rounded:
                    _score_bytes(query, keys, to, some, dim, step)
                else:
                    _score_floats(query, keys, to, some, dim, step)
    for query in range(of_queries):
        item = first + query // group
        row, of_scales = item // key_heads, 4 * item * p[SCALES_HEAD]
        mine = scores[query]
        if rounded:
            _multiply_by_scales(mine, p[KEY_SCALES] + of_scales, slots, p[SCALES_SLOT])
        if plain or _prepare(p, mine, row, slots, scale):
            totals[query] = _softmax(mine, slots, scale if plain else _ONE)
        else:  # it sees nothing, and gives zeros
            totals[query] = _ONE
            for slot in range(slots):
                mine[slot] = _ZERO
        if p[VALUE_WEIGHTS]:
            _multiply(mine, p[VALUE_WEIGHTS] + 4 * row * p[VALUE_WEIGHTS_ROW], slots)
        if rounded:
            _multiply_by_scales(mine, p[VALUE_SCALES] + of_scales, slots, p[SCALES_SLOT])
        vector = carray(floats(out + 4 * query * dim), (dim,))
        for channel in range(dim):
            vector[channel] = _ZERO
    for slot in range(0, slots, at_once):
        some = min(at_once, slots - slot)
        for item in range(items):
            values = p[VALUES] + places[item] + slot * step
            for query in range(item * group, (item + 1) * group):
                factors = scores.ctypes.data + 4 * (query * padded + slot)
                if rounded:
                    _sum_bytes(out + 4 * query * dim, factors, values, some, dim, step)
                else:
                    _sum_floats(out + 4 * query * dim, factors, values, some, dim, step)
    for query in range(of_queries):
        vector = carray(floats(out + 4 * query * dim), (dim,))
        for channel in range(dim):
            vector[channel] /= totals[query]


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: int,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    log_attention: Tensor | None = None,
    visible: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one query of each row; all float32, but for rounded keys and values.

    Args:
        query: [rows, heads, 1, head_dim], the entries of a head side by side.
        keys, values: [rows, key_heads, S or more, head_dim] of the same strides, the entries of a vector side by side.
        slots: S, those that are read.
        value_weights, key_weights: factors on probabilities and on scores, [rows or 1, S], the entries of a row side
            by side; None for ones.
        log_attention: is added to the scores, shaped likewise; None for zeros.
        visible: bool, shaped likewise, which slots a query sees; None: all. One that sees none gives zeros.
        key_scales, value_scales: of keys and values in int8, [rows, key_heads, S or more, 1] of the same strides, those
            of all heads of all rows in equal steps; None for float32.

    Returns:
        [rows, heads, 1, head_dim], contiguous.
    """
    rows, heads, _, dim = query.shape
    key_heads = keys.shape[1]
    if any(
        each is not None and len(each) not in (1, rows) for each in (value_weights, key_weights, log_attention, visible)
    ):
        raise ValueError(f"weights and mask must have one row, or {rows} like the queries")
    out = torch.empty((rows, heads, 1, dim), dtype=query.dtype, device="cpu")
    query_row, query_head, _, _ = query.stride()
    cache_row, cache_head, cache_slot, _ = keys.stride()
    launch(
        _attention, rows * key_heads, 2 * rows * key_heads * slots * dim,
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), key_heads, heads // key_heads, slots, dim,
        query_row, query_head, cache_row, cache_head, cache_slot,
        *_shared_rows(value_weights), *_shared_rows(key_weights), *_shared_rows(log_attention), *_shared_rows(visible),
        _address(key_scales), _address(value_scales), *_steps_of(key_scales),
    )  # fmt: skip
    return out


def _steps_of(scales: Tensor | None) -> tuple[int, int]:
    """The steps from head to head and from slot to slot of the scales of an int8 cache; zeros for None."""
    return (0, 0) if scales is None else (scales.stride(1), scales.stride(2))


(
    X, ADDED, GATE, GATE_ROW, SCALE, SCALE_ROW, SHIFT, SHIFT_ROW, WEIGHT, BIAS, TOTAL, NORMED, WIDTH, KIND, EPS, AT,
) = range(FIRST, FIRST + 16)  # fmt: skip


def _sum_of_vectors(vectors: int, squares: bool) -> Any:
    """Sum the numbers, or the squares of their distances from one, of some neighbouring vectors a turn.

    Its arguments are their address, the number they are compared with, and the number of turns, at least one.
    """

    @_intrinsic
    def total(typing: Any, x: Any, mean: Any, turns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, mean, turns = arguments
            means = _spread(builder, mean, LANES)

            def body(turn: Any, sums: list[Any]) -> list[Any]:
                start, found = builder.add(x, builder.mul(turn, _WORD(4 * LANES * vectors))), []
                for each, total in enumerate(sums):
                    numbers = _load(builder, builder.add(start, _WORD(4 * LANES * each)))
                    if squares:
                        numbers = builder.fsub(numbers, means)
                        found.append(_multiplied_and_added(builder, numbers, numbers, total))
                    else:
                        found.append(builder.fadd(total, numbers))
                return found

            sums = _loop(builder, turns, [ir.Constant(_LANES, [0.0] * LANES)] * vectors, body)
            vector = functools.reduce(builder.fadd, sums)
            for apart in (1, 2, 4):
                vector = _pairs_added(builder, vector, vector, apart)
            return builder.extract_element(vector, ir.IntType(32)(0))

        return types.float32(types.int64, types.float32, types.int64), generate

    return total


def _sum_of(squares: bool) -> Any:
    """The function that sums numbers, or the squares of their distances from one."""
    by_some, by_one = _sum_of_vectors(SUMS, squares), _sum_of_vectors(1, squares)

    @compiled()
    def total(x: int, width: int, mean: np.float32) -> np.float32:
        numbers, parts, found = floats(x), width // LANES, _ZERO
        turns = parts // SUMS
        if turns:
            found += by_some(x, mean, turns)
        if parts > turns * SUMS:
            found += by_one(x + 4 * LANES * SUMS * turns, mean, parts - turns * SUMS)
        for place in range(parts * LANES, width):
            found += (numbers[place] - mean) * (numbers[place] - mean) if squares else numbers[place]
        return found

    return total


_sum_of_numbers, _sum_of_squares = _sum_of(False), _sum_of(True)


def _scaling(weighted: bool) -> Any:
    """Write the distances of numbers from one, times a factor and the weight of each; a vector a turn.

    Its arguments are the addresses of numbers, of the results, which may be the same, and of weights; the number they
    are compared with; the factor; and the number of turns, at least one.
    """

    @_intrinsic
    def scale_all(typing: Any, x: Any, out: Any, weight: Any, mean: Any, factor: Any, turns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, out, weight, mean, factor, turns = arguments
            means, factors = (_spread(builder, each, LANES) for each in (mean, factor))

            def body(turn: Any, _: list[Any]) -> list[Any]:
                place = builder.mul(turn, _WORD(4 * LANES))
                found = builder.fmul(builder.fsub(_load(builder, builder.add(x, place)), means), factors)
                if weighted:
                    found = builder.fmul(found, _load(builder, builder.add(weight, place)))
                _store(builder, found, builder.add(out, place))
                return []

            _loop(builder, turns, [], body)
            return context.get_dummy_value()

        number = types.float32
        return types.void(*[types.int64] * 3, number, number, types.int64), generate

    return scale_all


_scale, _scale_by_weights = _scaling(False), _scaling(True)


@compiled()
def _mean_and_factor(x: int, width: int, kind: int, eps: np.float32) -> tuple[np.float32, np.float32]:
    """What layer norm or RMS norm subtracts from a vector, and then multiplies it by."""
    mean = _sum_of_numbers(x, width, _ZERO) / np.float32(width) if kind == LAYER else _ZERO
    return mean, _ONE / np.float32(math.sqrt(_sum_of_squares(x, width, mean) / np.float32(width) + eps))


@compiled()
def _write_normed(x: int, out: int, width: int, mean: np.float32, factor: np.float32, weight: int) -> None:
    """Write a vector minus a number times a factor, in its place or to another one, times the weights at an address."""
    turns = width // LANES
    if turns and weight:
        _scale_by_weights(x, out, weight, mean, factor, turns)
    elif turns:
        _scale(x, out, weight, mean, factor, turns)
    numbers, found, weights = floats(x), floats(out), floats(weight)
    for place in range(turns * LANES, width):
        number = (numbers[place] - mean) * factor
        found[place] = number * weights[place] if weight else number


@compiled()
def _add(x: Any, address: int, width: int) -> None:
    """Add the vector at an address to another; nothing where it is 0."""
    if address:
        terms = carray(floats(address), (width,))
        for channel in range(width):
            x[channel] += terms[channel]


@kernel
def _add_norm(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    width, eps = p[WIDTH], _float(p[EPS])
    for row in range(first, last):
        place, entry = 4 * row * width, integers(p[AT])[row] if p[AT] else row
        x = carray(floats(p[X] + place), (width,))
        normed = carray(floats(p[NORMED] + place), (width,))
        if p[ADDED]:
            total = carray(floats(p[TOTAL] + place), (width,))
            added = carray(floats(p[ADDED] + place), (width,))
            if p[GATE]:
                gate = carray(floats(p[GATE] + 4 * entry * p[GATE_ROW]), (width,))
                for channel in range(width):
                    total[channel] = x[channel] + gate[channel] * added[channel]
            else:
                for channel in range(width):
                    total[channel] = x[channel] + added[channel]
            x = total
        mean, factor = _mean_and_factor(x.ctypes.data, width, p[KIND], eps)
        _write_normed(x.ctypes.data, p[NORMED] + place, width, mean, factor, p[WEIGHT])
        _add(normed, p[BIAS], width)
        if p[SCALE]:
            scale = carray(floats(p[SCALE] + 4 * entry * p[SCALE_ROW]), (width,))
            shift = carray(floats(p[SHIFT] + 4 * entry * p[SHIFT_ROW]), (width,))
            for channel in range(width):
                normed[channel] = normed[channel] * (_ONE + scale[channel]) + shift[channel]


def add_norm(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    kind: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `softcfg.nn.kernels.fused.add_norm`, of float32."""
    at = None if at is None else at.contiguous()
    x, added, gate = x.contiguous(), None if added is None else added.contiguous(), _with_rows(gate)
    scale, shift = map(_with_rows, modulation or (None, None))
    total = x if added is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    width = x.shape[-1]
    launch(
        _add_norm, x.numel() // width, x.numel(),
        x.data_ptr(), _address(added), *_rows_of(gate), *_rows_of(scale), *_rows_of(shift),
        _address(weight), _address(bias), total.data_ptr(), normed.data_ptr(), width, kind, _bits(eps),
        _address(at),
    )  # fmt: skip
    return total, normed


(
    NEW_QUERY, NEW_QUERY_ROW, NEW_KEY, NEW_KEY_ROW, NEW_VALUE, NEW_VALUE_ROW, NEW_HEADS, NEW_KEY_HEADS, NEW_DIM,
    TURNED_QUERY, TURNED_KEY, COS, SIN, ROTARY_ROW, HALVES, SLOT, TO_KEYS, TO_VALUES, TO_ROW, TO_HEAD, TO_SLOT,
    NORM, QUERY_EPS, QUERY_SHARE, QUERY_WEIGHT, QUERY_BIAS, KEY_EPS, KEY_SHARE, KEY_WEIGHT, KEY_BIAS,
    TO_KEY_SCALES, TO_VALUE_SCALES, TO_SCALES_HEAD, TO_SCALES_SLOT,
) = range(FIRST, FIRST + 34)  # fmt: skip


@compiled()
def _copy(x: Any, to: int, dim: int) -> None:
    """Copy a vector to an address."""
    out = carray(floats(to), (dim,))
    for channel in range(dim):
        out[channel] = x[channel]


@compiled(fastmath=False)  # as the cache itself rounds
def _store_rounded(x: Any, to: int, scale: int, dim: int) -> None:
    """Round a vector to int8 at an address, and write its scale to another."""
    largest, strange = _ZERO, np.int32(0)
    for channel in range(dim):
        largest = max(largest, abs(x[channel]))
        strange += np.int32(x[channel] != x[channel])
    step = _NAN if strange else largest / _LARGEST_BYTE
    carray(floats(scale), (1,))[0] = step
    divisor = step if step > _ZERO else _ONE
    out = carray(bytes_(to), (dim,))
    for channel in range(dim):
        out[channel] = np.int8(np.rint(x[channel] / divisor))


def _turning(halves: bool) -> Any:
    """Rotate pairs of channels of a vector, `LANES` channels of it, or of each half, in a turn.

    Its arguments are the addresses of the vector, of the result, which may be the same, and of cosines and sines; the
    pairs of the vector; and the number of turns, at least one.
    """

    @_intrinsic
    def turn_all(typing: Any, source: Any, to: Any, cos: Any, sin: Any, pairs: Any, turns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, to, cos, sin, pairs, turns = arguments
            apart = builder.mul(pairs, _WORD(4))

            def of_halves(turn: Any, _: list[Any]) -> list[Any]:
                place = builder.mul(turn, _WORD(4 * LANES))
                one, other = builder.add(source, place), builder.add(builder.add(source, place), apart)
                first, second = _load(builder, one), _load(builder, other)
                by_cos, by_sin = (_load(builder, builder.add(each, place)) for each in (cos, sin))
                place = builder.add(to, place)
                _store(builder, _two_products(builder, first, by_cos, builder.fneg(second), by_sin), place)
                _store(builder, _two_products(builder, first, by_sin, second, by_cos), builder.add(place, apart))
                return []

            def of_neighbours(turn: Any, _: list[Any]) -> list[Any]:
                place = builder.mul(turn, _WORD(4 * LANES))
                of_pairs = builder.mul(turn, _WORD(4 * LANES // 2))
                x = _load(builder, builder.add(source, place))
                by_cos, by_sin = (_load(builder, builder.add(each, of_pairs), lanes=LANES // 2) for each in (cos, sin))
                in_turn = [lane for pair in range(LANES // 2) for lane in (pair, LANES // 2 + pair)]
                of_first = _shuffled(builder, by_cos, by_sin, in_turn)
                of_second = _shuffled(builder, builder.fneg(by_sin), by_cos, in_turn)
                first, second = (
                    _shuffled(builder, x, x, [lane // 2 * 2 + each for lane in range(LANES)]) for each in (0, 1)
                )
                _store(builder, _two_products(builder, first, of_first, second, of_second), builder.add(to, place))
                return []

            _loop(builder, turns, [], of_halves if halves else of_neighbours)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return turn_all


def _two_products(builder: Any, one: Any, by: Any, other: Any, other_by: Any) -> Any:
    """The sum of the products of vectors."""
    product = builder.fmul(one, by, flags=_CONTRACT)
    return builder.fadd(product, builder.fmul(other, other_by), flags=_CONTRACT)


_turn_halves, _turn_neighbours = _turning(True), _turning(False)


@compiled()
def _rotate(source: int, to: int, cos: int, sin: int, pairs: int, halves: bool) -> None:
    """Rotate the pairs of channels of a vector, in its place or to another one."""
    turns = pairs // LANES if halves else 2 * pairs // LANES
    done = turns * LANES if halves else turns * LANES // 2
    if turns and halves:
        _turn_halves(source, to, cos, sin, pairs, turns)
    elif turns:
        _turn_neighbours(source, to, cos, sin, pairs, turns)
    x, out, by_cos, by_sin = floats(source), floats(to), floats(cos), floats(sin)
    for pair in range(done, pairs):  # the rest, which fills no vector
        one, other = (pair, pairs + pair) if halves else (2 * pair, 2 * pair + 1)
        first, second = x[one], x[other]
        out[one] = first * by_cos[pair] - second * by_sin[pair]
        out[other] = second * by_cos[pair] + first * by_sin[pair]


@compiled()
def _turn_heads(
    p: Any, row: int, source: int, to: int, heads: int, eps: np.float32, served: int, weight: int, bias: int, norms: Any
) -> None:
    """Normalise and rotate the heads of a row, vectors side by side; `norms` is scratch memory, [heads, 2]."""
    dim, norm, halves = p[NEW_DIM], p[NORM], p[HALVES] != 0
    turned, place = p[COS] != 0, 4 * row * p[ROTARY_ROW]
    cos, sin = p[COS] + place, p[SIN] + place
    if not (norm or turned):
        _copy(carray(floats(source), (heads * dim,)), to, heads * dim)
        return
    if norm:  # first of all of them, for each waits long for its square root
        for head in range(heads):
            norms[head, 0], norms[head, 1] = _mean_and_factor(source + 4 * head * dim, dim, norm, eps)
    for head in range(heads):
        x, out = source + 4 * head * dim, to + 4 * head * dim
        if norm:
            group = 4 * (head // served) * dim
            mean, factor = norms[head, 0], norms[head, 1]
            _write_normed(x, out, dim, mean, factor, weight + group if weight else 0)
            _add(carray(floats(out), (dim,)), bias + group if bias else 0, dim)
            x = out
        if turned:
            _rotate(x, out, cos, sin, dim // 2, halves)


@kernel
def _rotate_and_cache(address: int) -> None:
    p = carray(integers(address), (MOST,))
    start, stop = share(p)
    heads, key_heads, dim = p[NEW_HEADS], p[NEW_KEY_HEADS], p[NEW_DIM]
    at_once = key_heads if p[TO_HEAD] == dim and not p[TO_KEY_SCALES] else 1
    width = at_once * dim
    norms = np.empty((max(heads, key_heads), 2), np.float32)
    for row in range(start, stop):
        _turn_heads(
            p, row, p[NEW_QUERY] + 4 * row * p[NEW_QUERY_ROW], p[TURNED_QUERY] + 4 * row * heads * dim, heads,
            _float(p[QUERY_EPS]), p[QUERY_SHARE], p[QUERY_WEIGHT], p[QUERY_BIAS], norms,
        )  # fmt: skip
        keys, values = p[TURNED_KEY] + 4 * row * key_heads * dim, p[NEW_VALUE] + 4 * row * p[NEW_VALUE_ROW]
        _turn_heads(
            p, row, p[NEW_KEY] + 4 * row * p[NEW_KEY_ROW], keys, key_heads,
            _float(p[KEY_EPS]), p[KEY_SHARE], p[KEY_WEIGHT], p[KEY_BIAS], norms,
        )  # fmt: skip
        for head in range(0, key_heads, at_once):
            key = carray(floats(keys + 4 * head * dim), (width,))
            value = carray(floats(values + 4 * head * dim), (width,))
            cached = row * p[TO_ROW] + head * p[TO_HEAD] + p[SLOT] * p[TO_SLOT]
            if p[TO_KEY_SCALES]:
                of_slot = 4 * ((row * key_heads + head) * p[TO_SCALES_HEAD] + p[SLOT] * p[TO_SCALES_SLOT])
                _store_rounded(key, p[TO_KEYS] + cached, p[TO_KEY_SCALES] + of_slot, dim)
                _store_rounded(value, p[TO_VALUES] + cached, p[TO_VALUE_SCALES] + of_slot, dim)
            else:
                _copy(key, p[TO_KEYS] + 4 * cached, width)
                _copy(value, p[TO_VALUES] + 4 * cached, width)


def rotate_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: int,
    keys: Tensor,
    values: Tensor,
    *,
    norm: int = 0,
    query_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    key_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: tuple[float, float] = (0.0, 0.0),
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    neighbours: bool = False,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `softcfg.nn.kernels.fused.rotate_and_cache`, of float32 and into a cache of float32, or of int8 with scales.

    Args:
        slot: of all rows.
        cos, sin: of each row, or one row for all; of the same strides.
    """
    rows, heads, _, dim = query.shape
    key_heads = key.shape[1]
    turned_query = torch.empty((rows, heads, 1, dim), dtype=query.dtype, device="cpu")
    turned_key = torch.empty((rows, key_heads, 1, dim), dtype=key.dtype, device="cpu")
    to_row, to_head, to_slot, _ = keys.stride()
    norms = [
        *(_bits(eps[0]), _heads_of_weights(query_weights[0], heads, dim), *map(_address, query_weights)),
        *(_bits(eps[1]), _heads_of_weights(key_weights[0], key_heads, dim), *map(_address, key_weights)),
    ]
    launch(
        _rotate_and_cache, rows, turned_query.numel() + turned_key.numel(),
        query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0),
        heads, key_heads, dim, turned_query.data_ptr(), turned_key.data_ptr(), _address(cos), *_shared_rows(sin),
        int(not neighbours), slot, keys.data_ptr(), values.data_ptr(), to_row, to_head, to_slot, norm, *norms,
        _address(key_scales), _address(value_scales), *_steps_of(key_scales),
    )  # fmt: skip
    return turned_query, turned_key


def _heads_of_weights(weight: Tensor | None, heads: int, dim: int) -> int:
    """How many neighbouring heads each vector of weights serves."""
    groups = 1 if weight is None else weight.numel() // dim
    if heads % groups:
        raise ValueError(f"{groups} vectors of weights cannot serve {heads} heads alike")
    return heads // groups


UNGATED, UNGATED_ROW, UP, UP_ROW, PRODUCT, PRODUCT_WIDTH, PIECES = range(FIRST, FIRST + 7)


@kernel
def _silu_product(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    for item in range(first, last):
        row, piece = item // p[PIECES], item % p[PIECES]
        start = piece * PIECE
        width = min(PIECE, p[PRODUCT_WIDTH] - start)
        gate = carray(floats(p[UNGATED] + 4 * (row * p[UNGATED_ROW] + start)), (width,))
        up = carray(floats(p[UP] + 4 * (row * p[UP_ROW] + start)), (width,))
        out = carray(floats(p[PRODUCT] + 4 * (row * p[PRODUCT_WIDTH] + start)), (width,))
        for place in range(width):
            out[place] = gate[place] / (_ONE + exp(-gate[place])) * up[place]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """As `softcfg.nn.kernels.fused.silu_product`, of float32 [..., width]."""
    out, width = torch.empty(gate.shape, dtype=gate.dtype, device="cpu"), gate.shape[-1]
    gates, ups = _with_rows(gate), _with_rows(up)
    pieces = -(-width // PIECE)
    launch(
        _silu_product, gate.numel() // width * pieces, gate.numel(),
        *_rows_of(gates), *_rows_of(ups), out.data_ptr(), width, pieces,
    )  # fmt: skip
    return out


# Of the exponent of the complementary error function (Numerical Recipes, section 6.2: to 1.2e-7 of itself).
_ERFC = [
    np.float32(term)
    for term in (
        -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806,
        0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
    )
]  # fmt: skip
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9 = _ERFC
_ROOT_HALF = np.float32(math.sqrt(0.5))

INTO_GELU, OF_GELU, NUMBERS = range(FIRST, FIRST + 3)


@kernel
def _gelu(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    for item in range(first, last):
        start = item * PIECE
        width = min(PIECE, p[NUMBERS] - start)
        x = carray(floats(p[INTO_GELU] + 4 * start), (width,))
        out = carray(floats(p[OF_GELU] + 4 * start), (width,))
        for place in range(width):
            z = abs(x[place]) * _ROOT_HALF
            t = _ONE / (_ONE + _HALF * z)
            series = _E4 + t * (_E5 + t * (_E6 + t * (_E7 + t * (_E8 + t * _E9))))
            series = _E0 + t * (_E1 + t * (_E2 + t * (_E3 + t * series)))
            beyond = _HALF * t * exp(series - z * z)  # the chance of a number further from 0, on this side
            out[place] = x[place] * (beyond if x[place] < _ZERO else _ONE - beyond)


def gelu(x: Tensor) -> Tensor:
    """x times the chance that a normal number is less, of float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    launch(_gelu, -(-x.numel() // PIECE), x.numel(), x.data_ptr(), out.data_ptr(), x.numel())
    return out


(
    CONFIDENCE, CONFIDENCE_ROW, WEIGHTS, WEIGHTS_ROW, COUNT, SUCCESSOR, STEP_NORM, STRENGTH, FLOOR, ADDED_TO_SUM,
) = range(FIRST, FIRST + 10)  # fmt: skip
_SMALLEST = np.finfo(np.float32).tiny


@compiled(fastmath={"contract"})  # by an inverse, the share of a token that is alone would be a little less than 1
def _lessen(weights: Any, confidence: Any, total: np.float32, later: int, count: int) -> None:
    for place in range(later, count):
        weights[place - later] = max(_ONE - confidence[place] / total, _ZERO)


@kernel
def _write_weights(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    count, later = p[COUNT], p[SUCCESSOR]
    strength, floor = _float(p[STRENGTH]), _float(p[FLOOR])
    for row in range(first, last):
        confidence = carray(floats(p[CONFIDENCE] + 4 * row * p[CONFIDENCE_ROW]), (count,))
        weights = carray(floats(p[WEIGHTS] + 4 * row * p[WEIGHTS_ROW]), (count,))
        total = _ONE
        if p[STEP_NORM]:
            total = _ZERO
            for place in range(later, count):
                total += confidence[place]
            total = max(total + _float(p[ADDED_TO_SUM]), _SMALLEST)  # without confidences, all are 0
        for place in range(count):
            weights[place] = _ONE
        _lessen(weights, confidence, total, later, count)
        if strength != _ONE:
            for place in range(count):
                weights[place] = weights[place] ** strength
        for place in range(count):
            weights[place] = max(weights[place], floor)


def write_weights(confidence: Tensor, weights: Tensor, **settings: Any) -> None:
    """As `softcfg.nn.kernels.fused.write_weights`."""
    launch(*weights_written(confidence, weights, **settings))


def weights_written(
    confidence: Tensor,
    weights: Tensor,
    *,
    step_norm: bool,
    strength: float,
    floor: float,
    eps: float,
    successor: bool,
) -> tuple[int, ...]:
    """The launch of `softcfg.nn.kernels.fused.write_weights`."""
    batch, count = confidence.shape
    return (
        _write_weights, batch, confidence.numel(), *_shared_rows(confidence), *_shared_rows(weights), count,
        int(successor), int(step_norm), _bits(float(strength)), _bits(float(floor)), _bits(float(eps)),
    )  # fmt: skip


(
    LOGITS, LOGITS_ROW, VOCABULARY, TEMPERATURE, PROBABILITY, PROBABILITY_ROW, COLUMN, CODES, CODES_ROW, TOKENS,
    TOKENS_ROW,
) = range(FIRST, FIRST + 11)  # fmt: skip


@kernel
def _write_confidence(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    count, column = p[VOCABULARY], p[COLUMN]
    inverse = _ONE / _float(p[TEMPERATURE])
    for row in range(first, last):
        logits = carray(floats(p[LOGITS] + 4 * row * p[LOGITS_ROW]), (count,))
        largest = _largest(logits)
        total = _ZERO
        for place in range(count):
            total += exp((logits[place] - largest) * inverse)
        found = _ONE / total
        if p[TOKENS]:
            token = carray(integers(p[TOKENS] + 8 * row * p[TOKENS_ROW]), (1,))[0]
            found *= exp((logits[token] - largest) * inverse) if 0 <= token < count else _ZERO
        if p[CODES] and not carray(bools(p[CODES] + row * p[CODES_ROW] + column), (1,))[0]:
            found = _ZERO
        carray(floats(p[PROBABILITY] + 4 * (row * p[PROBABILITY_ROW] + column)), (1,))[0] = found


def write_confidence(
    logits: Tensor,
    confidence: Tensor,
    at: Tensor,
    temperature: float,
    codes: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """As `softcfg.nn.kernels.fused.write_confidence`."""
    column = int(at)
    if not 0 <= column < confidence.shape[1]:
        raise IndexError(f"there are {confidence.shape[1]} columns, and {column} is none of them")
    launch(*confidence_written(logits, confidence, column, temperature, codes, tokens))


def confidence_written(
    logits: Tensor,
    confidence: Tensor,
    column: int,
    temperature: float,
    codes: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[int, ...]:
    """The launch of `write_confidence`; the tokens [B] may lie in equal steps."""
    batch, count = logits.shape
    codes_row = 0 if codes is None or codes.dim() == 1 else codes.stride(0)
    return (
        _write_confidence, batch, logits.numel(), *_shared_rows(logits), count, _bits(float(temperature)),
        *_shared_rows(confidence), column, _address(codes), codes_row, *_shared_rows(tokens),
    )  # fmt: skip


(
    COND, COND_ROW, OTHER, OTHER_ROW, GUIDANCE_SCALE, DIVISOR, CHOICES, START, STOP, GUIDED, UNIFORM, UNIFORM_ROW,
    DRAWN, DRAWN_ROW, SEEN, SEEN_ROW, SEEN_OTHER, SEEN_LAST,
) = range(FIRST, FIRST + 18)  # fmt: skip
SUMMED = 64  # weights whose sum is taken at once


@compiled()
def _largest_or_nan(numbers: Any) -> np.float32:
    """The same; NaN if one of them is no number."""
    strange = False
    for place in range(len(numbers)):
        strange |= numbers[place] != numbers[place]
    return _NAN if strange else _largest(numbers)


@compiled(fastmath=False)  # PyTorch rounds each of the operations
def _guide(guided: Any, cond: Any, other: Any, scale: np.float32, divisor: np.float32) -> None:
    for place in range(len(guided)):
        found = (other[place] + scale * (cond[place] - other[place])) / divisor
        guided[place] = found if cond[place] != _NOTHING else _NOTHING  # -inf minus -inf is NaN


@compiled()
def _sum(weights: Any) -> np.float64:
    total = np.float64(0)
    for place in range(len(weights)):
        total += np.float64(weights[place])
    return total


@compiled(fastmath=False)
def _by_inverse(weights: Any, uniform: np.float64) -> int:
    """The place at which the sum of weights exceeds this share of their total; never one with a weight of 0."""
    count = len(weights)
    total = before = np.float64(0)
    for first in range(0, count, SUMMED):
        total += _sum(weights[first : first + SUMMED])
    threshold, found = uniform * total, count - 1
    for first in range(0, count, SUMMED):
        after = before + _sum(weights[first : first + SUMMED])
        if after > threshold:
            last = min(first + SUMMED, count)
            found = last - 1
            for place in range(first, last):
                before += np.float64(weights[place])
                if before > threshold:
                    found = place
                    break
            break
        before = after
    while found and not weights[found] > _ZERO:  # sums in another order may differ in their last bits
        found -= 1
    return found


@kernel
def _draw(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    count, start, stop, divisor = p[CHOICES], p[START], p[STOP], _float(p[DIVISOR])
    scale = carray(floats(p[GUIDANCE_SCALE]), (1,))[0]
    for row in range(first, last):
        cond = carray(floats(p[COND] + 4 * row * p[COND_ROW]), (count,))
        other = carray(floats(p[OTHER] + 4 * row * p[OTHER_ROW]), (count,))
        guided = carray(floats(p[GUIDED] + 4 * row * count), (stop - start,))
        _guide(guided, cond[start:stop], other[start:stop], scale, divisor)
        largest = _largest_or_nan(guided)
        seen = carray(floats(p[SEEN] + 4 * row * p[SEEN_ROW]), (p[SEEN_LAST] + 1,))
        seen[0] = _largest_or_nan(cond)
        if p[SEEN_OTHER]:
            seen[p[SEEN_OTHER]] = _largest_or_nan(other)
        seen[p[SEEN_LAST]] = largest
        for place in range(len(guided)):
            guided[place] = exp(guided[place] - largest)
        uniform = carray(doubles(p[UNIFORM] + 8 * row * p[UNIFORM_ROW]), (1,))[0]
        carray(integers(p[DRAWN] + 8 * row * p[DRAWN_ROW]), (1,))[0] = start + _by_inverse(guided, uniform)


def draw(
    cond: Tensor,
    other: Tensor | None,
    scale: Tensor,
    temperature: float,
    uniforms: Tensor,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `softcfg.nn.fused.draw`.

    Raises:
        ValueError: `allowed` names no tokens of the vocabulary.
    """
    batch, count = cond.shape
    start, stop = (0, count) if allowed is None else allowed.flatten().tolist()
    check_allowed(start, stop, count)
    drawn = torch.empty(batch, dtype=torch.int64, device="cpu")
    seen = torch.empty(2 if other is None else 3, batch, dtype=torch.float32, device="cpu")
    guided = torch.empty_like(cond, memory_format=torch.contiguous_format)
    launch(*drawing(cond, other, scale, temperature, uniforms, (start, stop), guided, drawn, seen))
    return drawn, seen


def check_allowed(start: int, stop: int, count: int) -> None:
    """Raise `ValueError` unless tokens `start` to `stop - 1` are among those of the vocabulary."""
    if not 0 <= start < stop <= count:
        raise ValueError(f"tokens {start} to {stop - 1} are not among the {count} of the vocabulary")


def drawing(
    cond: Tensor,
    other: Tensor | None,
    scale: Tensor,
    temperature: float,
    uniforms: Tensor,
    allowed: tuple[int, int],
    guided: Tensor,
    drawn: Tensor,
    seen: Tensor,
) -> tuple[int, ...]:
    """The launch of `draw`.

    Args:
        allowed: the first token that may be drawn and the one after the last.
        guided: [B, V], contiguous, to compute in.
        drawn, seen: where the tokens are written, int64 [B], and what `draw` gives beside them, [2 or 3, B]; their
            entries may lie in equal steps.
    """
    batch, count = cond.shape
    away_from = cond if other is None else other  # away from itself it stays as it is
    of_other = 0 if other is None else seen.stride(0)
    return (
        _draw, batch, 3 * cond.numel(), *_shared_rows(cond), *_shared_rows(away_from), scale.data_ptr(),
        _bits(float(temperature)), count, *allowed, guided.data_ptr(), *_shared_rows(uniforms), drawn.data_ptr(),
        drawn.stride(0), seen.data_ptr(), seen.stride(1), of_other, (len(seen) - 1) * seen.stride(0),
    )  # fmt: skip


TOKENS_FED, FED_ROW, IMAGES, EMBEDDING, FED_WIDTH, FED = range(FIRST, FIRST + 6)


@kernel
def _embed(address: int) -> None:
    p = carray(integers(address), (MOST,))
    first, last = share(p)
    width = p[FED_WIDTH]
    for row in range(first, last):
        token = carray(integers(p[TOKENS_FED] + 8 * (row % p[IMAGES]) * p[FED_ROW]), (1,))[0]
        _copy(carray(floats(p[EMBEDDING] + 4 * token * width), (width,)), p[FED] + 4 * row * width, width)


def embedded(tokens: Tensor, embedding: Tensor, out: Tensor) -> tuple[int, ...]:
    """The launch that feeds a step: of each token its row of the table, and all of these again until rows are full.

    Args:
        tokens: int64 [B], whose entries may lie in equal steps; each has a row in the table.
        embedding: float32 [tokens, width], contiguous.
        out: where the rows are written, float32 [copies x B, 1, width], contiguous.
    """
    width = embedding.shape[1]
    return (
        _embed, len(out), out.numel(), tokens.data_ptr(), tokens.stride(0), len(tokens), embedding.data_ptr(), width,
        out.data_ptr(),
    )  # fmt: skip


PANEL = 16  # outputs whose weights lie side by side: a register, or two or four
TOGETHER = 6  # rows for which a panel is read at once: with so many, their sums stay in registers
UNROLLED = 2  # inputs of a turn of the loop
_VECTOR = ir.VectorType(_FLOAT, PANEL)


def _panel_product(rows: int) -> Any:
    """The product of some rows with a panel of weights, as vector instructions that no compiler has to find.

    Its arguments are the addresses of weights [in, PANEL], of rows, of their results, of a bias (or 0) and of what is
    added (or 0); the number of inputs; the bytes from row to row, of the inputs and of the results; and the address
    from which on memory is fetched meanwhile, with the bytes for each input.
    """

    @_intrinsic
    def product(
        typing: Any, weights: Any, x: Any, out: Any, bias: Any, onto: Any, inputs: Any, x_row: Any, out_row: Any,
        ahead: Any, pace: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace = arguments
            vector, zero = _VECTOR.as_pointer(), _WORD(0)

            def load(address: Any) -> Any:
                return builder.load(builder.inttoptr(address, vector), align=4)

            def moved(address: Any, step: Any, times: int) -> Any:
                return builder.add(address, builder.mul(step, _WORD(times)))

            def or_zero(address: Any, place: Any) -> Any:
                """The vector at a place; zeros where the address it belongs to is 0."""
                before = builder.block
                with builder.if_then(builder.icmp_signed("!=", address, zero)):
                    found, inside = load(place), builder.block
                result = builder.phi(_VECTOR)
                result.add_incoming(ir.Constant(_VECTOR, [0.0] * PANEL), before)
                result.add_incoming(found, inside)
                return result

            start = or_zero(bias, bias)
            entry = builder.block
            loop, end = builder.append_basic_block("inputs"), builder.append_basic_block("end")
            builder.branch(loop)
            builder.position_at_end(loop)
            index = builder.phi(_WORD)
            index.add_incoming(zero, entry)
            sums = [builder.phi(_VECTOR) for _ in range(rows)]
            results = list(sums)
            for turn in range(UNROLLED):
                place = builder.add(index, _WORD(turn))
                _ask_for(builder, builder.add(ahead, builder.mul(place, pace)))
                panel = load(moved(weights, place, 4 * PANEL))
                for row in range(rows):
                    address = moved(moved(x, x_row, row), place, 4)
                    number = builder.load(builder.inttoptr(address, _FLOAT.as_pointer()))
                    spread = _spread(builder, number, PANEL)
                    results[row] = _multiplied_and_added(builder, panel, spread, results[row])
            following = builder.add(index, _WORD(UNROLLED))
            index.add_incoming(following, loop)
            for phi, result in zip(sums, results, strict=True):
                phi.add_incoming(start, entry)
                phi.add_incoming(result, loop)
            builder.cbranch(builder.icmp_signed("<", following, inputs), loop, end)
            builder.position_at_end(end)
            for row, result in enumerate(results):
                more = or_zero(onto, moved(onto, out_row, row))
                builder.store(builder.fadd(result, more), builder.inttoptr(moved(out, out_row, row), vector), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return product


_one, _two, _three, _four, _five, _six = (_panel_product(rows) for rows in range(1, TOGETHER + 1))

PACKED, INPUT, OUTPUT, OFFSET, ONTO, ROWS, INPUTS, OUTPUTS = range(FIRST, FIRST + 8)


@compiled()
def _panel(p: Any, panel: int) -> None:
    """The products of all rows with a panel."""
    rows, inputs = p[ROWS], p[INPUTS]
    x_row, out_row = 4 * inputs, 4 * p[OUTPUTS]
    weights, place = p[PACKED] + 4 * PANEL * panel * inputs, 4 * PANEL * panel
    bias = p[OFFSET] + place if p[OFFSET] else 0
    groups = (rows + TOGETHER - 1) // TOGETHER
    # Groups after the first find the panel in the caches and would leave the memory idle: the next panel is fetched
    # meanwhile, a part of it with each group.
    pace = 4 * PANEL // groups
    ahead = weights + 4 * PANEL * inputs
    done = 0
    while done < rows:
        x, out = p[INPUT] + done * x_row, p[OUTPUT] + done * out_row + place
        onto = p[ONTO] + done * out_row + place if p[ONTO] else 0
        # Evenly, for the sums of one or two rows alone take as long as those of four, each waiting for the one before.
        some = (rows - done + groups - 1) // groups
        if some == 6:
            _six(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        elif some == 5:
            _five(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        elif some == 4:
            _four(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        elif some == 3:
            _three(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        elif some == 2:
            _two(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        else:
            _one(weights, x, out, bias, onto, inputs, x_row, out_row, ahead, pace)
        done, groups, ahead = done + some, groups - 1, ahead + inputs * pace


@compiled()
def _rest(p: Any, first: int) -> None:
    """The products of all rows with the outputs that fill no panel."""
    inputs, outputs = p[INPUTS], p[OUTPUTS]
    for row in range(p[ROWS]):
        x = carray(floats(p[INPUT] + 4 * row * inputs), (inputs,))
        out = carray(floats(p[OUTPUT] + 4 * row * outputs), (outputs,))
        for output in range(first, outputs):
            weights = carray(floats(p[PACKED] + 4 * output * inputs), (inputs,))
            total = _ZERO
            for place in range(inputs):
                total += x[place] * weights[place]
            out[output] = total
        if p[OFFSET]:
            _add(out[first:], p[OFFSET] + 4 * first, outputs - first)
        if p[ONTO]:
            _add(out[first:], p[ONTO] + 4 * (row * outputs + first), outputs - first)


@kernel
def _product(address: int) -> None:
    p = carray(integers(address), (MOST,))
    panels = p[OUTPUTS] // PANEL
    first, last = share(p)
    for panel in range(first, min(last, panels)):
        _panel(p, panel)
    if last > panels:
        _rest(p, panels * PANEL)


def pack(weight: Tensor) -> Tensor:
    """Weights [out, in] in the order in which `product` reads them, shaped alike: panels of PANEL outputs as
    [in, PANEL], and what fills none as it is."""
    packed = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    # Straight into its memory: what malloc keeps of another copy in between came to as much as all weights of a model.
    panels, whole = _panels_of(packed)
    panels.copy_(weight[:whole].unflatten(0, (len(panels), PANEL)).transpose(1, 2))
    packed[whole:] = weight[whole:]
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The weights [out, in] again."""
    weight = torch.empty_like(packed)
    panels, whole = _panels_of(packed)
    weight[:whole].unflatten(0, (len(panels), PANEL)).copy_(panels.transpose(1, 2))
    weight[whole:] = packed[whole:]
    return weight


def _panels_of(packed: Tensor) -> tuple[Tensor, int]:
    """The panels of packed weights, [panels, in, PANEL], and how many outputs they are."""
    count, inputs = len(packed) // PANEL, packed.shape[1]
    return packed[: count * PANEL].view(count, inputs, PANEL), count * PANEL


def can_pack(weight: Tensor) -> bool:
    """Whether `product` serves weights [out, in]."""
    return weight.dtype == torch.float32 and weight.shape[1] > 0 and not weight.shape[1] % UNROLLED


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """onto + x W^T + bias, in float32. Each row has the same bits, however many there are.

    Args:
        x: [..., in].
        packed: of `pack`, [out, in].
        bias: [out]; None for zeros.
        onto: [..., out]; None for zeros.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    outputs, inputs = packed.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"the layer takes inputs of width {inputs}, got {x.shape[-1]}")
    if bias is not None and not (bias.shape == (outputs,) and bias.dtype is packed.dtype and bias.is_contiguous()):
        raise ValueError(f"the bias must be {packed.dtype} [{outputs}] in one piece")
    if onto is not None and onto.shape != (*x.shape[:-1], outputs):
        raise ValueError(f"what is added to must be {[*x.shape[:-1], outputs]}, got {list(onto.shape)}")
    x, onto = x.contiguous(), None if onto is None else onto.contiguous()
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device="cpu")
    launch(
        _product, -(-outputs // PANEL), packed.numel(),
        packed.data_ptr(), x.data_ptr(), out.data_ptr(), _address(bias), _address(onto), x.numel() // inputs, inputs,
        outputs,
    )  # fmt: skip
    return out
