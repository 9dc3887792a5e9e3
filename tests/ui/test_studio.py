"""What the page does, without the page."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import softcfg
from softcfg import CFG, SoftCFG, UserError
from softcfg.guidance import PERTURBATIONS, RULES, SCHEDULES
from softcfg.models.geometry import Geometry
from softcfg.pipeline import Pipeline
from softcfg.ui.settings import METHODS, Settings
from softcfg.ui.studio import Canvas, Drawing, Limits, Model, Panel, Studio
from softcfg.zoo.registry import MODELS


@pytest.fixture
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


@pytest.fixture
def studio(pipeline: Pipeline) -> Studio:
    return Studio({"tiny": pipeline})


@pytest.fixture
def slow(pipeline: Pipeline) -> Pipeline:
    """Every step takes a moment."""
    pipeline.generator.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return pipeline


def drawn(studio: Studio, key: str = "visitor", **values: object) -> list[Panel]:
    frames = [panels for _, panels in studio.draw(key, studio.settings(**values))]
    return frames[-1]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


class TestSettings:
    def test_the_models_own_are_the_defaults(self, studio: Studio) -> None:
        settings = studio.settings()
        assert (settings.model, settings.scale, settings.power, settings.temperature) == ("tiny", 3.0, 0.5, 0.9)

    def test_a_link_brings_every_setting_back_to_the_last_bit(self, studio: Studio) -> None:
        settings = studio.settings(
            subject=2, methods=["released", "none"], scale=0.1 + 0.2, power=1 / 3, strength=0.7, step_norm=False,
            temperature=1.1, seed=2**32 - 1, seeds=3,
        )  # fmt: skip
        query = dict(urllib.parse.parse_qsl(settings.query(), strict_parsing=True))
        assert studio.settings_from_query(query) == settings
        assert settings.methods == ("none", "released")

    def test_other_keys_of_an_address_are_left_alone(self, studio: Studio) -> None:
        assert studio.settings_from_query({"seed": "4", "__theme": "dark"}) == studio.settings(seed=4)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"model": "other"}, "no model 'other' here; there are tiny"),
            ({"subject": 4}, "class must be a number from 0 to 3, not 4"),
            ({"subject": "-1"}, "class must be"),
            ({"subject": "9" * 5000}, "class must be"),
            ({"subject": True}, "class must be"),
            ({"subject": [1]}, "class must be"),
            ({"methods": []}, "Choose at least one method."),
            ({"methods": ["cfg", "other"]}, "There is no method 'other' here; choose from the list."),
            ({"methods": 3}, "Choose at least one method."),
            ({"methods": [["cfg"]]}, "There is no method ['cfg']"),
            ({"seeds": 0}, "The number of seeds must be a whole number from 1 to 8, not 0"),
            ({"seeds": 9}, "number of seeds must be"),
            (
                {"seeds": 8, "methods": ["none", "cfg", "softcfg", "released"]},
                "at most 24 pictures here, and these would",
            ),
            ({"scale": 20.5}, "scale must be a number from 0 to 20, not 20.5"),
            ({"scale": "nan"}, "scale must be"),
            ({"scale": None}, "scale must be"),
            ({"power": "inf"}, "power must be"),
            ({"strength": -0.1}, "strength must be"),
            ({"temperature": 0}, "temperature must be a number from 0.1 to 2"),
            ({"temperature": 10**400}, "temperature must be"),
            ({"seed": 1.5}, "seed must be a whole number from 0 to 4294967295, not 1.5"),
            ({"seed": 2**32}, "seed must be"),
            ({"seed": True}, "seed must be"),
            ({"step_norm": "yes"}, "Step Normalisation"),
            ({"checkpoint": "/etc/passwd"}, "no setting 'checkpoint'"),
        ],
    )
    def test_what_cannot_be_is_said_in_a_sentence(self, studio: Studio, values: dict[str, object], said: str) -> None:
        with pytest.raises(UserError) as caught:
            studio.settings(**values)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            ("none", CFG(1.0, 0.5)),
            ("cfg", CFG(5.0, 0.25)),
            ("softcfg", SoftCFG(5.0, 0.25, strength=0.5, step_norm=False)),
            ("released", SoftCFG.released(guidance_scale=5.0, guidance_scale_pow=0.25, strength=0.5, step_norm=False)),
        ],
    )
    def test_methods_are_guidance(self, studio: Studio, pipeline: Pipeline, method: str, expected: CFG) -> None:
        settings = studio.settings(scale=5, power=0.25, strength=0.5, step_norm=False)
        assert settings.guidance(method, pipeline) == expected

    def test_every_rule_and_perturbation_is_a_method_with_a_line_about_it(self) -> None:
        rules = {f"none+{rule}" for rule in RULES} - {"none+cfg"}
        perturbations = {f"{name}+cfg" for name in PERTURBATIONS} - {"none+cfg", "softcfg+cfg"}
        assert {"none", "cfg", "softcfg", "released"} | rules | perturbations < set(METHODS)
        for method in METHODS.values():
            assert 0 < len(method.line) < 80
            assert "\n" not in method.title + method.line
        assert len({method.title for method in METHODS.values()}) == len(METHODS)

    def test_examples_are_drawn_with_the_settings_of_the_model(self, pipeline: Pipeline) -> None:
        entry = replace(pipeline.entry, examples={"Star": 5, "T-shirt/top": 1})
        pipeline.source = replace(pipeline.source, entry=entry)
        studio = Studio({"tiny": pipeline})
        assert studio.models["tiny"].examples == [(3, 5), (2, 1)]
        methods = ("none", "cfg", "softcfg")
        assert studio.example("tiny", 1) == studio.settings(subject=2, seed=1, methods=methods)
        for number in (-1, 2):
            with pytest.raises(UserError, match="example is gone"):
                studio.example("tiny", number)

    @pytest.mark.parametrize("schedule", sorted(SCHEDULES))
    def test_whether_the_power_matters(self, pipeline: Pipeline, schedule: str) -> None:
        pipeline.sampling_defaults["schedule"] = schedule
        assert Model(pipeline).defaults("tiny").uses_power == (schedule == "cosine_power")

    @pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.examples])
    def test_examples_of_the_bundled_models_are_of_their_classes(self, name: str) -> None:
        entry = MODELS[name]
        assert entry.text is not None or set(entry.examples) <= set(entry.classes)
        assert all(0 <= seed < 2**32 for seed in entry.examples.values())


class TestDraw:
    def test_pictures_are_those_of_the_pipeline(self, studio: Studio, pipeline: Pipeline) -> None:
        panels = drawn(studio, subject=1, methods=["none", "cfg", "softcfg", "released"], seed=5, scale=4)
        for panel, guidance in zip(
            panels,
            (CFG(1.0), CFG(4.0, 0.5), SoftCFG(4.0, 0.5), SoftCFG.released(guidance_scale=4.0, guidance_scale_pow=0.5)),
            strict=True,
        ):
            expected = pipeline(labels=[1], guidance=guidance, seed=5)
            assert panel.picture is not None
            assert torch.equal(panel.picture.tokens, expected.tokens[0])
            assert np.array_equal(panel.picture.pixels, expected.pixels[0])

    def test_each_method_draws_from_each_seed(self, studio: Studio, pipeline: Pipeline) -> None:
        panels = drawn(studio, subject=1, methods=["cfg", "softcfg"], seed=5, seeds=3)
        assert [(panel.method, panel.seed) for panel in panels] == [
            (method, seed) for method in ("cfg", "softcfg") for seed in (5, 6, 7)
        ]
        for panel in panels:
            guidance = studio.settings().guidance(panel.method, pipeline)
            assert panel.picture is not None
            assert np.array_equal(panel.picture.pixels, pipeline([1], guidance=guidance, seed=panel.seed).pixels[0])
            assert panel.picture.caption.endswith(f"seed {panel.seed}")
            assert panel.picture.description()["seed"] == panel.seed
        # Its link brings all of them back, and so does the gallery.
        picture = panels[4].picture
        assert picture is not None
        query = dict(urllib.parse.parse_qsl(picture.description()["link"].removeprefix("?")))
        assert studio.settings_from_query(query) == picture.settings
        session = studio.session("visitor")
        session.show_again(picture.number)
        assert [panel.picture for panel in session.panels] == [panel.picture for panel in panels]

    def test_the_first_seed_is_drawn_under_all_methods_first(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow})
        for _, panels in studio.draw("visitor", studio.settings(methods=["cfg", "softcfg"], seeds=2)):
            if panels[2].done:
                studio.stop("visitor")
        assert [panel.done > 0 for panel in panels] == [True, False, True, False]

    def test_it_grows_token_by_token(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow})
        settings = studio.settings(methods=["softcfg"])
        tokens = slow(labels=[0], guidance=settings.guidance("softcfg", slow), seed=0).tokens[0]
        seen = []
        for drawing, (panel,) in studio.draw("visitor", settings):
            so_far = drawing.tokens("softcfg", 0)
            if so_far is not None:
                assert torch.equal(so_far.clone(), tokens[: len(so_far)])
            if panel.pixels is not None:
                clear = panel.pixels[..., 3] == 0
                # 16 tokens on a grid of 4 x 4, two pixels wide each.
                assert clear.sum() == 4 * (16 - panel.done)
                assert not clear.reshape(-1)[: 8 * 2 * (panel.done // 4)].any()
            seen.append(panel.done)
        assert seen == sorted(seen)
        assert len(set(seen)) > 3
        assert seen[-1] == 16

    def test_stop_ends_the_computation(self, slow: Pipeline) -> None:
        steps = []
        slow.generator.register_forward_pre_hook(lambda *_: steps.append(1))
        studio = Studio({"tiny": slow})
        for _, panels in studio.draw("visitor", studio.settings(methods=["cfg", "softcfg"])):
            if panels[0].done:
                studio.stop("visitor")
        drawing = studio.session("visitor").drawing
        assert drawing is not None
        assert drawing.stopped
        assert not drawing.active
        assert 0 < panels[0].done < 16
        assert panels[1].done == 0
        assert all(panel.picture is None for panel in panels)
        assert studio.active == 0
        before = len(steps)
        time.sleep(0.2)
        assert len(steps) == before

    def test_finished_methods_outlast_a_stop(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow})
        for _, panels in studio.draw("visitor", studio.settings(methods=["cfg", "softcfg"])):
            if panels[1].done:
                studio.stop("visitor")
        assert [panel.picture is not None for panel in panels] == [True, False]
        assert list(studio.session("visitor").pictures) == [1]

    def test_a_visitor_who_leaves_stops_the_computation(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow})
        frames = studio.draw("visitor", studio.settings())
        next(frames)
        assert studio.active == 1
        frames.close()
        until(lambda: studio.active == 0, 2)

    def test_it_takes_no_longer_than_the_limit(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow}, Limits(seconds=0.3))
        with pytest.raises(UserError, match=r"may take 0\.3 seconds on this host"):
            drawn(studio, methods=["cfg"])
        assert studio.active == 0

    def test_one_at_a_time_and_no_waiting_without_end(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow}, Limits(wait=0.2))
        first = studio.draw("one", studio.settings())
        next(first)
        until(lambda: studio.models["tiny"].lock.locked())
        with pytest.raises(UserError, match=r"busy with other visitors for 0\.2 seconds"):
            drawn(studio, "two")
        with pytest.raises(UserError, match="drawing already"):
            drawn(studio, "one")
        first.close()
        until(lambda: studio.active == 0)
        assert drawn(studio, "two", methods=["none"])[0].picture is not None

    def test_a_drawing_that_waits_can_be_stopped(self, slow: Pipeline) -> None:
        model = Model(slow)
        with model.lock:
            drawing = Drawing(model, Settings("tiny", 0), Limits())
            drawing.start()
            drawing.stop()
            assert drawing.wait(5)
        assert drawing.stopped
        assert drawing.waiting

    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            (RuntimeError, "The drawing failed on the server"),
            (MemoryError, "The server has no memory"),
        ],
    )
    def test_a_failure_is_one_sentence_and_frees_the_model(
        self,
        error: type[Exception],
        sentence: str,
        studio: Studio,
        pipeline: Pipeline,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object) -> None:
            raise error("secret detail")

        hook = pipeline.generator.register_forward_pre_hook(fail)
        with pytest.raises(UserError, match=sentence) as caught:
            drawn(studio)
        assert "secret" not in str(caught.value)
        assert "secret detail" in capsys.readouterr().err
        hook.remove()
        assert drawn(studio)[0].picture is not None

    def test_many_visitors_at_once(self, studio: Studio) -> None:
        results: dict[int, list[Panel]] = {}

        def visit(number: int) -> None:
            results[number] = drawn(studio, f"visitor {number}", seed=number)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for number in range(4):
            for panel, alone in zip(results[number], drawn(studio, "alone", seed=number), strict=True):
                assert np.array_equal(panel.picture.pixels, alone.picture.pixels)  # type: ignore[union-attr]


class TestSession:
    def test_the_oldest_pictures_and_sessions_go(self, pipeline: Pipeline) -> None:
        studio = Studio({"tiny": pipeline}, Limits(pictures=3, sessions=2))
        for seed in range(2):
            drawn(studio, "one", seed=seed)
        session = studio.session("one")
        assert list(session.pictures) == [2, 3, 4]
        with pytest.raises(UserError, match="no longer kept"):
            session.picture(1)
        studio.session("two")
        studio.session("three")
        assert not studio.session("one").pictures

    def test_the_drawing_of_a_session_that_goes_stops(self, slow: Pipeline) -> None:
        studio = Studio({"tiny": slow}, Limits(sessions=1))
        frames = studio.draw("visitor", studio.settings())
        drawing, _ = next(frames)
        studio.session("another")
        assert drawing.wait(2)
        assert drawing.stopped

    def test_a_drawing_is_shown_again(self, studio: Studio) -> None:
        drawn(studio, seed=1)
        drawn(studio, seed=2, methods=["none"])
        session = studio.session("visitor")
        session.show_again(2)
        assert [panel.method for panel in session.panels] == ["cfg", "softcfg"]
        assert session.shown == studio.settings(seed=1)
        with pytest.raises(UserError, match="no longer kept"):
            session.show_again(9)

    def test_pictures_of_others_are_out_of_reach(self, studio: Studio) -> None:
        drawn(studio, "one")
        with pytest.raises(UserError):
            studio.session("two").picture(1)

    def test_files_hold_image_and_settings(self, studio: Studio) -> None:
        (panel,) = drawn(studio, subject=2, methods=["softcfg"], seed=7, scale=2.5)
        picture = panel.picture
        assert picture is not None
        image = Image.open(io.BytesIO(picture.png()))
        assert np.array_equal(np.asarray(image), picture.pixels)
        described = json.loads(image.text["softcfg"])  # type: ignore[attr-defined]
        assert described == json.loads(picture.json())
        assert (described["subject"], described["method"], described["seed"], described["scale"]) == (
            2,
            "softcfg",
            7,
            2.5,
        )
        assert described["softcfg"] == softcfg.__version__
        again = studio.settings_from_query(dict(urllib.parse.parse_qsl(described["link"].removeprefix("?"))))
        assert again == picture.settings
        # The class is called "T-shirt/top".
        assert picture.caption == "T-shirt/top, SoftCFG, scale 2.5, seed 7"
        with zipfile.ZipFile(io.BytesIO(studio.session("visitor").archive())) as archive:
            assert archive.namelist() == ["tiny-T-shirt-top-softcfg-7-1.png", "tiny-T-shirt-top-softcfg-7-1.json"]
            assert archive.read(archive.namelist()[0]) == picture.png()


@pytest.fixture(scope="module")
def inspected(model_folder: Path) -> tuple[Studio, Pipeline, list[Panel]]:
    """A studio in which every method has drawn, its pipeline, and what was drawn."""
    pipeline = Pipeline.from_pretrained(model_folder)
    studio = Studio({"tiny": pipeline})
    values = {"subject": 3, "methods": list(METHODS), "seed": 2, "scale": 5, "strength": 0.5, "temperature": 0.8}
    return studio, pipeline, drawn(studio, **values)


class TestInspect:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_says_what_the_trace_says(self, inspected: tuple[Studio, Pipeline, list[Panel]], method: str) -> None:
        studio, pipeline, panels = inspected
        picture = next(panel.picture for panel in panels if panel.method == method)
        assert picture is not None
        inspection = studio.inspect(picture)
        guidance = picture.settings.guidance(method, pipeline)
        traced = softcfg.trace(
            pipeline.generator, labels=[3], guidance=guidance, tokens=picture.tokens[None], temperature=0.8
        )
        assert torch.allclose(inspection.confidence, traced.confidence[0])
        assert torch.equal(inspection.scale, traced.guidance_scale)
        weights = traced.value_weights
        assert weights is not None
        for token in (0, 7, 15):
            earlier = inspection.weights_on_earlier(token)
            assert np.isnan(earlier[token:]).all()
            assert np.allclose(earlier[:token], weights[0, token, :token])
            assert np.allclose(inspection.weights_of(token), weights[0, token + 1 :, token])
            for branch, logits in enumerate((traced.cond_logits, traced.uncond_logits, traced.guided_logits)):
                exact = (logits[0, token].double() / 0.8).softmax(-1).numpy()
                assert np.allclose(inspection.probabilities[token, branch], exact[inspection.codes[token]], atol=1e-5)
        # The candidates are those that are likeliest anywhere, in falling order of that.
        peaks = inspection.probabilities.amax(dim=1)
        assert (peaks[:, :-1] >= peaks[:, 1:]).all()
        assert studio.inspect(picture) is inspection

    def test_a_token_that_is_not_there(self, inspected: tuple[Studio, Pipeline, list[Panel]]) -> None:
        studio, *_ = inspected
        session = studio.session("visitor")
        picture = session.picture(1)
        session.choose(picture, 15)
        assert session.chosen == (1, 15)
        for token in (-1, 16):
            with pytest.raises(UserError, match="tokens 0 to 15"):
                session.choose(picture, token)


class TestPrompts:
    """A model that draws from prompts: its tokens hold the ends of lines and of the image, too."""

    @pytest.fixture
    def words(self, prompt_model_folder: Path) -> Pipeline:
        return Pipeline.from_pretrained(prompt_model_folder)

    def test_pictures_are_those_of_the_pipeline(self, words: Pipeline) -> None:
        studio = Studio({"words": words}, Limits(prompt=20))
        panels = drawn(studio, subject=" a red star ", seed=6)
        expected = words(prompts=["a red star"], guidance=words.default_guidance(), seed=6)
        picture = panels[1].picture
        assert picture is not None
        assert picture.caption == "a red star, SoftCFG, scale 3, seed 6"
        assert np.array_equal(picture.pixels, expected.pixels[0])
        # Where all tokens are there, the sketch is the image; where one is missing, its place is clear.
        canvas = Canvas(studio.models["words"], studio.settings(subject="a red star"))
        assert canvas.grid == Geometry(4, 4, row_end=1, tail=1)
        assert np.array_equal(canvas.sketch(picture.tokens)[..., :3], picture.pixels)
        assert (canvas.sketch(picture.tokens)[..., 3] == 255).all()
        clear = canvas.sketch(picture.tokens[:12])[..., 3] == 0
        assert clear.reshape(4, 2, 4, 2).all(axis=(1, 3)).reshape(-1).tolist() == [False] * 10 + [True] * 6

        inspection = studio.inspect(picture)
        assert np.isnan(inspection.weights_on_earlier(7)[7:]).all()
        # Ends of lines have no confidence and keep their weight.
        assert inspection.confidence[4] == 0
        assert (inspection.weights_of(4) == 1).all()

    @pytest.mark.parametrize(
        ("subject", "said"),
        [
            ("", "Write a prompt first"),
            ("a" * 21, "21 characters; at most 20"),
            (3, "Write a prompt first"),
            ("a \ud800", "half a character"),
        ],
    )
    def test_prompts_that_cannot_be(self, words: Pipeline, subject: object, said: str) -> None:
        studio = Studio({"words": words}, Limits(prompt=20))
        with pytest.raises(UserError, match=said):
            studio.settings(subject=subject)
