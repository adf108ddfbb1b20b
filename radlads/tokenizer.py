"""A model folder's tokenizer: text to ids, ids to text, chat messages to a prompt.

Wraps tokenizer.json, tokenizer_config.json, chat_template.jinja and the end-of-text ids. No code of the folder is run;
the chat template is rendered in a sandbox with limits.
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from radlads.errors import RadladsError, fail
from radlads.files import read_bytes, read_json
from radlads.tensors import contained

END_OF_TEXT = "<|endoftext|>"
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_PROMPT_CHARS = 10 * 2**20
MAX_RENDER_SECONDS = 5.0

Message = dict[str, str]


def continued(text: str, said: str) -> str:
    """A conversation without a template after someone said something: on a line of its own."""
    return text + ("\n" if text and not text[-1].isspace() else "") + said


class Tokenizer:
    """The tokenizer of a model folder; R206 when a file is missing, broken or names ids beyond `vocab_size`."""

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self.path = Path(path)
        self._fast = _load_fast(self.path / "tokenizer.json")
        self._config = _read_table(self.path / "tokenizer_config.json")
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        limit = vocab_size if vocab_size is not None else self.vocab_size
        if self.vocab_size > limit:
            why = f"it has ids up to {self.vocab_size - 1}, the model only {limit} tokens"
            raise _unusable(self.path / "tokenizer.json", why)
        self.bos_id = self._special_id("bos_token")
        self.eos_ids = self._read_eos_ids(limit)
        self._template_source = self._read_template()

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of `text`; `add_special` puts the begin-of-text id in front where the tokenizer asks for one."""
        try:
            ids = list(self._fast.encode(text, add_special_tokens=add_special).ids)
        except UnicodeEncodeError:
            why = "it holds half a surrogate pair, which is no character"
            raise fail("R301", where="text", why=why, fix="Send valid UTF-8") from None
        begins = self._config.get("add_bos_token")
        if add_special and self.bos_id is not None and isinstance(begins, bool):
            has_bos = ids[:1] == [self.bos_id]
            if begins and not has_bos:
                ids.insert(0, self.bos_id)
            elif has_bos and not begins:
                del ids[0]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; uses every core."""
        return [encoded.ids for encoded in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids without a token (padding rows of the embedding) give nothing."""
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def decode_batch(self, rows: Sequence[Sequence[int]], skip_special: bool = True) -> list[str]:
        """Text of each of `rows`; uses every core."""
        return list(self._fast.decode_batch([list(ids) for ids in rows], skip_special_tokens=skip_special))

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document in training data: <|endoftext|> where there is one, for a chat model's own ends a turn."""
        end_of_text = self._fast.token_to_id(END_OF_TEXT)
        return min(self.eos_ids, default=None) if end_of_text is None else end_of_text

    @property
    def begin_id(self) -> int | None:
        """The id in front of a text: what the tokenizer puts there, without that what ends a document."""
        return next(iter(self.encode("", add_special=True)), self.eos_id)

    @property
    def chat_template(self) -> str | None:
        """Source of the template that makes messages a prompt."""
        return self._template_source

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how messages become a prompt."""
        return self._template_source is not None

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text of `messages` ({"role", "content"}); R206 when the template fails or breaks a limit."""
        if self._template_source is None:
            raise fail("R206", where=self.path, why="the model has no chat template", fix="Use plain prompts with this model")
        special = {name: self._special_text(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        variables = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt, **special}
        try:
            return _render(self._template_source, variables)
        except Exception as error:  # a template can fail in every way Python can
            raise _unusable(self.path, f"the chat template fails: {error or type(error).__name__}") from None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt text of `messages`: the template's, or without a template all of them as one text to go on with."""
        if self.has_chat_template:
            return self.chat(messages)
        text = ""
        for message in messages:
            text = text + message["content"] if message["role"] == "assistant" else continued(text, message["content"])
        return text

    @cached_property
    def turn_ids(self) -> frozenset[int]:
        """The token that the chat template writes right behind an answer, as <|im_end|> or <sep>: it ends the answer, whether
        the model's files list it as an end or not. Empty where that is no token of its own."""
        said, answer = "Hello.", "An answer."
        try:
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            _, found, behind = self.chat(messages, add_generation_prompt=False).rpartition(answer)
        except RadladsError:  # it has no template, or one that wants something else
            return frozenset()
        first = self.encode(behind.lstrip())[:1] if found else []
        return frozenset(first) & self._fast.get_added_tokens_decoder().keys()

    def _special_text(self, name: str) -> str:
        value = self._config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def _special_id(self, name: str) -> int | None:
        text = self._special_text(name)
        return self._fast.token_to_id(text) if text else None

    def _read_eos_ids(self, limit: int) -> frozenset[int]:
        found = {self._special_id("eos_token")} - {None}
        for file in ("config.json", "generation_config.json"):
            value = _read_table(self.path / file).get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is None:
                    continue
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < limit:
                    raise _unusable(self.path / file, f"eos_token_id {token!r} is no id below {limit}")
                found.add(token)
        return frozenset(token for token in found if token is not None)

    def _read_template(self) -> str | None:
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file, MAX_TEMPLATE_BYTES)
        source = self._config.get("chat_template")
        if isinstance(source, list):
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
            raise _unusable(self.path / "tokenizer_config.json", "chat_template is no text of at most 1 MB")
        return source


