"""The page's functions, without a browser; `softcfg ui` itself, and the page in a real Chromium (slow)."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from page_server import Server
from softcfg import SoftCFG
from softcfg.pipeline import Pipeline
from softcfg.ui import page as pages
from softcfg.ui.studio import Studio


def pixels(address: str) -> np.ndarray:
    """Of the picture that a data address holds."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


class TestFunctions:
    """What the events of the page do."""

    @pytest.fixture
    def studio(self, model_folder: Path) -> Studio:
        return Studio({"tiny": Pipeline.from_pretrained(model_folder)})

    @pytest.fixture
    def shown(self, studio: Studio) -> pages.Shown:
        with gr.Blocks():
            form = pages.Form(studio, "tiny")
            return pages.Shown(studio, form, *(gr.HTML() for _ in range(5)))

    @staticmethod
    def request(**query: str) -> Any:
        return SimpleNamespace(session_hash="visitor", query_params=query)

    FIELDS = ("tiny", 3, "", "", None, None, ["cfg", "softcfg"], 3, 0.5, 1, True, "cosine_power", 0.9, 0, 4, 1)

    def test_draw_choose_and_open(self, shown: pages.Shown, studio: Studio) -> None:
        updates = list(shown.draw(self.request(), *self.FIELDS, "none"))
        stage = updates[-1][shown.stage]
        expected = studio.models["tiny"].pipeline(labels=[3], guidance=SoftCFG(3.0, 0.5), seed=4).pixels[0]
        addresses = re.findall(r'<img src="(data:image/png[^"]+)" alt="([^"]*)"', stage)
        assert [alt for _, alt in addresses] == ["Star, CFG, scale 3, seed 4", "Star, SoftCFG, scale 3, seed 4"]
        assert np.array_equal(pixels(addresses[1][0]), expected)
        assert "Drawn in" in updates[-1][shown.status]
        assert "seed=4" in updates[-1][shown.share]
        assert updates[0][shown.form.stop].interactive is True
        assert updates[-1][shown.form.stop].interactive is False

        event = SimpleNamespace(_data={"picture": 2, "token": 9})
        inspector = shown.choose("none", event, self.request())[shown.inspector]
        assert "Token 9" in inspector
        assert "row 3, column 2" in inspector
        chosen = shown.choose("weights", event, self.request())
        assert "Weights on the tokens before token 9" in chosen[shown.legend]
        # Maps over both pictures, clear from token 9 on.
        maps = re.findall(r'class="map" src="data:image/png;base64,([^"]+)"', chosen[shown.stage])
        for content in maps:
            alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))[..., 3].reshape(-1)
            assert (alpha[:9] == 255).all()
            assert (alpha[9:] == 0).all()
        assert len(maps) == 2

        opened = shown.open("confidence", SimpleNamespace(_data={"picture": 1}), self.request())
        assert opened[shown.stage].count('class="map"') == 2
        assert opened[shown.form.seed] == 4

    def test_mistakes_are_sentences(self, shown: pages.Shown) -> None:
        fields = list(self.FIELDS)
        fields[6] = []
        (update,) = shown.draw(self.request(), *fields, "none")
        assert re.fullmatch(r'<p class="alert" role="alert">Choose at least one method\.</p>', update[shown.status])
        for data in (None, {}, {"picture": "1", "token": 0}, {"picture": 1, "token": 0}):
            update = shown.choose("none", SimpleNamespace(_data=data), self.request())
            assert 'role="alert"' in update[shown.status]
        for data in (None, {}, {"example": "0"}, {"example": True}, {"example": -1}, {"example": 0}):
            (update,) = shown.pick("tiny", "none", SimpleNamespace(_data=data), self.request())
            assert 'role="alert"' in update[shown.status]
        form = shown.form
        for update in (form.on_model("gone"), form.on_ratio("gone", "1:1"), form.on_schedule("gone", "linear", 1.0)):
            assert "There is no model" in update[form.status]
        (update,) = shown.open_link("none", self.request(scale="much"))
        assert "This settings link does not work. The scale must be" in update[shown.status]

    def test_what_visitors_write_is_text(self, shown: pages.Shown) -> None:
        (update,) = shown.open_link("none", self.request(model="<img src=x onerror=alert(1)>"))
        assert "<img" not in update[shown.status]
        assert "&lt;img" in update[shown.status]

    def test_an_example_leaves_a_drawing_that_is_under_way(self, shown: pages.Shown, studio: Studio) -> None:
        pipeline = studio.models["tiny"].pipeline
        assert pipeline.source is not None
        pipeline.source = replace(pipeline.source, entry=replace(pipeline.source.entry, examples={"Star": 5}))
        drawing = shown.draw(self.request(), *self.FIELDS, "none")
        assert next(drawing)[shown.form.stop].interactive is True
        example = SimpleNamespace(_data={"example": 0})
        for others in (
            shown.pick("tiny", "none", example, self.request()),
            shown.open_link("none", self.request(seed="5")),
        ):
            (update,) = others
            assert update.keys() == {shown.status}
            assert "This page is drawing already" in update[shown.status]
        assert list(drawing)[-1][shown.form.stop].interactive is False
        first = next(shown.pick("tiny", "none", example, self.request()))
        assert (first[shown.form.seed], first[shown.form.stop].interactive) == (5, True)

    def test_a_link_draws_the_same_pictures(self, shown: pages.Shown) -> None:
        drawn = list(shown.draw(self.request(), *self.FIELDS, "none"))[-1]
        query = dict(
            part.split("=") for part in re.findall(r'href="./\?([^"]+)"', drawn[shown.share])[0].split("&amp;")
        )
        query["methods"] = query["methods"].replace("%2C", ",")
        linked = list(shown.open_link("none", self.request(**query)))
        assert linked[0][shown.form.seed] == 4
        sources = [re.findall(r'src="([^"]+)"', update[shown.stage]) for update in (drawn, linked[-1])]
        assert sources[0] == sources[1]
        assert list(shown.open_link("none", self.request())) == [{shown.status: ""}]


