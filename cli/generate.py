"""`radlads generate`: text from a prompt, streamed, or as JSON."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from radlads.cli.options import ModelOptions, SamplingOptions, StateOptions, opt
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.tokenizer import Tokenizer


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions, SamplingOptions, StateOptions):
    """What to write, and how long."""

    prompt: str | None = opt(None, "The prompt; - reads it from stdin.", "--prompt", "-p", metavar="TEXT")
    max_tokens: int = opt(256, "Tokens to write at most.", "--max-tokens", "-m")
    system_prompt: str | None = opt(None, "System prompt, for models with a chat template.", metavar="TEXT")
    ignore_chat_template: bool = opt(False, "Continue the prompt as it stands.", "--ignore-chat-template")
    stop: list[str] = opt([], "Stop before this text; may be given several times.", metavar="TEXT")
    stats: bool = opt(False, "Print speed and memory on stderr.", "--stats")
    json: bool = opt(False, "Print one JSON document instead of the text.", "--json")


@dataclass
class GenerateResult:
    """What was written, and what it took: speeds in tokens per second, the prompt's with all that a first use makes ready, the
    text's from its second step on; memory of the GPU where there is one, else of the process, in bytes.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    prompt_tps: float
    generation_tps: float
    peak_memory: int
    model: str
    backend: str
    device: str
    seed: int

    def stats(self) -> str:
        """Speed and memory in one line."""
        from radlads.cli.render import size

        return (
            f"prompt {self.prompt_tokens} tokens in {self.prompt_seconds:.3g} s, {self.prompt_tps:.4g} tok/s | "
            f"generated {self.generated_tokens} tokens, {self.generation_tps:.4g} tok/s | "
            f"peak memory {size(self.peak_memory)} | {self.backend} on {self.device}"
        )


def generate(options: GenerateOptions, write: Callable[[str], None] | None = None) -> GenerateResult:
    """Write text from a prompt; `write` gets each piece as it is made."""
    from radlads.backends import peak_memory
    from radlads.cli.render import note
    from radlads.session import Context, Generation

    sampling = options.sampling()
    prompt = prompt_text(options.prompt, "radlads generate")
    opened = options.open()
    folder, tokenizer, engine = opened
    loaded = options.loaded(opened)
    context = Context(engine, None if loaded is None else loaded.point(engine))
    prompt_ids = _prompt_ids(tokenizer, prompt, options, None if loaded is None else loaded.follows)
    if not tokenizer.has_chat_template and not options.ignore_chat_template:
        note("note: this model has no chat template; the prompt is continued as plain text")
    generation = Generation(context, tokenizer, prompt_ids, sampling, options.max_tokens, options.stop)
    for piece in generation:
        if write is not None:
            write(piece)
    if write is not None:
        write("\n")
    if options.save_state is not None:
        from radlads.states import model_fingerprint, save_state

        point, _ = context.reach(prompt_ids + generation.token_ids)
        follows = "answer" if tokenizer.has_chat_template and not options.ignore_chat_template else "text"
        save_state(options.save_state, engine, point, model_fingerprint(folder), follows=follows)
    result = GenerateResult(
        text=generation.text,
        token_ids=generation.token_ids,
        logprobs=generation.logprobs,
        finish_reason=generation.finish,
        prompt_tokens=len(prompt_ids),
        generated_tokens=len(generation.token_ids),
        prompt_seconds=generation.prompt_seconds,
        prompt_tps=generation.prompt_tps,
        generation_tps=generation.generation_tps,
        peak_memory=peak_memory(engine),
        model=str(folder.path),
        backend=engine.name,
        device=engine.device,
        seed=sampling.seed,
    )
    if options.stats:
        note(result.stats())
    return result


def prompt_text(given: str | None, where: str) -> str:
    """The prompt given on the command line or, without one or for "-", what stdin holds."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise fail("R101", where=where, why="there is no prompt", fix='Give one with -p "...", or pipe it in')
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("R301", where="stdin", why=f"not UTF-8 at byte {error.start}", fix="Send the prompt as UTF-8 text") from None


def _prompt_ids(tokenizer: "Tokenizer", prompt: str, options: GenerateOptions, follows: str | None) -> list[int]:
    """Ids of the prompt, in the chat template where there is one; after a state, what is left of the template."""
    templated = tokenizer.has_chat_template and not options.ignore_chat_template
    if options.system_prompt and (not templated or follows is not None):
        why = "after a state it comes too late" if follows else "without a chat template a system prompt has no place"
        raise fail("R101", where="--system-prompt", why=why, fix="Put the instructions into the prompt")
    if templated and follows in ("question", "answer"):
        from radlads.data.chat import script_of

        script = script_of(tokenizer.chat, options.model)
        return tokenizer.encode((script.again if follows == "answer" else "") + prompt + script.answer)
    if templated and follows is None:
        system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
        return tokenizer.encode(tokenizer.chat([*system, {"role": "user", "content": prompt}]))
    return tokenizer.encode(prompt, add_special=follows is None)
