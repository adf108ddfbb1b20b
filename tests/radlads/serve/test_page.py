"""The chat page in a real browser: a headless Chromium, told what to do through its debugging protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

connect = pytest.importorskip("websockets.sync.client").connect

from radlads.serve.worker import Worker  # noqa: E402
from tests.toy import ToyEngine  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
SECONDS = 60
PICTURE = os.environ.get("RADLADS_SCREENSHOT")  # a file to keep the last picture in, for people


class Page:
    """One tab, spoken to through the debugging protocol; `events` are what the browser reported meanwhile."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.count, self.events = socket, 0, list[dict[str, Any]]()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=SECONDS))
            if message.get("id") == self.count:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} did not come true: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Type into what has the focus and press Enter."""
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **enter)

    def picture(self) -> bytes:
        """The tab as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Chromium; the address of its debugging socket's host."""
    folder = tmp_path_factory.mktemp("browser")
    arguments = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=900,640", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told, deadline = folder / "DevToolsActivePort", time.monotonic() + SECONDS
    while not (told.exists() and told.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    yield f"127.0.0.1:{told.read_text().split()[0]}"
    process.terminate()
    process.wait(20)


@pytest.fixture
def visit(browser: str) -> Iterator[Callable[[str], Page]]:
    """A function that opens an address in a tab of its own."""
    import httpx

    tabs, stack = list[str](), ExitStack()

    def begin(address: str) -> Page:
        tab = httpx.put(f"http://{browser}/json/new?about:blank", timeout=SECONDS).json()
        page = Page(stack.enter_context(connect(tab["webSocketDebuggerUrl"], max_size=None)))
        tabs.append(tab["id"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=address)
        page.until("document.readyState == 'complete' && !!document.getElementById('said')")
        return page

    yield begin
    stack.close()
    for name in tabs:
        httpx.get(f"http://{browser}/json/close/{name}", timeout=SECONDS)


def requests(page: Page) -> set[str]:
    """Addresses that the page asked for."""
    sent = [event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if url != "about:blank"}


Start = Callable[..., tuple[str, Worker]]
LAST = "document.querySelector('#talk > :last-child')"


class Slow(ToyEngine):
    """Never ends a text, and takes its time."""

    def feed(self, state: Any, tokens: Any) -> Any:
        time.sleep(0.02)
        logits, state = super().feed(state, tokens)
        logits[:3] = -50.0
        return logits, state


def test_a_chat_in_the_browser(start: Start, visit: Callable[[str], Page], tokenizer: Any, tmp_path: Path) -> None:
    answers = ("The sea is <b>high</b> today.", "Then we stay.")
    said = [token for answer in answers for token in (*tokenizer.encode(answer), tokenizer.eos_id)]
    address, worker = start(ToyEngine(loud=said))
    page = visit(address)
    assert page.value("document.activeElement.id") == "said" and "toy" in page.value("document.title")
    page.type("Hello, <i>old</i> man")
    page.until("document.getElementById('send').textContent == 'Send' && document.querySelectorAll('#talk > div').length == 2")
    # Text of people and of models is text, never markup.
    assert page.value("document.querySelectorAll('#talk i, #talk b').length") == 0
    assert page.value("document.querySelector('#talk > .user').innerText") == "Hello, <i>old</i> man"
    assert page.value("document.getElementById('said').value") == ""
    assert page.value(f"{LAST}.innerText").strip() == "The sea is <b>high</b> today."
    page.type("And then?")
    page.until("document.getElementById('send').textContent == 'Send' && document.querySelectorAll('#talk > div').length == 4")
    assert page.value(f"{LAST}.innerText").strip() == "Then we stay." and worker.failed == 0
    picture = page.picture()
    Path(PICTURE or tmp_path / "page.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert requests(page) == {f"{address}/", f"{address}/v1/chat/completions"}
    complaints = [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not complaints, complaints
    page.value("document.getElementById('new').click()")
    assert page.value("document.querySelectorAll('#talk > div').length") == 0


def test_without_a_chat_template_the_page_continues_a_text(
    start: Start, visit: Callable[[str], Page], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "has_chat_template", property(lambda _: False))
    engine = ToyEngine(loud=[token for _ in range(2) for token in (*tokenizer.encode(" a time"), tokenizer.eos_id)])
    address, _ = start(engine)
    page = visit(address)
    assert "continues the text" in page.value("document.getElementById('status').innerText")
    for turn, text in enumerate(("Once upon", "Then"), 1):
        page.type(text)
        page.until(f"!running && document.querySelectorAll('#talk > div').length == {2 * turn}")
        assert page.value(f"{LAST}.innerText").strip() == "a time"
    assert requests(page) == {f"{address}/", f"{address}/v1/chat/completions"}
    read = [token for tokens in engine.fed for token in tokens if token != tokenizer.eos_id]
    assert tokenizer.decode(read).startswith("Once upon a time\nThen")


def test_stop_and_errors_in_the_browser(start: Start, visit: Callable[[str], Page]) -> None:
    address, worker = start(Slow(), max_tokens=100_000, slots=1)
    page = visit(address)
    page.type("Go on for ever")
    page.until(f"document.getElementById('send').textContent == 'Stop' && {LAST}.innerText.length > 5")
    page.value("document.getElementById('send').click()")
    page.until("document.getElementById('send').textContent == 'Send'")
    deadline = time.monotonic() + SECONDS
    while worker.active:
        assert time.monotonic() < deadline, "the place was not freed"
        time.sleep(0.05)
    page.value("fetch = async () => new Response(JSON.stringify({error: {message: 'the queue is full'}}), {status: 429})")
    page.type("Again")
    page.until("!!document.querySelector('#talk > .error')")
    assert "the queue is full" in page.value("document.querySelector('#talk > .error').innerText")
    assert page.value("document.getElementById('said').value") == "Again"


def test_a_key_is_asked_for_once(start: Start, visit: Callable[[str], Page]) -> None:
    address, worker = start(key="secret")
    page = visit(address)
    page.value("window.asked = 0; prompt = () => { asked += 1; return 'secret'; }")
    for turn in (1, 2):
        page.type("Hello")
        page.until(f"!running && document.querySelectorAll('#talk > div').length == {2 * turn}")
    assert page.value("asked") == 1 and worker.served == 2
    assert page.value("document.querySelectorAll('#talk > .error').length") == 0
