"""A rule, a perturbation, a schedule and a confidence of a file outside the package act wherever guidance does."""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import softcfg
from softcfg import CFG, Pipeline, Sampling, SoftCFG, Trace, UserError, plugins
from softcfg.cli import arguments
from softcfg.cli.main import build_parser, main
from softcfg.decoding import ImageStreams, decode, draw, image_uniforms, jacobi_decode
from softcfg.guidance import (
    CONFIDENCES,
    PERTURBATIONS,
    RULES,
    SCHEDULES,
    ConfidenceWeights,
    Perturbation,
    Rule,
    compose,
    describe,
    register_perturbation,
    register_rule,
    restore,
    setting,
)
from softcfg.guidance import METHODS as CLASSES
from softcfg.inspection import measures, plots
from softcfg.runs.folder import RunFolder
from softcfg.tuning import SETTINGS, Range, Space, parse_search
from softcfg.tuning.space import methods, sample_flags
from softcfg.ui import fragments
from softcfg.ui.settings import METHODS
from softcfg.ui.studio import Studio
from tiny_models import tiny_llama

TOYS = '''
from softcfg.guidance import (
    Perturbation, Rule, register_confidence, register_perturbation, register_rule, register_schedule, setting
)


@register_rule("heavy", label="Heavy ball")
class HeavyBall(Rule):
    """Guidance with momentum."""

    stateful = True
    decay: float = setting(0.5, low=0, high=1, help="what is left of the momentum after a step")

    def guide(self, cond, uncond, scale, *, step, state=None):
        push = cond - uncond if state is None else cond - uncond + self.decay * state
        return cond + (scale - 1) * push, push


@register_rule("late")
class Late(Rule):
    start: int = setting(6, low=0)

    def guide(self, cond, uncond, scale, *, step, state=None):
        return cond + (step >= self.start) * (scale - 1) * (cond - uncond), None


@register_perturbation("dim", description="all tokens equally")
class Dim(Perturbation):
    keep: float = 0.5

    def weights(self, confidence):
        return 1 - (1 - self.keep) * (confidence > 0)


@register_schedule("odd")
def odd_steps(steps, scale, power, codes):
    """The full scale at every other step."""
    import torch
    return torch.where(torch.arange(steps) % 2 == 1, float(scale), 1.0)


@register_confidence("collision", label="sum of p squared", description="probability that two draws agree")
def collision(probabilities, tokens):
    return probabilities.square().sum(dim=-1)
'''


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("plugins") / "plugged_toys.py"
    path.write_text(TOYS)
    before = {id(table): set(table) for table in (RULES, PERTURBATIONS, SCHEDULES, CONFIDENCES)}
    plugins.load(str(path))
    yield str(path)
    for table in (RULES, PERTURBATIONS, SCHEDULES, CONFIDENCES):
        for name in set(table) - before[id(table)]:
            del table[name]
    del sys.modules["plugged_toys"]
    plugins._loaded.clear()


SHARED: dict[str, Any] = {"guidance_scale": 3.0, "schedule": "constant"}
NAMES = ["heavy", "heavy+softcfg", "heavy+dim", "late", "late+softcfg", "dim", "odd", "collision", "softcfg", "cfg"]


def guidance_named(name: str) -> CFG:
    return {
        "heavy": lambda: CFG(**SHARED, rule="heavy"),  # type: ignore[arg-type]
        "heavy+softcfg": lambda: SoftCFG(**SHARED, rule=RULES["heavy"](decay=0.8), strength=2),  # type: ignore[call-arg]
        "heavy+dim": lambda: CFG(**SHARED, rule="heavy", perturbation="dim"),  # type: ignore[arg-type]
        "late": lambda: CFG(**SHARED, rule="late"),  # type: ignore[arg-type]
        "late+softcfg": lambda: SoftCFG(**SHARED, rule=RULES["late"](start=3), step_norm=False),  # type: ignore[call-arg]
        "dim": lambda: CFG(**SHARED, perturbation=PERTURBATIONS["dim"](keep=0.1)),  # type: ignore[call-arg]
        "odd": lambda: SoftCFG(3.0, schedule="odd"),
        "collision": lambda: SoftCFG(**SHARED, confidence="collision", step_norm=False),
        "softcfg": lambda: CFG(**SHARED, perturbation=ConfidenceWeights(strength=2)),
        "cfg": lambda: CFG(**SHARED),
    }[name]()


