from collections.abc import Callable
from typing import Any

import pytest
import torch

from softcfg import SoftCFG, UserError
from softcfg.configuration import load_config
from softcfg.decoding import decode, image_uniforms
from softcfg.models import rar as rar_module
from softcfg.models.alitok import AliTok, AliTokConfig
from softcfg.models.base import Generator
from softcfg.models.llamagen import LlamaGen, LlamaGenConfig
from softcfg.models.rar import RAR, RARConfig, RobusTokConfig
from softcfg.nn import Position

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": 24,
    "condition_num_classes": 5,
}  # fmt: skip
LLAMAGEN = {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 5, "vocab_size": 24, "block_size": 9}


def alitok(prefix: int = 3, grid: int = 3) -> AliTok:
    torch.manual_seed(0)
    config = AliTokConfig(**SMALL, image_seq_len=prefix + grid**2, grid_size=grid, prefix_tokens=prefix)
    return AliTok(config).eval()


def rar() -> RAR:
    torch.manual_seed(0)
    return RAR(RARConfig(**SMALL, intermediate_size=64, image_seq_len=12)).eval()


def robustok() -> RAR:
    torch.manual_seed(0)
    return RAR(RobusTokConfig(**SMALL, intermediate_size=64, image_seq_len=12)).eval()


def llamagen() -> LlamaGen:
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(**LLAMAGEN)).eval()


GENERATORS = {
    "alitok": alitok,
    "alitok without prefix": lambda: alitok(0, 4),
    "rar": rar,
    "robustok": robustok,
    "llamagen": llamagen,
}


@pytest.fixture(params=list(GENERATORS))
def generator(request: pytest.FixtureRequest) -> Generator:
    return GENERATORS[request.param]()


def tokens_for(generator: Generator, rows: int) -> torch.Tensor:
    return torch.randint(generator.vocab_size, (rows, generator.num_tokens))


@torch.no_grad()
def test_any_split_into_passes_gives_the_same_logits(generator: Generator) -> None:
    condition = generator.condition([0, 4], guided=True)
    tokens = tokens_for(generator, 4)[:, :-1]
    slots = generator.condition_slots + generator.num_tokens - 1
    value_weights, key_weights = torch.rand(2, 4, slots)
    whole = generator(condition, tokens, value_weights=value_weights, key_weights=key_weights)
    assert whole.shape == (4, generator.num_tokens, generator.vocab_size)
    for pieces in ([0, 1, 4, 3], [2, 5], [0] + [1] * tokens.shape[1]):
        cache = generator.new_cache(condition)
        logits, start = [], 0
        for length in pieces:
            piece = tokens[:, start : start + length]
            slot = generator.condition_slots + start if logits else 0
            logits.append(
                generator(
                    condition,
                    piece,
                    cache=cache,
                    slot=slot,
                    value_weights=value_weights,
                    key_weights=key_weights,
                )
            )
            start += length
        torch.testing.assert_close(torch.cat(logits, 1), whole[:, : start + 1])


