"""The socket of a server, and its life between start and Ctrl-C or SIGTERM."""

import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from radlads.errors import fail
from radlads.serve.worker import Worker

GRACE_SECONDS = 5  # for clients that do not take what was written before the server was told to stop
KEEP_ALIVE_SECONDS = 75  # longer than the 60 of usual proxies, so that none sends a request while its connection is being closed


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. R101 when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)  # a name that is not found
        fix = "Give another `--host` or `--port` (0 takes a free one)"
        raise fail("R101", where=f"{host} port {port}", why=why.lower(), fix=fix) from None


class Stoppable(uvicorn.Server):
    """Told to stop, it ends the answers that are being written, and `run` returns; uvicorn's own would raise the signal again."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal waits for nobody."""
        self.worker.stop()
        self.force_exit = self.should_exit
        self.should_exit = True


def run(app: FastAPI, worker: Worker, listener: socket.socket) -> None:
    """Serve until a signal comes."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    Stoppable(config, worker).run(sockets=[listener])
