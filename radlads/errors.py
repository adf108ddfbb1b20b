"""One error for everything a user can cause: what, where, why, how to fix it."""

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches

# Exit status of the command line, by the code or its first digit. The place of an output is chosen by the user, as an input is.
EXIT_STATUS = {"R401": 2, "1": 2, "2": 2, "3": 2, "4": 1, "5": 3}

CODES = {
    "R101": "unknown option or value",
    "R102": "recipe not valid",
    "R103": "stage order",
    "R104": "optional package missing",
    "R201": "file not readable",
    "R202": "weights file not valid",
    "R203": "tensors do not fit the model",
    "R204": "config not valid",
    "R205": "architecture not supported",
    "R206": "tokenizer not usable",
    "R207": "values not finite",
    "R301": "data not readable",
    "R302": "data too short",
    "R303": "run folder belongs to another run",
    "R304": "saved state not usable",
    "R401": "output not writable",
    "R402": "no space left",
    "R403": "out of memory",
    "R404": "training diverged",
    "R405": "backend not available",
    "R406": "a process of the run failed",
    "R407": "upload failed",
    "R501": "gate not met",
}


@dataclass
class RadladsError(Exception):
    """An error with a code of `CODES`, the place, the reason and the fix; printed as one line, without a traceback."""

    code: str
    where: str
    why: str
    fix: str

    def __post_init__(self) -> None:
        super().__init__(str(self))

    def __str__(self) -> str:
        end = "" if self.why.endswith(("?", "!")) else "."
        return f"{self.code} {CODES[self.code]}: {self.where}: {self.why}{end} {self.fix}"

    def __reduce__(self) -> tuple[type["RadladsError"], tuple[str, str, str, str]]:
        """An error of another process arrives whole."""
        return RadladsError, (self.code, self.where, self.why, self.fix)

    @property
    def exit_status(self) -> int:
        """Exit status of the command line: 2 for usage and bad input, 1 for a failure, 3 for a gate that was not met."""
        return EXIT_STATUS.get(self.code, EXIT_STATUS[self.code[1]])


def fail(code: str, *, where: object, why: str, fix: str) -> RadladsError:
    """Build the error to raise: `raise fail("R201", where=path, why="...", fix="...")`."""
    end = "" if fix.endswith((".", "?", "`")) else "."
    return RadladsError(code, printable(str(where)), printable(why.rstrip(".")), fix + end)


def nearest(name: str, known: Collection[str]) -> str:
    """The one of `known` that a mistyped or shortened `name` most likely means; empty when none is near."""
    starts = [word for word in known if name and word.startswith(name)]
    return next(iter(starts or get_close_matches(name[:80], known, 1, 0.5)), "")


def printable(text: str, limit: int = 2000) -> str:
    """Text from a file made safe for a terminal: control characters escaped, length bounded."""
    safe = "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else safe[:limit] + "..."