@torch.no_grad()
def test_an_int8_cache_moves_the_logits_a_little(generator: Generator) -> None:
    condition = generator.condition([0, 4], guided=True)
    tokens = tokens_for(generator, 4)[:, :-1]
    exact = generator(condition, tokens)
    plain_bytes = generator.cache_bytes(condition)
    generator.cache_dtype = torch.int8
    cache = generator.new_cache(condition)
    assert cache.keys[0].dtype == torch.int8
    assert generator.cache_bytes(condition) == cache.nbytes < plain_bytes / 3
    logits = [generator(condition, tokens[:, :0], cache=cache)]
    for step in range(tokens.shape[1]):
        by_row = Position.by_row(torch.full((4,), generator.condition_slots + step))
        slot = by_row if step % 2 else generator.condition_slots + step
        logits.append(generator(condition, tokens[:, step : step + 1], cache=cache, slot=slot))
    error = torch.cat(logits, 1) - exact
    assert 0 < error.abs().max() < 0.05 * exact.std()


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_at_slots_of_their_own(generator: Generator, new: int, weighted: bool) -> None:
    generator = generator.double()
    condition = generator.condition([0, 4, 2], guided=True)
    total, slots = generator.num_tokens, condition.slots
    tokens = tokens_for(generator, 6)[:, :-1]
    weights = {}
    if weighted:  # slots of the condition, as queries and as keys, have none
        table = torch.rand(2, 6, total, condition.cache_slots, dtype=torch.float64)
        table[..., :slots] = 1
        padded = torch.nn.functional.pad(table, (0, 0, slots - 1, 0), value=1.0)
        weights = {"value_weights": padded[0], "key_weights": padded[1]}
    whole = generator(condition, tokens, **weights)

    cache = generator.new_cache(condition)
    for part in (*cache.keys, *cache.values):
        part.fill_(1e3)  # what lies behind a query must not matter
    head = {name: weight[:, :slots] for name, weight in weights.items()}
    logits = [[row] for row in generator(condition, tokens[:, :0], cache=cache, **head)[:, 0]]
    fed = torch.zeros(6, dtype=torch.int64)
    pace = torch.tensor([1, 2, 3, 1, 3, 2]).clamp(max=new)
    rows = torch.arange(6)[:, None]
    while (fed < total - 1).any():
        start = fed.clamp(max=total - 1 - new)  # rows near their end feed some tokens again
        where = start[:, None] + torch.arange(new)
        if weighted:
            weights = {f"{name}_weights": table[i][rows, where + 1] for i, name in enumerate(("value", "key"))}
        out = generator(condition, tokens[rows, where], cache=cache, slot=Position.by_row(slots + start), **weights)
        assert out.shape == (6, new, generator.vocab_size)
        for row in range(6):
            stop = min(int(fed[row] + pace[row]), total - 1)
            logits[row] += out[row, fed[row] - start[row] : stop - start[row]]
            fed[row] = stop
    torch.testing.assert_close(torch.stack([torch.stack(row) for row in logits]), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_logits_depend_on_the_past_alone(generator: Generator) -> None:
    condition = generator.condition([1], guided=False)
    tokens = tokens_for(generator, 1)[:, :-1]
    before = generator(condition, tokens)
    tokens[0, 6] = (tokens[0, 6] + 1) % generator.vocab_size
    after = generator(condition, tokens)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_an_images_bits_do_not_depend_on_the_other_labels(generator: Generator) -> None:
    tokens = tokens_for(generator, 6)
    logits = []
    for labels in ([2, 0, 1], [2, 4, 4]):
        condition = generator.condition(labels, guided=True)
        cache = generator.new_cache(condition)
        steps = [generator(condition, tokens[:, :0], cache=cache)]
        for step in range(generator.num_tokens - 1):
            slot = generator.condition_slots + step
            steps.append(generator(condition, tokens[:, step : step + 1], cache=cache, slot=slot))
        logits.append(torch.cat(steps, 1))
    assert torch.equal(logits[0][[0, 3]], logits[1][[0, 3]])
    assert not torch.equal(logits[0][1], logits[1][1])


@torch.no_grad()
def test_condition_and_null_class_matter(generator: Generator) -> None:
    tokens = tokens_for(generator, 1).repeat(3, 1)[:, :-1]
    first, second, null = generator(generator.class_condition(torch.tensor([0, 1, 5])), tokens)
    assert (first - second).abs().max() > 1e-4
    assert (first - null).abs().max() > 1e-4
    guided = generator.condition([0, 1], guided=True)
    assert guided.classes.tolist() == [0, 1, 5, 5]


@pytest.mark.parametrize("labels", [[5], [-1], [0.5], [[0]], ["x"], [True]])
def test_labels_out_of_range(generator: Generator, labels: list) -> None:
    with pytest.raises(UserError, match="labels"):
        generator.condition(labels, guided=True)


def test_a_later_pass_needs_the_cache(generator: Generator) -> None:
    with pytest.raises(ValueError, match="cache"):
        generator(generator.condition([0], guided=False), torch.zeros(1, 1, dtype=torch.int64), slot=3)


def test_training_reaches_every_parameter(generator: Generator) -> None:
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = tokens_for(generator, 2)
    condition = generator.class_condition(torch.tensor([1, 5]))
    logits = generator(condition, tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    without = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size must be an integer, got 'wide'"),
        ({"hidden_size": 32.5}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be greater than 0, got 0"),
        ({"num_attention_heads": 3}, "multiple of"),
        ({"image_seq_len": 100}, "image_seq_len"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ],
)
def test_configurations_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(AliTokConfig, {**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 36}, r"dim 36 must be a multiple of 4 x n_head \(2\)"),
        ({"block_size": 10}, "block_size 10 must be the square of a whole number"),
        ({"ffn_hidden_dim": 0}, "ffn_hidden_dim must be greater than 0, got 0"),
        ({"multiple_of": 0}, "multiple_of must be greater than 0, got 0"),
        (
            {"model_type": "t2i", "cls_token_num": 120},
            "model_type must be c2i, got t2i, .* family llamagen-t2i",
        ),
        ({"cls_token_num": 2}, "cls_token_num must be 1"),
    ],
)
def test_llamagen_configurations_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(LlamaGenConfig, {**LLAMAGEN, **change})


