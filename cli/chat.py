"""`radlads chat`: a conversation on the terminal or through a pipe. What it looks like is the affair of `screen`."""

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from radlads.cli.options import ModelOptions, SamplingOptions, opt
from radlads.cli.render import counted, size
from radlads.cli.screen import Screen
from radlads.errors import RadladsError, fail, nearest

if TYPE_CHECKING:
    from radlads.session import Generation, Session

HELP = """\
/help, h            this list
/reset, /clear, r   forget everything said
/system TEXT        set the system prompt (it holds for the whole conversation)
/set NAME VALUE     change temp, top-p, top-k, min-p, repetition-penalty, seed or max-tokens; alone it shows them
/undo               take back the last message and its answer
/retry              answer the last message again
/fork               keep this point of the conversation; /fork N goes back to the kept point N
/save FILE          keep the conversation in a file; /load FILE takes it up again
/tokens             length of the conversation and size of the state
/stats              speed of the last answer; after each answer from now on, or no more
/exit, /bye, q      leave
Lines between two \"\"\" marks are one message. Ctrl-C stops the answer; twice leaves."""

ALIASES = {"/clear": "/reset", "/bye": "/exit", "/quit": "/exit", "/?": "/help", "q": "/exit", "r": "/reset", "h": "/help"}

COUNTS = ("max-tokens", "top-k", "seed")  # settings that are whole numbers


@dataclass(kw_only=True)
class ChatOptions(ModelOptions, SamplingOptions):
    """How the conversation starts."""

    temp: float = opt(0.7, "Temperature; 0 takes the most likely token.", panel="Sampling")
    top_p: float = opt(0.95, "Keep the most likely tokens that sum to this probability; 1 is off.", panel="Sampling")
    max_tokens: int = opt(512, "Tokens of one answer at most.", "--max-tokens", "-m")
    system_prompt: str | None = opt(None, "System prompt, for models with a chat template.", metavar="TEXT")
    stats: bool = opt(False, "Show the speed after each answer.", "--stats")
    load_state: str | None = opt(None, "Go on with the conversation in this file.", metavar="FILE")


@dataclass
class ChatResult:
    """How many messages were answered."""

    turns: int

    def blocks(self) -> list[str]:
        """Nothing: all was said on the screen."""
        return []


def chat(options: ChatOptions) -> ChatResult:
    """Talk with a model until the input ends; KeyboardInterrupt when Ctrl-C comes twice."""
    from radlads.session import Session
    from radlads.states import model_fingerprint

    sampling = options.sampling()
    folder, tokenizer, engine = options.open()
    session = Session(engine, tokenizer, sampling, options.max_tokens, options.system_prompt)
    fingerprint = model_fingerprint(folder)
    if options.load_state is not None:
        restore(session, options.load_state, fingerprint)
    screen = Screen()
    spec = folder.spec
    recurrent = spec.L - len(spec.kept_layers)
    screen.welcome(
        folder.name,
        f"{spec.recurrent or 'softmax'}, {recurrent} of {spec.L} layers recurrent, {spec.parameters() / 1e6:,.1f}M parameters, "
        f"{engine.name} on {engine.device}",
    )
    if session.plain:
        screen.say("note: this model has no chat template; it continues the text you write")
    return Chat(session, screen, options.stats, fingerprint).run()


