"""SHA-256 of the input's files, taken beside the conversion and no faster than it: what it has just read is still in memory."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType

from radlads.errors import RadladsError
from radlads.files import open_regular

PIECE = 2**24


class InputHashes:
    """As a context: a thread hashes `paths` up to the share of their bytes that `reached` names; `result` waits for the rest."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.total = paths, sum(path.stat().st_size for path in paths)
        self.hashes: dict[str, str] = {}
        self.error: RadladsError | None = None
        self.share, self.stopped, self.changed = 0.0, False, Condition()
        self.thread = Thread(target=self.run, daemon=True)

    def __enter__(self) -> "InputHashes":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()

    def reached(self, share: float) -> None:
        """The conversion has come this far, from 0 to 1."""
        with self.changed:
            self.share = share
            self.changed.notify()

    def result(self) -> Mapping[str, str]:
        """Hash of each file by its name; R201 for one that cannot be read."""
        self.reached(1.0)
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.hashes

    def run(self) -> None:
        """Hash the files, one after the other."""
        done = 0
        try:
            for path in self.paths:
                digest = hashlib.sha256()
                with open_regular(path) as file:
                    while self.may_read(done) and (data := file.read(PIECE)):
                        digest.update(data)
                        done += len(data)
                if self.stopped:
                    return
                self.hashes[path.name] = digest.hexdigest()
        except RadladsError as error:
            self.error = error

    def may_read(self, done: int) -> bool:
        """True once the conversion is past what is done; False if it has ended before."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.share >= 1 or done < self.share * self.total)
            return not self.stopped
