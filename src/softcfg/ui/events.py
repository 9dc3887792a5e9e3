"""The values of an event of the page, read strictly: text, numbers, booleans, null, and flat lists of those.

Gradio takes an object inside `data` for a file and opens the path or address that it names, so objects are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

JOIN = "/gradio_api/queue/join"
PREDICT = "/gradio_api/run/predict"
CANCEL = "/gradio_api/cancel"
RESET = "/gradio_api/reset"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Refused(Exception):  # noqa: N818 - no error of the server
    """A request that is not let through: `status` is the HTTP status code, the message one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def checked(route: str, body: bytes, inputs: Mapping[int, int]) -> dict[str, Any]:
    """The values of an event that Gradio needs; others are left out.

    Args:
        inputs: the events that the route takes, and how many values each has.

    Raises:
        Refused: a value is missing or not of its kind.
    """
    values = _json(body)
    if route == RESET:
        return {"event_id": _name(values, "event_id")}
    session = session_of([values.get("session_hash")])
    if route == CANCEL:
        number = _whole(values, "fn_index")
        return {"session_hash": session, "fn_index": number, "event_id": _name(values, "event_id")}
    event = _whole(values, "fn_index")
    if event not in inputs:
        raise Refused(422, "There is no such event.")
    data = values.get("data")
    if not isinstance(data, list) or len(data) != inputs[event]:
        raise Refused(422, f"The event has {inputs[event]} values.")
    if not all(_plain(value) or (isinstance(value, list) and all(map(_plain, value))) for value in data):
        raise Refused(422, "A value is text, a number, true, false or null, or a list of those.")
    about = values.get("event_data")
    if not _plain(about) and not (isinstance(about, dict) and all(map(_plain, about.values()))):
        raise Refused(422, "Event data are text, numbers, true, false and null.")
    trigger = None if values.get("trigger_id") is None else _whole(values, "trigger_id")
    return {"session_hash": session, "fn_index": event, "data": data, "event_data": about, "trigger_id": trigger}


def session_of(names: Any) -> str:
    """The one name of a session in a list; raises `Refused` where there is no such thing."""
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(422, "A session's name has 1 to 64 letters, digits, hyphens and underscores.")
    return name


def _json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Refused(422, "An event is one JSON object.")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _plain(value: Any) -> bool:
    if isinstance(value, (int, float)):
        # What JavaScript can hold exactly.
        return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53
    return value is None or isinstance(value, str)


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 2**53:
        raise Refused(422, f"The {name} is a whole number.")
    return value


def _name(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise Refused(422, f"The {name} has 1 to 64 letters, digits, hyphens and underscores.")
    return value
