import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import softcfg
from small_families import FAMILIES, load
from softcfg import CFG, Sampling, SoftCFG, UserError
from softcfg.decoding import decode, draw, graphs, image_uniforms, throughput
from softcfg.decoding.sequential import steps_are_static
from softcfg.models.base import Generator
from softcfg.nn import fused


@pytest.fixture(scope="module")
def generator(model_folder: Path) -> Generator:
    return softcfg.load_generator(model_folder)


LABELS = [0, 1, 2, 3, 0]
METHODS = [
    CFG(guidance_scale=0),
    CFG(guidance_scale=3.0, schedule="constant"),
    SoftCFG(guidance_scale=3.0, schedule="constant"),
    SoftCFG(guidance_scale=3.0, step_norm=False, target="key"),
    SoftCFG.released(guidance_scale=3.0, target="both"),
]


class Halved(SoftCFG):
    def weights(self, confidence: torch.Tensor) -> torch.Tensor:
        return 1 - confidence / 2


class Certain(SoftCFG):
    def token_confidence(
        self, cond_logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        return torch.ones(tokens.shape)


@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        (SoftCFG(3.0), "weights confidence"),
        (CFG(3.0, perturbation="softcfg"), "weights confidence"),  # type: ignore[arg-type]
        (SoftCFG.released(guidance_scale=3.0), "weights confidence"),
        (SoftCFG(3.0, confidence="entropy"), "weights"),
        (Halved(3.0), "confidence"),
        (Certain(3.0), "weights"),
        (CFG(3.0, perturbation="low_confidence"), ""),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_kernels_compute_what_softcfg_defines_and_nothing_else(
    generator: Generator, method: CFG, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()
    for name in ("weights", "confidence"):

        def there_is_none(*given: object, name: str = name, **settings: object) -> bool:
            asked.add(name)
            return False

        monkeypatch.setattr(fused, f"write_{name}", there_is_none)
    decode(generator, LABELS, method, uniforms=image_uniforms(0, range(len(LABELS)), generator.num_tokens))
    assert asked == set(kernels.split())


@torch.no_grad()
def by_hand(generator: Generator, method: CFG, label: int, uniforms: torch.Tensor) -> list[int]:
    """One image without a cache: every step runs both branches over the whole sequence, the definition of the method.

    Perturbed activations of earlier steps stay as they were when they were computed, so the unconditional branch
    sees for each query the weights of that query's step.
    """
    total, slots = generator.num_tokens, generator.condition_slots
    cond_class, null_class = (generator.class_condition(torch.tensor([c])) for c in (label, generator.num_classes))
    tokens: list[int] = []
    confidence = torch.zeros(1, total)
    rows = [torch.ones(slots + total) for _ in range(slots)]
    for step in range(total):
        fed = torch.tensor([tokens], dtype=torch.int64).reshape(1, -1)
        cond = generator(cond_class, fed)[:, -1]
        guided = cond
        if method.is_active:
            weights = {}
            if isinstance(method, SoftCFG):
                if step:
                    rows.append(torch.cat((torch.ones(slots), method.weights(confidence)[0])))
                table = torch.stack(rows)[None]
                names = {"value": ["value"], "key": ["key"], "both": ["value", "key"]}[method.target]
                weights = {f"{name}_weights": table for name in names}
            uncond = generator(null_class, fed, **weights)[:, -1]
            guided = uncond + method.scales(total)[step] * (cond - uncond)
        token = draw(Sampling().probabilities(guided), uniforms[step : step + 1])
        if isinstance(method, SoftCFG):
            confidence[:, step] = method.token_confidence(cond, token)
        tokens.append(int(token))
    return tokens


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.0, float("inf")])
def test_uniforms_that_are_none(generator: Generator, value: float) -> None:
    uniforms = image_uniforms(11, range(5), generator.num_tokens)
    uniforms[2, 3] = value
    with pytest.raises(UserError, match="uniforms must be numbers in"):
        decode(generator, LABELS, CFG(), uniforms=uniforms)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'target', '')}")
def test_decoding_is_the_definition_without_a_cache(generator: Generator, method: CFG) -> None:
    uniforms = image_uniforms(11, range(5), generator.num_tokens)
    tokens = decode(generator, LABELS, method, uniforms=uniforms)
    for row, label in enumerate(LABELS):
        assert tokens[row].tolist() == by_hand(generator, method, label, uniforms[row])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'target', '')}")
