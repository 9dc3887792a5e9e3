"""What the page in a real Chromium shows: the form says what is drawn, what matters is in sight, all can be read."""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FINISHED = ".picture[data-picture]"
# Of the text, placeholders included, whose contrast with what is behind it is below 4.5; disabled buttons may be faint.
FAINT = """() => {
  const channels = (text) => { const n = text.match(/[0-9.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(channels(getComputedStyle(e).backgroundColor));
    const page = matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    return layers.reverse().reduce((under, top) => over(top, under), page);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const check = (element, color, text) => {
    const under = behind(element);
    const [dark, bright] = [light(over(channels(color), under)), light(under)].sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)} ${text.trim().slice(0, 60)}`);
  };
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility() || element.closest(":disabled")) continue;
    check(element, getComputedStyle(element).color, walker.currentNode.textContent);
  }
  for (const field of document.querySelectorAll("main :is(input, textarea)")) {
    if (!field.checkVisibility() || ["range", "checkbox", "radio"].includes(field.type)) continue;
    check(field, getComputedStyle(field).color, field.value);
    if (field.placeholder) check(field, getComputedStyle(field, "::placeholder").color, field.placeholder);
  }
  return found;
}"""


def form(page: Any) -> dict[str, Any]:
    """What the fields say; those that are not to be seen are left out."""
    page.wait_for_timeout(500)  # for an answer that should not come
    if not page.locator("#temperature").is_visible():
        page.get_by_role("button", name="SoftCFG and sampling").click()
        page.locator("#temperature").wait_for()
    fields = {"model": "#model input", "class": "#class input", "prompt": "#prompt textarea"}
    numbers = ("scale", "power", "strength", "temperature", "seed", "seeds")
    fields |= {name: f"#{name} input[type=number]" for name in numbers}
    said = {name: page.locator(field).first for name, field in fields.items()}
    values: dict[str, Any] = {name: field.input_value() for name, field in said.items() if field.is_visible()}
    values["step_norm"] = page.locator("#step-norm input").is_checked()
    values["methods"] = page.locator("#methods input:checked").evaluate_all("all => all.map((one) => one.name)")
    return values


def choose(page: Any, field: str, option: str) -> None:
    page.get_by_label(field, exact=True).click()
    page.get_by_role("option", name=option).click()


def in_sight(page: Any, selector: str) -> bool:
    """Whether it can be clicked or read where the page is scrolled to: all of it, with nothing in front."""
    found: bool = page.evaluate(
        """(selector) => {
             const element = document.querySelector(selector), box = element.getBoundingClientRect();
             if (!box.height || box.top < 0 || box.bottom > innerHeight || box.left < 0 || box.right > innerWidth)
               return false;
             return [box.top + 3, (box.top + box.bottom) / 2, box.bottom - 3].every((y) => {
               const front = document.elementFromPoint((box.left + box.right) / 2, y);
               return element.contains(front) || front.contains(element);
             });
           }""",
        selector,
    )
    return found


LINKED = {
    "tiny": {
        "model": "tiny", "subject": "3", "methods": "none,released,none+apg", "scale": "7.5", "power": "1.25",
        "strength": "0.7", "step_norm": "0", "temperature": "1.1", "seed": "41", "seeds": "2",
    },
    "words": {
        "model": "words", "subject": "a red star", "methods": "cfg", "scale": "5", "power": "1",
        "strength": "1", "step_norm": "1", "temperature": "0.7", "seed": "9", "seeds": "1",
    },
}  # fmt: skip
SHOWN: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "tiny", "class": "Star", "methods": ["none", "released", "none+apg"], "scale": "7.5", "power": "1.25",
        "strength": "0.7", "step_norm": False, "temperature": "1.1", "seed": "41", "seeds": "2",
    },
    "words": {
        "model": "words", "prompt": "a red star", "methods": ["cfg"], "scale": "5",
        "strength": "1", "step_norm": True, "temperature": "0.7", "seed": "9", "seeds": "1",
    },
}  # fmt: skip


def link(open_page: Callable[..., Any], name: str) -> Any:
    page = open_page("?" + urllib.parse.urlencode(LINKED[name]))
    page.get_by_text("Drawn in").wait_for()
    page.wait_for_selector(FINISHED)
    return page


