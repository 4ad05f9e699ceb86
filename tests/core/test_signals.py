"""Signals that ask for a stop."""

import os
import signal

import pytest

from ernie_train.core.errors import Interrupted
from ernie_train.core.signals import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal_name == number.name


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGTERM"


def test_flags_nest() -> None:
    with StopFlag() as outer:
        with StopFlag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.requested
        assert outer.requested
        with StopFlag() as late:
            assert late.requested
    with StopFlag() as fresh:
        assert not fresh.requested


def test_interrupts_are_counted_through_nested_flags() -> None:
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with StopFlag(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_without_a_signal() -> None:
    with StopFlag() as stop:
        stop.request("rank 3")
        assert stop.requested and stop.signal_name == "rank 3"


def test_the_first_signal_is_acknowledged_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopFlag("stopping soon"), StopFlag():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "\nSIGTERM: stopping soon\n"


def test_work_with_nothing_to_save_ends_at_once() -> None:
    with StopFlag() as stop:
        with pytest.raises(Interrupted, match="SIGINT"), stop.at_once():
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")
        with pytest.raises(Interrupted), stop.at_once():  # asked for before
            raise AssertionError("it began")
        os.kill(os.getpid(), signal.SIGTERM)  # outside of the block it is noted again