@pytest.mark.parametrize(
    ("dim", "change", "width"),
    [
        (768, {}, 2048),
        (1024, {}, 2816),
        (3200, {}, 8704),
        (64, {"multiple_of": 8}, 176),
        (64, {"ffn_hidden_dim": 9}, 9),
    ],
)
def test_llamagen_feed_forward_width(dim: int, change: dict, width: int) -> None:
    assert load_config(LlamaGenConfig, {**LLAMAGEN, "dim": dim, **change}).ffn_width == width


def test_configuration_needs_its_sizes_and_ignores_the_rest() -> None:
    with pytest.raises(UserError, match="needs num_hidden_layers, num_attention_heads"):
        load_config(AliTokConfig, {"hidden_size": 32})
    config = load_config(AliTokConfig, {**SMALL, "dropout": 0.1, "rms_norm_eps": "1e-6"})
    assert config.rms_norm_eps == 1e-6
    with pytest.warns(UserWarning, match=r"did you mean grid_size\?"):
        load_config(AliTokConfig, {**SMALL, "gridsize": 16})


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just text", "model: 3"])
def test_configuration_files_that_are_none(content: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError):
        load_config(AliTokConfig, path)
    with pytest.raises(UserError, match="does not exist"):
        load_config(AliTokConfig, tmp_path / "missing.yaml")


MODES = [torch.inference_mode, torch.no_grad]


@torch.no_grad()
@pytest.mark.parametrize("modes", [MODES[:1], MODES[1:], MODES], ids=["inference", "no gradient", "both"])
@pytest.mark.parametrize("ahead", [1, 4, 9, 1000])
def test_windows_of_modulations_move_on(modes: list[Any], ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any length, back and forth, and in either mode: steps compute what the whole sequence does."""
    monkeypatch.setattr(rar_module, "WINDOW_ROWS", ahead * 3)
    generator = rar()
    tokens = tokens_for(generator, 4)[:, :-1]
    whole = generator(generator.condition([1, 3], guided=True), tokens)
    condition = generator.condition([1, 3], guided=True)
    cache = generator.new_cache(condition)
    generator(condition, tokens, cache=cache)
    steps = [*range(tokens.shape[1]), 4, 3, 9, 0, 0]
    for number, step in enumerate(steps):
        with modes[number % len(modes)]():
            slot = generator.condition_slots + step
            logits = generator(condition, tokens[:, step : step + 1], cache=cache.up_to(slot + 1), slot=slot)
        torch.testing.assert_close(logits[:, 0], whole[:, step + 1])


@torch.no_grad()
@pytest.mark.parametrize("make", [rar, robustok])
def test_modulations_that_are_too_large_to_hold_are_computed_in_the_step(
    make: Callable[[], RAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make()
    guidance, uniforms = SoftCFG(3.0), image_uniforms(0, range(2), generator.num_tokens)
    condition = generator.condition([0, 4], guided=True)
    held = condition.cache_slots * 3 * (6 * SMALL["num_hidden_layers"] + 2) * SMALL["hidden_size"] * 4
    whole = decode(generator, [0, 4], guidance, uniforms=uniforms, static=False)
    found = []
    monkeypatch.setattr(RAR, "device", torch.device("meta"))
    for most in (held, held - 1):
        monkeypatch.setattr(rar_module, "HELD_BYTES", most)
        found.append(generator.ahead_bytes(condition))
    assert found == [held, 0]
    monkeypatch.undo()
    for most in (held, held - 1):
        monkeypatch.setattr(rar_module, "HELD_BYTES", most)
        cache = generator.new_cache(condition)
        condition = generator.condition([0, 4], guided=True)
        generator(condition, tokens_for(generator, 4)[:, :0], cache=cache)
        slot = Position.by_row(torch.full((4,), generator.condition_slots))
        generator(condition, tokens_for(generator, 4)[:, :1], cache=cache, slot=slot)
        assert (condition.window is not None) is (most == held)
        assert torch.equal(decode(generator, [0, 4], guidance, uniforms=uniforms, static=True), whole)
