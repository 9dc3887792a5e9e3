"""The layout of the page and its events, and the server that shows it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

# Before Gradio is imported: it reports nothing to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI

from softcfg.errors import UserError
from softcfg.ui import fragments
from softcfg.ui.guard import Guard
from softcfg.ui.studio import METHODS, RANGES, Session, Settings, Studio

HERE = Path(__file__).parent
MAPS = {"none": "Picture", "confidence": "Confidence", "weights": "Weights"}
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
HEADER = """
<header class="masthead"><h1>softcfg</h1>
<p>Classifier-free guidance and SoftCFG for autoregressive image models, side by side from the same seed.</p>
</header>"""
# On a narrow screen the pictures are below the form.
TO_THE_STAGE = """() => {
  const stage = document.getElementById("stage");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (innerWidth < 900) stage.scrollIntoView({behavior: still ? "auto" : "smooth", block: "start"});
}"""
NEW_SEED = f"() => Math.floor(Math.random() * {RANGES['seed'][1] + 1})"

Update = dict[Any, Any]  # component -> its new value


def application(studio: Studio) -> FastAPI:
    """The whole server: the page of `build` behind the guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app,
        build(studio),
        path="/",
        footer_links=[],
        show_error=False,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=0,
        theme=gr.themes.Base(
            primary_hue="indigo",
            neutral_hue="slate",
            radius_size="lg",
            font=list(FONT),
            font_mono=["ui-monospace", "monospace"],
        ).set(
            # Small print that can be read: a contrast of 4.5 and more.
            body_text_color_subdued="*neutral_500",
            block_info_text_color="*neutral_500",
            block_label_text_color="*neutral_600",
        ),
        css=(HERE / "page.css").read_text(),
    )
    app.add_middleware(Guard)
    return app


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    first = next(iter(studio.models))
    with gr.Blocks(title="softcfg", analytics_enabled=False, delete_cache=None) as blocks:
        gr.HTML(HEADER, apply_default_css=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=1, min_width=300, elem_id="form"):
                form = Form(studio, first)
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(
                    "",
                    html_template='<div role="status" aria-live="polite">${value}</div>',
                    elem_id="status",
                    apply_default_css=False,
                )
                stage = gr.HTML(
                    fragments.EMPTY_STAGE,
                    js_on_load=(HERE / "stage.js").read_text(),
                    elem_id="stage",
                    apply_default_css=False,
                )
                share = gr.HTML(
                    "", apply_default_css=False, elem_id="share", js_on_load=(HERE / "share.js").read_text()
                )
                with gr.Row(elem_id="below-stage"):
                    mode = gr.Radio(
                        [(name, key) for key, name in MAPS.items()],
                        value="none",
                        label="Show over the pictures",
                        container=False,
                        elem_id="mode",
                    )
                    legend = gr.HTML("", apply_default_css=False, elem_id="legend")
                inspector = gr.HTML(fragments.EMPTY_INSPECTOR, apply_default_css=False, elem_id="inspector")
                with gr.Row(elem_id="gallery-head"):
                    gr.HTML("<h2>Gallery</h2>", apply_default_css=False)
                    download = gr.Button("Download all", size="sm", elem_id="download", scale=0, min_width=140)
                gallery = gr.HTML(
                    fragments.EMPTY_GALLERY,
                    js_on_load=(HERE / "gallery.js").read_text(),
                    elem_id="gallery",
                    apply_default_css=False,
                )
                archive = gr.HTML(
                    "",
                    html_template="",
                    js_on_load=(HERE / "archive.js").read_text(),
                    visible="hidden",
                )
        shown = Shown(studio, form, status, stage, share, legend, inspector, gallery)

        def stop(request: gr.Request) -> None:
            studio.stop(_key(request))

        def download_all(request: gr.Request) -> Update:
            session = studio.session(_key(request))
            if not session.pictures:
                return {status: _alert("There is nothing to download yet; draw something first.")}
            return {archive: fragments.data_address(session.archive(), "application/zip")}

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        drawing = {"concurrency_limit": len(studio.models), "concurrency_id": "draw", **private}
        # One after the other, so that the answer to the last of several quick choices comes last.
        looking = {"concurrency_limit": 1, "concurrency_id": "look", **private}
        form.model.change(form.on_model, form.model, form.of_model, **looking)
        form.new_seed.click(None, None, form.seed, js=NEW_SEED)
        gr.on(
            [form.draw.click, form.prompt.submit, form.seed.submit],
            shown.draw,
            [*form.fields, mode],
            shown.all,
            trigger_mode="once",
            **drawing,
        )
        gr.on([form.draw.click, form.prompt.submit, form.seed.submit], None, js=TO_THE_STAGE)
        # Past the queue: it must work when the queue is full.
        form.stop.click(stop, queue=False, **private)
        stage.choose(shown.choose, mode, [stage, share, legend, inspector, status], trigger_mode="multiple", **looking)
        mode.change(shown.choose_map, mode, [stage, share, legend, status], **looking)
        gallery.open(shown.open, mode, [*shown.all, *form.fields], **looking)
        download.click(download_all, None, [archive, status], **looking)
        blocks.load(shown.open_link, mode, [*shown.all, *form.fields], **drawing)
        blocks.unload(stop)
        blocks.queue(max_size=studio.limits.queue, default_concurrency_limit=1, api_open=False)
    return blocks