class StreamDecoder:
    """Turns ids into text one at a time and never hands out half a character.

    `context` holds the last ids of the prompt: some tokenizers write a word differently at the start of a text.
    """

    CONTEXT = 8  # ids decoded again in front of the new one
    PATIENCE = 8  # a character has at most four bytes, so what stays broken for eight tokens is no character

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = list(context[-self.CONTEXT :])
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """The text that is certain after `token`; may be empty."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd") and len(self._ids) - self._read < self.PATIENCE:
            return ""
        self._ids = self._ids[-self.CONTEXT :]
        self._read = len(self._ids)
        return text

    def finish(self) -> str:
        """What is left at the end, without an unfinished character."""
        return self._pending().rstrip("\ufffd")

    def _pending(self) -> str:
        before = self._decode(self._ids[: self._read])
        return self._decode(self._ids)[len(before) :]


def _load_fast(file: Path) -> FastTokenizer:
    text = _read_text(file, MAX_TOKENIZER_BYTES)
    try:
        return FastTokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise _unusable(file, f"not a tokenizer.json: {error}") from None


def _read_text(file: Path, limit: int) -> str:
    try:
        return read_bytes(contained(file.parent, file.name), limit).decode("utf-8")
    except RadladsError as error:
        raise _unusable(file, error.why) from None
    except UnicodeDecodeError as error:
        raise _unusable(file, f"not UTF-8 at byte {error.start}") from None


def _read_table(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    table = read_json(contained(file.parent, file.name), code="R206")
    if not isinstance(table, dict):
        raise _unusable(file, "it holds no table of settings")
    return table


def _unusable(where: Path, why: str) -> RadladsError:
    return fail("R206", where=where, why=why, fix="Copy the tokenizer files of the teacher into the folder")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, where repetition and powers cannot fill the memory either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MAX_PROMPT_CHARS:
            raise SecurityError(f"'{operator}' makes too large a value")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(source)


def _render(source: str, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    before = sys.gettrace()
    sys.settrace(_deadline(time.monotonic() + MAX_RENDER_SECONDS))
    try:
        for piece in _compiled(source).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_PROMPT_CHARS:
                raise SecurityError("the prompt grows beyond 10 MB")
    finally:
        sys.settrace(before)
    return "".join(pieces)


def _deadline(end: float) -> Any:
    """A trace function that stops Python code after `end`: works in every thread, unlike a signal."""

    def check(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise SecurityError(f"it ran longer than {MAX_RENDER_SECONDS:g} seconds")
        return check

    return check


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """JSON as templates of the field expect it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