def test_steps_of_constant_shapes_draw_the_same(generator: Generator, method: CFG) -> None:
    uniforms = image_uniforms(11, range(5), generator.num_tokens)
    done: list[int] = []
    mask = torch.zeros(5, generator.num_tokens, dtype=torch.bool)
    mask[1, 2:5] = True
    forced = {"forced_tokens": torch.ones(5, generator.num_tokens, dtype=torch.int64), "forced_mask": mask}
    static = decode(generator, LABELS, method, uniforms=uniforms, static=True, on_step=done.append, **forced)
    assert static.tolist() == decode(generator, LABELS, method, uniforms=uniforms, static=False, **forced).tolist()
    assert done == list(range(1, generator.num_tokens + 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'target', '')}")
def test_a_graph_on_a_gpu_draws_what_a_cpu_draws(model_folder: Path, generator: Generator, method: CFG) -> None:
    on_gpu = softcfg.load_generator(model_folder, device="cuda")
    uniforms = image_uniforms(11, range(5), generator.num_tokens)
    drawn = decode(on_gpu, LABELS, method, uniforms=uniforms)
    assert drawn.tolist() == decode(generator, LABELS, method, uniforms=uniforms).tolist()


def test_methods_differ(generator: Generator) -> None:
    uniforms = image_uniforms(11, range(5), generator.num_tokens)
    drawn = [decode(generator, LABELS, method, uniforms=uniforms).tolist() for method in METHODS]
    assert len({str(tokens) for tokens in drawn}) == len(METHODS)


def test_an_image_is_the_same_in_any_batch(generator: Generator) -> None:
    method = SoftCFG(guidance_scale=3.0)
    uniforms = image_uniforms(5, range(5), generator.num_tokens)
    together = decode(generator, LABELS, method, uniforms=uniforms)
    for row, label in enumerate(LABELS):
        alone = decode(generator, [label], method, uniforms=uniforms[row : row + 1])
        assert alone[0].tolist() == together[row].tolist()