class Form:
    """The fields that make up the settings."""

    def __init__(self, studio: Studio, first: str) -> None:
        self.studio = studio
        model = studio.models[first]
        suited = model.defaults(first)
        names = list(studio.models)
        self.model = gr.Dropdown(names, value=first, label="Model", visible=len(names) > 1, elem_id="model")
        self.label = gr.Dropdown(
            _classes(studio, first),
            value=None if model.takes_prompts else 0,
            label="Class",
            visible=not model.takes_prompts,
            elem_id="class",
        )
        self.prompt = gr.Textbox(
            label="Prompt",
            lines=2,
            max_length=studio.limits.prompt,
            visible=model.takes_prompts,
            elem_id="prompt",
            placeholder="what to draw",
        )
        self.methods = gr.CheckboxGroup(
            [(name, key) for key, name in METHODS.items()],
            value=list(suited.methods),
            label="Guidance",
            info="Each one draws a picture from the same seed.",
            elem_id="methods",
        )
        self.scale = gr.Slider(
            0,
            RANGES["scale"][1],
            suited.scale,
            step=0.1,
            label="Scale",
            info="0 or 1: no guidance",
            elem_id="scale",
        )
        self.power = gr.Slider(
            0,
            RANGES["power"][1],
            suited.power,
            step=0.05,
            label="Power",
            info="of the scale's ramp",
            elem_id="power",
        )
        with gr.Accordion("SoftCFG and sampling", open=True, elem_id="more"):
            self.strength = gr.Slider(
                0,
                RANGES["strength"][1],
                suited.strength,
                step=0.1,
                label="Strength",
                info="exponent of the weights; 0: plain CFG",
                elem_id="strength",
            )
            self.step_norm = gr.Checkbox(suited.step_norm, label="Step Normalisation", elem_id="step-norm")
            low, high = RANGES["temperature"]
            self.temperature = gr.Slider(
                low, high, suited.temperature, step=0.05, label="Temperature", elem_id="temperature"
            )
        with gr.Row(elem_id="seed-row"):
            self.seed = gr.Number(
                suited.seed,
                label="Seed",
                precision=0,
                minimum=0,
                maximum=RANGES["seed"][1],
                elem_id="seed",
                min_width=120,
            )
            self.new_seed = gr.Button("New seed", size="sm", scale=0, min_width=100, elem_id="new-seed")
        with gr.Row(elem_id="actions"):
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=120)
        self.of_model = [self.label, self.prompt, self.scale, self.power, self.temperature]
        self.fields = [
            self.model, self.label, self.prompt, self.methods, self.scale, self.power, self.strength, self.step_norm,
            self.temperature, self.seed,
        ]  # fmt: skip

    def settings(
        self, model: Any, label: Any, prompt: Any, methods: Any, scale: Any, power: Any, strength: Any, step_norm: Any,
        temperature: Any, seed: Any,
    ) -> Settings:  # fmt: skip
        """The settings of the fields' values, checked."""
        return self.studio.settings(
            model=model, subject=prompt if self.studio.model(model).takes_prompts else label, methods=methods,
            scale=scale, power=power, strength=strength, step_norm=step_norm, temperature=temperature, seed=seed,
        )  # fmt: skip

    def on_model(self, name: str) -> Update:
        """The fields of another model: its classes or the prompt, and the settings that suit it."""
        model = self.studio.model(name)
        suited = model.defaults(name)
        return {
            self.label: gr.Dropdown(
                choices=_classes(self.studio, name),
                value=None if model.takes_prompts else 0,
                visible=not model.takes_prompts,
            ),
            self.prompt: gr.Textbox(visible=model.takes_prompts),
            self.scale: suited.scale,
            self.power: suited.power,
            self.temperature: suited.temperature,
        }

    def filled(self, settings: Settings) -> Update:
        """The fields with these settings."""
        model = self.studio.model(settings.model)
        values = dict(zip(self.fields[3:], (
            list(settings.methods), settings.scale, settings.power, settings.strength, settings.step_norm,
            settings.temperature, settings.seed,
        ), strict=True))  # fmt: skip
        return {
            **self.on_model(settings.model),
            self.model: settings.model,
            (self.prompt if model.takes_prompts else self.label): self._subject(settings),
            **values,
        }

    def _subject(self, settings: Settings) -> Any:
        model = self.studio.model(settings.model)
        if model.takes_prompts:
            return gr.Textbox(value=str(settings.subject), visible=True)
        return gr.Dropdown(choices=_classes(self.studio, settings.model), value=settings.subject, visible=True)