class TestTheFormSaysWhatIsDrawn:
    @pytest.mark.parametrize("name", LINKED)
    def test_a_settings_link(self, open_page: Callable[..., Any], name: str) -> None:
        assert form(link(open_page, name)) == SHOWN[name]

    def test_a_click_in_the_gallery(self, open_page: Callable[..., Any]) -> None:
        page = link(open_page, "words")
        choose(page, "Model", "tiny")
        page.get_by_label("Class", exact=True).wait_for()
        page.click("#draw")
        page.wait_for_selector(".canvas img[alt$='scale 3, seed 9']")
        page.get_by_role("button", name="a red star").click()
        page.wait_for_selector(".canvas img[alt^='a red star']")
        assert form(page) == SHOWN["words"]
        page.get_by_role("button", name="scale 3, seed 9").click()
        page.wait_for_selector(".canvas img[alt$='scale 3, seed 9']")
        expected = SHOWN["words"] | {
            "model": "tiny",
            "class": "Circle",
            "scale": "3",
            "power": "0.5",
            "temperature": "0.9",
        }
        del expected["prompt"]
        assert form(page) == expected

    def test_another_model_has_settings_of_its_own(self, page: Any) -> None:
        page.locator("#seed input").fill("8")
        page.locator("#scale input[type=number]").fill("9")
        before = form(page)
        choose(page, "Model", "words")
        page.get_by_label("Prompt").wait_for()
        # Its schedule takes no power.
        rest = {name: before[name] for name in ("methods", "strength", "step_norm", "seed", "seeds")}
        expected = {"model": "words", "prompt": "", "scale": "3", "temperature": "0.9"}
        assert form(page) == rest | expected
        assert page.locator(".chips").count() == 0
        choose(page, "Model", "tiny")
        page.get_by_label("Power").first.wait_for()
        assert form(page) == before | {"scale": "3"}
        assert page.locator(".chips button").all_inner_texts() == ["Star"]

    def test_an_example(self, page: Any) -> None:
        page.locator("#scale input[type=number]").fill("9")
        page.get_by_role("button", name="Star", exact=True).click()
        page.wait_for_selector(".canvas img[alt='Star, SoftCFG, scale 3, seed 5']")
        assert page.locator(FINISHED).count() == 3
        said = form(page)
        assert (said["class"], said["seed"], said["scale"]) == ("Star", "5", "3")
        assert said["methods"] == ["none", "cfg", "softcfg"]

    def test_several_seeds_have_a_column_each(self, page: Any) -> None:
        page.locator("#seeds input").fill("3")
        page.click("#draw")
        page.locator(FINISHED).nth(5).wait_for()
        corners = page.locator(".panel").evaluate_all(
            "all => all.map((one) => [one.getBoundingClientRect().left, one.getBoundingClientRect().top])"
        )
        columns, rows = sorted({left for left, _ in corners}), sorted({top for _, top in corners})
        assert corners == [[left, top] for top in rows for left in columns]
        assert len(columns) == 3
        heads = page.locator(".panel figcaption > span:first-child").all_inner_texts()
        assert heads == [f"{method} seed {seed}" for method in ("CFG", "SoftCFG") for seed in range(3)]


class TestKeys:
    def test_enter_draws_and_shift_enter_breaks_the_line(self, page: Any) -> None:
        choose(page, "Model", "words")
        prompt = page.get_by_label("Prompt")
        prompt.fill("a red")
        prompt.press("End")
        prompt.press("Shift+Enter")
        page.keyboard.type("star")
        page.wait_for_timeout(300)
        assert page.locator(".panel").count() == 0
        assert prompt.input_value() == "a red\nstar"
        prompt.press("Enter")
        page.wait_for_selector(FINISHED)
        assert prompt.input_value() == "a red\nstar"
        assert page.locator(".canvas img").first.get_attribute("alt").startswith("a red\nstar, CFG")

    @pytest.mark.parametrize("field", ["scale", "seed"])
    def test_enter_in_a_number_draws_with_it(self, page: Any, field: str) -> None:
        number = page.locator(f"#{field} input[type=number]")
        number.fill("6")
        number.press("Enter")
        page.wait_for_selector(f".canvas img[alt*='{field} 6']")


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (1024, 768), (390, 844)])
def test_draw_and_errors_stay_in_sight(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    choose(page, "Model", "words")
    page.get_by_label("Prompt").wait_for()
    assert in_sight(page, "#draw")
    page.click("#draw")
    page.get_by_role("alert").wait_for()
    assert in_sight(page, "#draw")
    assert in_sight(page, "#status .alert")
    # So is the field that is wrong.
    assert in_sight(page, "#prompt textarea")
    page.get_by_label("Prompt").fill("a star")
    page.get_by_role("button", name="SoftCFG and sampling").click()
    page.click("#draw")
    page.wait_for_selector(FINISHED)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(300)
    assert in_sight(page, "#draw")
    assert in_sight(page, "#stop")


def test_the_empty_stage_is_centred(page: Any) -> None:
    middles = page.evaluate(
        """() => [document.querySelector("#stage .hint"), ...document.querySelectorAll("#stage .hint p")]
             .map((e) => e.getBoundingClientRect()).map((box) => (box.left + box.right) / 2)"""
    )
    assert len(middles) == 3
    assert max(middles) - min(middles) < 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.get_by_role("button", name="SoftCFG and sampling").click()
    assert page.evaluate(FAINT) == []
    choose(page, "Model", "words")
    page.get_by_label("Prompt").wait_for()
    page.click("#draw")
    page.get_by_role("alert").wait_for()
    assert page.evaluate(FAINT) == []
    page.get_by_label("Prompt").fill("a star")
    page.locator("#seeds input").fill("2")
    page.click("#draw")
    page.wait_for_selector(FINISHED)
    page.locator(".canvas").nth(2).click()
    page.wait_for_selector(".inspector")
    page.get_by_label("Weights", exact=True).check()
    page.wait_for_selector(".mapped")
    page.wait_for_timeout(300)  # colours fade
    assert page.evaluate(FAINT) == []
    levels = page.locator(":is(h1, h2, h3, h4, h5, h6)").evaluate_all("all => all.map((one) => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert 3 in levels