def test_inactive_guidance_runs_no_unconditional_rows(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = type(generator).forward

    def watch(self, condition, tokens, **arguments):  # type: ignore[no-untyped-def]
        rows.append(condition.rows)
        return forward(self, condition, tokens, **arguments)

    monkeypatch.setattr(type(generator), "forward", watch)
    uniforms = image_uniforms(0, range(2), generator.num_tokens)
    for method, expected in [(CFG(guidance_scale=1), 2), (SoftCFG(guidance_scale=0), 2), (CFG(guidance_scale=2), 4)]:
        rows.clear()
        decode(generator, [0, 1], method, uniforms=uniforms)
        assert rows == [expected] * generator.num_tokens


def test_strength_zero_is_cfg_to_the_bit(generator: Generator) -> None:
    uniforms = image_uniforms(0, range(3), generator.num_tokens)
    soft = decode(generator, [0, 1, 2], SoftCFG(guidance_scale=3, strength=0), uniforms=uniforms)
    plain = decode(generator, [0, 1, 2], CFG(guidance_scale=3), uniforms=uniforms)
    assert torch.equal(soft, plain)


def test_forced_tokens_whole_and_by_mask(generator: Generator) -> None:
    total = generator.num_tokens
    uniforms = image_uniforms(1, range(2), total)
    method = SoftCFG(guidance_scale=3)
    given = torch.randint(generator.vocab_size, (2, total))
    assert torch.equal(decode(generator, [0, 1], method, uniforms=uniforms, forced_tokens=given), given)
    mask = torch.rand(2, total) < 0.5
    mixed = decode(generator, [0, 1], method, uniforms=uniforms, forced_tokens=given, forced_mask=mask)
    assert torch.equal(mixed[mask], given[mask])
    free = decode(generator, [0, 1], method, uniforms=uniforms)
    nothing = decode(
        generator, [0, 1], method, uniforms=uniforms, forced_tokens=given, forced_mask=torch.zeros_like(mask)
    )
    assert torch.equal(nothing, free)
    # What was drawn between forced tokens follows from them: drawing again with all of them forced changes nothing.
    again = decode(generator, [0, 1], method, uniforms=uniforms, forced_tokens=mixed, forced_mask=mask)
    assert torch.equal(again, mixed)


@pytest.mark.parametrize("family", ["emu3", "lumina-mgpt-2"])
def test_forced_tokens_stand_where_the_model_may_draw_them(family: str) -> None:
    generator = load(family)
    inputs = generator.example_inputs(2)
    condition = generator.condition(inputs, guided=False)
    steps = torch.arange(condition.num_tokens)
    given = generator.allowed(steps, condition)[:, 0].repeat(2, 1)
    forced = {"uniforms": image_uniforms(1, range(2), len(steps)), "forced_tokens": given}
    assert torch.equal(decode(generator, inputs, CFG(), **forced), given)  # with the ends of lines
    line = int((~generator.is_code(steps, condition)).nonzero()[0])
    mask = torch.zeros_like(given, dtype=torch.bool)
    for step, other in ((0, line), (line, 0)):
        wrong = given.clone()
        wrong[1, step] = given[1, other]
        mask[:, step] = True
        message = rf"forced_tokens holds {wrong[1, step]} at step {step}, where the model can draw {given[1, step]}"
        for where in (None, mask):
            with pytest.raises(UserError, match=message):
                decode(generator, inputs, CFG(), **{**forced, "forced_tokens": wrong}, forced_mask=where)
        decode(generator, inputs, CFG(), **{**forced, "forced_tokens": wrong}, forced_mask=~mask)


def test_top_k_one_is_greedy(generator: Generator) -> None:
    method = CFG(guidance_scale=2)
    greedy = [
        decode(
            generator,
            [3],
            method,
            uniforms=image_uniforms(seed, [0], generator.num_tokens),
            sampling=Sampling(top_k=1),
        ).tolist()
        for seed in range(3)
    ]
    assert greedy[0] == greedy[1] == greedy[2]


def test_every_step_is_reported(generator: Generator) -> None:
    steps: list[int] = []
    uniforms = image_uniforms(0, [0], generator.num_tokens)
    decode(generator, [0], CFG(), uniforms=uniforms, on_step=steps.append)
    assert steps == list(range(1, generator.num_tokens + 1))


def test_tokens_so_far_can_be_watched_and_the_decoding_ended(generator: Generator) -> None:
    uniforms = image_uniforms(0, range(2), generator.num_tokens)
    seen: list[torch.Tensor] = []
    drawn = decode(generator, [0, 1], CFG(), uniforms=uniforms, on_tokens=lambda tokens: seen.append(tokens.clone()))
    assert [tokens.shape[1] for tokens in seen] == list(range(1, generator.num_tokens + 1))
    assert all(torch.equal(tokens, drawn[:, : tokens.shape[1]]) for tokens in seen)

    def end(tokens: torch.Tensor) -> None:
        calls.append(tokens.shape[1])
        if len(calls) == 3:
            raise InterruptedError

    calls: list[int] = []
    with pytest.raises(InterruptedError):
        decode(generator, [0, 1], CFG(), uniforms=uniforms, on_tokens=end)
    assert calls == [1, 2, 3]
    assert torch.equal(decode(generator, [0, 1], CFG(), uniforms=uniforms), drawn)


def test_arguments_that_do_not_fit(generator: Generator) -> None:
    total = generator.num_tokens
    good = image_uniforms(0, [0], total)
    tokens = torch.zeros(1, total, dtype=torch.int64)
    with pytest.raises(UserError, match=r"labels holds 4, which is outside of 0\.\.3"):
        decode(generator, [4], CFG(), uniforms=good)
    with pytest.raises(UserError, match="uniforms must have shape"):
        decode(generator, [0, 1], CFG(), uniforms=good)
    with pytest.raises(UserError, match="forced_tokens must have shape"):
        decode(generator, [0], CFG(), uniforms=good, forced_tokens=tokens[:, 1:])
    with pytest.raises(UserError, match=r"forced_tokens holds 20, which is outside of 0\.\.19"):
        decode(generator, [0], CFG(), uniforms=good, forced_tokens=tokens + 20)
    with pytest.raises(UserError, match="forced_mask must be boolean"):
        decode(generator, [0], CFG(), uniforms=good, forced_tokens=tokens, forced_mask=tokens)
    with pytest.raises(UserError, match="forced_tokens, which are missing"):
        decode(generator, [0], CFG(), uniforms=good, forced_mask=tokens.bool())


class Scales(SoftCFG):
    """Guidance whose scales somebody has written."""

    given: object = None

    def scales(self, steps: int, codes: int | None = None) -> torch.Tensor:
        return self.given  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16, list])
