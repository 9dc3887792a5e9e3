import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softcfg.nn import AttentionContext, weighted_attention
from softcfg.nn.attention import attend
from softcfg.nn.kv_cache import Int8KVCache, KVCache
from softcfg.nn.position import Position

ROWS, HEADS, DIM = 3, 2, 8


def update(cache: KVCache, layer: int, keys: Tensor, values: Tensor, position: Position) -> tuple[Tensor, Tensor]:
    """Write and read back what attention then covers."""
    cache.write(layer, keys, values, position)
    return cache.read(layer, position.covered(keys.shape[2], cache.slots))


@pytest.mark.parametrize("by_slot", [False, True])
def test_cache_returns_the_filled_part_and_keeps_what_was_written(by_slot: bool) -> None:
    cache = KVCache(layers=2, rows=ROWS, heads=HEADS, slots=6, head_dim=DIM, by_slot=by_slot)
    key, value = torch.randn(2, ROWS, HEADS, 6, DIM)
    pointers = [part.data_ptr() for part in (*cache.keys, *cache.values)]
    for layer in range(2):
        update(cache, layer, key[:, :, :2], value[:, :, :2], Position.start())
    for slot in range(2, 6):
        for layer in range(2):
            new = slice(slot, slot + 1)
            scaled = (layer + 1) * key[:, :, new]
            keys, values = update(cache, layer, scaled, value[:, :, new], Position.shared(slot))
            assert keys.shape == values.shape == (ROWS, HEADS, slot + 1, DIM)
    assert torch.equal(cache.values[0], value)
    assert torch.equal(keys[:, :, 2:], 2 * key[:, :, 2:])
    assert torch.equal(cache.keys[0], key)
    assert [part.data_ptr() for part in (*cache.keys, *cache.values)] == pointers
    assert cache.slots == 6
    filled = cache.read(0, 4)[0]
    assert filled.permute(2, 0, 1, 3).is_contiguous() == by_slot  # in one piece


@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
def test_cache_refuses_to_overflow(kind: type[KVCache]) -> None:
    cache = kind(layers=1, rows=1, heads=1, slots=2, head_dim=4)
    with pytest.raises(ValueError, match="2 slots"):
        cache.write(0, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), Position.shared(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by_row", [False, True])
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype, by_row: bool) -> None:
    torch.manual_seed(0)
    cache = Int8KVCache(layers=2, rows=ROWS, heads=HEADS, slots=6, head_dim=DIM, dtype=dtype)
    written = torch.randn(2, 2, ROWS, HEADS, 6, DIM, dtype=dtype)  # layers, keys and values
    written *= 10.0 ** torch.arange(-3, 3)[:, None]  # vectors of very different length
    written[..., 4, :] = 0
    for layer, (keys, values) in enumerate(written):
        for slots in (slice(0, 3), slice(3, 4), slice(4, 6)):
            position = Position.shared(slots.start)
            if by_row:
                position = Position.by_row(torch.full((ROWS,), slots.start))
            read = update(cache, layer, keys[:, :, slots], values[:, :, slots], position)
        again = update(cache, layer, keys[:, :, :2], values[:, :, :2], Position.start())
        assert [part.shape[2] for part in again] == [2, 2]
        for found, wanted in zip(read, (keys, values), strict=True):
            assert found.dtype == dtype
            step = wanted.double().abs().amax(-1, keepdim=True) / 127
            # In bfloat16 the product with the scale is rounded once more.
            room = 0.5 + (127 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-4)
            error = (found.double() - wanted.double()).abs()
            assert (error <= room * step).all()
            assert error.max() > 0
    assert cache.keys[0].dtype == torch.int8


def test_int8_rows_write_where_they_stand() -> None:
    torch.manual_seed(0)
    cache = Int8KVCache(layers=1, rows=2, heads=1, slots=5, head_dim=DIM)
    vectors = torch.randn(2, 1, 2, DIM)
    keys, values = update(cache, 0, vectors, -vectors, Position.by_row(torch.tensor([0, 3])))
    for row, slot in ((0, 0), (1, 3)):
        torch.testing.assert_close(keys[row, :, slot : slot + 2], vectors[row], atol=0.02, rtol=0)
        torch.testing.assert_close(values[row, :, slot : slot + 2], -vectors[row], atol=0.02, rtol=0)
    assert not keys[0, :, 2:].any()
    assert not keys[1, :, :3].any()


@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
def test_a_part_shares_the_memory(kind: type[KVCache]) -> None:
    cache = kind(layers=1, rows=1, heads=1, slots=6, head_dim=DIM)
    part = cache.up_to(4)
    vectors = torch.randn(1, 1, 2, DIM)
    part.write(0, vectors, vectors, Position.by_row(torch.tensor([1])))
    assert part.slots == 4
    assert torch.equal(cache.read(0, 4)[0], part.read(0, 4)[0])
    assert cache.read(0, 6)[1].count_nonzero(-1).flatten().tolist() == [0, DIM, DIM, 0, 0, 0]


class PlainKVCache(KVCache):
    """Keys and values of another dtype, which are no more than converted."""

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        keys, values = super().read(layer, slots)
        return keys.to(self.dtype), values.to(self.dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_a_step_writes_what_the_cache_stores(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainKVCache, "stored", stored)
    cache = PlainKVCache(1, 2, 3, 8, 32)
    query, key, value = 9 * torch.randn(3, 2, 3, 1, 32)
    with torch.inference_mode():
        found = attend(query, key, value, 0, AttentionContext.create(Position.shared(5), 1, cache))
    contents = (cache.keys[0], cache.values[0])
    for given, kept in zip((key, value), contents, strict=True):
        wanted = torch.zeros_like(kept)
        wanted[:, :, 5:6] = given
        assert torch.equal(kept, wanted)
    keys, values = (each[:, :, :6].float() for each in contents)
    torch.testing.assert_close(found, weighted_attention(query, keys, values).transpose(1, 2).flatten(2))


def test_bytes() -> None:
    sizes = {"layers": 3, "rows": 2, "heads": 4, "slots": 5, "head_dim": 16}
    vectors = 2 * 3 * 2 * 4 * 5
    assert KVCache(**sizes, dtype=torch.bfloat16).nbytes == vectors * 32
    assert Int8KVCache(**sizes, dtype=torch.bfloat16).nbytes == vectors * (16 + 4)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="only a Linux with huge pages has them")
@pytest.mark.parametrize("kind", [KVCache, Int8KVCache])
def test_a_large_cache_asks_for_huge_pages(kind: type[KVCache]) -> None:
    cache = kind(2, 8, 4, 512, 128)
    assert not any(contents.any() for contents in (*cache.keys, *cache.values))
    middle = cache.values[0].data_ptr()
    for lines in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        first, last = (int(end, 16) for end in lines.split(" ", 1)[0].split("-"))
        if first <= middle < last:
            assert " hg" in lines[lines.index("VmFlags") :]
            return
    pytest.fail("the cache lies nowhere")
