"""Ctrl-C, SIGTERM and the end of the terminal as a wish to stop, which a run fulfils when it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Stopped(Exception):
    """A signal, of number ``signum``, asked the program to stop; ``where`` says how far it had got."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.where = ""


class Stop:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        """Raise `Stopped` if so."""
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Catch the signals for as long as it lasts. The second one of a kind acts at once, as it did before.

    A signal that is ignored stays so: a shell without job control starts what goes on behind it (``&``) so that Ctrl-C is not
    meant for it. Outside the main thread, where Python lets nobody catch signals, nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {int(signum): signal.getsignal(signum) or signal.SIG_DFL for signum in SIGNALS}
    before = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        signal.signal(signum, before[signum])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
