"""Many chats at once against a server: none lost, none mixed up, whatever the others do.

Run by hand: python -m tests.load [--chats 1000] [--backend mlx] [--tokens 8]
It makes a tiny student with a chat template, starts `radlads serve` on it, and talks to it as clients of five kinds: two turns
streamed, two turns in one piece, slow readers, those who leave in the middle of an answer, and those who leave before it begins.
Every answer is compared with what the engine writes to that conversation alone. Told to come back (429), a client does.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from radlads.engine import Engine
from radlads.sampling import Sampling
from radlads.session import Writer
from radlads.tokenizer import Tokenizer

KINDS = ("streamed", "streamed", "whole", "slow", "leaves", "leaves early")
TURNS = 2
WAIT = 600.0


@dataclass
class Tally:
    """What happened to the chats: answers right, wrong or missing, and how often a client was told to come back."""

    right: int = 0
    left: int = 0
    told_to_wait: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def question(chat: int, turn: int) -> str:
    """What a chat says in a turn; no two chats say the same."""
    return f"This is chat number {chat}. " + ("Who are you?" if turn == 0 else "And then?")


def answer_alone(engine: Engine, tokenizer: Tokenizer, messages: list[dict[str, str]], tokens: int) -> str:
    """The greedy answer to a conversation that nobody else disturbs."""
    ids = tokenizer.encode(tokenizer.chat(messages), add_special=False)
    logits, state = engine.feed(engine.start(), ids)
    writer = Writer(tokenizer, ids, Sampling(0.0), tokens)
    text = writer.take(logits)
    while writer.finish is None:
        logits, state = engine.feed(state, writer.token_ids[-1:])
        text += writer.take(logits)
    return text


async def ask(http: httpx.AsyncClient, messages: list[dict[str, str]], kind: str, tokens: int, tally: Tally) -> str | None:
    """One answer of the server; None when the client left."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": kind != "whole"}
    while True:
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code == 429:
                tally.told_to_wait += 1
                await asyncio.sleep(float(reply.headers["retry-after"]))
                continue
            assert reply.status_code == 200, (reply.status_code, await reply.aread())
            if kind == "leaves early":
                return None
            if kind == "whole":
                return str(json.loads(await reply.aread())["choices"][0]["message"]["content"])
            text, ended = "", False
            async for line in reply.aiter_lines():
                if kind == "slow":
                    await asyncio.sleep(0.05)
                if not line.startswith("data: ") or line == "data: [DONE]":
                    ended |= line == "data: [DONE]"
                    continue
                data = json.loads(line[6:])
                assert "error" not in data, data
                text += data["choices"][0]["delta"].get("content", "")
                if kind == "leaves" and text:
                    return None
            assert ended, "the stream broke off"
            return text


async def chat(http: httpx.AsyncClient, number: int, expected: list[str], tokens: int, tally: Tally) -> None:
    """All turns of one chat."""
    kind, messages = KINDS[number % len(KINDS)], list[dict[str, str]]()
    for turn, wanted in enumerate(expected):
        messages.append({"role": "user", "content": question(number, turn)})
        began = time.monotonic()
        try:
            found = await ask(http, messages, kind, tokens, tally)
        except (httpx.HTTPError, AssertionError, OSError) as error:
            tally.lost.append(f"chat {number} ({kind}), turn {turn}: {type(error).__name__} {error}")
            return
        if found is None:
            tally.left += 1
            return
        tally.seconds.append(time.monotonic() - began)
        if found != wanted:
            tally.wrong.append(f"chat {number} ({kind}), turn {turn}: {found!r} instead of {wanted!r}")
        else:
            tally.right += 1
        messages.append({"role": "assistant", "content": wanted})


async def run_chats(address: str, expected: list[list[str]], tokens: int) -> tuple[Tally, dict[str, Any]]:
    """All chats at once, then what the server says of itself once all is quiet."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=WAIT, limits=limits) as http:
        await asyncio.gather(*(chat(http, i, answers, tokens, tally) for i, answers in enumerate(expected)))
        for _ in range(100):
            health: dict[str, Any] = (await http.get("/health")).json()
            if not health["active"] and not health["waiting"]:
                break
            await asyncio.sleep(0.1)
    return tally, health


def conversations(engine: Engine, tokenizer: Tokenizer, chats: int, tokens: int) -> list[list[str]]:
    """The right answers to every turn of every chat."""
    found = []
    for number in range(chats):
        messages, answers = list[dict[str, str]](), list[str]()
        for turn in range(TURNS):
            messages.append({"role": "user", "content": question(number, turn)})
            answers.append(answer_alone(engine, tokenizer, messages, tokens))
            messages.append({"role": "assistant", "content": answers[-1]})
        found.append(answers)
    return found


def main() -> int:
    from radlads.backends import open_engine
    from radlads.folder import open_folder
    from radlads.weights_tools.surgery import make_student
    from tests.models import tiny_teacher

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--backend", default="mlx")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    with tempfile.TemporaryDirectory() as place:
        teacher = open_folder(tiny_teacher(Path(place) / "teacher"))
        folder = make_student(teacher, Path(place) / "student", arch="rwkv7", options={})
        engine, tokenizer = open_engine(folder, options.backend), Tokenizer(folder.path)
        expected = conversations(engine, tokenizer, options.chats, options.tokens)
        port = 20_000 + time.time_ns() % 20_000
        command = [sys.executable, "-m", "radlads", "serve", str(folder.path), "--backend", options.backend, "--port", str(port)]
        server = subprocess.Popen(command)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + WAIT
            while True:
                try:
                    httpx.get(f"{address}/v1/models")
                    break
                except httpx.HTTPError:
                    assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
                    time.sleep(0.2)
            began = time.monotonic()
            tally, health = asyncio.run(run_chats(address, expected, options.tokens))
            took = time.monotonic() - began
        finally:
            server.terminate()
            server.wait(30)
    kinds = Counter(KINDS[i % len(KINDS)] for i in range(options.chats))
    waits = sorted(tally.seconds)
    print(f"{options.chats} chats at once ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}) in {took:.0f} s")
    print(f"answers right {tally.right}, lost {len(tally.lost)}, wrong {len(tally.wrong)}")
    print(f"clients that left {tally.left}, told to come back {tally.told_to_wait} times")
    print(f"an answer took {waits[len(waits) // 2]:.1f} s in the median, {waits[-1]:.1f} s at most")
    print("health after:", health)
    print(*[*tally.lost, *tally.wrong][:10], sep="\n")
    return int(bool(tally.lost or tally.wrong or health["active"] or health["failed"] or health["restarts"]))


if __name__ == "__main__":
    sys.exit(main())
