"""Ends a training process that the others of its machine have left, from outside: a process of its own, without torch.

Inside, a call that waits for a GPU may hold the interpreter, and then no thread of the process runs any more.

Run: python lookout.py PID MESSAGE RANK:PID...
"""

import os
import select
import signal
import sys
import time

# Seconds that the process has to notice by itself, which lets it say more.
GRACE = 15.0


def look_out(pid: int, message: str, others: dict[str, int]) -> None:
    """Until process `pid` ends: when one of the others (rank to pid) does, wait a little, say so and kill `pid`."""
    own = os.pidfd_open(pid)  # type: ignore[attr-defined,unused-ignore]
    waiting = select.poll()
    waiting.register(own, select.POLLIN)
    ranks: dict[int, str] = {}
    for rank, other in others.items():
        handle = os.pidfd_open(other)  # type: ignore[attr-defined,unused-ignore]
        waiting.register(handle, select.POLLIN)
        ranks[handle] = rank
    ended = {handle for handle, _ in waiting.poll()}
    if own in ended:
        return
    time.sleep(GRACE)
    alone = select.poll()
    alone.register(own, select.POLLIN)
    if not alone.poll(0):
        gone = ", ".join(ranks[handle] for handle in ended)
        print(message.replace("RANK", gone), file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; this one waits for its own
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pairs = (text.split(":") for text in sys.argv[3:])
    try:
        look_out(int(sys.argv[1]), sys.argv[2], {rank: int(pid) for rank, pid in pairs})
    except ProcessLookupError:  # somebody was gone before this began: the thread inside sees that
        sys.exit(0)
