"""What the page does, apart from its layout: drawings that can be watched and stopped, sessions, and what guidance did
to each token."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from softcfg.decoding import Sampling
from softcfg.decoding.perturbed import step_weights
from softcfg.errors import UserError
from softcfg.guidance import CFG, SCHEDULES
from softcfg.inspection import trace
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.geometry import Geometry
from softcfg.nn.memory import is_out_of_memory
from softcfg.pipeline import Pipeline
from softcfg.ui.settings import METHODS, RANGES, Settings, check_methods, check_number
from softcfg.version import __version__

CANDIDATES = 8  # codes kept per token
PIECE = 256  # tokens whose distributions are in memory at once
RATIOS = ("1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
FRAME_SECONDS = 0.12  # least time between two looks at a drawing


@dataclass(frozen=True)
class Limits:
    """What one visitor, and all together, may take of the host.

    Attributes:
        seconds: of computation per drawing.
        wait: seconds that a drawing waits for its model.
        prompt: characters.
        pictures: of one drawing, and kept per session; the oldest go first.
        sessions: kept in memory; the least recently used of the visitor with most of them go first.
        queue: requests that may wait at a time; further ones are refused.
        places: in the queue, for one visitor.
    """

    seconds: float = 120.0
    wait: float = 60.0
    prompt: int = 400
    pictures: int = 24
    sessions: int = 64
    queue: int = 16
    places: int = 4


@dataclass
class Inspection:
    """What a trace says about the tokens of one picture, without its logits [T, V].

    Attributes:
        confidence, scale: float32 [T].
        codes: int64 [T, k], the likeliest codes under any of the three distributions, the likeliest first.
        probabilities: float32 [T, 3, k], conditional, unconditional and guided.
    """

    guidance: CFG
    confidence: Tensor
    scale: Tensor
    codes: Tensor
    probabilities: Tensor

    def weights_on_earlier(self, step: int) -> np.ndarray:
        """The weights that a step puts on the tokens before it: float32 [T], NaN from `step` on."""
        weights = step_weights(self.confidence[None], self.guidance.weak_branch, torch.tensor([step]))[0, 0].numpy()
        return np.where(np.arange(len(weights)) < step, weights, np.float32("nan"))

    def weights_of(self, token: int) -> np.ndarray:
        """The weights that a token got at the steps after its own: float32 [T - 1 - token]."""
        later = torch.arange(token + 1, len(self.confidence))
        return step_weights(self.confidence[None], self.guidance.weak_branch, later)[0, :, token].numpy()


@dataclass
class Picture:
    """A finished image.

    Attributes:
        number: its number in the session.
        shot: the number of its drawing; the pictures of one drawing differ in method and seed alone.
        settings: of the whole drawing.
        tokens: int64 [T].
        pixels: uint8 [H, W, 3].
    """

    number: int
    shot: int
    settings: Settings
    method: str
    seed: int
    subject: str
    grid: Geometry
    tokens: Tensor
    pixels: np.ndarray
    inspection: Inspection | None = None

    @property
    def caption(self) -> str:
        """What it shows and how it was drawn, in one line."""
        parts = [self.subject, METHODS[self.method].title]
        if self.method != "none":
            parts.append(f"scale {self.settings.scale:g}")
        return ", ".join([*parts, f"seed {self.seed}"])

    @property
    def file_name(self) -> str:
        """Without extension; letters, digits and hyphens alone."""
        words = f"{self.settings.model}-{self.subject[:40]}-{self.method}-{self.seed}-{self.number}"
        return "-".join(filter(None, "".join(c if c.isascii() and c.isalnum() else " " for c in words).split()))

    def description(self) -> dict[str, Any]:
        """The settings for a file beside the image; `link` brings the whole drawing back."""
        values = {**self.settings.describe(), "method": self.method, "seed": self.seed}
        del values["methods"], values["seeds"]
        return {"softcfg": __version__, **values, "link": f"?{self.settings.query()}"}

    def json(self) -> str:
        """The description as text."""
        return json.dumps(self.description(), indent=2) + "\n"

    def png(self) -> bytes:
        """The image as a PNG file that holds its description under "softcfg"."""
        info = PngInfo()
        info.add_text("softcfg", json.dumps(self.description()))
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, format="PNG", pnginfo=info)
        return buffer.getvalue()


@dataclass
class Panel:
    """One method's image while it is drawn: `done` tokens of the grid, and their pixels uint8 [H, W, 4], clear where
    no token was drawn yet."""

    method: str
    seed: int
    grid: Geometry
    done: int = 0
    pixels: np.ndarray | None = None
    picture: Picture | None = None


@dataclass
class Session:
    """What the server keeps of one page of a visitor.

    Attributes:
        visitor: whose it is; the address.
        pictures: by their number, the oldest first.
        panels: the drawing that is on the page, of the settings `shown`.
        chosen: picture number and token that are looked into.
        note: how the last drawing ended.
    """

    visitor: str = ""
    pictures: OrderedDict[int, Picture] = field(default_factory=OrderedDict)
    drawing: Drawing | None = None
    panels: list[Panel] = field(default_factory=list)
    shown: Settings | None = None
    chosen: tuple[int, int] | None = None
    note: str = ""
    drawn: int = 0
    shots: int = 0

    def picture(self, number: int) -> Picture:
        """The kept picture of that number; raises `UserError` if it was dropped."""
        if number not in self.pictures:
            raise UserError("That picture is no longer kept; draw it again with its settings link.")
        return self.pictures[number]

    def show_again(self, number: int) -> Settings:
        """Put the drawing of a kept picture back on the page and return its settings.

        Raises:
            UserError: the picture is gone, or a drawing is under way.
        """
        picture = self.picture(number)
        if self.drawing is not None and self.drawing.active:
            raise UserError("A drawing is under way; stop it first or wait for it.")
        shot = [other for other in self.pictures.values() if other.shot == picture.shot]
        self.panels = [
            Panel(other.method, other.seed, other.grid, other.grid.num_tokens, picture=other) for other in shot
        ]
        self.shown, self.chosen, self.note = picture.settings, None, ""
        return picture.settings

    def choose(self, picture: Picture, token: int) -> None:
        """Look into a token; raises `UserError` where the picture has no such token."""
        if not 0 <= token < len(picture.tokens):
            raise UserError(f"The picture has tokens 0 to {len(picture.tokens) - 1}, not {token}.")
        self.chosen = (picture.number, token)

    def archive(self) -> bytes:
        """All pictures with their settings as a ZIP file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for picture in self.pictures.values():
                file.writestr(f"{picture.file_name}.png", picture.png())
                file.writestr(f"{picture.file_name}.json", picture.json())
        return buffer.getvalue()