@dataclass
class Chat:
    """A session on a screen, and the commands that begin with a slash."""

    session: "Session"
    screen: Screen
    stats: bool = False
    fingerprint: str = ""  # of the model, for the files of /save and /load
    forks: list["Session"] = field(default_factory=list)
    turns: int = 0

    def run(self) -> ChatResult:
        """Read and answer until the end; a second Ctrl-C in a row is raised as KeyboardInterrupt."""
        interrupted = False
        while True:
            try:
                line = self.screen.read()
                if line is None or not self.handle(line):
                    return ChatResult(self.turns)
                interrupted = False
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self.screen.end()
                self.screen.say("Ctrl-C again leaves")
            except RadladsError as error:
                if error.exit_status == 1:
                    raise
                self.screen.say(f"error: {error}")

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; False to leave. R101 for a command that makes no sense."""
        word, _, rest = line.partition(" ")
        word = ALIASES.get(word, word) if word.startswith("/") or not rest else word
        if not word.startswith("/"):
            if line:
                self.answer(self.session.say(line))
            return True
        if word == "/exit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.screen.say(HELP),
            "/reset": self.reset,
            "/system": self.system,
            "/set": self.set,
            "/undo": self.undo,
            "/retry": lambda _: self.answer(self.session.retry()),
            "/fork": self.fork,
            "/save": self.save,
            "/load": self.load,
            "/tokens": self.tokens,
            "/stats": self.toggle_stats,
        }
        if word not in commands:
            raise unknown(word, [*commands, "/exit"])
        commands[word](rest.strip())
        return True

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """Write an answer as it comes; closing the stream early keeps what was written."""
        with closing(pieces) as stream:
            for piece in stream:
                self.screen.piece(piece)
        self.screen.end()
        self.turns += 1
        if self.stats and self.session.last is not None:
            self.screen.say(speed(self.session.last))

    def reset(self, _: str) -> None:
        """Forget everything said."""
        self.session.reset()
        self.screen.say("forgotten")

    def system(self, text: str) -> None:
        """Set or remove the system prompt."""
        self.session.set_system(text)
        self.screen.say("system prompt set" if text else "system prompt removed")

    def set(self, text: str) -> None:
        """Change a setting, "temp 0.5", or show it; without a name show them all."""
        values = {name.replace("_", "-"): value for name, value in vars(self.session.sampling).items()}
        values["max-tokens"] = self.session.max_tokens
        name, _, raw = text.replace("=", " ").partition(" ")
        name = name.lstrip("-").replace("_", "-")
        if name in values and raw:
            value = number(name, raw.strip())
            if name == "max-tokens":
                self.session.max_tokens = int(value)
            else:
                changes: dict[str, Any] = {name.replace("-", "_"): value}
                self.session.set_sampling(replace(self.session.sampling, **changes))
            values[name] = value
        elif name and name not in values:
            raise unknown(name, list(values))
        shown = [name] if name else list(values)
        self.screen.say(", ".join(f"{key} {values[key]}" for key in shown))

    def undo(self, _: str) -> None:
        """Take back the last message and its answer."""
        turn = self.session.undo()
        self.screen.say(f"took back: {turn.said[:60]}")

    def fork(self, text: str) -> None:
        """Keep this point, or go back to the kept point `text`."""
        if not text:
            self.forks.append(self.session.fork())
            self.screen.say(f"kept this point; /fork {len(self.forks)} goes back to it")
        elif text.isdecimal() and 0 < int(text) <= len(self.forks):
            self.session = self.forks[int(text) - 1].fork()
            self.screen.say(f"back at point {text}, messages {len(self.session.turns)}")
        else:
            why = f"there is no such point, {len(self.forks)} are kept"
            raise fail("R101", where=f"/fork {text}", why=why, fix="Keep one with /fork, go back with /fork N")

    def save(self, file: str) -> None:
        """Keep the conversation in a file."""
        from radlads.states import save_state

        session = self.session
        point = session.point()
        follows = "text" if session.plain else "answer"
        written = save_state(
            path_of(file, "/save"),
            session.engine,
            point,
            self.fingerprint,
            follows=follows,
            session=session.record(),
            token_ids=session.ids,
        )
        self.screen.say(f"kept {counted(len(session.turns), 'message')} in {file} ({size(written)})")

    def load(self, file: str) -> None:
        """Take up a conversation from a file, or change nothing if that fails."""
        session = self.session.fork()
        restore(session, path_of(file, "/load"), self.fingerprint)
        self.session = session
        self.screen.say(f"taken up: {counted(len(session.turns), 'message')}, {counted(len(session.ids), 'token')}")

    def tokens(self, _: str) -> None:
        """Show the length of the conversation and the size of the state."""
        spec = self.session.engine.spec
        state = f"state {size(spec.state_bytes(len(self.session.ids)))}"
        state += ", growing with every token of its softmax layers" if spec.kept_layers else ", at any length"
        self.screen.say(f"tokens {len(self.session.ids):,}, messages {len(self.session.turns)}, {state}")

    def toggle_stats(self, _: str) -> None:
        """Show the speed after each answer from now on, or no more."""
        self.stats = not self.stats
        last = f"; last answer: {speed(self.session.last)}" if self.session.last is not None else ""
        self.screen.say(f"stats {'on' if self.stats else 'off'}{last}")


def path_of(file: str, command: str) -> str:
    """The file a command names. R101 without one."""
    if not file:
        raise fail("R101", where=command, why="it needs a file", fix=f"Write for example `{command} talk.state`")
    return file


def restore(session: "Session", file: str, fingerprint: str) -> None:
    """Take up the conversation of a file. R201 or R304 when the file cannot be used."""
    from radlads.states import load_state, unusable

    saved = load_state(file, fingerprint)
    if saved.session is None:
        raise unusable(file, "it is a bare state, not a conversation", "Use it with `radlads generate --load-state`")
    try:
        session.restore(saved.point(session.engine), saved.token_ids, saved.session)
    except (ValueError, TypeError, KeyError) as error:
        raise unusable(file, str(error) or "the conversation in it is damaged", "Save the conversation again") from None


def speed(answer: "Generation") -> str:
    """Tokens and speed of one answer."""
    return (
        f"{answer.fed_tokens} tokens read at {answer.prompt_tps:.4g} tok/s, "
        f"{len(answer.token_ids)} written at {answer.generation_tps:.4g} tok/s"
    )


def number(name: str, raw: str) -> float | int:
    """The value of a setting; R101 when it is no number."""
    kind = int if name in COUNTS else float
    try:
        value: float | int = kind(raw)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (name == "max-tokens" and value < 1):
        raise fail("R101", where=f"/set {name}", why=f"{raw!r} is no fitting number", fix=f"Write for example `/set {name} 1`")
    return value


def unknown(word: str, known: list[str]) -> RadladsError:
    """R101 with the nearest known word."""
    near = nearest(word, known)
    fix = f"The nearest is {near}" if near else "/help lists the commands"
    return fail("R101", where=word, why="there is no such command or setting", fix=fix)
