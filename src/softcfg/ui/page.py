"""The layout of the page and its events, and the server that shows it."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
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
from softcfg.guidance import SCHEDULES
from softcfg.ui import fragments
from softcfg.ui.guard import LOCAL, MAX_UNREAD, Access, Guard
from softcfg.ui.settings import METHODS, RANGES, Settings
from softcfg.ui.studio import Session, Studio
from softcfg.ui.waiting import Waiting

HERE = Path(__file__).parent
MAPS = {"none": "Picture", "confidence": "Confidence", "weights": "Weights"}
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
HEADER = """
<header class="masthead"><h1>softcfg</h1>
<p>Classifier-free guidance and SoftCFG for autoregressive image models, side by side from the same seed.</p>
</header>"""
NEW_SEED = f"() => Math.floor(Math.random() * {RANGES['seed'][1] + 1})"

# The settings with a field of the same name, in the order of the form; the model and its subject come before them.
SETTINGS = (
    *("negative_prompt", "width", "height", "methods", "scale", "power"),
    *("strength", "step_norm", "schedule", "temperature", "top_k", "seed", "seeds"),
)

OF_MODEL = ("width", "height", "scale", "schedule", "temperature", "top_k")

Update = dict[Any, Any]  # component -> its new value


def answered(event: Callable[..., Update]) -> Callable[..., Update]:
    """The event of the form, or of what is beside it; a mistake in what it was sent is said in the status."""

    @functools.wraps(event)
    def answer(self: Form | Shown, *values: Any) -> Update:
        try:
            return event(self, *values)
        except UserError as error:
            return {self.status: _alert(error)}

    return answer


def application(studio: Studio, access: Access | None = None) -> FastAPI:
    """The whole server: the page of `build`, with the guard in front of it.

    Args:
        access: whom it answers; browsers of this machine by default.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    blocks = build(studio)
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=list(FONT),
        font_mono=["ui-monospace", "monospace"],
    ).set(  # small print with a contrast of 4.5 and more
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_label_text_color="*neutral_600",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        link_text_color_dark="*primary_300",
        button_primary_background_fill="*primary_600",
    )
    gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], show_error=False, allowed_paths=[], ssr_mode=False, mcp_server=False,
        enable_monitoring=False, max_file_size=0, theme=theme, css=(HERE / "page.css").read_text(),
    )  # fmt: skip
    # Mounting does not say so, and until then Gradio does not check which files it opens.
    blocks.has_launched = True
    waiting = Waiting(blocks, studio.limits)
    waiting.keep_no_records()
    app.add_middleware(Guard, access=access or Access(), waiting=waiting)
    return app


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    html = functools.partial(gr.HTML, apply_default_css=False)
    first = next(iter(studio.models))
    with gr.Blocks(title="softcfg", analytics_enabled=False, delete_cache=None) as blocks:
        html(HEADER)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=1, min_width=300, elem_id="form"):
                form = Form(studio, first)
            with gr.Column(scale=3, min_width=320):
                headed = '<h2 class="hidden">Pictures</h2>${value}'
                script = _script("stage")
                stage = html(fragments.EMPTY_STAGE, html_template=headed, js_on_load=script, elem_id="stage")
                share = html("", js_on_load=_script("share"), elem_id="share")
                with gr.Row(elem_id="below-stage"):
                    maps = [(name, key) for key, name in MAPS.items()]
                    mode = gr.Radio(maps, value="none", label="Show over the pictures", container=False, elem_id="mode")
                    legend = html("", elem_id="legend")
                inspector = html(fragments.EMPTY_INSPECTOR, elem_id="inspector")
                with gr.Row(elem_id="gallery-head"):
                    html("<h2>Gallery</h2>")
                    download = gr.Button("Download all", size="sm", elem_id="download", scale=0, min_width=140)
                gallery = html(fragments.EMPTY_GALLERY, js_on_load=_script("gallery"), elem_id="gallery")
                archive = gr.HTML("", html_template="", js_on_load=_script("archive"), visible="hidden")
        waiting = Waiting(blocks, studio.limits)
        shown = Shown(studio, form, stage, share, legend, inspector, gallery, unread=waiting.unread)

        def stop(request: gr.Request) -> None:
            studio.stop(_key(request))

        def download_all(request: gr.Request) -> Update:
            session = _session(studio, request)
            if not session.pictures:
                return {form.status: _alert("There is nothing to download yet; draw something first.")}
            return {archive: fragments.data_address(session.archive(), "application/zip")}

        # The values as the browser sent them: Gradio would round some, and refuse others in words of its own.
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}
        drawing = {"concurrency_limit": len(studio.models), "concurrency_id": "draw", **private}
        # One after the other, so that the answer to the last of several quick choices comes last.
        looking = {"concurrency_limit": 1, "concurrency_id": "look", **private}
        # Chosen by hand: what the server fills in comes with all other fields.
        form.model.input(form.on_model, form.model, [*form.of_model, form.status], **looking)
        size = [form.width, form.height]
        form.ratio.input(form.on_ratio, [form.model, form.ratio], [*size, form.status], **looking)
        for side in size:
            side.input(None, None, form.ratio, js="() => null")
        schedule = [form.model, form.schedule, form.power]
        form.schedule.input(form.on_schedule, schedule, [form.power, form.status], **looking)
        form.new_seed.click(None, None, form.seed, js=NEW_SEED)
        form.draw.click(shown.draw, [*form.fields, mode], shown.all, trigger_mode="once", **drawing)
        everything = [*shown.all, *form.fields, form.size, form.ratio]
        form.examples.pick(shown.pick, [form.model, mode], everything, trigger_mode="once", **drawing)
        # Past the queue: it must work when the queue is full.
        form.stop.click(stop, queue=False, **private)
        looked = [stage, share, legend, form.status]
        stage.choose(shown.choose, mode, [*looked, inspector], trigger_mode="multiple", **looking)
        mode.change(shown.choose_map, mode, looked, **looking)
        gallery.open(shown.open, mode, everything, **looking)
        download.click(download_all, None, [archive, form.status], **looking)
        blocks.load(shown.open_link, mode, everything, **drawing)
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
            lines=1,
            max_lines=4,
            max_length=studio.limits.prompt,
            visible=model.takes_prompts,
            elem_id="prompt",
            placeholder="what to draw",
        )
        self.negative_prompt = gr.Textbox(
            suited.negative_prompt or "",
            label="Negative prompt",
            info="what the unconditional branch reads",
            lines=1,
            max_lines=4,
            max_length=studio.limits.prompt,
            visible=suited.negative_prompt is not None,
            elem_id="negative-prompt",
        )
        with gr.Row(elem_id="size-row", visible=suited.width is not None) as self.size:
            self.width = _number("width", suited, label="Width", min_width=60)
            self.height = _number("height", suited, label="Height", min_width=60)
            ratios = list(model.ratios)
            self.ratio = gr.Dropdown(
                ratios, value=None, label="Ratio", visible=bool(ratios), min_width=70, elem_id="ratio"
            )
        self.examples = gr.HTML(
            fragments.examples(model),
            js_on_load=_script("form"),
            elem_id="examples",
            apply_default_css=False,
        )
        self.methods = gr.CheckboxGroup(
            # The style sheet sets the first line apart.
            [(f"{method.title}\n{method.line}", key) for key, method in METHODS.items()],
            value=list(suited.methods),
            label="Guidance",
            info="Each method draws from the same seed.",
            elem_id="methods",
        )
        self.scale = _slider("scale", suited, 0.1, info="0 or 1: no guidance")
        self.power = _slider("power", suited, 0.05, info="of the scale's ramp", visible=suited.uses_power)
        with gr.Accordion("SoftCFG and sampling", open=False, elem_id="more"):
            self.strength = _slider("strength", suited, 0.1, info="exponent of the weights; 0: plain CFG")
            self.step_norm = gr.Checkbox(suited.step_norm, label="Step Normalisation", elem_id="step-norm")
            self.schedule = gr.Dropdown(
                list(SCHEDULES), value=suited.schedule, label="Schedule", info="of the scale", elem_id="schedule"
            )
            self.temperature = _slider("temperature", suited, 0.05)
            self.top_k = _number("top_k", suited, label="Top-k", info="codes to draw from; 0: all")
        with gr.Row(elem_id="seed-row"):
            self.seed = _number("seed", suited, label="Seed", min_width=90)
            self.seeds = _number("seeds", suited, label="How many", min_width=60)
            self.new_seed = gr.Button("New seed", size="sm", scale=0, min_width=90, elem_id="new-seed")
        with gr.Column(elem_id="footer"):
            live = '<div role="status" aria-live="polite">${value}</div>'
            self.status = gr.HTML("", html_template=live, elem_id="status", apply_default_css=False)
            with gr.Row(elem_id="actions"):
                self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=120)
        self.of_model = [
            *(self.label, self.prompt, self.negative_prompt, self.size, self.width, self.height, self.ratio),
            *(self.examples, self.scale, self.power, self.schedule, self.temperature, self.top_k),
        ]
        self.fields = [self.model, self.label, self.prompt, *(getattr(self, name) for name in SETTINGS)]

    def settings(self, *values: Any) -> Settings:
        """The settings of the values of `fields`, checked."""
        model, label, prompt, *others = values
        subject = prompt if self.studio.model(model).takes_prompts else label
        named = dict(zip(SETTINGS, others, strict=True))
        return self.studio.settings(model=model, subject=subject, **named)

    @answered
    def on_model(self, name: str) -> Update:
        """The fields of another model: its classes or the prompt, and the settings that suit it."""
        model = self.studio.model(name)
        suited = model.defaults(name)
        ratios = list(model.ratios)
        return {
            self.label: gr.Dropdown(
                choices=_classes(self.studio, name),
                value=None if model.takes_prompts else 0,
                visible=not model.takes_prompts,
            ),
            self.prompt: gr.Textbox(visible=model.takes_prompts),
            self.size: gr.Row(visible=suited.width is not None),
            self.ratio: gr.Dropdown(choices=ratios, value=None, visible=bool(ratios)),
            self.examples: fragments.examples(model),
            **self._suited(suited),
        }

    @answered
    def on_ratio(self, name: str, ratio: str) -> Update:
        """The size of images of this ratio."""
        ratios = self.studio.model(name).ratios
        width, height = ratios[ratio] if ratio in list(ratios) else (None, None)
        return {self.width: width, self.height: height}

    @answered
    def on_schedule(self, name: str, schedule: str, power: float) -> Update:
        """The power, where the schedule takes one."""
        settings = replace(self.studio.model(name).defaults(name), schedule=schedule)
        return {self.power: gr.Slider(value=power, visible=schedule in list(SCHEDULES) and settings.uses_power)}

    def filled(self, settings: Settings) -> Update:
        """The fields with these settings."""
        update = {**self.on_model(settings.model), self.model: settings.model}
        update |= {getattr(self, name): getattr(settings, name) for name in SETTINGS}
        update |= {self.methods: list(settings.methods), **self._suited(settings)}
        if isinstance(settings.subject, str):
            update[self.prompt] = gr.Textbox(value=settings.subject, visible=True)
        else:
            choices = _classes(self.studio, settings.model)
            update[self.label] = gr.Dropdown(choices=choices, value=settings.subject, visible=True)
        return update

    def _suited(self, settings: Settings) -> Update:
        """The fields that differ from model to model, with these settings."""
        negative = settings.negative_prompt
        return {
            self.negative_prompt: gr.Textbox(value=negative or "", visible=negative is not None),
            self.power: gr.Slider(value=settings.power, visible=settings.uses_power),
            **{getattr(self, name): getattr(settings, name) for name in OF_MODEL},
        }


