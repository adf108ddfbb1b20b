"""The report: what it shows of a run, that text cannot break out of it, and that it works on half a run."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.recipe import load_recipe
from radlads.report import write_report
from radlads.runs import Run, begin_run

PNG = b"\x89PNG\r\n\x1a\n"
TRAP = '<script>alert(1)</script><img src="http://example.com/x">'


class Page(HTMLParser):
    """Tags and attribute values of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]


def fill(run: Run) -> None:
    context = {"short_context": 8, "short_context_loss": 2.25, "full_context_loss": 2.0}
    run.log({"kind": "eval", "stage": "teacher", "loss": 2.0, "ppl": float(np.exp(2.0)), **context})
    for stage, loss in ((0, 4.0), (1, 2.5), (2, 2.1)):
        run.log(
            {
                "kind": "eval",
                "stage": stage,
                "loss": loss,
                "kl": loss - 2,
                "agreement": 0.8765,
                "kl_by_position": [0.5, 0.7, None, 0.9],
            }
        )
    for stage in (1, 2):
        for step in range(1, 30):
            layers = {"layer_error": [1 / step, 2 / step]} if stage == 1 else {}
            run.log(
                {"kind": "train", "stage": stage, "step": step, "tokens": 64 * step, "loss": 1 / step, "tok_s": 100.0, **layers}
            )
    run.log({"kind": "sample", "stage": "teacher", "prompt": "Once", "text": " upon " + TRAP})
    run.log({"kind": "sample", "stage": 0, "prompt": "Once", "text": "xqxqxq"})
    run.log({"kind": "sample", "stage": 2, "prompt": "Once", "text": " again"})
    run.finish({"teacher_ppl": 7.389, "student_ppl": 8.166, "ppl_ratio": 1.1052, "kl": 0.1, "agreement": 0.8765}, [])


def test_a_whole_run(tmp_path: Path) -> None:
    with begin_run(tmp_path, load_recipe("tiny")) as run:
        fill(run)
    files = write_report(tmp_path)
    assert [path.name for path in files] == ["loss.png", "layers.png", "positions.png", "report.html"]
    assert all((tmp_path / "plots" / path.name).read_bytes().startswith(PNG) for path in files[:3])
    text = files[-1].read_text()
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells[:6] == ["Teacher", "2.0000", "7.39", "1.000", "–", "–"]
    assert cells[6:12] == ["Student, before training", "4.0000", "54.60", "7.389", "2.0000", "87.6 %"]
    assert cells[18:24] == ["Student after stage 2", "2.1000", "8.17", "1.105", "0.1000", "87.6 %"]
    assert " again" in text and "xqxqxq" not in text
    assert "<b>1.105</b>" in text and "quarter_cosine" in text
    assert "last 8 tokens to look at, the teacher&#39;s loss is 0.250 nats higher" in text


def test_the_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    with begin_run(tmp_path, load_recipe("tiny", [f"eval.prompt={TRAP!r}"])) as run:
        fill(run)
    text = write_report(tmp_path)[-1].read_text()
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("img") == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert base64.b64decode(page.sources[0].partition(",")[2]).startswith(PNG)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;" in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    begin_run(tmp_path, load_recipe("tiny")).close()
    files = write_report(tmp_path)
    assert [path.name for path in files] == ["report.html"]
    assert "not finished yet" in files[0].read_text()


def test_a_run_without_a_student(tmp_path: Path) -> None:
    with begin_run(tmp_path, load_recipe("tiny")) as run:
        run.log({"kind": "eval", "stage": "teacher", "loss": 2.0})
        run.finish({"teacher_ppl": 7.389, "student_ppl": 7.389, "ppl_ratio": 1.0, "kl": 0.0, "agreement": 1.0}, [])
    text = write_report(tmp_path)[-1].read_text()
    assert re.findall(r"<li><b>(.*?)</b><span>(.*?)</span>", text) == [("7.39", "teacher perplexity")]


def test_odd_records_are_left_out(tmp_path: Path) -> None:
    with begin_run(tmp_path, load_recipe("tiny")) as run:
        for loss in (None, "low", 10**400, 0.5):
            run.log({"kind": "train", "stage": 1, "step": 1, "tokens": 10, "loss": loss, "layer_error": ["x"]})
        run.log({"kind": "eval", "stage": [1], "loss": 1e9, "kl_by_position": 3})
        run.log({"kind": "eval", "stage": 1, "loss": 1e9, "kl_by_position": [None, None]})
    assert [path.name for path in write_report(tmp_path)] == ["loss.png", "report.html"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match="R201"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
