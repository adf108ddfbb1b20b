"""What the chat looks like: a quiet screen on a terminal, nothing but the answers in a pipe."""

import sys

from radlads.cli.render import note, styled, write_text
from radlads.errors import fail

PROMPT = ">>> "
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


class Screen:
    """Reads lines and writes answers; on a terminal with a prompt and colours, in a pipe without."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.coloured = self.interactive and styled(sys.stdout)
        if self.interactive:
            try:
                import readline  # noqa: F401  (gives `input` history and editing)
            except ImportError:
                pass  # not on every system; lines can still be typed

    def welcome(self, title: str, details: str) -> None:
        """The first lines; in a pipe there are none."""
        if not self.interactive:
            return
        if self.coloured:
            from rich.console import Console
            from rich.panel import Panel
            from rich.text import Text

            text = Text.assemble((title, "bold"), "\n", (details, "dim"))
            Console().print(Panel(text, expand=False, border_style="dim"))
        else:
            print(f"{title}\n{details}")
        note("/help lists the commands, /exit or Ctrl-D leaves.")

    def read(self) -> str | None:
        '''The next message, without surrounding space; None at the end. A message may span lines between """ marks.'''
        line = self._line(PROMPT)
        if line is None or not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            more = self._line("... ")
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines).removesuffix('"""').strip("\n")

    def piece(self, text: str) -> None:
        """A piece of the answer."""
        write_text(text)

    def end(self) -> None:
        """The end of the answer."""
        write_text("\n")

    def say(self, text: str) -> None:
        """Something about the chat that is no part of it; on stderr, so that a pipe carries answers alone."""
        note(text)

    def _line(self, prompt: str) -> str | None:
        if self.interactive:
            try:
                # readline must not count the colour codes: they stand between its own marks.
                return input(f"\x01{BOLD}\x02{prompt}\x01{PLAIN}\x02" if self.coloured else prompt).strip()
            except EOFError:
                print()
                return None
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise fail("R301", where="stdin", why=f"not UTF-8 at byte {error.start}", fix="Send UTF-8 text") from None
        return line.strip() if line else None