class Model:
    """A pipeline that computes for one visitor at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.pipeline.conditioning.keep_files = False
        self.lock = threading.Lock()

    @property
    def takes_prompts(self) -> bool:
        """Whether the subject is a prompt rather than a class."""
        return self.pipeline.conditioning.takes_prompts

    @property
    def subjects(self) -> list[str]:
        """The names of the classes."""
        titles = map(self.pipeline.conditioning.title, range(self.pipeline.generator.num_classes))
        return [title if self.pipeline.classes else title.capitalize() for title in titles]

    @property
    def examples(self) -> list[tuple[int | str, int]]:
        """Subjects and seeds on which methods differ."""
        entry = self.pipeline.entry
        known = {} if self.takes_prompts else {name: label for label, name in enumerate(self.subjects)}
        return [(known.get(subject, subject), seed) for subject, seed in (entry.examples if entry else {}).items()]

    @property
    def negative_prompt(self) -> str | None:
        """What the unconditional branch reads by default; None where it reads no text."""
        conditioning = self.pipeline.conditioning
        if not isinstance(conditioning, PromptConditioning) or "negative_text" not in conditioning.options:
            return None
        return str(conditioning.settings.get("negative_text") or "")

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, in pixels, that are not asked for; None where there are no others."""
        conditioning = self.pipeline.conditioning
        any_size = isinstance(conditioning, PromptConditioning) and conditioning.any_size
        return conditioning.image_size() if any_size else None

    @property
    def ratios(self) -> dict[str, tuple[int, int]]:
        """Width and height, in pixels, of images of usual ratios, where the model chooses the area."""
        found: dict[str, tuple[int, int]] = {}
        conditioning = self.pipeline.conditioning
        if isinstance(conditioning, PromptConditioning):
            for ratio in RATIOS:
                with contextlib.suppress(UserError):
                    found[ratio] = conditioning.size_of_ratio(ratio)
        return found

    def name_of(self, subject: int | str) -> str:
        """The class's name, or the prompt itself."""
        return subject if isinstance(subject, str) else self.subjects[subject]

    def requests(self, settings: Settings) -> list[Any]:
        """What is drawn, as the pipeline takes it.

        Raises:
            UserError: the model draws no images of this size, or takes no negative prompt.
        """
        # Without a negative prompt of one's own the model does as it is used to.
        negative = None if settings.negative_prompt == self.negative_prompt else settings.negative_prompt
        return self.pipeline.conditioning.requests(
            [settings.subject], width=settings.width, height=settings.height, negative_prompt=negative
        )

    def inputs(self, settings: Settings) -> list[Any]:
        """What is drawn, as the generator takes it."""
        return self.pipeline.conditioning.inputs(self.requests(settings))

    def defaults(self, name: str) -> Settings:
        """The settings that suit the model."""
        suited = self.pipeline.sampling_defaults
        width, height = self.size or (None, None)
        return Settings(
            name,
            "" if self.takes_prompts else 0,
            self.negative_prompt,
            width,
            height,
            schedule=suited.get("schedule", CFG.schedule),
            top_k=int(suited.get("top_k", Sampling.top_k)),
            scale=float(suited.get("guidance_scale", CFG.guidance_scale)),
            power=float(suited.get("guidance_scale_pow", CFG.guidance_scale_pow)),
            temperature=float(suited.get("temperature", Sampling.temperature)),
        )


