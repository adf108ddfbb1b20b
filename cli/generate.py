"""`radlads generate`: text from a prompt, streamed, or as JSON."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from radlads.cli.options import ModelOptions, SamplingOptions, opt
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.tokenizer import Tokenizer


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions, SamplingOptions):
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
    """What was written, and what it took; speeds in tokens per second, memory in bytes."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int
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
            f"prompt {self.prompt_tokens} tokens, {self.prompt_tps:.4g} tok/s | "
            f"generated {self.generated_tokens} tokens, {self.generation_tps:.4g} tok/s | "
            f"peak memory {size(self.peak_memory)} | {self.backend} on {self.device}"
        )


def generate(options: GenerateOptions, write: Callable[[str], None] | None = None) -> GenerateResult:
    """Write text from a prompt; `write` gets each piece as it is made."""
    from radlads.cli.render import note
    from radlads.session import stream

    sampling = options.sampling()
    prompt = _prompt(options.prompt)
    folder, tokenizer, engine = options.open()
    prompt_ids = _prompt_ids(tokenizer, prompt, options)
    if not tokenizer.has_chat_template and not options.ignore_chat_template:
        note("note: this model has no chat template; the prompt is continued as plain text")
    generation = stream(engine, tokenizer, prompt_ids, sampling, options.max_tokens, options.stop)
    for piece in generation:
        if write is not None:
            write(piece)
    if write is not None:
        write("\n")
    result = GenerateResult(
        text=generation.text,
        token_ids=generation.token_ids,
        logprobs=generation.logprobs,
        finish_reason=generation.finish,
        prompt_tokens=len(prompt_ids),
        generated_tokens=len(generation.token_ids),
        prompt_tps=generation.prompt_tps,
        generation_tps=generation.generation_tps,
        peak_memory=peak_memory(),
        model=str(folder.path),
        backend=engine.name,
        device=engine.device,
        seed=sampling.seed,
    )
    if options.stats:
        note(result.stats())
    return result


def peak_memory() -> int:
    """The most memory this process held so far, in bytes (0 where the system does not say)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise fail("R101", where="radlads generate", why="there is no prompt", fix='Give one with -p "...", or pipe it in')
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("R301", where="stdin", why=f"not UTF-8 at byte {error.start}", fix="Send the prompt as UTF-8 text") from None


def _prompt_ids(tokenizer: "Tokenizer", prompt: str, options: GenerateOptions) -> list[int]:
    if tokenizer.has_chat_template and not options.ignore_chat_template:
        system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
        return tokenizer.encode(tokenizer.chat([*system, {"role": "user", "content": prompt}]))
    if options.system_prompt:
        why = "without a chat template a system prompt has no place"
        raise fail("R101", where="--system-prompt", why=why, fix="Put the instructions into the prompt")
    return tokenizer.encode(prompt, add_special=True)