def guided_by_hand(guidance: CFG, cond: Tensor, uncond: Tensor) -> Tensor:
    """Step by step from the definitions above, for logits [B, T, V]."""
    guided, push = [], torch.zeros_like(cond[:, 0])
    for t in range(cond.shape[1]):
        scale = 3.0 if guidance.schedule == "constant" or t % 2 else 1.0
        difference = cond[:, t] - uncond[:, t]
        if type(guidance.rule) is RULES["heavy"]:
            push = difference + guidance.rule.decay * push  # type: ignore[attr-defined]
            guided.append(cond[:, t] + (scale - 1) * push)
        elif type(guidance.rule) is RULES["late"]:
            guided.append(cond[:, t] + (scale - 1) * difference * (t >= guidance.rule.start))  # type: ignore[attr-defined]
        else:
            guided.append(uncond[:, t] + scale * difference)
    return torch.stack(guided, dim=1)


def weights_by_hand(guidance: CFG, trace: Trace) -> Tensor:
    """[B, T, T]: step, token."""
    p = (trace.cond_logits / trace.temperature).softmax(-1)
    ones = torch.ones(*trace.tokens.shape, trace.tokens.shape[1])
    for t in range(1, ones.shape[1]):
        largest = p[:, :t].amax(-1)
        if type(guidance.weak_branch) is PERTURBATIONS["dim"]:
            ones[:, t, :t] = guidance.weak_branch.keep  # type: ignore[attr-defined]
        elif guidance.weak_branch.confidence == "collision":
            ones[:, t, :t] = 1 - p[:, :t].square().sum(-1)
        elif guidance.perturbs and guidance.weak_branch.step_norm:  # type: ignore[attr-defined]
            share = largest / largest.sum(-1, keepdim=True)
            ones[:, t, :t] = (1 - share) ** guidance.weak_branch.strength  # type: ignore[attr-defined]
        elif guidance.perturbs:
            ones[:, t, :t] = 1 - largest
    return ones


@pytest.mark.parametrize("name", NAMES)
def test_decode_and_trace(pipe: Pipeline, name: str) -> None:
    guidance, labels = guidance_named(name), [0, 1, 2]
    sampling = Sampling(0.8)
    uniforms = image_uniforms(5, range(3), 16)
    tokens = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling)
    trace = softcfg.trace(
        pipe.generator, labels=labels, tokens=tokens, guidance=guidance, sampling=sampling, steps_per_pass=5
    )
    guided = guided_by_hand(guidance, trace.cond_logits, trace.uncond_logits)
    torch.testing.assert_close(trace.guided_logits, guided, rtol=0, atol=1e-4)
    assert trace.value_weights is not None
    torch.testing.assert_close(trace.value_weights, weights_by_hand(guidance, trace), rtol=0, atol=1e-5)
    assert torch.equal(tokens, draw(sampling.probabilities(guided), uniforms))
    static = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling, static=True)
    assert torch.equal(static, tokens)


def test_they_draw_different_images(pipe: Pipeline) -> None:
    drawn = [tuple(pipe([0, 1, 2], guidance_named(name)).tokens.flatten().tolist()) for name in NAMES]
    assert len(set(drawn)) == len(NAMES)


@pytest.mark.parametrize("window", [1, 3, 7, 16])
@pytest.mark.parametrize("name", NAMES)
def test_jacobi(pipe: Pipeline, name: str, window: int) -> None:
    """Where nothing is left to chance it draws what token by token decoding draws."""
    guidance, labels, greedy = guidance_named(name), [0, 1, 2, 3], Sampling(top_k=1)
    expected = decode(pipe.generator, labels, guidance, uniforms=torch.zeros(4, 16), sampling=greedy)
    streams = ImageStreams(0, range(4))
    tokens, _ = jacobi_decode(pipe.generator, labels, guidance, streams=streams, window=window, sampling=greedy)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", NAMES)
