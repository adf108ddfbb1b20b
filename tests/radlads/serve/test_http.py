"""The server as the official client meets it, and as those meet it who send what they should not."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from radlads.errors import RadladsError  # noqa: E402
from radlads.serve.http import BODY_LIMIT, Settings, create_app  # noqa: E402
from radlads.serve.listen import Stoppable, listen  # noqa: E402
from radlads.serve.worker import PrefixStore, Worker  # noqa: E402
from radlads.tokenizer import Tokenizer  # noqa: E402
from tests.models import tiny_spec, tiny_teacher  # noqa: E402
from tests.toy import ToyEngine  # noqa: E402

Start = Callable[..., tuple[str, Worker]]
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def client(address: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def alive(address: str, **headers: str) -> dict[str, Any]:
    reply = httpx.get(f"{address}/health", headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()  # type: ignore[no-any-return]


def test_the_official_client(start: Start, tokenizer: Tokenizer) -> None:
    address, worker = start()
    with client(address) as ai:
        assert [model.id for model in ai.models.list()] == ["toy"] and ai.models.retrieve("toy").id == "toy"
        whole = ai.chat.completions.create(model="toy", seed=3, temperature=0.7, **ASK)
        assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 8 and whole.usage.total_tokens == whole.usage.prompt_tokens + 8
        chunks = list(
            ai.chat.completions.create(
                model="toy", seed=3, temperature=0.7, stream=True, stream_options={"include_usage": True}, **ASK
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 8
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
        plain = ai.completions.create(model="default", prompt="Once upon", max_tokens=5, temperature=0)
        assert plain.choices[0].text and plain.usage.prompt_tokens == len(tokenizer.encode("Once upon"))
    assert worker.served >= 3 and alive(address)["status"] == "ok"


def test_a_stop_string_ends_the_answer_before_it(start: Start, tokenizer: Tokenizer) -> None:
    engine = ToyEngine(loud=tokenizer.encode("the cat sat"))
    address, _ = start(engine)
    with client(address) as ai:
        found = ai.chat.completions.create(model="toy", temperature=0, stop=[" cat"], **ASK)
    assert found.choices[0].message.content == "the" and found.choices[0].finish_reason == "stop"


def test_the_next_turn_is_not_read_again(start: Start) -> None:
    address, worker = start()
    prompt = "Once upon a time"
    with client(address) as ai:
        ai.completions.create(model="toy", prompt=prompt, max_tokens=1, temperature=0)
        again = ai.completions.create(model="toy", prompt=prompt, max_tokens=4, temperature=0)
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
        other = ai.completions.create(model="toy", prompt="Another", max_tokens=1)
        assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert worker.prefixes.hits == 1


def test_kept_states_stay_within_their_bytes() -> None:
    logits = np.zeros(1, np.float32)
    store = PrefixStore(1000, lambda tokens: 100 + 10 * tokens)
    for length in (1, 20, 30, 100):  # the last would not fit alone
        store.keep(range(length), logits, f"after {length}")
    assert (len(store), store.held_bytes) == (3, 110 + 300 + 400)
    assert store.find(range(25))[::2] == (20, "after 20")
    store.keep([7] * 40, logits, "another")  # 500 bytes: those used longest ago go
    assert [store.find(range(n))[0] for n in (1, 25, 30)] == [0, 20, 20] and store.held_bytes == 800
    assert store.find([8, *range(20)])[0] == 0 and PrefixStore(0, lambda _: 1).keep([1], logits, "none") is None


BAD_FIELDS = [
    {"top_k": 10**9}, {"stop": 5}, {"stop": ""}, {"logit_bias": {"1000000000": 1}}, {"seed": 2**70}, {"seed": -1},
    {"max_tokens": True}, {"max_tokens": 0}, {"temperature": "hot"}, {"temperature": -1}, {"messages": []}, {"messages": "hi"},
    {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "tool", "content": "x"}]}, {"n": 2}, {"tools": []},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]},
    {"adapters": "../.."}, {"adapters": None}, {"stop": ["x"] * 99}, {"logprobs": True},
    {"response_format": {"type": "json_object"}},
]  # fmt: skip


@pytest.fixture
def door(start: Start) -> str:
    return start()[0]


def test_every_bad_field_is_a_400_that_names_it(door: str) -> None:
    with httpx.Client(base_url=door) as http:
        for change in BAD_FIELDS:
            reply = http.post("/v1/chat/completions", json={**ASK, **change})
            assert reply.status_code == 400, (change, reply.text)
            error = reply.json()["error"]
            assert error["type"] == "invalid_request_error" and (error["param"] or "").partition(".")[0] == next(iter(change))
        for name in ("/etc/passwd", "../secret", "other"):
            reply = http.post("/v1/chat/completions", json={**ASK, "model": name})
            assert reply.status_code == 404 and name not in reply.text
    alive(door)


RAW = [
    b"\xff\xfe",
    b"[" * 100_000,
    b"{",
    b"",
    b"[]",
    b'{"messages": NaN}',
    b'{"temperature": Infinity}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
    b'{"a": 1, "a": 2}',
]


def test_bodies_that_are_no_request(door: str) -> None:
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=door) as http:
        for body in RAW:
            reply = http.post("/v1/chat/completions", content=body, headers=headers)
            assert reply.status_code == 400 and "Traceback" not in reply.text, body[:20]
        assert http.post("/v1/chat/completions", json={**ASK, "max_tokens": 2**63}).status_code == 200
        assert http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        for name, value in (("host", "evil.example"), ("host", "evil.example:80"), ("origin", "http://evil.example")):
            assert http.post("/v1/chat/completions", json=ASK, headers={name: value}).status_code == 403
        for host in ("localhost", "localhost:1234", "[::1]", "[::1]:1234", "LOCALHOST"):
            assert http.get("/v1/models", headers={"host": host}).status_code == 200
        lost = http.get("/docs")
        assert lost.status_code == 404 and lost.json()["error"]["type"] == "invalid_request_error"
    alive(door)


@pytest.mark.parametrize(
    ("length", "status"), [("-1", b"400"), (str(10**12), b"413"), (str(BODY_LIMIT + 1), b"413"), ("x", b"400")]
)
def test_lengths_are_believed_only_within_bounds(door: str, length: str, status: bytes) -> None:
    host, port = door.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        head = ("POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {length}")
        raw.sendall("\r\n".join([*head, "", "{}"]).encode())
        assert raw.recv(64).split(b" ")[1] == status
    alive(door)


def test_what_means_nothing_is_no_error(start: Start, tokenizer: Tokenizer) -> None:
    """Nulls, switched-off fields and the newer name of "system", as clients send them."""
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "stream", "presence_penalty", "logprobs", "max_tokens"))
    with httpx.Client(base_url=start()[0]) as http:
        reply = http.post("/v1/chat/completions", json={**ASK, **nulls, "response_format": {"type": "text"}, "store": False})
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] > 0, reply.text
        talk = [[{"role": role, "content": "be kind"}, *ASK["messages"]] for role in ("system", "developer")]
        one, two = (http.post("/v1/chat/completions", json={**ASK, "temperature": 0, "messages": said}).json() for said in talk)
        assert one["choices"] == two["choices"] and one["usage"]["prompt_tokens"] == two["usage"]["prompt_tokens"]


def test_a_template_that_fails_is_a_400(start: Start, tmp_path: Path) -> None:
    served = tiny_teacher(tmp_path / "teacher")
    settings = json.loads((served / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'].no_such.thing }}"
    (served / "tokenizer_config.json").write_text(json.dumps(settings))
    for extra in served.glob("chat_template*"):
        extra.unlink()
    address, worker = start()
    worker.tokenizer = Tokenizer(served)
    reply = httpx.post(f"{address}/v1/chat/completions", json=ASK)
    error = reply.json()["error"]
    assert reply.status_code == 400 and (error["type"], error["param"]) == ("invalid_request_error", "messages")
    assert "Traceback" not in reply.text and str(tmp_path) not in reply.text
    alive(address)


def test_without_a_template_a_chat_is_one_text(start: Start, tokenizer: Tokenizer, tmp_path: Path) -> None:
    served = tiny_teacher(tmp_path / "teacher")
    settings = json.loads((served / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (served / "tokenizer_config.json").write_text(json.dumps(settings))
    for extra in served.glob("chat_template*"):
        extra.unlink()
    address, worker = start()
    worker.tokenizer = Tokenizer(served)
    messages = [{"role": "system", "content": "A tale."}, {"role": "user", "content": "Once upon"}]
    with client(address) as ai:
        first = ai.chat.completions.create(model="toy", messages=messages, max_tokens=3, temperature=0)
        text = first.choices[0].message.content
        plain = ai.completions.create(model="toy", prompt="A tale.\nOnce upon", max_tokens=3, temperature=0)
        assert plain.choices[0].text == text and plain.usage.prompt_tokens == first.usage.prompt_tokens
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and then"}]
        second = ai.chat.completions.create(model="toy", messages=messages, max_tokens=1, temperature=0)
        whole = "A tale.\nOnce upon" + text + ("" if text[-1].isspace() else "\n") + "and then"
        assert second.usage.prompt_tokens == len(tokenizer.encode(whole, add_special=True))


def test_a_key_guards_every_route_but_the_page(start: Start) -> None:
    address, _ = start(key="secret")
    with httpx.Client(base_url=address) as http:
        assert http.get("/").status_code == 200
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/nothing")):
            reply = http.request(method, path, json={} if method == "POST" else None)
            assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"
    with client(address, "secret") as ai:
        assert ai.models.list().data


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_for_a_sequence_is_there_before_it_is_read(start: Start, tokenizer: Tokenizer) -> None:
    """Keys and values of softmax layers grow: what a request may reach at its end counts from its beginning."""
    engine = SlowEngine(tiny_spec())
    each = engine.spec.state_bytes(len(tokenizer.encode("long")) + 40)
    address, worker = start(engine, slots=8, memory=2.5 * each)
    most = 0

    def step() -> None:
        nonlocal most
        Worker.step(worker)
        most = max(most, len(worker.active))

    worker.step = step  # type: ignore[method-assign]
    body = {"prompt": "long", "max_tokens": 40, "temperature": 1.0}
    with httpx.Client(base_url=address, timeout=60) as http:
        threads = [threading.Thread(target=lambda: http.post("/v1/completions", json=body)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (worker.served, most) == (5, 2)
        refused = http.post("/v1/completions", json={**body, "max_tokens": 130, "prompt": "long " * 40})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


class SlowEngine(ToyEngine):
    """Takes a moment for every token and never ends a text; breaks when it is fed a marked one."""

    marked: int | None = None

    def feed(self, state: Any, tokens: Any) -> Any:
        if self.marked in tokens:
            raise RuntimeError("planted")
        time.sleep(0.002)
        logits, state = super().feed(state, tokens)
        logits[:3] = -50.0
        return logits, state


def test_many_clients_at_once_get_their_own_answers(start: Start) -> None:
    address, worker = start(waiting=400, slots=16)
    prompts = [f"number {index} of them" for index in range(80)]
    http = httpx.Client(base_url=address, timeout=120)

    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        reply = http.post("/v1/completions", json=body)
        return str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else f"status {reply.status_code}"

    alone = {prompt: ask(prompt) for prompt in prompts[:10]}
    answers: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=prompt: answers.__setitem__(p, ask(p))) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 80 and not [text for text in answers.values() if text.startswith("status")]
    assert all(answers[prompt] == text for prompt, text in alone.items()) and len(set(answers.values())) > 20
    assert worker.failed == 0


def test_a_client_that_leaves_frees_its_place(start: Start) -> None:
    address, worker = start(SlowEngine(), slots=1, max_tokens=100_000)
    body = {"prompt": "endless", "max_tokens": 100_000, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert len(worker.active) == 1
    until(lambda: not worker.active)
    assert alive(address)["status"] == "ok"


def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    address, worker = start(SlowEngine(), slots=1, waiting=1, max_tokens=100_000)
    body = {"prompt": "long", "max_tokens": 100_000, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as first, httpx.Client() as http:
        lines = first.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{address}/v1/completions", json=body):
            until(lambda: worker.waiting == 1)
            reply = http.post(f"{address}/v1/completions", json={**body, "stream": False})
            assert reply.status_code == 429 and reply.headers["retry-after"] == "1"


def test_a_busy_server_is_a_healthy_one_and_a_stuck_one_is_not(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radlads.serve.http.HEALTH_SECONDS", 1.0)
    released = threading.Event()
    address, worker = start(SlowEngine(), slots=1, waiting=4, max_tokens=100_000)
    body = {"prompt": "long", "max_tokens": 100_000, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as first:
        lines = first.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{address}/v1/completions", json=body):
            until(lambda: worker.waiting == 1)
            alive(address)  # by another's token: one of its own would wait for both
            monkeypatch.setattr(worker.engine, "feed_many", lambda *_: released.wait(60))
            stuck = httpx.get(f"{address}/health")
            assert stuck.status_code == 503 and "no token within 1 s" in stuck.json()["error"]
            released.set()


def test_told_to_stop_it_ends_what_is_being_written(tokenizer: Tokenizer) -> None:
    worker = Worker(SlowEngine(), tokenizer, slots=1, waiting=4, prefixes=0)
    listener = listen("127.0.0.1", 0)
    host, port = listener.getsockname()
    with pytest.raises(RadladsError, match=f"R101.*{host} port {port}: address already in use"):
        listen(host, port)
    server = Stoppable(uvicorn.Config(create_app(worker, Settings("toy", max_tokens=100_000)), log_level="error"), worker)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    heard: list[list[str]] = [[], []]

    def ask(index: int) -> None:
        body = {"prompt": "long", "max_tokens": 100_000, "stream": True, "temperature": 1.0}
        with httpx.stream("POST", f"http://{host}:{port}/v1/completions", json=body) as reply:
            heard[index].extend(reply.iter_lines())

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for asking in threads:
        asking.start()
    until(lambda: worker.waiting == 1 and worker.fed_at > 0)
    server.handle_exit(signal.SIGTERM, None)
    for ended in (*threads, thread, worker):
        ended.join(20)
        assert not ended.is_alive()
    assert all("the server is stopping" in lines[-4] and lines[-2] == "data: [DONE]" for lines in heard)


def test_an_error_of_the_engine_ends_one_request_only(start: Start, tokenizer: Tokenizer) -> None:
    engine = SlowEngine()
    engine.marked = tokenizer.encode("Z")[0]
    address, worker = start(engine)
    with httpx.Client(base_url=address) as http:
        reply = http.post("/v1/completions", json={"prompt": "Z", "max_tokens": 4})
        assert reply.status_code == 500 and "planted" not in reply.text
        assert http.post("/v1/completions", json={"prompt": "fine", "max_tokens": 4, "temperature": 0}).status_code == 200
    assert worker.is_alive() and alive(address)["failed"] == 1


def test_the_page_asks_nobody_else(door: str) -> None:
    reply = httpx.get(door)
    assert "default-src 'none'" in reply.headers["content-security-policy"] and "toy" in reply.text
    assert "http://" not in reply.text and "https://" not in reply.text and "{{" not in reply.text


def test_events_are_json_lines_that_end(start: Start) -> None:
    address, _ = start()
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**ASK, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:])["object"] == "chat.completion.chunk" for line in lines[:-1])
