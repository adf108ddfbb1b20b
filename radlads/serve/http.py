"""HTTP for the worker: OpenAI's chat, completions and models, health, a chat page. Nothing is read before it is checked."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from radlads.errors import RadladsError
from radlads.files import parse_json
from radlads.sampling import Sampling
from radlads.serve.schema import ChatRequest, CompletionRequest, first_problem
from radlads.serve.schema import Request as Wanted
from radlads.serve.worker import Event, Full, Job, Worker

Asked = TypeVar("Asked", bound=Wanted)

BODY_LIMIT = 8 << 20
HEALTH_SECONDS = 10.0
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """What a server allows; `hosts` and `origins` beyond this machine, `key` None for none."""

    name: str
    max_tokens: int = 4096
    max_prompt_tokens: int = 131_072
    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))


class Refusal(Exception):
    """An answer with a status of 400 or above, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.kind = status, message, param, kind

    def response(self) -> JSONResponse:
        """The error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return JSONResponse({"error": error}, self.status, {"Retry-After": "1"} if self.status in (429, 503) else None)


def create_app(worker: Worker, settings: Settings) -> FastAPI:
    """The application; the worker starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    server = Server(worker, settings)
    page = files("radlads.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.middleware("http")
    async def door(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """The one place where every request is let in or not."""
        try:
            check_door(request, settings)
        except Refusal as refusal:
            return refusal.response()
        return await go_on(request)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, "there is no such address, or not with this method").response()

    @app.get("/")
    async def chat_page() -> Response:
        plain = "false" if worker.tokenizer.has_chat_template else "true"
        shown = page.replace("{{name}}", escape(settings.name)).replace("{{plain}}", plain)
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(shown, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        return await server.health()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise Refusal(404, "there is no such model", param="model")
        return server.model()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = await read(request, ChatRequest)
        try:
            text = worker.tokenizer.prompt([message.plain() for message in wanted.messages])
        except RadladsError as error:
            raise Refusal(400, error.why, param="messages") from None
        return await server.answer(request, wanted, text, ChatForm(settings.name))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        wanted = await read(request, CompletionRequest)
        return await server.answer(request, wanted, wanted.prompt, TextForm(settings.name))

    return app


def check_door(request: Request, settings: Settings) -> None:
    """Host, origin, key, content type and length, before a byte of the body is read. Raises Refusal."""
    given = request.headers.get("host", "")
    host = given if given.endswith("]") else given.rpartition(":")[0] or given  # without the port
    if host.lower() not in (*LOCAL_HOSTS, *settings.hosts):
        raise Refusal(403, "this host name is not served; the server's --host allows it")
    origin = request.headers.get("origin")
    own = {f"http://{given}", f"https://{given}"}
    if origin is not None and origin not in (*own, *settings.origins):
        raise Refusal(403, "this origin is not allowed; the server's --allowed-origin allows it")
    key = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if settings.key is not None and request.url.path != "/" and not hmac.compare_digest(key, settings.key.encode()):
        raise Refusal(401, "the API key is missing or wrong", kind="authentication_error")
    if request.method == "POST":
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the content type must be application/json")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refusal(400, "the content length is no number")
        if int(length) > BODY_LIMIT:
            raise Refusal(413, f"the body is larger than {BODY_LIMIT >> 20} MB")


async def read(request: Request, form: type[Asked]) -> Asked:
    """The body of a request, checked. Raises Refusal."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            raise Refusal(413, f"the body is larger than {BODY_LIMIT >> 20} MB")
    try:
        return form.model_validate(parse_json(bytes(body)))
    except ValidationError as error:
        message, param = first_problem(error)
        raise Refusal(400, message, param=param or None) from None
    except (ValueError, RecursionError, RadladsError):
        raise Refusal(400, "the body is no JSON object that can be read") from None


class Server:
    """Requests on one side, the worker on the other."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings

    def model(self) -> dict[str, Any]:
        """The one model served."""
        return {"id": self.settings.name, "object": "model", "created": self.settings.started, "owned_by": "radlads"}

    async def health(self) -> Response:
        """A real decode of one token within HEALTH_SECONDS, and the counters."""
        worker = self.worker
        began, error = time.perf_counter(), None
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                if worker.waiting or len(worker.active) >= worker.places:
                    # A token of its own would wait for all of those: one of theirs shows as well that the engine works.
                    while worker.fed_at < began:
                        await asyncio.sleep(0.01)
                else:
                    token = worker.tokenizer.eos_id if worker.tokenizer.eos_id is not None else 0
                    _, events = self.submit([token], Sampling(), 1, ())
                    error = (await anext(event async for event in events if event.finish or event.error)).error
        except (TimeoutError, Refusal) as late:
            error = str(late) or f"no token within {HEALTH_SECONDS:g} s"
        prefixes = worker.prefixes
        about = {
            "status": "ok" if error is None else "failing",
            "error": error,
            "decode_seconds": round(time.perf_counter() - began, 4),
            "active": len(worker.active),
            "waiting": worker.waiting,
            "served": worker.served,
            "failed": worker.failed,
            "restarts": worker.restarts,
            "written_tokens": worker.written_tokens,
            "prefix_hits": prefixes.hits,
            "prefix_misses": prefixes.misses,
            "prefix_tokens_reused": prefixes.reused_tokens,
            "prefix_bytes": prefixes.held_bytes,
        }
        return JSONResponse(about, 200 if error is None else 503)

    def submit(
        self, ids: list[int], sampling: Sampling, max_tokens: int, stop: tuple[str, ...]
    ) -> tuple[Job, AsyncIterator[Event]]:
        """A job in the queue, and its events until the last one. Raises Refusal when the queue is full."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def publish(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ids, sampling, max_tokens, stop, publish)
        try:
            self.worker.submit(job)
        except Full:
            raise Refusal(429, "the server is busy; try again", kind="rate_limit_error") from None

        async def heard() -> AsyncIterator[Event]:
            try:
                while True:
                    event = await events.get()
                    yield event
                    if event.finish is not None or event.error is not None:
                        return
            finally:
                # However this ends, a client that left among the ways, the place in the batch is free.
                job.cancel()

        return job, heard()

    async def answer(self, request: Request, wanted: Wanted, prompt: str, form: "Form") -> Response:
        """Stream or collect the answer to a prompt. Raises Refusal for what the limits forbid."""
        settings = self.settings
        if wanted.model not in (settings.name, "default"):
            raise Refusal(404, "there is no such model; /v1/models lists the one that is served", param="model")
        try:
            templated = isinstance(form, ChatForm) and self.worker.tokenizer.has_chat_template  # it writes its own first token
            ids = self.worker.tokenizer.encode(prompt, add_special=not templated)
        except RadladsError as error:
            raise Refusal(400, error.why) from None
        if not ids:
            raise Refusal(400, "the prompt is empty", param="prompt")
        if len(ids) > settings.max_prompt_tokens:
            why = f"the prompt has {len(ids):,} tokens, and {settings.max_prompt_tokens:,} are allowed"
            raise Refusal(400, why, param=form.param)
        most = min(wanted.max_tokens or settings.max_tokens, settings.max_tokens)
        if self.worker.engine.spec.state_bytes(len(ids) + most) > self.worker.memory:
            why = f"the state after {len(ids):,} tokens of prompt and {most:,} of answer is larger than the server allows"
            raise Refusal(400, why, param="max_tokens")
        job, events = self.submit(ids, wanted.sampling(secrets.randbits(31)), most, wanted.stops())
        if wanted.stream:
            counted = wanted.stream_options is not None and wanted.stream_options.include_usage
            return StreamingResponse(stream(form, job, events, counted), media_type="text/event-stream")
        text, finish = "", None
        watch = asyncio.create_task(gone(request))
        try:
            async for event in events:
                if event.error is not None:
                    raise Refusal(500, event.error, kind="server_error")
                text, finish = text + event.text, event.finish
                if watch.done():
                    break
        finally:
            watch.cancel()
            job.cancel()
        return JSONResponse(form.whole(text, finish) | {"usage": usage(job)})


async def gone(request: Request) -> None:
    """Returns when the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def stream(form: "Form", job: Job, events: AsyncIterator[Event], counted: bool) -> AsyncIterator[str]:
    """An answer as server-sent events."""

    def line(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"

    for opening in form.opening():
        yield line(opening)
    async for event in events:
        if event.error is not None:
            yield line({"error": {"message": event.error, "type": "server_error", "param": None, "code": None}})
            break
        yield line(form.chunk(event.text, event.finish))
    if counted:
        yield line(form.frame("chunk") | {"choices": [], "usage": usage(job)})
    yield "data: [DONE]\n\n"


def usage(job: Job) -> dict[str, Any]:
    """Tokens read and written, and how many of those read were known already."""
    read, written = len(job.prompt_ids), job.written_tokens
    details = {"cached_tokens": job.cached_tokens}
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": details,
    }


class Form:
    """The shape of an answer."""

    prefix = kind = param = ""

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time()), model

    def frame(self, part: str = "") -> dict[str, Any]:
        """What every object of an answer carries."""
        return {"id": self.id, "object": self.kind + (f".{part}" if part else ""), "created": self.created, "model": self.model}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        """One piece of a stream."""
        raise NotImplementedError

    def whole(self, text: str, finish: str | None) -> dict[str, Any]:
        """An answer in one piece."""
        raise NotImplementedError


class ChatForm(Form):
    """chat.completion and its chunks."""

    prefix, kind, param = "chatcmpl", "chat.completion", "messages"

    def opening(self) -> list[dict[str, Any]]:
        """The role, as the official client expects it first."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self.frame("chunk") | {"choices": [choice]}]

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        """A delta of the message."""
        choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
        return self.frame("chunk") | {"choices": [choice]}

    def whole(self, text: str, finish: str | None) -> dict[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": text}
        return self.frame() | {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


class TextForm(Form):
    """text_completion; its chunks have the same shape."""

    prefix, kind, param = "cmpl", "text_completion", "prompt"

    def frame(self, part: str = "") -> dict[str, Any]:
        """The same object whole and in pieces."""
        return super().frame()

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        """A piece of the text."""
        return self.whole(text, finish)

    def whole(self, text: str, finish: str | None) -> dict[str, Any]:
        """The whole text."""
        return self.frame() | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}


def escape(text: str) -> str:
    """Text for HTML."""
    from html import escape as escaped

    return escaped(text)
