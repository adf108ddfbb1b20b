"""`radlads cache`: read a long prompt once, and keep where the model stands after it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from radlads.cli.generate import prompt_text
from radlads.cli.options import ModelOptions, opt
from radlads.errors import fail

# Tokens between two looks at the clock.
STEP = 4096


@dataclass(kw_only=True)
class CacheOptions(ModelOptions):
    """What to read, and where to keep the state."""

    prompt: str | None = opt(None, "The text to read; - reads it from stdin.", "--prompt", "-p", metavar="TEXT")
    ignore_chat_template: bool = opt(False, "Read the text as it stands, not as a message's beginning.", "--ignore-chat-template")
    output_file: str = opt("prompt.state", "File to write.", "--output-file", "-o", metavar="FILE")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class CacheResult:
    """What was kept."""

    file: str
    position: int
    bytes: int
    seconds: float
    model: str

    def blocks(self) -> Iterator[str]:
        """The file, and how to go on from it."""
        from radlads.cli.render import counted, size

        after = counted(self.position, "token")
        yield f"{self.file}  {size(self.bytes)}, the state after {after}, read in {self.seconds:.1f} s"
        yield f'Next: `radlads generate {self.model} --load-state {self.file} -p "..."` goes on from there.'


def cache(options: CacheOptions) -> CacheResult:
    """Read a prompt and write the model's state after it."""
    from radlads.cli.render import progress_lines
    from radlads.data.chat import script_of
    from radlads.session import Context
    from radlads.states import model_fingerprint, save_state

    text = prompt_text(options.prompt, "radlads cache")
    folder, tokenizer, engine = options.open()
    templated = tokenizer.has_chat_template and not options.ignore_chat_template
    # In a chat the text is the beginning of the first question.
    opening = script_of(tokenizer.chat, folder.path).opening if templated else ""
    ids = tokenizer.encode(opening + text, add_special=not templated)
    if not ids:
        raise fail("R101", where="the prompt", why="it is empty", fix="Give some text")
    context, began, report = Context(engine), time.perf_counter(), progress_lines("reading")
    for end in range(STEP, len(ids), STEP):
        context.reach(ids[:end])
        report(end, len(ids))
    point, _ = context.reach(ids)
    seconds = time.perf_counter() - began
    follows = "question" if templated else "text"
    written = save_state(options.output_file, engine, point, model_fingerprint(folder), follows=follows)
    return CacheResult(options.output_file, len(ids), written, seconds, str(folder.path))
