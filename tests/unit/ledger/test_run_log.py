"""The log of a run, and the lock that keeps it."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdrl_core.config.secrets import resolve_secret
from kdrl_core.errors import RunError, RunLockedError, Stopped
from kdrl_core.ledger import lock_holder, require_free, run_lock
from kdrl_core.ledger.lock import last_error, log_file, log_of, redact

SECRET = "sk-live-0123456789abcdef"  # noqa: S105


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def _fail(root: Path, error: BaseException) -> None:
    with run_lock(root / "run.lock"):
        raise error


def test_a_run_keeps_what_kdrl_says_and_the_warnings_of_the_rest(root: Path) -> None:
    with run_lock(root / "run.lock"), run_lock(root / "run.lock"):
        logging.getLogger("kdrl").debug("a detail")
        logging.getLogger("kdrl.sweep").info("a cell")
        logging.getLogger("urllib3").warning("a retry")
        logging.getLogger("urllib3").info("a connection")
    logging.getLogger("kdrl").warning("after the session")
    text = log_file(root).read_text()
    assert [text.count(said) for said in ("a detail", "a cell", "a retry")] == [1, 1, 1]
    assert "a connection" not in text
    assert "after the session" not in text


def test_an_error_is_kept_with_its_traceback_and_names_the_log(root: Path) -> None:
    with pytest.raises(RunError) as caught:
        _fail(root, RunError("stage1: no problems; loosen the filter"))
    assert log_of(caught.value) == str(log_file(root))
    text = log_file(root).read_text()
    assert "ERROR kdrl: session ends: stage1: no problems; loosen the filter" in text
    assert "Traceback" in text
    found = last_error(root)
    assert found is not None
    assert found["error"] == "stage1: no problems; loosen the filter"
    assert found["log"] == str(log_file(root))
    with pytest.raises(KeyError):
        _fail(root, KeyError("step"))
    assert (last_error(root) or {})["error"] == "KeyError: 'step'"


@pytest.mark.parametrize("stop", [Stopped("stopped by Ctrl-C"), KeyboardInterrupt()])
def test_a_session_that_was_stopped_is_no_error(root: Path, stop: BaseException) -> None:
    with pytest.raises(RunError):
        _fail(root, RunError("first"))
    with pytest.raises(type(stop)):
        _fail(root, stop)
    assert last_error(root) is None
    assert "ERROR kdrl: session ends: first" in log_file(root).read_text()


def test_neither_log_nor_last_error_holds_a_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_PASS", f"{SECRET}-of-a-teacher")
    monkeypatch.setenv("WANDB_API_KEY", f"{SECRET}-of-wandb")
    monkeypatch.setattr(sys, "argv", ["kdrl", "run", "--set", f"teacher.server.api_key={SECRET}"])
    resolved = resolve_secret("env:TEACHER_PASS")
    with pytest.raises(RuntimeError):
        _fail(root, RuntimeError(f"401 at https://user:{SECRET}@host/v1: {resolved} Authorization: Bearer {SECRET}"))
    logging.getLogger("kdrl").warning("none")
    with pytest.raises(ValueError, match="x"):
        _fail(root, ValueError(f"x {os.environ['WANDB_API_KEY']}"))
    for file in (log_file(root), root / "run.error.json"):
        assert SECRET not in file.read_text()
    assert "401 at https://***@host/v1" in log_file(root).read_text()


def test_ordinary_words_are_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-positive")
    monkeypatch.setenv("MAX_TOKENS", "1000000")
    text = "max_tokens=1000000 is a false-positive; tokens: 1,024; see https://host/v1, key columns"
    text += "; token 151936 has no row; tokenizers differ: token 'Hello!!' is 1234567; the secret ingredient"
    assert redact(text) == text


def test_the_log_is_rotated(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrl_core.ledger.lock._MAX_BYTES", 2_000)
    with run_lock(root / "run.lock"):
        for number in range(400):
            logging.getLogger("kdrl").info("line %d", number)
    files = sorted(root.glob("run.log*"))
    assert [path.name for path in files] == ["run.log", "run.log.1", "run.log.2", "run.log.3"]
    assert all(path.stat().st_size <= 2_000 for path in files)


def test_a_log_that_cannot_be_written_does_not_disturb_the_work(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root.mkdir(parents=True)
    (root / "run.log").mkdir()  # something is in the way
    (root / "run.error.json").mkdir()
    with run_lock(root / "run.lock"):
        logging.getLogger("kdrl").info("work")
    with pytest.raises(RunError):
        _fail(root, RunError("an error of the work"))
    assert "Traceback" not in capfd.readouterr().err
    assert last_error(root) is None


def test_neither_log_nor_last_error_follows_what_others_put_there(root: Path, tmp_path: Path) -> None:
    """A run that somebody else made may have a link or a FIFO in place of its log."""
    root.mkdir(parents=True)
    (victim := tmp_path / "victim").write_text("mine")
    (root / "run.log").symlink_to(victim)
    os.mkfifo(root / "run.error.json")
    assert last_error(root) is None
    with run_lock(root / "run.lock"):
        logging.getLogger("kdrl").info("work")
    (root / "run.log").unlink()
    os.mkfifo(root / "run.log")
    with run_lock(root / "run.lock"):
        logging.getLogger("kdrl").info("work")
    assert victim.read_text() == "mine"


def test_a_last_error_that_cannot_be_read_is_none(root: Path) -> None:
    root.mkdir(parents=True)
    for content in ("", "[]", '{"at": 1}', "[" * 100_000):
        (root / "run.error.json").write_text(content)
        assert last_error(root) is None


# --- looking at the lock ----------------------------------------------------------------------------------------------

LOOK = """
import sys, time
from pathlib import Path
from kdrl_core.ledger import lock_holder
lock, until, seen = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
print("looking", flush=True)
while time.monotonic() < until:
    seen += lock_holder(lock) is not None
print(seen)
"""


def _lookers(lock: Path, count: int, seconds: float) -> "list[subprocess.Popen[str]]":
    command = [sys.executable, "-c", LOOK, str(lock), str(seconds)]
    found = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for each in found:
        assert each.stdout is not None
        assert each.stdout.readline() == "looking\n"
    return found


def test_lookers_neither_see_each_other_nor_keep_a_run_from_its_lock(root: Path) -> None:
    lock = root / "run.lock"
    with run_lock(lock):
        pass
    lookers = _lookers(lock, 4, 1.5)
    assert [each.communicate()[0] for each in lookers] == ["0\n"] * 4
    lookers = _lookers(lock, 4, 2.0)
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        with run_lock(lock):
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1
    for each in lookers:
        each.communicate()


def test_a_looker_never_takes_the_exclusive_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = root / "run.lock"
    with run_lock(lock):
        pass
    asked = []
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (asked.append(how), real(file, how))[1])
    assert lock_holder(lock) is None
    assert asked == [fcntl.LOCK_SH | fcntl.LOCK_NB]


def test_the_holders_file_goes_with_the_holder(root: Path) -> None:
    lock = root / "run.lock"
    with run_lock(lock):
        assert json.loads((root / "run.holder.json").read_text())["pid"] == os.getpid()
        with run_lock(lock):
            pass
        assert (root / "run.holder.json").is_file()
        with pytest.raises(RunLockedError, match=f"run one is in use by pid {os.getpid()} "):
            require_free(lock)
    assert not (root / "run.holder.json").exists()
    require_free(lock)


def test_a_lock_that_is_no_file_holds_nobody_up(root: Path) -> None:
    root.mkdir(parents=True)
    os.mkfifo(root / "run.lock")
    assert lock_holder(root / "run.lock") is None
