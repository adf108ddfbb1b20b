import json

import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.tokenizer import Tokenizer
from radlads.tuning.examples import Batches, check_data, find_split, load_examples
from tests.models import tiny_teacher

CHAT = {"messages": [{"role": role, "content": f"the {role}"} for role in ("user", "assistant", "user", "assistant")]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny_teacher(tmp_path_factory.mktemp("examples") / "teacher"))


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counted_text(tokenizer, example):
    return tokenizer.decode([int(t) for t, c in zip(example.tokens, example.counted, strict=True) if c], skip_special=False)


def test_texts_completions_and_conversations_with_and_without_mask(tokenizer, tmp_path):
    file = written(tmp_path / "train.jsonl", {"prompt": "the sea", "completion": "is high"}, CHAT)
    masked = load_examples(file, tokenizer, 200, mask_prompt=True).items
    assert counted_text(tokenizer, masked[0]) == "is high<|im_end|>\n"
    assert counted_text(tokenizer, masked[1]) == "the assistant<|im_end|>\n" * 2
    whole = load_examples(file, tokenizer, 200, mask_prompt=False).items
    assert all(example.counted.all() for example in whole)
    assert [list(a.tokens) for a in whole] == [list(a.tokens) for a in masked]
    text = load_examples(written(tmp_path / "t.jsonl", {"text": "the cat and the house"}), tokenizer, 200, mask_prompt=False)
    assert counted_text(tokenizer, text.items[0]) == "the cat and the house<|endoftext|>"


def test_long_texts_are_cut_and_every_token_is_predicted_once(tokenizer, tmp_path):
    line = "once upon a time there was an old man and his cat " * 20
    found = load_examples(written(tmp_path / "train.jsonl", {"text": line}), tokenizer, 32, mask_prompt=False)
    whole = [*tokenizer.encode(line), tokenizer.eos_id]
    predicted = [int(token) for example in found.items for token in example.tokens[1:]]
    assert predicted == whole[1:] and found.cut == 1 and all(len(example.tokens) <= 32 for example in found.items)
    long_chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": line}]}
    found = load_examples(written(tmp_path / "chat.jsonl", long_chat, CHAT), tokenizer, 160, mask_prompt=True)
    assert found.truncated == 1 and len(found.items[0].tokens) == 160 and len(found.items) == 2


def test_a_model_without_template_takes_completions_as_plain_text(tokenizer, tmp_path):
    folder = tiny_teacher(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    plain = Tokenizer(folder)
    file = written(tmp_path / "train.jsonl", {"prompt": "the sea ", "completion": "is high"})
    example = load_examples(file, plain, 200, mask_prompt=True).items[0]
    assert plain.decode(list(map(int, example.tokens)), skip_special=False) == "the sea is high<|endoftext|>"
    assert counted_text(plain, example) == "is high<|endoftext|>"
    with pytest.raises(RadladsError, match=r"R301.*chat\.jsonl:1.*no chat template"):
        load_examples(written(tmp_path / "chat.jsonl", CHAT), plain, 200, mask_prompt=False)


@pytest.mark.parametrize(
    ("line", "mask", "words"),
    [
        ('{"text": "a"', False, "it is not JSON"),
        ('{"txet": "a"}', False, "no field 'text'"),
        ('{"prompt": "a", "completion": 3}', False, "prompt or completion is no text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', False, "no message of the assistant"),
        ('{"messages": [], "tools": []}', False, "tools"),
        ('{"text": "a b c"}', True, "no prompt to mask"),
        ('{"text": "\\ud800"}', False, "surrogate"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path, line, mask, words):
    good = json.dumps({"prompt": "a", "completion": "b"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(RadladsError, match=rf"R301.*train\.jsonl:2.*{words}"):
        load_examples(tmp_path / "train.jsonl", tokenizer, 64, mask_prompt=mask)


def test_where_the_splits_are_looked_for(tokenizer, tmp_path):
    with pytest.raises(RadladsError, match=r"R301.*holds no train\.jsonl"):
        check_data(str(tmp_path))
    file = written(tmp_path / "train.jsonl", {"text": "a b"})
    assert find_split(check_data(str(tmp_path)), "train") == file and find_split(tmp_path, "valid") is None
    assert find_split(file, "train") == file and find_split(file, "valid") is None
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(RadladsError, match="both there"):
        find_split(tmp_path, "train")


def test_a_token_store_is_read_as_it_is(tokenizer, tmp_path):
    from radlads.data.prepare import prepare
    from radlads.data.sources import Source

    file = written(tmp_path / "x.jsonl", {"text": "the cat and the sea"}, {"text": "an old man"})
    prepare([Source(str(file))], tokenizer, tmp_path / "data" / "train", eos_id=tokenizer.eos_id)
    path = find_split(check_data(str(tmp_path / "data")), "train")
    stored = load_examples(path, tokenizer, 64, mask_prompt=False).items
    direct = load_examples(file, tokenizer, 64, mask_prompt=False).items
    assert [list(a.tokens) for a in stored] == [list(a.tokens) for a in direct]


def test_batches_depend_on_seed_and_place_alone(tokenizer, tmp_path):
    rows = [{"text": "the cat " * n} for n in range(1, 12)]
    examples = load_examples(written(tmp_path / "t.jsonl", *rows), tokenizer, 64, mask_prompt=False).items
    batches, again = Batches(examples, 2, 3, "x"), Batches(examples, 2, 3, "x")
    assert len(batches) == 5 and len(Batches(examples, 2, 3, "x", whole=True)) == 6
    first = [batches.at(place).inputs.tolist() for place in range(10)]
    assert [again.at(place).inputs.tolist() for place in reversed(range(10))] == first[::-1]
    assert sorted(map(str, first[:5])) == sorted(map(str, first[5:])) and first[:5] != first[5:]
    batch = batches.at(0)
    assert batch.inputs.shape == batch.targets.shape == batch.counted.shape and batch.inputs.shape[1] % 32 == 0
    for row, counted in zip(batch.targets, batch.counted, strict=True):
        assert not row[np.flatnonzero(counted)[-1] + 1 :].any()
    with pytest.raises(RadladsError, match=r"R302.*fewer than a batch of 20"):
        Batches(examples, 20, 0, "x")
