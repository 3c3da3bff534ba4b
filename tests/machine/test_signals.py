"""A first signal lets the work save, a later one does not."""

import os
import signal
import threading

import pytest

from simmimlib.machine import signals
from simmimlib.machine.signals import stop_signals


def test_the_signals_of_one_stop_are_one():
    """Slurm sends SIGTERM to every process of a job, and the stage passes its own on to the training as SIGINT."""
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == ["SIGTERM"]


def test_a_later_signal_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals, "ONE_STOP_SECONDS", -1.0)
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="stopped by a second signal, without saving"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_beside_the_main_thread_there_are_no_signals():
    def work():
        with stop_signals() as stopped:
            assert stopped == []

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