class Shown:
    """What is on the page beside the form, and how events change it."""

    def __init__(self, studio: Studio, form: Form, *parts: gr.HTML) -> None:
        self.studio = studio
        self.form = form
        self.status, self.stage, self.share, self.legend, self.inspector, self.gallery = parts
        self.all = [*parts, form.draw, form.stop]

    def draw(self, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Draw what the form says."""
        *fields, mode = values
        try:
            settings = self.form.settings(*fields)
        except UserError as error:
            yield {self.status: _alert(error)}
            return
        yield from self._draw(settings, mode, _key(request))

    def open_link(self, mode: str, request: gr.Request) -> Iterator[Update]:
        """Draw what the page's address says, if it says anything."""
        query = dict(request.query_params)
        if not set(query) & set(Settings.__dataclass_fields__):
            yield {self.status: ""}
            return
        try:
            settings = self.studio.settings_from_query(query)
        except UserError as error:
            yield {self.status: _alert(f"This settings link does not work. {error}")}
            return
        yield self.form.filled(settings)
        yield from self._draw(settings, mode, _key(request))

    def open(self, mode: str, event: gr.EventData, request: gr.Request) -> Update:
        """Show the drawing of a picture of the gallery again."""
        session = self.studio.session(_key(request))
        try:
            settings = session.show_again(_whole(event, "picture"))
            return {
                **self.form.filled(settings),
                **self._finished(session, mode),
                self.inspector: fragments.EMPTY_INSPECTOR,
                self.status: "",
            }
        except UserError as error:
            return {self.status: _alert(error)}

    def choose(self, mode: str, event: gr.EventData, request: gr.Request) -> Update:
        """Look into the token that was pointed at."""
        session = self.studio.session(_key(request))
        try:
            picture = session.picture(_whole(event, "picture"))
            token = _whole(event, "token")
            inspection = self.studio.inspect(picture)
            session.choose(picture, token)
            update: Update = {self.inspector: fragments.inspector(picture, inspection, token)}
            update[self.status] = _note(session.note)
            return update | (self._finished(session, mode) if mode == "weights" else {})
        except UserError as error:
            return {self.status: _alert(error)}

    def choose_map(self, mode: str, request: gr.Request) -> Update:
        """Lay another map over the pictures."""
        session = self.studio.session(_key(request))
        if session.drawing is not None and session.drawing.active:
            return {self.status: _note("The map appears when the drawing is done.")}
        try:
            return {**self._finished(session, mode), self.status: _note(session.note)}
        except UserError as error:
            return {self.status: _alert(error)}

    def _draw(self, settings: Settings, mode: str, key: str) -> Iterator[Update]:
        session, form = self.studio.session(key), self.form
        name = self.studio.model(settings.model).name_of(settings.subject)
        start: Update = {self.legend: "", self.share: "", self.inspector: fragments.EMPTY_INSPECTOR}
        start |= {form.draw: gr.Button(interactive=False), form.stop: gr.Button(interactive=True)}
        ready: Update = {form.draw: gr.Button(interactive=True), form.stop: gr.Button(interactive=False)}
        try:
            for drawing, panels in self.studio.draw(key, settings):
                state = "Waiting for the model" if drawing.waiting else f"Drawing {name}"
                yield {**start, self.status: _note(f"{state} …"), self.stage: fragments.stage(panels)}
                start = {}
            ending = "Stopped after" if drawing.stopped else "Drawn in"
            session.note = f"{ending} {drawing.seconds:.1f} seconds."
            status = _note(session.note)
        except UserError as error:
            session.note, status = "", _alert(error)
        update: Update = {**ready, self.status: status, self.gallery: fragments.gallery(session)}
        try:
            update |= self._finished(session, mode)
        except UserError as error:
            update[self.status] = _alert(error)
        yield update

    def _finished(self, session: Session, mode: str) -> Update:
        """The drawing on the stage with the map that is asked for."""
        if session.shown is None:
            return {self.stage: fragments.EMPTY_STAGE, self.share: "", self.legend: ""}
        maps, legend = self._maps(session, mode)
        return {
            self.stage: fragments.stage(session.panels, maps),
            self.share: fragments.share(session.shown.query()),
            self.legend: legend,
        }

    def _maps(self, session: Session, mode: str) -> tuple[dict[int, str], str]:
        pictures = [panel.picture for panel in session.panels if panel.picture is not None]
        if mode not in MAPS or mode == "none" or not pictures:
            return {}, ""
        values: dict[int, np.ndarray] = {}
        step = session.chosen[1] if session.chosen else pictures[0].grid.num_tokens - 1
        for picture in pictures:
            inspection = self.studio.inspect(picture)
            per_token = inspection.confidence.numpy() if mode == "confidence" else inspection.weights_on_earlier(step)
            values[picture.number] = picture.grid.on_grid(per_token)
        low = 0.0
        if mode == "weights":
            known = np.concatenate([grid[~np.isnan(grid)] for grid in values.values()])
            low = min(float(np.quantile(known, 0.01)), 0.99) if len(known) else 0.0
        title = "Confidence" if mode == "confidence" else f"Weights on the tokens before token {step}"
        maps = {number: fragments.heat_map(grid, low, 1.0) for number, grid in values.items()}
        return maps, fragments.legend(title, low, 1.0)


def _key(request: gr.Request) -> str:
    return str(request.session_hash)


def _whole(event: gr.EventData, name: str) -> int:
    value = event._data.get(name) if isinstance(event._data, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"The page asked for no {name}; load it again.")
    return value


def _classes(studio: Studio, name: str) -> list[tuple[str, int]]:
    model = studio.models[name]
    return [] if model.takes_prompts else [(label, index) for index, label in enumerate(model.subjects)]


def _note(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _alert(error: object) -> str:
    text = str(error)
    return f'<p class="alert" role="alert">{escape(text[:1].upper() + text[1:])}</p>'


def serve(studio: Studio, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Show the page until the process is interrupted.

    Args:
        ready: called with the address when the server is up.

    Raises:
        UserError: the address cannot be taken.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from None
    shown = f"[{host}]" if ":" in host else host
    # Failures are printed where they happen; the server's own log would add the pages that are open at the end.
    config = uvicorn.Config(application(studio), log_level="critical", timeout_graceful_shutdown=1)
    with listener:
        ready(f"http://{shown}:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])
