"""What a folder tells about its origin and licence."""

from itertools import pairwise
from pathlib import Path

import pytest

from radlads.folder import open_folder
from radlads.provenance import card_head, hub_origin, license_of, teacher_record
from tests.hostile.set_cases import DIMS
from tests.models import tiny_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_of_the_hub_cache_names_repository_and_revision(tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT, **DIMS)
    (path / "README.md").write_text("---\r\nlicense: other\r\nlicense_name: qwen\r\nlicense_link: LICENSE\r\n---\r\n# Card\r\n")
    record = teacher_record(open_folder(path))
    assert record["name"] == "Qwen3-0.6B" and record["repository"] == "Qwen/Qwen3-0.6B" and record["revision"] == COMMIT
    assert record["license"] == {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(record["files"])


def test_a_download_into_a_folder_names_the_revision(tmp_path: Path) -> None:
    left = tmp_path / ".cache" / "huggingface" / "download"
    left.mkdir(parents=True)
    (left / "config.json.metadata").write_text(f"{COMMIT}\netag\n1.0\n")
    assert hub_origin(tmp_path) == {"revision": COMMIT}
    (left / "config.json.metadata").write_text("main\n")
    assert hub_origin(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LICENSE", "                                 Apache License\n                           Version 2.0", "apache-2.0"),
        ("LICENSE.txt", "MIT License\n\nCopyright", "mit"),
        ("LICENSE", "Qwen RESEARCH LICENSE AGREEMENT", "other"),
        ("README.md", "---\nlicense: cc-by-4.0\n---\n", "cc-by-4.0"),
    ],
)
def test_license_comes_from_the_card_or_the_licence_file(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert license_of(tmp_path, {"teacher": {"license": {"license": "mit"}}}) == {"license": expected}


def test_license_is_carried_over_from_the_manifest(tmp_path: Path) -> None:
    assert license_of(tmp_path, {"teacher": {"license": {"license": "mit", "x": 1}}}) == {"license": "mit"}
    assert license_of(tmp_path, None) == {} and license_of(tmp_path, {"teacher": [1]}) == {}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Card",
        "---\n",
        "---\nlicense: mit",
        "---\n[1]\n---\n",
        "---\n{\n---\n",
        "---\n!!python/object/apply:os.abort []\n---\n",
    ],
)
def test_a_card_without_a_head_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_head(tmp_path / "README.md") == {}


def test_a_card_that_multiplies_itself_is_read_in_no_time(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{BOMB}license: mit\n---\n")
    assert license_of(tmp_path, None) == {"license": "mit"}
