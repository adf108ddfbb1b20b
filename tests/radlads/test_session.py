from contextlib import closing

import pytest

from radlads.errors import RadladsError
from radlads.sampling import Sampling
from radlads.session import PREFILL_STEP, Context, Session, stream
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher
from tests.toy import ToyEngine


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tiny_teacher(tmp_path_factory.mktemp("session") / "teacher"))


@pytest.fixture
def plain(tokenizer, monkeypatch) -> Tokenizer:
    monkeypatch.setattr(tokenizer, "_template_source", None)
    return tokenizer


def writing(tokenizer: Tokenizer, text: str, end: bool = True) -> ToyEngine:
    return ToyEngine(loud=tokenizer.encode(text) + ([2] if end else []))


def talk(session: Session, text: str) -> str:
    return "".join(session.say(text))


def after(session: Session) -> int:
    """Hash of the state at the end of the conversation: tells whether every token was fed once, in order."""
    return session.context.reach(session.ids)[0].state.mixed


def alone(ids: list[int]) -> int:
    engine = ToyEngine()
    return engine.feed(engine.start(), ids)[1].mixed


def test_stream_writes_until_the_end_of_text(tokenizer):
    generation = stream(writing(tokenizer, "the cat"), tokenizer, [5, 6], Sampling(), 50)
    assert "".join(generation) == generation.text == "the cat"
    assert generation.finish == "stop" and generation.token_ids == tokenizer.encode("the cat")
    assert len(generation.logprobs) == len(generation.token_ids) and generation.fed_tokens == 2
    assert generation.prompt_tps > 0 and generation.generation_tps > 0


def test_speed_of_writing_is_that_of_steps_after_the_first(tokenizer, monkeypatch):
    engine, clock = ToyEngine(), [0.0]
    feed = engine.feed

    def slow(state, tokens):
        clock[0] += {0: 3.0, 1: 50.0}.get(len(engine.fed), 0.5)  # the prompt, a first step that builds kernels, the others
        return feed(state, tokens)

    engine.feed = slow
    monkeypatch.setattr("radlads.session.time.perf_counter", lambda: clock[0])
    generation = stream(engine, tokenizer, [5, 6], Sampling(temp=1, seed=1), 4)
    list(generation)
    assert generation.finish == "length" and generation.seconds == 51.0 and generation.prompt_seconds == 3.0
    assert generation.generation_tps == 2 and generation.prompt_tps == pytest.approx(2 / 3)
    short = stream(engine, tokenizer, [5, 6], Sampling(temp=1, seed=1), 2)
    list(short)
    assert short.generation_tps == 2 / short.seconds


def test_stream_ends_at_max_tokens_without_feeding_the_last(tokenizer):
    engine = ToyEngine()
    generation = stream(engine, tokenizer, [5], Sampling(temp=1, seed=1), 4)
    list(generation)
    assert len(generation.token_ids) == 4 and generation.finish == "length"
    assert [token for tokens in engine.fed for token in tokens] == [5, *generation.token_ids[:-1]]


@pytest.mark.parametrize("stop, left", [("at s", "the c"), ("the cat sat", ""), ("zzz", "the cat sat"), ("t", "")])
def test_stop_strings_cut_the_text_across_tokens(tokenizer, stop, left):
    generation = stream(writing(tokenizer, "the cat sat"), tokenizer, [5], Sampling(), 50, ["", stop])
    assert "".join(generation) == generation.text == left and generation.finish == "stop"


def test_text_that_only_begins_a_stop_string_is_written(tokenizer):
    generation = stream(writing(tokenizer, "the ca"), tokenizer, [5], Sampling(), 50, ["cat"])
    assert "".join(generation) == "the ca"


def test_long_prompt_is_fed_in_steps(tokenizer):
    engine, prompt = ToyEngine(), [i % 200 + 3 for i in range(2 * PREFILL_STEP + 5)]
    generation = stream(engine, tokenizer, prompt, Sampling(), 1)
    list(generation)
    assert [len(tokens) for tokens in engine.fed] == [PREFILL_STEP, PREFILL_STEP, 5]
    other = ToyEngine()
    point, _ = Context(other).reach(prompt)
    assert point.state.mixed == alone(prompt)


def test_same_seed_writes_the_same(tokenizer):
    one, two, other = (list(stream(ToyEngine(), tokenizer, [5], Sampling(temp=1, seed=s), 20)) for s in (1, 1, 2))
    assert one == two != other


def test_empty_prompt_and_no_tokens_are_refused(tokenizer):
    for prompt, count in (([], 5), ([5], 0)):
        with pytest.raises(RadladsError, match="R101"):
            stream(ToyEngine(), tokenizer, prompt, Sampling(), count)


