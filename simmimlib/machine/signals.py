"""Ctrl-C and SIGTERM: the first one lets the work save."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

ONE_STOP_SECONDS = 3.0  # a cluster signals every process of a job, and what started this one passes its signal on


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yields a list that a first SIGINT or SIGTERM puts its name into; a later one interrupts at once."""
    caught: list[str] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not caught:
            first = time.monotonic()
            caught.append(signal.Signals(number).name)
        elif time.monotonic() - first > ONE_STOP_SECONDS:
            raise KeyboardInterrupt("stopped by a second signal, without saving")

    if threading.current_thread() is not threading.main_thread():
        yield caught  # signals reach the main thread only
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