def test_plug(name: str) -> None:
    pytest.importorskip("transformers")
    from softcfg.integrations import transformers as plug

    model = tiny_llama()
    guidance, sampling = guidance_named(name), Sampling(top_k=10)
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "unconditional_ids": torch.tensor([[1]])}
    tokens = plug.decode(model, guidance=guidance, num_tokens=9, sampling=sampling, seed=3, **prompts)
    trace = softcfg.trace(
        plug.TransformersGenerator(model, 9), labels=plug.Prompts(**prompts), tokens=tokens, guidance=guidance
    )
    guided = guided_by_hand(guidance, trace.cond_logits, trace.uncond_logits)
    torch.testing.assert_close(trace.guided_logits, guided, rtol=0, atol=1e-4)
    assert torch.equal(tokens, draw(sampling.probabilities(guided), image_uniforms(3, range(2), 9)))


@pytest.mark.parametrize("name", NAMES)
def test_settings_bring_it_back(name: str) -> None:
    guidance = guidance_named(name)
    assert restore(json.loads(json.dumps(describe(guidance)))) == guidance


def test_settings_of_plain_methods_are_as_before() -> None:
    plain = {
        "method": "CFG",
        "guidance_scale": 2.0,
        "guidance_scale_pow": 1.0,
        "schedule": "linear",
        "interval": (1, 5),
    }
    assert json.dumps(describe(CFG(2.0, schedule="linear", interval=(1, 5)))) == json.dumps(plain)
    soft = {
        "confidence": "max", "step_norm": True, "strength": 1.0, "floor": 0.0, "eps": 0.0, "target": "value",
        "alignment": "own",
    }  # fmt: skip
    expected = {**plain, "method": "SoftCFG", **soft}
    assert json.dumps(describe(SoftCFG(2.0, schedule="linear", interval=(1, 5)))) == json.dumps(expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "PAG"}, "method must be one of CFG, SoftCFG(, PatchSoftCFG)?, got 'PAG'"),
        ({"method": "CFG", "rule": "hvy"}, "rule must be one of cfg, .*, heavy, late, got 'hvy'"),
        ({"method": "CFG", "rule": "heavy", "heavy_mass": 3}, "no setting named 'heavy_mass'"),
        ({"method": "CFG", "rule": "late", "heavy_decay": 0.5}, "heavy_decay is a setting of the rule heavy"),
        ({"method": "CFG", "rule": "heavy", "heavy_decay": 2}, r"decay must be a number in \[0, 1\], got 2"),
        ({"method": "CFG", "strength": 1}, "strength is a setting of the perturbation softcfg"),
        ({"method": "SoftCFG", "perturbation": "dim"}, "give another one to CFG"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        restore(settings)


def test_what_is_not_registered_can_be_drawn_but_not_written(pipe: Pipeline, tmp_path: Path) -> None:
    class Silent(Rule):
        def guide(self, cond: Tensor, uncond: Tensor, scale: Any, *, step: Any, state: Any = None) -> Any:
            return cond, None

    guidance = CFG(3.0, rule=Silent())
    trace = softcfg.trace(pipe.generator, labels=[0], guidance=guidance)
    assert torch.equal(trace.guided_logits, trace.cond_logits)
    with pytest.raises(UserError, match=r"Silent has no name; register it"):
        trace.save(tmp_path / "trace.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_class_with_a_guide_of_its_own(pipe: Pipeline) -> None:
    class Doubled(CFG):
        def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor | float) -> Tensor:
            return super().guide(cond, uncond, 2 * scale)

    doubled, expected = Doubled(3.0, schedule="constant"), CFG(6.0, schedule="constant")
    assert torch.equal(pipe([0, 1], doubled).tokens, pipe([0, 1], expected).tokens)
    traces = [softcfg.trace(pipe.generator, labels=[0], guidance=method) for method in (doubled, expected)]
    assert torch.equal(traces[0].guided_logits, traces[1].guided_logits)
    assert not doubled.is_plain
    twice = pipe([0, 1], Doubled(3.0, schedule="constant", rule="cfg"), guidance_scale=2.0, progress=False)
    assert torch.equal(twice.tokens, pipe([0, 1], CFG(4.0, schedule="constant")).tokens)
    with pytest.raises(UserError, match="strength is a setting of the perturbation softcfg, which is not chosen"):
        pipe([0], doubled, strength=0.5)
    chosen = pipe([0, 1], CFG(6.0, schedule="constant"), perturbation="softcfg", strength=0.5)
    assert torch.equal(pipe([0, 1], doubled, perturbation="softcfg", strength=0.5).tokens, chosen.tokens)


def test_guidance_is_known_by_its_class_not_by_its_name() -> None:
    mine = type("SoftCFG", (CFG,), {})
    with pytest.raises(ValueError, match=r"the method .*SoftCFG has no name; register it"):
        describe(mine())
    CLASSES.register("mine")(mine)
    try:
        assert describe(mine(2.0))["method"] == "mine"
        assert type(restore(json.loads(json.dumps(describe(mine(2.0)))))) is mine
    finally:
        del CLASSES["mine"]


def test_a_scale_of_no_perturbation(pipe: Pipeline) -> None:
    message = "perturbation_scale 1 takes a perturbation, and there is none"
    with pytest.raises(ValueError, match=message):
        compose(perturbation="none", perturbation_scale=1.0)
    with pytest.raises(UserError, match=message):
        pipe([0], perturbation="none", perturbation_scale=1.0)
    searched = {"perturbation": "none", "perturbation_scale": 1.0}
    assert compose(drop_unused=True, **searched) == CFG()  # a trial has what acts in it
    assert compose(drop_unused=True, **{**searched, "perturbation": "pag"}).perturbation_scale == 1


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match="there is a rule named 'heavy' already"):
        register_rule("heavy")(type("Other", (Rule,), {}))
    with pytest.raises(ValueError, match="a rule is a subclass of Rule"):
        register_rule("new")(Perturbation)
    with pytest.raises(ValueError, match=r"must be letters, digits, '-' and '_', got 'a,b'"):
        register_rule("a,b")(type("Other", (Rule,), {}))
    with pytest.raises(ValueError, match=r"need defaults; Bare\.size has none"):
        register_rule("new")(type("Bare", (Rule,), {"__annotations__": {"size": "float"}}))
    fields = {"__annotations__": {"scale": "float"}, "scale": 1.0}
    with pytest.raises(ValueError, match="a setting named guidance_scale already"):
        register_perturbation("guidance")(type("Taken", (Perturbation,), fields))
    assert "new" not in RULES
    assert "guidance" not in PERTURBATIONS
    with pytest.raises(ValueError, match="Old has a rule of its own, guide, and takes no other"):
        type("Old", (CFG,), {"guide": lambda *_: None})(rule="late")
    with pytest.raises(ValueError, match="rule must be a Rule, or one of cfg"):
        CFG(rule=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("float | None", "float | None"), (float | None, "float | None"), (tuple, "tuple"), (Tensor, "Tensor")],
)
def test_fields_that_files_would_not_hold_are_refused(kind: Any, said: str) -> None:
    capped = type("Capped", (Rule,), {"__annotations__": {"cap": kind}, "cap": None})
    message = re.escape(f"the setting Capped.cap is of kind {said}; settings are numbers, texts and booleans")
    with pytest.raises(ValueError, match=message):
        register_rule("capped")(capped)
    assert "capped" not in RULES
    RULES["capped"] = capped
    try:
        with pytest.raises(ValueError, match=message):
            describe(CFG(rule=capped(cap=0.5)))  # type: ignore[call-arg]
    finally:
        del RULES["capped"]


