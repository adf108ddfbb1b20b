"""Conversations: which tokens are learnt, for templates that keep earlier turns and for those that rewrite them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from radlads.data.chat import documents_of, script_of
from radlads.data.prepare import prepare
from radlads.errors import RadladsError
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "See you."},
]
# As templates of reasoning models do: what was thought is dropped from earlier turns, and an answer begins with a thought.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("chat") / "teacher")


def with_template(teacher: Path, folder: Path, template: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def learnt(tokenizer: Tokenizer, folder: Path, *talks: object) -> list[tuple[str, str]]:
    """(text, learnt text) of every document of a store made from conversations."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    store = prepare([folder / "a.jsonl"], tokenizer, folder / "store", eos_id=tokenizer.eos_id)
    counted = store.counted
    assert counted is not None and store.header["counted"] == counted.sum()
    bounds = [*store.document_starts().tolist(), len(store)]
    return [
        (
            tokenizer.decode(store.tokens[a:b].tolist(), skip_special=False),
            tokenizer.decode(store.tokens[a:b][counted[a:b]].tolist(), skip_special=False),
        )
        for a, b in pairwise(bounds)
    ]


def test_the_answers_and_the_ends_of_their_turns_are_learnt(teacher: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(teacher)
    ((text, answers),) = learnt(tokenizer, tmp_path, TALK)
    assert text == tokenizer.chat(TALK, add_generation_prompt=False) + "<|endoftext|>"
    assert answers == "Hello.<|im_end|>See you.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gives_a_document_per_answer(teacher: Path, tmp_path: Path) -> None:
    tokenizer = with_template(teacher, tmp_path, FORGETFUL)
    first, second = learnt(tokenizer, tmp_path, TALK)
    assert first[0] == tokenizer.chat(TALK[:3], add_generation_prompt=False) + "<|endoftext|>"
    assert first[1] == "<think>\n\n</think>\n\nHello.<|im_end|>"
    assert second[0] == tokenizer.chat(TALK, add_generation_prompt=False) + "<|endoftext|>"
    assert second[1] == "<think>\n\n</think>\n\nSee you.<|im_end|>"


def test_sharegpt_names_and_plain_text_beside_it(teacher: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(teacher)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]})
        + "\n"
        + json.dumps({"text": "plain"})
    )
    store = prepare([tmp_path / "b.jsonl"], tokenizer, tmp_path / "store", eos_id=0)
    assert store.counted is not None
    text = tokenizer.decode(store.tokens[store.counted].tolist(), skip_special=False)
    assert text == "Yes.<|im_end|>plain<|endoftext|>"


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        ([{"role": "user", "content": "Hi?"}], "no message of the assistant"),
        ([{"role": "user"}, *TALK[2:3]], "message 1 has no role or no text"),
        ([{"role": "user", "content": [{"type": "image"}]}, *TALK[2:3]], "message 1 has no role or no text"),
        (["hello"], "message 1"),
    ],
)
def test_a_bad_conversation_is_named(teacher: Path, tmp_path: Path, talk: list[object], told: str) -> None:
    with pytest.raises(RadladsError) as caught:
        learnt(Tokenizer(teacher), tmp_path, TALK, talk)
    assert caught.value.code == "R301" and caught.value.where.endswith("a.jsonl:2") and told in caught.value.why


def test_templates_that_cannot_be_followed_are_refused(teacher: Path, tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    for template, told in (
        (plain, "does not continue its own prompt"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ):
        with pytest.raises(RadladsError, match=rf"R301.*a.jsonl:1.*{told}"):
            learnt(with_template(teacher, tmp_path, template), tmp_path, TALK)
    bare = with_template(teacher, tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink()
    bare = Tokenizer(tmp_path)
    with pytest.raises(RadladsError, match=r"R206.*a.jsonl:1.*no chat template"):
        learnt(bare, tmp_path, TALK)


def test_the_script_of_a_template(teacher: Path) -> None:
    script = script_of(Tokenizer(teacher).chat, "here")
    assert script.opening == "<|im_start|>user\n"
    assert script.answer == "<|im_end|>\n<|im_start|>assistant\n"
    assert script.again == "<|im_end|>\n<|im_start|>user\n"
    with pytest.raises(RadladsError, match="R206"):
        script_of(lambda messages, prompt: "nothing", "here")
    documents = list(documents_of(TALK, Tokenizer(teacher).chat, "here"))
    assert "".join(part.text for part in documents[0]) == Tokenizer(teacher).chat(TALK, False)