@pytest.mark.slow
class TestBrowser:
    def test_draw_look_and_download(self, page: Any, pipeline: Pipeline, tmp_path: Path) -> None:
        page.get_by_label("Class").click()
        page.get_by_role("option", name="Star").click()
        assert not page.get_by_label("Prompt").is_visible()
        page.locator("#seed input").fill("12")
        page.click("#draw")
        page.wait_for_selector(".picture[data-picture]")
        expected = pipeline(labels=[3], guidance=pipeline.default_guidance(), seed=12).pixels[0]
        shown = page.get_by_alt_text("Star, SoftCFG, scale 3, seed 12", exact=True).first
        assert np.array_equal(pixels(shown.get_attribute("src")), expected)
        page.get_by_text("Drawn in").wait_for()

        canvas = page.locator(".picture[data-picture] .canvas").nth(1)
        box = canvas.bounding_box()
        # Row 2 and column 4 of 4 x 4 places: token 7.
        canvas.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.4})
        page.get_by_role("heading", name="Token 7").wait_for()
        inspector = page.locator("#inspector")
        assert "row 2, column 4 · SoftCFG" in inspector.inner_text()
        assert inspector.locator("tbody tr").count() == 8
        assert inspector.get_by_role("img", name="Weight from").count() == 1
        page.get_by_label("Confidence", exact=True).check()
        page.wait_for_selector(".mapped")
        assert page.locator("img.map").count() == 2

        with page.expect_download() as download:
            page.locator(".panel a", has_text="PNG").nth(1).click()
        assert download.value.suggested_filename == "tiny-Star-softcfg-12-2.png"
        saved = Image.open(download.value.path())
        assert np.array_equal(np.asarray(saved), expected)
        assert json.loads(saved.text["softcfg"])["seed"] == 12
        with page.expect_download() as download:
            page.click("#download")
        with zipfile.ZipFile(download.value.path()) as archive:
            assert len(archive.namelist()) == 4

    def test_a_link_reproduces_a_picture(self, page: Any, open_page: Callable[..., Any]) -> None:
        page.locator("#seed input").fill("77")
        page.click("#draw")
        page.wait_for_selector(".picture[data-picture]")
        sources = page.eval_on_selector_all(".canvas img", "images => images.map((image) => image.src)")
        href = page.get_by_role("link", name="Link to these settings").get_attribute("href")
        other = open_page(href.removeprefix("./"))
        other.wait_for_selector(".picture[data-picture]")
        assert other.eval_on_selector_all(".canvas img", "images => images.map((image) => image.src)") == sources
        assert other.locator("#seed input").input_value() == "77"

    def test_a_model_that_reads_prompts(self, page: Any) -> None:
        page.get_by_label("Model").click()
        page.get_by_role("option", name="words").click()
        prompt = page.get_by_label("Prompt")
        prompt.wait_for()
        assert not page.get_by_label("Class").is_visible()
        page.click("#draw")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").inner_text() == "Write a prompt first."
        prompt.fill("a <b>red</b> star")
        page.click("#draw")
        page.wait_for_selector(".picture[data-picture]")
        assert page.locator(".canvas img").first.get_attribute("alt") == "a <b>red</b> star, CFG, scale 3, seed 0"

    def test_stop_stops_the_computation(self, page: Any, server: Server, pause: dict[str, float]) -> None:
        pause["seconds"] = 0.3
        page.click("#draw")
        page.wait_for_function("document.querySelector('.panel progress')?.value > 1")
        assert page.get_by_role("button", name="Draw", exact=True).is_disabled()
        page.click("#stop")
        page.get_by_text("Stopped after").wait_for()
        assert server.studio.active == 0
        assert 1 < page.locator(".panel progress").first.evaluate("bar => bar.value") < 16
        assert page.get_by_role("button", name="Draw", exact=True).is_enabled()
        assert page.get_by_role("button", name="Stop").is_disabled()

    def test_closing_the_page_stops_the_computation(
        self, open_page: Callable[..., Any], server: Server, page: Any, pause: dict[str, float]
    ) -> None:
        pause["seconds"] = 0.5
        other = open_page()
        other.click("#draw")
        other.wait_for_selector(".panel")
        assert server.studio.active == 1
        other.context.close()
        deadline = time.monotonic() + 7
        while server.studio.active:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_the_keyboard_is_enough(self, page: Any) -> None:
        focused = "document.activeElement"
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"{focused}.id") == "draw":
                break
        else:
            pytest.fail("Tab does not reach the button")
        outline = page.evaluate(f"getComputedStyle({focused}).outlineStyle + getComputedStyle({focused}).outlineWidth")
        assert outline == "solid3px"
        page.keyboard.press("Enter")
        page.wait_for_selector(".picture[data-picture]")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(f"{focused}.dataset.picture") == "2":
                break
        else:
            pytest.fail("Tab does not reach the picture")
        picture = page.locator('.picture[data-picture="2"]')
        assert picture.get_attribute("role") == "slider"
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Token 10").wait_for()
        assert picture.get_attribute("aria-valuetext") == "token 10, row 3, column 3"
        for key, token in (("ArrowRight", 11), ("ArrowUp", 7), ("Home", 0), ("ArrowLeft", 0), ("End", 15)):
            page.keyboard.press(key)
            assert picture.get_attribute("aria-valuenow") == str(token)
        page.get_by_role("heading", name="Token 15").wait_for()
        # The answer leaves the focus where it was.
        assert page.evaluate(f"{focused}.dataset.picture") == "2"

    @pytest.mark.parametrize("width", [390, 820])
    def test_a_narrow_screen(self, page: Any, width: int) -> None:
        page.set_viewport_size({"width": width, "height": 844})
        page.click("#draw")
        page.wait_for_selector(".picture[data-picture]")
        # The page moves to the pictures, which are below the form.
        page.wait_for_function("document.querySelector('#stage').getBoundingClientRect().top < innerHeight / 2")
        page.locator(".canvas").nth(1).click()
        page.wait_for_selector(".inspector")
        page.get_by_label("Weights", exact=True).check()
        page.wait_for_selector(".mapped")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((e) => {
                 const box = e.getBoundingClientRect();
                 return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && e.closest(".hidden") === null;
               }).map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        for button in ("#draw", "#stop", "#new-seed", "#download"):
            assert page.locator(button).bounding_box()["height"] >= 32

    def test_everything_has_a_name(self, page: Any) -> None:
        page.click("#draw")
        page.wait_for_selector(".picture[data-picture]")
        page.locator(".canvas").first.click()
        page.wait_for_selector(".inspector")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("main :is(button, a, input, textarea, img, svg[role], .picture)")]
               .filter((e) => e.offsetParent !== null && !e.classList.contains("map"))
               .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("alt") || e.textContent.trim()
                 || e.labels?.length || e.getAttribute("aria-labelledby") || e.title))
               .map((e) => e.outerHTML.slice(0, 120))"""
        )
        assert nameless == []
        assert page.locator("h1").count() == 1

    def test_the_gallery_brings_a_drawing_back(self, page: Any) -> None:
        for seed in ("1", "2"):
            page.locator("#seed input").fill(seed)
            page.click("#draw")
            page.wait_for_selector(f".canvas img[alt$='seed {seed}']")
        assert page.locator(".gallery li").count() == 4
        page.get_by_role("button", name="seed 1").first.click()
        page.wait_for_selector(".canvas img[alt$='seed 1']")
        assert page.locator("#seed input").input_value() == "1"
        assert page.locator(".panel").count() == 2
