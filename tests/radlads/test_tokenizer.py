import json
from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.tokenizer import StreamDecoder, Tokenizer
from tests.models import CHAT_TEMPLATE, tiny_teacher

TEXT = "Once upon a time: grüße, 日本語 and 🙂🚀!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("tokenizer") / "teacher")


def changed(folder: Path, to: Path, **files: str) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    for name, text in files.items():
        (to / name.replace("__", ".")).write_text(text)
    return to


def with_template(folder: Path, tmp_path: Path, template: str) -> Tokenizer:
    return Tokenizer(changed(folder, tmp_path / "changed", chat_template__jinja=template))


def test_encode_and_decode_are_inverse(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([0, *tokenizer.encode("a")], skip_special=False) == "<|endoftext|>a"
    assert tokenizer.encode_batch([TEXT, "a"]) == [tokenizer.encode(TEXT), tokenizer.encode("a")]


def test_eos_ids_come_from_every_file(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_ids == {0, 2} and tokenizer.eos_id == 0


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHAT_TEMPLATE, {2}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} <|im_start|> {% endfor %}", {1}),  # as Reka's has <sep>
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", set()),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
    ],
)
def test_what_the_template_writes_behind_an_answer_ends_it(folder, tmp_path, template, ends):
    assert with_template(folder, tmp_path, template).turn_ids == ends
    (tmp_path / "changed" / "chat_template.jinja").unlink()
    assert Tokenizer(tmp_path / "changed").turn_ids == set()


def test_stream_never_hands_out_half_a_character(folder):
    tokenizer = Tokenizer(folder)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) + decoder.finish() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_drops_an_unfinished_character_at_the_end(folder):
    tokenizer = Tokenizer(folder)
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.add(token) for token in tokenizer.encode("ab🙂")[:-1]) + decoder.finish() == "ab"


def test_stream_goes_on_after_bytes_that_are_no_character(folder):
    tokenizer = Tokenizer(folder)
    lone = tokenizer.encode("🙂")[-1]
    decoder = StreamDecoder(tokenizer)
    text = "".join(decoder.add(token) for token in [lone] * 20 + tokenizer.encode("abc"))
    assert text.endswith("abc") and len(decoder._ids) < 20


def test_add_special_follows_add_bos_token(folder, tmp_path):
    plain = Tokenizer(folder)
    assert plain.encode("a", add_special=True) == plain.encode("a")
    settings = {"bos_token": "<|im_start|>", "add_bos_token": True, "eos_token": {"content": "<|endoftext|>"}}
    begins = Tokenizer(changed(folder, tmp_path / "bos", tokenizer_config__json=json.dumps(settings)))
    assert begins.encode("a", add_special=True) == [1, *plain.encode("a")]
    assert begins.encode("a") == plain.encode("a") and begins.begin_id == 1
    settings["add_bos_token"] = False
    ends = Tokenizer(changed(folder, tmp_path / "eos", tokenizer_config__json=json.dumps(settings)))
    assert ends.bos_id == 1 and ends.begin_id == ends.eos_id == 0


def test_chat_template_makes_the_prompt(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.has_chat_template
    prompt = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert 1 in tokenizer.encode(prompt)


def test_template_may_stand_in_the_config_alone_or_in_a_list(folder, tmp_path):
    for number, template in enumerate(("X", [{"name": "default", "template": "X"}, {"name": "tool", "template": "Y"}])):
        path = changed(folder, tmp_path / str(number), tokenizer_config__json=json.dumps({"chat_template": template}))
        (path / "chat_template.jinja").unlink()
        assert Tokenizer(path).chat([]) == "X"


def test_template_functions_of_the_field_work(folder, tmp_path):
    loop = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    template = loop + "{{ strftime_now('%Y') | length }}"
    tokenizer = with_template(folder, tmp_path, template)
    messages = [{"role": "user", "content": "<a>"}] * 2
    assert tokenizer.chat(messages) == '{"role": "user", "content": "<a>"}4'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for a in range(90000) %}{{ 'x' * 900 }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content.upper() }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_hostile_template_is_one_error(folder, tmp_path, template):
    with pytest.raises(RadladsError, match="R206"):
        with_template(folder, tmp_path, template).chat([{"role": "user", "content": "hi"}])


def test_repetition_is_refused_before_it_fills_the_memory(folder, tmp_path):
    with pytest.raises(RadladsError, match=r"R206.*too large"):
        with_template(folder, tmp_path, "{{ ('x' * 10000000000) | length }}").chat([])


def test_template_that_runs_for_ever_is_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("radlads.tokenizer.MAX_RENDER_SECONDS", 0.05)
    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(RadladsError, match=r"R206.*longer than 0\.05 seconds"):
        with_template(folder, tmp_path, loop).chat([])


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{}"},
        {"tokenizer__json": "\x00"},
        {"tokenizer_config__json": "[1]"},
        {"tokenizer_config__json": '{"chat_template": 5}'},
        {"generation_config__json": '{"eos_token_id": [900000]}'},
        {"generation_config__json": '{"eos_token_id": "x"}'},
        {"generation_config__json": "{" * 100000},
        {"chat_template__jinja": "x" * (2**20 + 1)},
    ],
)
def test_broken_files_are_one_error(folder, tmp_path, files):
    with pytest.raises(RadladsError, match="R206"):
        tokenizer = Tokenizer(changed(folder, tmp_path / "broken", **files))
        if "tokenizer_config__json" in files:
            (tokenizer.path / "chat_template.jinja").unlink()
            Tokenizer(tokenizer.path)


def test_missing_tokenizer_and_ids_beyond_the_model_are_refused(folder, tmp_path):
    with pytest.raises(RadladsError, match=r"R206.*tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(RadladsError, match=r"R206.*only 10 tokens"):
        Tokenizer(folder, vocab_size=10)
