"""The web page on a port of its own."""

from __future__ import annotations

import threading

import uvicorn

from softcfg.ui import page as pages
from softcfg.ui.studio import Studio

WAIT = 60_000  # milliseconds, for a machine that has much else to do


class Server:
    """The page on a port of its own, in this process."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.listener = pages.socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.server = uvicorn.Server(
            uvicorn.Config(pages.application(studio), log_level="critical", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()