class Canvas:
    """Where the images of one drawing are drawn."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.pipeline = model.pipeline
        self.condition = self.pipeline.generator.condition(model.inputs(settings), guided=False)
        self.grid = self.condition.geometry

    def sketch(self, tokens: Tensor) -> np.ndarray:
        """The image of the first n tokens [n], n >= 1, as uint8 [H, W, 4], clear where tokens are missing."""
        grid, tokenizer = self.grid, self.pipeline.tokenizer
        # What is missing takes the newest code: the decoder looks beyond the edge of what is drawn.
        newest = max((token for token in range(len(tokens)) if grid.place(token)), default=0)
        filled = torch.cat((tokens, tokens[newest : newest + 1].expand(grid.num_tokens - len(tokens))))
        codes = self.pipeline.generator.image_codes(filled[None], self.condition)
        pixels = tokenizer.to_uint8(tokenizer.decode(codes, self.condition.grid))[0].cpu().numpy()
        height, width = pixels.shape[:2]
        drawn = grid.on_grid(np.arange(grid.num_tokens) < len(tokens))
        mask = drawn[np.arange(height) * grid.rows // height][:, np.arange(width) * grid.columns // width]
        return np.dstack((pixels, np.uint8(255) * mask.astype(np.uint8)))


class Stopped(Exception):  # noqa: N818 - no error
    """The visitor stopped the drawing, or left."""


class Drawing:
    """One drawing, computed in a thread of its own and looked at from others; `stop` ends it at the next token."""

    def __init__(self, model: Model, settings: Settings, limits: Limits) -> None:
        self.settings = settings
        self.stopped = False
        self.seconds = 0.0
        self.waiting = True
        self.outputs: dict[tuple[str, int], tuple[Tensor, np.ndarray]] = {}
        self._model = model
        self._limits = limits
        self._so_far: dict[tuple[str, int], Tensor] = {}
        self._error: UserError | None = None
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="softcfg-drawing")

    @property
    def active(self) -> bool:
        """Whether it is still waiting or computing."""
        return not self._finished.is_set()

    def start(self) -> None:
        """Begin to wait for the model, then to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End the computation at the next token; what was finished stays."""
        self._stop.set()

    def wait(self, timeout: float) -> bool:
        """Wait for the end, at most `timeout` seconds; returns whether it has come."""
        return self._finished.wait(timeout)

    def check(self) -> None:
        """Raise the `UserError` that the drawing ended with, if it did."""
        if self._error is not None:
            raise self._error

    def tokens(self, method: str, seed: int) -> Tensor | None:
        """The tokens of a picture so far, int64 [n] with n >= 1."""
        return self._so_far.get((method, seed))

    def _run(self) -> None:
        try:
            self._take_turn()
            try:
                self.waiting = False
                start = time.monotonic()
                # One seed after the other, so that the methods can be compared early.
                with self._model.pipeline.in_use():
                    for method, seed in sorted(self.settings.pictures, key=lambda picture: picture[1]):
                        self._draw(method, seed, start)
            finally:
                self._model.lock.release()
        except Stopped:
            self.stopped = True
        except UserError as error:
            self._error = error
        except Exception as error:
            traceback.print_exc()
            self._error = UserError(
                "The server has no memory for this drawing at the moment; try again later."
                if is_out_of_memory(error)
                else "The drawing failed on the server; its log says why."
            )
        finally:
            self._finished.set()

    def _take_turn(self) -> None:
        deadline = time.monotonic() + self._limits.wait
        while not self._model.lock.acquire(timeout=0.1):
            if self._stop.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise UserError(
                    f"The model was busy with other visitors for {self._limits.wait:g} seconds; try again later."
                )

    def _draw(self, method: str, seed: int, start: float) -> None:
        settings, pipeline = self.settings, self._model.pipeline

        def look(tokens: Tensor) -> None:
            self.seconds = time.monotonic() - start
            self._so_far[method, seed] = tokens[0]
            if self._stop.is_set():
                raise Stopped
            if self.seconds > self._limits.seconds:
                raise UserError(
                    f"A drawing may take {self._limits.seconds:g} seconds on this host, and this one was not done by "
                    "then; choose fewer methods or seeds."
                )

        output = pipeline(
            self._model.requests(settings),
            guidance=settings.guidance(method, pipeline),
            seed=seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            on_tokens=look,
        )
        self.seconds = time.monotonic() - start
        self.outputs[method, seed] = (output.tokens[0], output.pixels[0])


class Studio:
    """The models and the visitors' sessions of one server."""

    def __init__(self, pipelines: Mapping[str, Pipeline], limits: Limits | None = None) -> None:
        self.models = {name: Model(pipeline) for name, pipeline in pipelines.items()}
        self.limits = limits or Limits()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def session(self, key: str, visitor: str = "") -> Session:
        """The session of that key, begun for `visitor` where there is none."""
        with self._lock:
            session = self._sessions.setdefault(key, Session(visitor))
            self._sessions.move_to_end(key)
            while len(self._sessions) > self.limits.sessions:
                # The visitor with most sessions loses one, so that nobody can push out the others.
                ((most, _),) = Counter(kept.visitor for kept in self._sessions.values()).most_common(1)
                oldest = next(name for name, kept in self._sessions.items() if kept.visitor == most)
                _end(self._sessions.pop(oldest))
            return session

    @property
    def active(self) -> int:
        """Drawings under way."""
        with self._lock:
            drawings = [session.drawing for session in self._sessions.values()]
        return sum(drawing is not None and drawing.active for drawing in drawings)

    def model(self, name: Any) -> Model:
        """The model of that name; raises `UserError` if there is none."""
        if not isinstance(name, str) or name not in self.models:
            raise UserError(f"There is no model {name!r} here; there are {', '.join(self.models)}.")
        return self.models[name]

    def settings(self, **values: Any) -> Settings:
        """Settings from what a form or a link says, checked; what is missing is as the model has it.

        Raises:
            UserError: a value is of the wrong kind or out of its range.
        """
        unknown = set(values) - set(Settings.__dataclass_fields__)
        if unknown:
            raise UserError(f"There is no setting {sorted(unknown)[0]!r}.")
        name = values.get("model", next(iter(self.models)))
        model = self.model(name)
        checked: dict[str, Any] = {"model": name}
        if "subject" in values or model.takes_prompts:
            checked["subject"] = self._subject(model, values.get("subject", ""))
        negative = values.get("negative_prompt")
        if negative or (negative is not None and model.negative_prompt is not None):  # empty ones are a model's, too
            checked["negative_prompt"] = self._text(negative, "negative prompt", model.negative_prompt)
        if "schedule" in values:
            if values["schedule"] not in list(SCHEDULES):
                raise UserError(f"There is no schedule {values['schedule']!r} here; choose from the list.")
            checked["schedule"] = values["schedule"]
        if "methods" in values:
            checked["methods"] = check_methods(values["methods"])
        if "step_norm" in values:
            if not isinstance(values["step_norm"], bool):
                raise UserError(f"Step Normalisation is either on or off, not {values['step_norm']!r}.")
            checked["step_norm"] = values["step_norm"]
        optional = ("width", "height")
        given = {
            key: values[key] for key in RANGES if key in values and (values[key] is not None or key not in optional)
        }
        checked.update((key, check_number(key, value)) for key, value in given.items())
        settings = replace(model.defaults(name), **checked)
        model.requests(settings)
        if (count := len(settings.pictures)) > self.limits.pictures:
            raise UserError(
                f"A drawing has at most {self.limits.pictures} pictures here, and these would be {count}; choose fewer "
                "methods or seeds."
            )
        return settings

    def example(self, name: Any, number: int) -> Settings:
        """The settings that draw an example of a model: its own, without and with guidance.

        Raises:
            UserError: there is no such example.
        """
        model = self.model(name)
        if not 0 <= number < len(model.examples):
            raise UserError("That example is gone; load the page again.")
        subject, seed = model.examples[number]
        return replace(model.defaults(name), subject=subject, seed=seed, methods=("none", "cfg", "softcfg"))

    def settings_from_query(self, query: Mapping[str, str]) -> Settings:
        """The settings of a link made by `Settings.query`; keys that are no settings are left alone.

        Raises:
            UserError: a value is of the wrong kind or out of its range.
        """
        values: dict[str, Any] = {key: query[key] for key in Settings.__dataclass_fields__ if key in query}
        if "methods" in values:
            values["methods"] = values["methods"].split(",")
        if "step_norm" in values:
            values["step_norm"] = {"0": False, "1": True}.get(values["step_norm"], values["step_norm"])
        return self.settings(**values)

    def draw(self, key: str, settings: Settings) -> Iterator[tuple[Drawing, list[Panel]]]:
        """Draw, and yield the session's panels every now and then, at last with the finished pictures.

        When the iteration is given up the computation ends at the next token.

        Raises:
            UserError: the session draws already, the model is busy, or the drawing took too long.
        """
        model, session = self.model(settings.model), self.session(key)
        canvas = Canvas(model, settings)
        drawing = Drawing(model, settings, self.limits)
        with self._lock:
            if session.drawing is not None and session.drawing.active:
                raise UserError("This page is drawing already; stop that first or wait for it.")
            session.drawing, session.shown, session.chosen = drawing, settings, None
            session.panels = panels = [Panel(*picture, canvas.grid) for picture in settings.pictures]
            session.shots += 1
            shot = session.shots
        try:
            drawing.start()
            yield drawing, panels
            pause = FRAME_SECONDS
            while not drawing.wait(pause):
                start = time.monotonic()
                self._look(canvas, drawing, panels)
                # Looking must not cost more than drawing.
                pause = max(FRAME_SECONDS, 2 * (time.monotonic() - start))
                yield drawing, panels
            self._look(canvas, drawing, panels)
            for panel in panels:
                if output := drawing.outputs.get((panel.method, panel.seed)):
                    session.drawn += 1
                    subject = model.name_of(settings.subject)
                    panel.picture = Picture(
                        session.drawn, shot, settings, panel.method, panel.seed, subject, canvas.grid, *output
                    )
                    session.pictures[session.drawn] = panel.picture
            while len(session.pictures) > self.limits.pictures:
                session.pictures.popitem(last=False)
            yield drawing, panels
            drawing.check()
        finally:
            drawing.stop()

    def stop(self, key: str) -> None:
        """Stop the session's drawing, if there is one."""
        with self._lock:
            session = self._sessions.get(key)
        if session is not None:
            _end(session)

    def inspect(self, picture: Picture) -> Inspection:
        """What guidance did to each token of a picture; computed at the first call.

        Raises:
            UserError: the model is busy.
        """
        if picture.inspection is not None:
            return picture.inspection
        model, settings = self.model(picture.settings.model), picture.settings
        if not model.lock.acquire(timeout=self.limits.wait):
            raise UserError("The model is busy with other visitors; try again later.")
        try:
            traced = trace(
                model.pipeline.generator,
                labels=model.inputs(settings),
                guidance=settings.guidance(picture.method, model.pipeline),
                tokens=picture.tokens[None],
                temperature=settings.temperature,
                value_weights=False,
            )
        finally:
            model.lock.release()
        branches = (traced.cond_logits[0], traced.uncond_logits[0], traced.guided_logits[0])
        codes, probabilities = [], []
        for pieces in zip(*(logits.split(PIECE) for logits in branches), strict=True):
            piece = torch.stack([(logits / settings.temperature).softmax(-1) for logits in pieces], dim=1)  # [n, 3, V]
            likeliest = piece.amax(dim=1).topk(min(CANDIDATES, piece.shape[-1])).indices
            codes.append(likeliest.cpu())
            probabilities.append(piece.gather(2, likeliest[:, None].expand(-1, 3, -1)).cpu())
        picture.inspection = Inspection(
            guidance=traced.guidance,
            confidence=traced.confidence[0].cpu(),
            scale=traced.guidance_scale.cpu(),
            codes=torch.cat(codes),
            probabilities=torch.cat(probabilities),
        )
        return picture.inspection

    def _subject(self, model: Model, subject: Any) -> int | str:
        if model.takes_prompts:
            if not isinstance(subject, str) or not subject.strip():
                raise UserError("Write a prompt first.")
            return self._text(subject, "prompt").strip()
        count = len(model.subjects)
        if isinstance(subject, str) and subject.isdecimal() and len(subject) < 10:
            subject = int(subject)
        if isinstance(subject, bool) or not isinstance(subject, int) or not 0 <= subject < count:
            raise UserError(f"The class must be a number from 0 to {count - 1}, not {subject!r}.")
        return subject

    def _text(self, text: Any, name: str, usual: str | None = None) -> str:
        if not isinstance(text, str):
            raise UserError(f"The {name} must be a text, not {text!r}.")
        if len(text) > self.limits.prompt and text != usual:
            raise UserError(f"The {name} has {len(text)} characters; at most {self.limits.prompt} are taken here.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The {name} holds half a character; write it again.") from error
        return text

    @staticmethod
    def _look(canvas: Canvas, drawing: Drawing, panels: list[Panel]) -> None:
        for panel in panels:
            tokens = drawing.tokens(panel.method, panel.seed)
            if tokens is not None and len(tokens) != panel.done:
                panel.done, panel.pixels = len(tokens), canvas.sketch(tokens)


def _end(session: Session) -> None:
    if session.drawing is not None:
        session.drawing.stop()