def test_scales_may_be_of_any_dtype(generator: Generator, dtype: object) -> None:
    uniforms, method = image_uniforms(0, range(2), generator.num_tokens), Scales(3.0)
    scales = [3] * generator.num_tokens
    object.__setattr__(method, "given", scales if dtype is list else torch.tensor(scales).to(dtype))  # type: ignore[call-overload]
    found = decode(generator, [0, 1], method, uniforms=uniforms)
    assert torch.equal(found, decode(generator, [0, 1], SoftCFG(3.0, schedule="constant"), uniforms=uniforms))


@pytest.mark.parametrize("shape", [(3,), (), (1, 1)], ids=str)
def test_scales_that_are_not_one_for_each_step(generator: Generator, shape: tuple[int, ...]) -> None:
    method = Scales(3.0)
    object.__setattr__(method, "given", torch.ones(shape))
    message = f"of Scales must give [{generator.num_tokens}], a guidance scale for each step, got {list(shape)}"
    with pytest.raises(UserError, match=re.escape(message)):
        decode(generator, [0], method, uniforms=image_uniforms(0, [0], generator.num_tokens))


class Confident(SoftCFG):
    """Guidance whose confidences somebody has written."""

    given: object = None

    def token_confidence(
        self, cond_logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        return self.given  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((2,), torch.nan), r"must lie in \[0, 1\], got nan"),
        (torch.tensor([0.5, 2.0]), r"must lie in \[0, 1\], got 2.0"),
        (torch.tensor([-0.1, 0.5]), r"must lie in \[0, 1\], got -0.1"),
        (torch.ones(2, 1), r"must be \[2\], one for each token, got \[2, 1\]"),
        (0.5, r"must be \[2\], one for each token, got \[\]"),
    ],
)
def test_confidences_that_are_none_are_blamed(generator: Generator, given: object, message: str) -> None:
    method = Confident(3.0)
    object.__setattr__(method, "given", given)
    with pytest.raises(UserError, match=f"the confidence of Confident.* {message}"):
        decode(generator, [0, 1], method, uniforms=image_uniforms(0, range(2), generator.num_tokens))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_image_codes_may_be_told_by_numbers(
    generator: Generator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniforms = image_uniforms(0, range(2), generator.num_tokens)
    found = []
    for kind in (torch.bool, dtype):
        monkeypatch.setattr(
            type(generator), "is_code", lambda self, steps, condition, kind=kind: (steps % 2 > 0).to(kind)
        )
        found.append(decode(generator, [0, 1], SoftCFG(3.0), uniforms=uniforms))
    assert torch.equal(*found)
    assert not torch.equal(found[0], decode(generator, [0, 1], CFG(3.0), uniforms=uniforms))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 3 MiB free"),
        RuntimeError("operation not permitted\nCompile with TORCH_USE_CUDA_DSA"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_as_it_is(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    method, uniforms = SoftCFG(guidance_scale=3.0), image_uniforms(11, range(5), generator.num_tokens)
    wanted = decode(generator, LABELS, method, uniforms=uniforms, static=False)
    tried = []

    def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        tried.append(device.type)
        raise error

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    said = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "operation not permitted"
    with pytest.warns(RuntimeWarning, match=f"could not be captured .* slower: {said}$") as caught:
        drawn = decode(generator, LABELS, method, uniforms=uniforms, static=True)
    assert len(caught) == 1
    assert tried == ["cpu"]
    assert drawn.tolist() == wanted.tolist()


def test_a_graph_keeps_the_memory_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads and writes memory that it does not own."""
    held = torch.zeros(3)
    seen = weakref.ref(held)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda step, device: lambda: None)
    run = graphs.captured(partial(held.add_, 1), torch.device("cpu"))
    del held
    gc.collect()
    assert seen() is not None
    del run
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("guidance", METHODS[:2], ids=lambda m: type(m).__name__)
def test_what_is_timed_is_the_step_of_decoding(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, guidance: CFG
) -> None:
    captured = []

    def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        captured.append(device.type)
        return step

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    for static in (False, True):
        monkeypatch.setattr(throughput, "steps_are_static", lambda _, static=static: static)
        drawn = throughput.TimedStep(generator, LABELS, guidance, 3)()
        assert drawn.shape == (5,)
    assert captured == ["cpu"]


@pytest.mark.parametrize(
    ("device", "supports_row_positions", "layer_devices", "static"),
    [
        ("cuda", True, None, True),
        ("cuda", False, None, False),
        ("cuda", True, [torch.device("cuda", 0), torch.device("cuda", 1)], False),
        ("cpu", True, None, False),
    ],
)
def test_which_generators_decode_in_static_steps(
    device: str, supports_row_positions: bool, layer_devices: list[torch.device] | None, static: bool
) -> None:
    generator = SimpleNamespace(
        device=torch.device(device), supports_row_positions=supports_row_positions, layer_devices=layer_devices
    )
    assert steps_are_static(generator) is static  # type: ignore[arg-type]


class Adapted(torch.nn.Module):
    """A layer in a module that is no linear one, as adapters put it."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def drawn(generator: Generator) -> torch.Tensor:
    inputs = generator.example_inputs(2)
    total = generator.condition(inputs, guided=False).num_tokens
    return decode(generator, inputs, SoftCFG(3.0), uniforms=image_uniforms(4, range(2), total))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_adapters(family: str) -> None:
    generator = load(family)
    expected = drawn(generator)
    for part in list(generator.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(part, name, Adapted(child))
    assert torch.equal(drawn(generator), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["module", "forward"])
def test_a_compiled_model(way: str, model_folder: Path) -> None:
    """Also where the code that is compiled has served another batch of another model before."""
    generator, other = softcfg.load_generator(model_folder), softcfg.Pipeline.from_pretrained(model_folder)
    expected = drawn(generator)
    softcfg.Pipeline(torch.compile(other.generator, backend="eager"), other.tokenizer)([0, 1], seed=1)
    if way == "module":
        generator.compile(backend="eager")
    else:
        generator.forward = torch.compile(generator.forward, backend="eager")  # type: ignore[method-assign]
    assert torch.equal(drawn(generator), expected)


def test_what_is_set_on_an_object_or_on_all_modules_acts(model_folder: Path) -> None:
    """Whether there are kernels or not."""
    generator = softcfg.load_generator(model_folder)
    plain = drawn(generator)

    def constrain(logits: torch.Tensor, steps: torch.Tensor, condition: object) -> torch.Tensor:
        return logits.masked_fill(torch.arange(logits.shape[-1]) >= 5, float("-inf"))

    generator.constrain = constrain  # type: ignore[method-assign]
    assert drawn(generator).max() < 5
    del generator.constrain
    norms = (torch.nn.RMSNorm, torch.nn.LayerNorm)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 3 * out if isinstance(module, norms) else None
    )
    try:
        hooked = drawn(generator)
        with fused.without_fused_kernels():
            assert torch.equal(drawn(generator), hooked)
    finally:
        hook.remove()
    assert torch.equal(drawn(generator), plain)
    assert not torch.equal(hooked, plain)


def test_a_pass_that_does_not_fit_its_cache_is_refused(model_folder: Path) -> None:
    """Kernels would write beside it."""
    generator = softcfg.load_generator(model_folder)
    four, two = (generator.condition([0] * count, guided=False) for count in (4, 2))
    token = torch.zeros(4, 1, dtype=torch.int64)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="the cache is of 2 rows, and the pass of 4"):
            generator(four, token, cache=generator.new_cache(two), slot=four.slots)
        with pytest.raises(ValueError, match="a slot is at least 0, got -1"):
            generator(four, token, cache=generator.new_cache(four), slot=-1)
        weights = torch.ones(4, four.slots)
        with pytest.raises(ValueError, match="value_weights must be"):
            generator(four, token, cache=generator.new_cache(four), slot=four.slots, value_weights=weights)


def test_an_interval_in_which_no_step_lies_is_refused(model_folder: Path) -> None:
    generator = softcfg.load_generator(model_folder)
    uniforms = image_uniforms(0, range(1), generator.num_tokens)
    with pytest.raises(UserError, match="the interval 16-20 holds none of the 16 steps"):
        decode(generator, [0], SoftCFG(3.0, interval=(16, 20)), uniforms=uniforms)