def test_chat_feeds_every_token_of_the_template_once(tokenizer):
    engine = writing(tokenizer, "hello")
    session = Session(engine, tokenizer, system="be kind")
    assert talk(session, "hi") == "hello"
    engine.loud = [*tokenizer.encode("bye"), 2]
    assert talk(session, "and now") == "bye"
    expected = tokenizer.chat(session._messages("x"), add_generation_prompt=False)
    assert tokenizer.decode(session.ids, skip_special=False) == expected.split("<|im_end|>\n<|im_start|>user\nx")[0]
    assert [t for tokens in engine.fed for t in tokens] == session.ids  # nothing was read twice


def test_states_follow_undo_retry_and_fork(tokenizer):
    session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=3), max_tokens=6)
    talk(session, "one")
    kept, twin = list(session.ids), session.fork()
    talk(session, "two")
    first = session.turns[-1].answer
    again = "".join(session.retry())
    assert again != first and session.turns[-1].said == "two" and after(session) == alone(session.ids)
    assert session.undo().answer == again and session.ids == kept and after(session) == alone(kept)
    assert twin.ids == kept and talk(twin, "three") and session.ids == kept and after(twin) == alone(twin.ids)


def test_what_a_fork_says_changes_nothing_here(tokenizer):
    def second(with_fork: bool) -> str:
        session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=3), max_tokens=6)
        talk(session, "one")
        if with_fork:
            talk(session.fork(), "aside")
        return talk(session, "two")

    assert second(True) == second(False)


def test_undo_is_free_and_an_old_point_is_read_again(tokenizer):
    engine = ToyEngine()
    session = Session(engine, tokenizer, Sampling(temp=1, seed=4), max_tokens=3)
    for text in "abcdef":
        talk(session, text)
    engine.fed.clear()
    session.undo()
    session.context.reach(session.ids)
    assert engine.fed == [session.ids[-1:]] or engine.fed == []  # at most the token that ended the answer before
    for _ in range(4):
        session.undo()
    assert after(session) == alone(session.ids)


def test_number_of_kept_states_does_not_grow(tokenizer):
    session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=5), max_tokens=3)
    for text in "abcdefghijkl":
        talk(session, text)
        assert len(session.context._points) <= Context.KEPT


def test_template_that_rewrites_earlier_turns_is_read_again(tokenizer, monkeypatch):
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last else '...' }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "_template_source", source)
    session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=6), max_tokens=3)
    talk(session, "one")
    talk(session, "two")
    prompt = tokenizer.encode("u:...;a:...;u:two;")
    assert session.ids[: len(prompt)] == prompt and after(session) == alone(session.ids)


def test_plain_model_continues_one_text(plain):
    engine = writing(plain, " there was")
    session = Session(engine, plain)
    assert session.plain and talk(session, "Once") == " there was"
    engine.loud = [*plain.encode(" an end"), 2]
    talk(session, "The")
    assert plain.decode(session.ids) == session.text == "Once there was\nThe an end"
    with pytest.raises(RadladsError, match=r"R101.*system prompt"):
        session.set_system("be kind")


def test_interrupted_answer_is_kept_and_an_unbegun_one_is_not(tokenizer):
    session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=8), max_tokens=50)
    with closing(session.say("hi")) as pieces:
        for _ in range(5):
            next(pieces)
    assert len(session.turns) == 1 and 0 < len(session.last.token_ids) < 50 and session.last.finish is None
    assert talk(session, "go on") and after(session) == alone(session.ids)

    def broken(state, tokens):
        raise KeyboardInterrupt

    session.engine.feed = broken
    before = list(session.ids)
    with pytest.raises(KeyboardInterrupt):
        talk(session, "never read")
    assert len(session.turns) == 2 and session.ids == before


def test_reset_keeps_the_system_prompt_and_undo_of_nothing_is_refused(tokenizer):
    session = Session(ToyEngine(), tokenizer, system="be kind", max_tokens=3)
    talk(session, "hi")
    session.reset()
    assert session.turns == [] and session.ids == [] and session.system == "be kind"
    with pytest.raises(RadladsError, match="R101"):
        session.undo()


def test_new_seed_starts_the_random_numbers_afresh(tokenizer):
    session = Session(ToyEngine(), tokenizer, Sampling(temp=1, seed=1), max_tokens=8)
    first = talk(session, "hi")
    session.reset()
    session.set_sampling(Sampling(temp=1, seed=2))
    session.set_sampling(Sampling(temp=1, seed=1))
    assert talk(session, "hi") == first


def test_an_answer_ends_with_the_token_that_the_template_writes_behind_it(tmp_path):
    folder = tiny_teacher(tmp_path / "teacher")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|>{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder)
    assert 1 not in tokenizer.eos_ids
    engine = ToyEngine(loud=[*tokenizer.encode("the cat"), 1, *tokenizer.encode("user: and so on")])
    session = Session(engine, tokenizer)
    assert talk(session, "who?") == "the cat" and session.last.finish == "stop"
    talk(session, "and?")
    assert after(session) == alone(session.ids) and session.ids.count(1) == 3
