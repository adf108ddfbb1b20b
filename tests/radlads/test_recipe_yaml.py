"""The YAML of recipes: which plain values mean what, and which texts are refused."""

from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.recipe_yaml import MAX_BYTES, parse, parse_value, read_document
from tests.work import calls


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("100_000", 100_000),
        ("-7", -7),
        ("0", 0),
        ("010", "010"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("12:30", "12:30"),
        ("2026-01-02", "2026-01-02"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{a: b}", {"a": "b"}),
        ("He said: no", "He said: no"),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert parse_value(text, "here") == value
    assert type(parse_value(text, "here")) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x [1]\nb: *x", "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("a: !!float 1", "tags"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("[1]: 2", "a key must be a name"),
        ("[" * 100_000, "nested deeper"),
        ("a: 1\n--- \nb: 2", "document"),
        ("a: [1", "expected"),
        ("a:\n\t- 1", "cannot start any token"),
        ("a: \x00", "not allowed"),
        ("9" * 5000, "digits"),
    ],
)
def test_other_texts_are_refused_in_one_line(text: str, told: str) -> None:
    def refused() -> None:
        with pytest.raises(RadladsError, match=told) as caught:
            parse(text, "file", {})
        assert "\n" not in str(caught.value)

    assert calls(refused) < 20_000 + 10 * len(text)


def test_lines_of_keys_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\nb:\n  - c: 2\n    d: 3\n")
    document = read_document(tmp_path / "a.yaml")
    assert document.values == {"a": 1, "b": [{"c": 2, "d": 3}]}
    assert document.place("b", 0, "d").endswith("a.yaml:4: b.0.d")
    assert document.place("b", 0, "missing").endswith("a.yaml:3: b.0.missing")


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"a: \xff", "R102", "byte 3 is not UTF-8"),
        (b"- 1", "R102", "no table"),
        (b"", "R102", "no table"),
        (b"# " + b"x" * MAX_BYTES, "R102", "larger than"),
        (None, "R201", "directory"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes | None, code: str, told: str) -> None:
    path = tmp_path
    if content is not None:
        path = tmp_path / "a.yaml"
        path.write_bytes(content)
    with pytest.raises(RadladsError) as caught:
        read_document(path)
    assert caught.value.code == code
    assert told in caught.value.why.lower() or told in caught.value.why
