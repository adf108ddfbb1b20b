"""A server on a free port of this machine, over the engine without a model."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher
from tests.toy import ToyEngine

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from radlads.serve.http import Settings, create_app  # noqa: E402
from radlads.serve.worker import Worker  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_teacher(tmp_path_factory.mktemp("served") / "teacher"))


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., tuple[str, Worker]]]:
    """Start a server; returns its address and its worker."""
    running = []

    def begin(
        engine: Any = None, *, slots: int = 8, waiting: int = 64, memory: float = math.inf, **settings: Any
    ) -> tuple[str, Worker]:
        worker = Worker(engine or ToyEngine(), tokenizer, slots=slots, waiting=waiting, prefixes=10_000_000, memory=memory)
        app = create_app(worker, Settings(name="toy", **{"max_tokens": 64, **settings}))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", worker

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def model_path(tokenizer: Tokenizer) -> Path:
    return tokenizer.path
