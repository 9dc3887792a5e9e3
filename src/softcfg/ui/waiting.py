"""How much of Gradio's queue each visitor holds.

Gradio bounds the queue as a whole; these bounds are per visitor, so that nobody can fill it alone. This is the only
module that looks into Gradio's own structures.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import gradio as gr

from softcfg.ui.events import JOIN, PREDICT
from softcfg.ui.studio import Limits


class Waiting:
    """What the queue of the page holds for each visitor and session.

    Attributes:
        places: in the queue, for one visitor.
    """

    def __init__(self, blocks: gr.Blocks, limits: Limits) -> None:
        self.places = limits.places
        self._blocks = blocks
        self._kept = limits.sessions
        self._sessions: dict[str, OrderedDict[str, None]] = {}

    def inputs(self, route: str) -> dict[int, int]:
        """The events that a route takes, and how many values each has."""
        queued = {JOIN: True, PREDICT: False}.get(route)
        return {
            number: len(event.inputs)
            for number, event in self._blocks.fns.items()
            if event.fn is not None and event.queue is queued
        }

    def of(self, visitor: str) -> int:
        """Requests of a visitor that wait."""
        queues = self._blocks._queue.event_queue_per_concurrency_id.values()
        clients = (event.request.client for queue in queues for event in queue.queue)
        return sum(client is not None and client.host == visitor for client in clients)

    def unread(self, session: str) -> int:
        """Messages that a session has not fetched."""
        messages = self._blocks._queue.pending_messages_per_session.get(session)
        return 0 if messages is None else messages.qsize()

    def note(self, visitor: str, session: str) -> None:
        """Note that a visitor uses a session; of too many, Gradio forgets the least recently used."""
        sessions = self._sessions.setdefault(visitor, OrderedDict())
        sessions[session] = None
        sessions.move_to_end(session)
        while len(sessions) > self._kept:
            oldest, _ = sessions.popitem(last=False)
            queue, states = self._blocks._queue, self._blocks.state_holder
            queue.pending_messages_per_session.pop(oldest, None)
            queue.pending_event_ids_session.pop(oldest, None)
            states.session_data.pop(oldest, None)
            states.time_last_used.pop(oldest, None)

    def keep_no_records(self) -> None:
        """Turn off Gradio's records of events, which it sums up after each one and the page never uses."""
        self._blocks._queue.event_analytics = _Nothing()


class _Nothing(dict[str, dict[str, Any]]):
    """Takes what is written into it, and keeps nothing."""

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        pass

    def __missing__(self, key: str) -> dict[str, Any]:
        return {}
