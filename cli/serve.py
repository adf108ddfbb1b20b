"""`radlads serve`: an OpenAI-compatible server for one model, with a chat page."""

import os
from dataclasses import dataclass

from radlads.cli.options import ModelOptions, opt
from radlads.cli.render import note, size
from radlads.errors import fail

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class ServeOptions(ModelOptions):
    """Where to listen, and how much to take on."""

    host: str = opt("127.0.0.1", "Address to listen on; beyond this machine only with an API key.", panel="Server")
    port: int = opt(8080, "Port to listen on.", panel="Server")
    name: str | None = opt(None, "Name for clients; the folder's or run's without it.", panel="Server", metavar="NAME")
    api_key: str | None = opt(None, "Key that clients must send; RADLADS_API_KEY without it.", panel="Server", metavar="KEY")
    allowed_host: list[str] = opt([], "Host name under which clients reach the server.", panel="Server", metavar="NAME")
    allowed_origin: list[str] = opt([], "Web origin whose pages may use the server.", panel="Server", metavar="URL")
    max_tokens: int = opt(4096, "Tokens of one answer at most.", "--max-tokens", "-m", panel="Limits")
    max_prompt_tokens: int = opt(131_072, "Tokens of one prompt at most.", panel="Limits")
    max_batch: int = opt(32, "Sequences served at once.", panel="Limits")
    max_waiting: int = opt(256, "Requests in the queue; beyond it clients are told to try again.", panel="Limits")
    state_memory: float = opt(
        8.0, "GB for the states of the sequences served at once; others wait.", panel="Limits", metavar="GB"
    )
    prefix_memory: float = opt(
        1.0, "GB for states kept so that the next turn of a chat is not read again.", panel="Limits", metavar="GB"
    )


@dataclass
class ServeResult:
    """What was served until the server was stopped."""

    served: int
    failed: int

    def blocks(self) -> list[str]:
        """One line."""
        return [f"served {self.served:,} requests, {self.failed:,} failed"]


def serve(options: ServeOptions) -> ServeResult:
    """Serve a model until Ctrl-C or SIGTERM."""
    check(options)
    try:
        from radlads.serve.http import Settings, create_app
        from radlads.serve.listen import listen, run
        from radlads.serve.worker import Worker
    except ImportError:
        why = "FastAPI or uvicorn is not installed"
        raise fail("R104", where="radlads serve", why=why, fix="Run `pip install 'radlads[serve]'`") from None
    key = options.api_key or os.environ.get("RADLADS_API_KEY") or None
    listener = listen(options.host, options.port)
    folder, tokenizer, engine = options.open()
    memory, each = options.state_memory * 1e9, folder.spec.state_bytes()
    if each > memory:
        why = f"the state of one sequence takes {size(each)}"
        raise fail("R101", where=f"--state-memory {options.state_memory:g}", why=why, fix="Give more GB")
    limits = {"slots": options.max_batch, "waiting": options.max_waiting}
    worker = Worker(engine, tokenizer, **limits, prefixes=options.prefix_memory * 1e9, memory=memory)
    settings = Settings(
        name=options.name or folder.name,
        max_tokens=options.max_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        key=key,
        hosts=tuple(name.lower() for name in (*options.allowed_host, options.host)),
        origins=tuple(options.allowed_origin),
    )
    growth = folder.spec.state_bytes(1) - each
    state = f"state {size(each)} a sequence" + (f" and {size(growth)} a token (softmax layers)" if growth else "")
    at_once = f"{options.max_batch} at once" if growth else f"{min(options.max_batch, int(memory // each))} at once"
    note(f"{settings.name} on {engine.name} ({engine.device}); {state}, {at_once}")
    if not tokenizer.has_chat_template:
        note("note: this model has no chat template; a chat's messages are continued as one text")
    shown = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    note(f"{address}/ is the chat page, {address}/v1 the API; Ctrl-C stops")
    run(create_app(worker, settings), worker, listener)
    return ServeResult(worker.served, worker.failed)


def check(options: ServeOptions) -> None:
    """R101 for what cannot work or would not be safe, before anything is loaded."""
    if options.host not in LOOPBACK and not (options.api_key or os.environ.get("RADLADS_API_KEY")):
        why = "the server would be open to the network without an API key"
        raise fail("R101", where=f"--host {options.host}", why=why, fix="Give `--api-key`, or listen on 127.0.0.1")
    limits = {"--port": (options.port, 0, 65535), "--max-tokens": (options.max_tokens, 1, 1 << 30)}
    limits |= {"--max-batch": (options.max_batch, 1, 65536), "--max-waiting": (options.max_waiting, 1, 1 << 20)}
    limits |= {"--max-prompt-tokens": (options.max_prompt_tokens, 1, 1 << 30)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise fail("R101", where=name, why=f"{value} is not from {low} to {high}", fix="Give a number in this range")
    for name, amount in (("--state-memory", options.state_memory), ("--prefix-memory", options.prefix_memory)):
        if not 0 <= amount <= 1e6:
            raise fail("R101", where=name, why=f"{amount} is no amount", fix="Give 0 or more GB")
