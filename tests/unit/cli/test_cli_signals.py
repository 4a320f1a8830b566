"""The stop signals of a command, in small programs of their own."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from flows.signals import STOPPED, Signals, end_in_order, publishing
from kdrl_core.errors import Stopped
from kdrl_core.ledger.lock import stop_if_requested, stop_requested

def say(text):
    print(text, flush=True)

with Signals(say, "last words", grace_s=1.0, limit_s=2.0) as came:
    try:
        {work}
    except Stopped as stop:
        say(f"published; {{stop}}")
    except KeyboardInterrupt:
        say("interrupted")
        {cleaning}
sys.exit(STOPPED)
"""
IN_STEPS = """
        with publishing():
            say("ready")
            while True:
                time.sleep(0.2)
                stop_if_requested()"""
LONG_STEP = """
        with publishing():
            say("ready")
            time.sleep(60)"""
STARTING = """
        say("ready")
        time.sleep(60)"""
STUBBORN = "time.sleep(60)"
REPORTING = """
        with publishing():
            say("ready")
            while stop_requested() is None:
                time.sleep(0.1)
            end_in_order()
            time.sleep(1.5)
            say("reported")"""


def ended(work: str, *signals: signal.Signals, cleaning: str = "pass") -> tuple[int, str, float]:
    """Exit code, output and seconds of a program that gets the signals, a moment apart."""
    program = PROGRAM.format(work=work.strip(), cleaning=cleaning)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        said = process.stdout.read()
        return process.wait(30), said, time.monotonic() - began


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGHUP, "the end of its terminal (SIGHUP)"),
    ],
)
def test_the_first_signal_lets_the_work_in_hand_be_published(number: signal.Signals, name: str) -> None:
    code, said, seconds = ended(IN_STEPS, number)
    assert code == 130
    first = f"{name}: stopping when the work in hand is published; once more to stop at once"
    assert said == f"{first}\npublished; stopped by {name}\n"
    assert seconds < 1


def test_work_that_takes_longer_than_the_grace_is_interrupted() -> None:
    code, said, seconds = ended(LONG_STEP, signal.SIGTERM)
    assert code == 130
    assert said.endswith("interrupted\n")
    assert 1 <= seconds < 2


def test_what_is_left_after_the_stop_is_not_interrupted() -> None:
    """Prefect is told that the flow was cancelled, also if the grace ends meanwhile; it would be told of a crash."""
    code, said, seconds = ended(REPORTING, signal.SIGTERM)
    assert code == 130
    assert said.endswith("reported\n")
    assert seconds >= 1.5


def test_what_cannot_be_interrupted_ends_at_the_limit_with_its_last_words() -> None:
    code, said, seconds = ended(LONG_STEP, signal.SIGINT, cleaning=STUBBORN)
    assert code == 130
    assert said.endswith("interrupted\nlast words\n")
    assert 2 <= seconds < 3


def test_the_second_signal_ends_it_at_once() -> None:
    code, said, seconds = ended(LONG_STEP, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert said.endswith("interrupted\n")
    assert seconds < 1


def test_whatever_else_comes_does_not_disturb_the_end() -> None:
    """A third Ctrl-C of an impatient user: no traceback, the shell's exit code."""
    code, said, _ = ended(LONG_STEP, *[signal.SIGINT] * 4, cleaning=STUBBORN)
    assert code == 130
    assert "Traceback" not in said
    assert said.endswith("last words\n")


def test_nothing_is_in_hand_before_a_flow_begins() -> None:
    code, said, seconds = ended(STARTING, signal.SIGTERM)
    assert code == 130
    assert "interrupted\n" in said
    assert seconds < 1


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup kdrl run …` goes on when the terminal is closed."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM.format(
        work=IN_STEPS.strip(), cleaning="pass"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 130
