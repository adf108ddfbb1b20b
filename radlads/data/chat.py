"""Conversations as training text: the teacher's chat template, and which of its tokens the student learns to write."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from radlads.data.documents import Message, bad
from radlads.errors import RadladsError, fail

# Stand for what is said, to find the places where a template puts it; private characters that no template knows.
SAID = ("\ue0a1\ue0a2", "\ue0a3\ue0a4", "\ue0a5\ue0a6")

Render = Callable[[Sequence[Message], bool], str]


class Segment(NamedTuple):
    """A stretch of a document's text; the tokens of one that is not `counted` are context only."""

    text: str
    counted: bool


def documents_of(messages: Sequence[Message], render: Render, where: str) -> Iterator[list[Segment]]:
    """The documents of a conversation: what `render(messages, add_generation_prompt)` writes, the assistant's turns counted.

    A turn of the assistant is what the template adds after the prompt that asks for it. A template that rewrites earlier
    turns (as those that drop old reasoning do) gives one document per turn, each as the model would see it then.
    Raises R301 when the template refuses the conversation, or does not continue its own prompt.
    """
    try:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [render(messages[:number], True) for number in turns]
        answered = [render(messages[: number + 1], False) for number in turns]
        whole = render(messages, False)
    except RadladsError as error:
        raise bad(where, error.why, "Correct the conversation, or the template of the tokenizer") from None
    for prompt, text in zip(prompts, answered, strict=True):
        if not text.startswith(prompt):
            why = "the chat template does not continue its own prompt, so the assistant's tokens cannot be told"
            raise bad(where, why, "Use the template of the model that is to answer")
    if not all(later.startswith(earlier) for earlier, later in zip(answered, [*prompts[1:], whole], strict=True)):
        for prompt, text in zip(prompts, answered, strict=True):
            yield [Segment(prompt, False), Segment(text[len(prompt) :], True)]
        return
    segments, done = [], 0
    for prompt, text in zip(prompts, answered, strict=True):
        segments += [Segment(prompt[done:], False), Segment(text[len(prompt) :], True)]
        done = len(text)
    yield [*segments, *([Segment(whole[done:], False)] if whole[done:] else [])]


class Script(NamedTuple):
    """The text of a template around what is said: before the first question, before an answer, before the next question."""

    opening: str
    answer: str
    again: str


def script_of(render: Render, where: object) -> Script:
    """What a template writes around the turns of a conversation. Raises R206 when it does not keep what is said."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": said} for role, said in zip(roles, SAID, strict=True)]
    asked, whole = render(messages[:1], True), render(messages, True)
    pieces = [asked.partition(SAID[0]), whole.partition(SAID[1])[2].partition(SAID[2])]
    if any(not between for _, between, _ in pieces):
        why = "its chat template does not keep the messages as they are"
        raise fail("R206", where=where, why=why, fix="Sample without --chat")
    return Script(pieces[0][0], pieces[0][2], pieces[1][0])