def test_an_option_that_a_command_has_already(capsys: pytest.CaptureFixture[str]) -> None:
    register_rule("top")(type("Top", (Rule,), {"__annotations__": {"k": "int"}, "k": 1}))
    try:
        assert main(["models"]) == 2
        assert "conflicting option string: --top-k; give the rule or perturbation with that" in capsys.readouterr().err
    finally:
        del RULES["top"]


FLAGS = ["--rule", "heavy", "--heavy-decay", "0.25", "--perturbation", "dim", "--dim-keep", "0.75", "--schedule", "odd"]


def test_a_run_and_its_continuation(
    pipe: Pipeline, model_folder: Path, plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["sample", str(model_folder), "--plugin", plugin, "--labels", "0,1", "--num-samples", "4"]
    words += ["--batch-size", "2"]
    assert main([*words, *FLAGS, "--output-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "CFG: guidance_scale 3.0" in said
    assert "rule heavy, heavy_decay 0.25, perturbation dim, dim_keep 0.75" in said
    assert f"with CFG and with dim + Heavy ball: {folder / 'comparison.png'}" in said
    settings = json.loads((folder / "run.json").read_text())
    guidance = restore(settings["guidance"])
    assert guidance == CFG(
        3.0,
        0.5,
        "odd",
        rule=RULES["heavy"](decay=0.25),  # type: ignore[call-arg]
        perturbation=PERTURBATIONS["dim"](keep=0.75),  # type: ignore[call-arg]
    )
    expected = pipe([0, 1, 0, 1], guidance, batch_size=2).pixels

    def pixels() -> np.ndarray:
        return np.concatenate([RunFolder.open(folder).require(number).pixels for number in (0, 1)])

    assert np.array_equal(pixels(), expected)
    (folder / "shards" / "shard-000001.safetensors").unlink()
    assert main([*words, *FLAGS, "--output-dir", str(folder)]) == 0
    assert "2 of 4 images are there already" in capsys.readouterr().out
    assert np.array_equal(pixels(), expected)
    assert main([*words, *FLAGS, "--heavy-decay", "0.5", "--output-dir", str(folder)]) == 2
    assert "another guidance.heavy_decay (0.25 there, 0.5 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rule", "hvy"], "heavy, late, got 'hvy'"),
        (["--heavy-decay", "0.5"], "heavy_decay is a setting of the rule heavy, which is not chosen"),
        (["--rule", "heavy", "--heavy-decay", "7"], "decay must be a number in [0, 1], got 7.0"),
        (["--perturbation", "dim", "--softcfg-strength", "1"], "strength is a setting of the perturbation softcfg"),
        (["--perturbation", "dim", "--preset", "released"], "there is no preset for the perturbation dim"),
    ],
)
def test_flags_that_cannot_be(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["sample", str(model_folder), *flags, "--output-dir", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "how the logits of the branches are combined: cfg, rescale" in said
    assert ", heavy or late (default: the model's own)" in said
    assert (
        "--heavy-decay HEAVY_DECAY of the rule heavy: what is left of the momentum after a step (default: 0.5)" in said
    )
    assert "--late-start LATE_START of the rule late (default: 6)" in said
    assert "max, sampled, entropy, margin, unsure, uniform, random or collision" in said
    assert "cosine_power, lumina_released or odd" in said


def test_trace_and_figures(
    pipe: Pipeline, model_folder: Path, plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "trace.safetensors"
    words = [str(model_folder), "--labels", "0", "--plugin", plugin, *FLAGS]
    assert main(["trace", *words, "--output", str(output)]) == 0
    with safe_open(output, "pt") as file:
        saved = json.loads(file.metadata()["softcfg"])
    assert restore({"method": saved["method"], **saved["guidance"]}).title == "dim + Heavy ball"
    assert main(["plot", *words, "--output-dir", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").iterdir())) == 5

    trace = softcfg.trace(pipe.generator, labels=[0], guidance=guidance_named("dim"))
    (line,) = plots.plot_budget(trace).axes[0].lines
    assert line.get_label() == "dim"
    assert np.allclose(line.get_ydata(), 0.9 * np.arange(16), atol=1e-5)
    assert torch.equal(measures.perturbation_budget(trace), measures.perturbation_budget(trace, step_norm=False))
    trace = softcfg.trace(pipe.generator, labels=[0], guidance=guidance_named("collision"))
    labels = [axis.get_ylabel() for axis in plots.plot_confidence(trace, pipe([0]).pixels).axes]
    assert "confidence (sum of p squared)" in labels


def test_sweep(pipe: Pipeline, plugin: str) -> None:
    words = ["rule=cfg,heavy", "heavy-decay=0:1:0.5", "confidence=max,collision", "schedule=odd"]
    search = parse_search(words)
    assert search["heavy_decay"] == Range(0.0, 1.0, 0.5)
    space = Space(search)
    space.check_parts({})
    corners = [methods(pipe, corner)[0] for corner in space.corners()]
    assert CFG(3.0, 0.5, rule=RULES["heavy"](decay=1.0)).rule in [corner.rule for corner in corners]  # type: ignore[call-arg]
    trials = [space.settings(space.propose("grid", 0, number, [], minimize=True)) for number in range(12)]
    for trial in trials:
        guidance, sampling = methods(pipe, trial)
        assert isinstance(guidance, SoftCFG)
        assert guidance.rule == (RULES["heavy"](decay=trial["heavy_decay"]) if trial["rule"] == "heavy" else Rule())  # type: ignore[call-arg]
        args = build_parser().parse_args(["sample", "any", *sample_flags(guidance, sampling)])
        assert arguments.guidance_from(args, pipe) == guidance
    guidance, sampling = methods(pipe, {"perturbation": "dim", "dim_keep": 0.25, "rule": "late"})
    assert guidance == CFG(3.0, 0.5, rule="late", perturbation=PERTURBATIONS["dim"](keep=0.25))  # type: ignore[call-arg, arg-type]
    args = build_parser().parse_args(["sample", "any", *sample_flags(guidance, sampling)])
    assert arguments.guidance_from(args, pipe) == guidance
    with pytest.raises(
        UserError, match="heavy_decay is a setting of the rule heavy, which no trial has; add rule=heavy"
    ):
        Space({"heavy_decay": Range(0, 1)}).check_parts({"rule": "late"})
    assert {"rule", "heavy_decay", "late_start", "dim_keep"} <= set(SETTINGS)


@pytest.mark.parametrize("method", ["none+heavy", "softcfg+heavy", "none+late", "dim+cfg"])
def test_web_page(pipe: Pipeline, method: str) -> None:
    studio = Studio({"tiny": pipe})
    settings = studio.settings(subject=1, methods=[method], strength=0.5)
    query = dict(urllib.parse.parse_qsl(settings.query(), strict_parsing=True))
    assert studio.settings_from_query(query) == settings
    (panel,) = [panels for _, panels in studio.draw("visitor", settings)][-1]
    assert panel.picture is not None
    expected = {
        "none+heavy": CFG(3.0, 0.5, rule="heavy"),  # type: ignore[arg-type]
        "softcfg+heavy": SoftCFG(3.0, 0.5, rule="heavy", strength=0.5),  # type: ignore[arg-type]
        "none+late": CFG(3.0, 0.5, rule="late"),  # type: ignore[arg-type]
        "dim+cfg": CFG(3.0, 0.5, perturbation="dim"),  # type: ignore[arg-type]
    }[method]
    assert torch.equal(panel.picture.tokens, pipe([1], expected).tokens[0])
    assert METHODS[method].title == {
        "none+heavy": "Heavy ball", "softcfg+heavy": "SoftCFG + Heavy ball", "none+late": "late", "dim+cfg": "dim"
    }[method]  # fmt: skip
    inspection = studio.inspect(panel.picture)
    assert METHODS[method].title in fragments.inspector(panel.picture, inspection, 3)


def test_a_field_that_is_declared_once_is_checked() -> None:
    class Sized(Rule):
        size: int = setting(2, low=1)

    made = register_rule("sized")(Sized)
    try:
        with pytest.raises(ValueError, match=r"size must be an integer >= 1, got 0\.5"):
            made(size=0.5)  # type: ignore[call-arg]
        assert made(size=3) != made()  # type: ignore[call-arg]
    finally:
        del RULES["sized"]


@pytest.mark.parametrize("name", ["guide", "guide_step", "away_from"])
def test_a_method_of_ones_own_acts_in_every_way_to_decode(pipe: Pipeline, name: str) -> None:
    """Also where kernels would draw from CFG's formula."""
    methods: dict[str, Any] = {
        "guide": lambda self, cond, uncond, scale: cond - uncond,
        "guide_step": lambda self, cond, uncond, scale, *, step, state=None: (cond - uncond, None),
        "away_from": lambda self, uncond, weak: 0.5 * uncond,
    }
    guidance = type("Own", (CFG,), {name: methods[name]})(4.0, 0.0)
    uniforms = image_uniforms(6, range(2), pipe.generator.num_tokens)
    tokens = decode(pipe.generator, [0, 2], guidance, uniforms=uniforms)
    trace = softcfg.trace(pipe.generator, labels=[0, 2], tokens=tokens, guidance=guidance)
    assert torch.equal(draw(trace.guided_logits.softmax(-1), uniforms), tokens)
    assert not torch.equal(decode(pipe.generator, [0, 2], CFG(4.0, 0.0), uniforms=uniforms), tokens)