class Shown:
    """What is on the page beside the form, and how events change it."""

    def __init__(
        self, studio: Studio, form: Form, *parts: gr.HTML, unread: Callable[[str], int] = lambda session: 0
    ) -> None:
        self.studio = studio
        self.form = form
        self.unread = unread  # messages that a session has not fetched
        self.stage, self.share, self.legend, self.inspector, self.gallery = parts
        self.status = form.status
        self.all = [*parts, form.status, form.draw, form.stop, form.examples]

    def draw(self, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Draw what the form says."""
        *fields, mode = values
        try:
            settings = self.form.settings(*fields)
        except UserError as error:
            yield {self.status: _alert(error)}
            return
        yield from self._draw(settings, mode, request)

    def pick(self, model: str, mode: str, event: gr.EventData, request: gr.Request) -> Iterator[Update]:
        """Draw an example of the model."""
        try:
            settings = self.studio.example(model, _whole(event, "example"))
        except UserError as error:
            yield {self.status: _alert(error)}
            return
        yield from self._draw(settings, mode, request, self.form.filled(settings))

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
        yield from self._draw(settings, mode, request, self.form.filled(settings))

    @answered
    def open(self, mode: str, event: gr.EventData, request: gr.Request) -> Update:
        """Show the drawing of a picture of the gallery again."""
        session = _session(self.studio, request)
        settings = session.show_again(_whole(event, "picture"))
        return {
            **self.form.filled(settings),
            **self._finished(session, mode),
            self.inspector: fragments.EMPTY_INSPECTOR,
            self.status: "",
        }

    @answered
    def choose(self, mode: str, event: gr.EventData, request: gr.Request) -> Update:
        """Look into the token that was pointed at."""
        session = _session(self.studio, request)
        picture = session.picture(_whole(event, "picture"))
        token = _whole(event, "token")
        inspection = self.studio.inspect(picture)
        session.choose(picture, token)
        update: Update = {self.inspector: fragments.inspector(picture, inspection, token)}
        update[self.status] = _note(session.note)
        return update | (self._finished(session, mode) if mode == "weights" else {})

    @answered
    def choose_map(self, mode: str, request: gr.Request) -> Update:
        """Lay another map over the pictures."""
        session = _session(self.studio, request)
        if session.drawing is not None and session.drawing.active:
            return {self.status: _note("The map appears when the drawing is done.")}
        return {**self._finished(session, mode), self.status: _note(session.note)}

    def _draw(
        self, settings: Settings, mode: str, request: gr.Request, filled: Update | None = None
    ) -> Iterator[Update]:
        """Draw, the form being `filled` when the drawing begins; where none does, the page stays as it is."""
        key, session, form = _key(request), _session(self.studio, request), self.form
        name = self.studio.model(settings.model).name_of(settings.subject)
        start: Update = {**(filled or {}), self.legend: "", self.share: "", self.inspector: fragments.EMPTY_INSPECTOR}
        start |= {form.draw: gr.Button(interactive=False), form.stop: gr.Button(interactive=True)}
        ready: Update = {form.draw: gr.Button(interactive=True), form.stop: gr.Button(interactive=False)}
        drawing = None
        try:
            for drawing, panels in self.studio.draw(key, settings):
                # A page that does not keep up, or went away, gets fewer looks at the drawing.
                if self.unread(key) > MAX_UNREAD // 2:
                    continue
                state = "Waiting for the model" if drawing.waiting else f"Drawing {name}"
                yield {**start, self.status: _note(f"{state} …"), self.stage: fragments.stage(panels)}
                start = {}
            assert drawing is not None
            ending = "Stopped after" if drawing.stopped else "Drawn in"
            session.note = f"{ending} {drawing.seconds:.1f} seconds."
            status = _note(session.note)
        except UserError as error:
            if drawing is None:
                yield {self.status: _alert(error)}
                return
            session.note, status = "", _alert(error)
        update: Update = {**start, **ready, self.status: status, self.gallery: fragments.gallery(session)}
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
        if mode not in list(MAPS) or mode == "none" or not pictures:
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


def _session(studio: Studio, request: gr.Request) -> Session:
    client = getattr(request, "client", None)
    return studio.session(_key(request), client.host if client else "")


def _whole(event: gr.EventData, name: str) -> int:
    value = event._data.get(name) if isinstance(event._data, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"The page did not say which {name}; load it again.")
    return value


def _script(name: str) -> str:
    return (HERE / f"{name}.js").read_text()


def _slider(name: str, suited: Settings, step: float, **shown: Any) -> gr.Slider:
    """The slider of a setting, at the value that suits the model."""
    low, high = RANGES[name]
    return gr.Slider(low, high, getattr(suited, name), step=step, label=name.capitalize(), elem_id=name, **shown)


def _number(name: str, suited: Settings, **shown: Any) -> gr.Number:
    """The field of a whole number, at the value that suits the model."""
    low, high = RANGES[name]
    return gr.Number(
        getattr(suited, name), precision=0, minimum=low, maximum=high, elem_id=name.replace("_", "-"), **shown
    )


def _classes(studio: Studio, name: str) -> list[tuple[str, int]]:
    model = studio.models[name]
    return [] if model.takes_prompts else [(label, index) for index, label in enumerate(model.subjects)]


def _note(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _alert(error: object) -> str:
    text = str(error)
    return f'<p class="alert" role="alert">{escape(text[:1].upper() + text[1:])}</p>'


def serve(
    studio: Studio,
    host: str,
    port: int,
    ready: Callable[[str], None],
    *,
    allowed_hosts: Iterable[str] = (),
    behind_proxy: bool = False,
) -> None:
    """Show the page until the process is interrupted.

    Args:
        ready: called with the address when the server is up.
        allowed_hosts: names that visitors reach the page by, beside `host` and those of this machine.
        behind_proxy: believe the X-Forwarded headers of the one web server in front of this one.

    Raises:
        UserError: the address cannot be taken.
    """
    if not host:  # for a socket, all addresses of the machine
        raise UserError("host must be an address or a name, got ''")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]  # Python adds what it was doing
        raise UserError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from error
    shown = f"[{host}]" if ":" in host else host
    # Failures are printed where they happen; the server's own log would add the pages that are open at the end.
    access = Access(LOCAL | {name.lower() for name in (host, *allowed_hosts)}, behind_proxy)
    config = uvicorn.Config(
        application(studio, access),
        http="h11",  # bounds the headers of a request
        ws="none",
        proxy_headers=False,
        server_header=False,
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    with listener:
        ready(f"http://{shown}:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])
