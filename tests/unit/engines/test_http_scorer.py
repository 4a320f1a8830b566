"""Scoring by servers that fail in every way: what passes is tried again, what does not is told, no key gets out."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash.tiny_run import differing, open_tiny, results, train
from faulty_server import FaultyServer, faulty_server

from kdrl_core.boxes.session import close_sessions
from kdrl_core.config.paths import ASSETS
from kdrl_core.config.secrets import register_secret_source, resolve_secret
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.errors import EngineError, KdrlError, RecipeError, SecretError
from kdrl_core.ledger import is_published, open_run
from kdrl_core.models.loading import load_model
from kdrl_core.tables.files import load_metrics, read_table
from kdrl_core.types import ScoreRequest

TEACHER = ASSETS / "miniature" / "teacher"
KEY = "sk-planted-9f8e7d6c5b4a"
TESTS = Path(__file__).parents[2]
REQUESTS = [
    ScoreRequest(prompt_token_ids=list(range(5, 5 + n)), token_ids=[9, 4, 7, 11, 6, 1][: 2 + n % 5])
    for n in range(1, 9)
]
Make = Callable[..., HTTPScorer]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with faulty_server(TEACHER, key=KEY) as server:
        yield server


@pytest.fixture
def make(server: FaultyServer) -> Iterator[Make]:
    """A scorer with pauses of milliseconds; the server has no faults left from other tests."""
    server.faults.clear()
    scorers: list[HTTPScorer] = []

    def make(urls: list[str] | None = None, **options: Any) -> HTTPScorer:
        fast = {"api_key": KEY, "timeout_s": 0.5, "retry_for_s": 8.0, "first_pause_s": 0.01, "concurrency": 4}
        limits = {name: options.pop(name) for name in ("num_tokens", "max_tokens") if name in options}
        scorer = HTTPScorer(ServedModel(urls=urls or [server.url], **{**fast, **options}), **limits)
        scorers.append(scorer)
        return scorer

    yield make
    for scorer in scorers:
        scorer.close()


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    local = TransformersScorer(load_model(TEACHER), temperature=1.0, batch_tokens=2048)
    return local.score(REQUESTS)


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.fixture
def sleeper() -> Iterator[FaultyServer]:
    """One of `kdrl serve`."""
    with faulty_server(TEACHER, key=KEY) as server:
        server.can_be_told = True
        yield server


def test_servers_that_share_their_gpus_sleep_and_wake(
    make: Make, sleeper: FaultyServer, expected: list[np.ndarray]
) -> None:
    scorer = make([sleeper.url], sleep=True)
    same(scorer.score(REQUESTS), expected)
    scorer.sleep()
    assert sleeper.is_asleep
    same(scorer.score(REQUESTS), expected)
    assert sleeper.told == ["kdrl_wake", "kdrl_sleep", "kdrl_wake"]  # it may have been started asleep


def test_a_server_that_cannot_sleep_is_named(make: Make, server: FaultyServer) -> None:
    with pytest.raises(EngineError, match=r"teacher server .* answered 404: .*kdrl serve starts .* be told to sleep"):
        make(sleep=True).sleep()


@pytest.mark.usefixtures("fast_sessions")
def test_a_stage_takes_turns_with_a_teacher_that_shares_its_gpus(tmp_path: Path, sleeper: FaultyServer) -> None:
    """It scores nothing ahead, and sleeps while responses are sampled and the policy is updated."""
    shared = [f"teacher.server.{field}" for field in (f"urls=['{sleeper.url}']", "sleep=true", "api_key=env:SHARED")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARED", KEY)
        run = open_tiny(tmp_path, "r", ["stage1=null", "stage2.steps=2", *shared])
        train(run)
    changes = [told for told, _ in groupby(sleeper.told)]
    assert changes == ["kdrl_sleep", "kdrl_wake", "kdrl_sleep", "kdrl_wake", "kdrl_sleep"]
    assert [row["time/teacher_score_hidden_s"] for row in load_metrics(run, "stage2")] == [0.0, 0.0]


TRANSIENT = ["hang", "drop", "500", "503", "429", "garbage", "empty", "short", "null", "nan", "echo", "501", "520"]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_costs_only_time(
    fault: str, make: Make, server: FaultyServer, expected: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = make(timeout_s=2.0 if fault == "hang" else 60.0, retry_for_s=60.0)
    server.faults.extend([fault] * 3)
    before = server.requests
    same(scorer.score(REQUESTS), expected)
    assert server.requests - before == len(REQUESTS) + 3
    assert sum(record.name == "kdrl" and "tried again in" in record.message for record in caplog.records) == 3
    assert server.url in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("fault", ["", "short", "nan", "409", "503"])
def test_a_server_of_kdrl_sends_bytes(fault: str, make: Make, expected: list[np.ndarray]) -> None:
    with faulty_server(TEACHER, key=KEY) as server:
        server.has_routes = True
        server.faults.extend([fault] * 3 if fault else [])
        scorer = make([server.url], timeout_s=60.0, retry_for_s=60.0, num_tokens=22)
        same(scorer.score(REQUESTS), expected)
        assert server.requests == len(REQUESTS) + len(fault and 3 * "x")
        local = TransformersScorer(load_model(TEACHER), temperature=1.0, batch_tokens=2048, num_tokens=22)
        for ours, theirs in zip(scorer.score_topk(REQUESTS, 3), local.score_topk(REQUESTS, 3), strict=True):
            assert (ours.topk_ids == theirs.topk_ids).all()
            np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=2e-5)
        assert server.temperatures == {1.0}
        scorer.close()


@pytest.mark.parametrize("fault", ["hang", "500", "garbage", "null", "echo"])
def test_a_fault_that_does_not_pass_ends_in_bounded_time(fault: str, make: Make, server: FaultyServer) -> None:
    scorer = make(retry_for_s=0.6, timeout_s=0.2)
    server.faults.append(f"{fault}*")
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"response \d+: teacher server http://.*given up after \d+ tries in") as told:
        scorer.score(REQUESTS)
    assert time.monotonic() - started < 10
    assert "resume the run" in str(told.value)
    assert KEY not in str(told.value)
    assert "\n" not in str(told.value)


def test_topk_is_the_local_scorers(make: Make) -> None:
    local = TransformersScorer(load_model(TEACHER), temperature=1.0, batch_tokens=2048, num_tokens=24)
    for ours, theirs in zip(make(num_tokens=24).score_topk(REQUESTS, 5), local.score_topk(REQUESTS, 5), strict=True):
        assert (ours.topk_ids == theirs.topk_ids).all()
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=2e-5)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)


@pytest.mark.parametrize("fault", ["best-null", "best-nan"])
def test_a_likeliest_token_without_a_number_is_asked_for_again(fault: str, make: Make, server: FaultyServer) -> None:
    scorer = make(num_tokens=24)
    expected = scorer.score_topk(REQUESTS, 5)
    server.faults.extend([fault] * 2)
    for ours, theirs in zip(scorer.score_topk(REQUESTS, 5), expected, strict=True):
        np.testing.assert_array_equal(ours.topk_logprobs, theirs.topk_logprobs)
    assert not server.faults


def test_an_answer_in_drops_ends_with_the_time_limit(make: Make, server: FaultyServer) -> None:
    """Each piece comes soon enough; the whole would take five seconds."""
    scorer = make(timeout_s=0.2, retry_for_s=0.3)
    server.faults.append("trickle*")
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0\.2 s; given up"):
        scorer.score(REQUESTS[:1])
    assert time.monotonic() - started < 3


def test_a_long_retry_after_does_not_lengthen_the_limit(make: Make, server: FaultyServer) -> None:
    scorer = make(retry_for_s=0.5)
    server.faults.append("later*")  # Retry-After: 30
    started = time.monotonic()
    with pytest.raises(EngineError, match="answered 503"):
        scorer.score(REQUESTS[:1])
    assert time.monotonic() - started < 5


def test_the_first_response_that_is_given_up_ends_the_others(make: Make, server: FaultyServer) -> None:
    scorer = make(retry_for_s=30.0, first_pause_s=20.0, concurrency=4)
    server.faults.extend(["503", "503", "503", "307"])  # three that would wait, one that never passes
    started = time.monotonic()
    with pytest.raises(EngineError, match="answered 307"):
        scorer.score(REQUESTS[:4])
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("fast_sessions")
def test_a_teacher_that_cannot_score_stops_a_stage_before_it_samples(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T_KEY", KEY)
    overrides = [
        "stage1=null",
        *SERVED,
        f"teacher.server.urls=[{json.dumps(server.url)}]",
        "teacher.server.model=other",
    ]
    run = open_tiny(tmp_path, "r", overrides)
    with pytest.raises(EngineError, match="serves teacher, not other"):
        train(run)
    assert not run.paths.step("stage2", 0).exists()


@pytest.mark.parametrize("k", [0, 5])
def test_what_was_begun_ahead_is_asked_for_once(
    k: int, make: Make, server: FaultyServer, expected: list[np.ndarray]
) -> None:
    scorer = make(num_tokens=24)
    before = server.requests
    scorer.score_ahead(REQUESTS[:3], k)
    scorer.score_ahead(REQUESTS[2:6], k)
    found = [best.logprobs for best in scorer.score_topk(REQUESTS, k)] if k else scorer.score(REQUESTS)
    same(found, expected)
    assert server.requests - before == len(REQUESTS)
    assert scorer.hidden_seconds() > 0.0
    assert scorer.hidden_seconds() == 0.0
    same(scorer.score(REQUESTS[:2]), expected[:2])  # nothing is left from before


def test_a_fault_ahead_is_told_by_whoever_asks(make: Make, server: FaultyServer, expected: list[np.ndarray]) -> None:
    scorer = make()
    server.faults.append("307")  # never passes by itself
    scorer.score_ahead(REQUESTS[:1])
    while server.faults:
        time.sleep(0.01)
    same(scorer.score(REQUESTS), expected)  # it has passed since
    server.faults.append("307*")
    scorer.score_ahead(REQUESTS)
    with pytest.raises(EngineError, match="answered 307"):
        scorer.score(REQUESTS)


def test_closing_lets_go_of_what_was_begun(make: Make, server: FaultyServer) -> None:
    scorer = make(retry_for_s=60.0, first_pause_s=10.0)
    server.faults.append("503*")
    scorer.score_ahead(REQUESTS)
    started = time.monotonic()
    scorer.close()
    assert time.monotonic() - started < 5


def test_a_dead_server_is_left_out_and_comes_back(make: Make, server: FaultyServer, expected: list[np.ndarray]) -> None:
    with faulty_server(TEACHER, key=KEY) as other:
        scorer = make([server.url, other.url])
        other.faults.append("503*")
        same(scorer.score(REQUESTS), expected)
        other.faults.clear()
        at_other = other.requests
        for _ in range(40):
            same(scorer.score(REQUESTS), expected)
            if other.requests > at_other + 3:
                break
        assert other.requests > at_other + 3
    same(scorer.score(REQUESTS), expected)  # now it is gone for good
    with pytest.raises(EngineError, match=r"cannot be reached \(ConnectError\); given up"):
        make([other.url], retry_for_s=0.3)
    same(make([other.url, server.url]).score(REQUESTS), expected)


def test_a_wrong_key_is_told_at_once_without_it(make: Make, server: FaultyServer) -> None:
    with pytest.raises(EngineError, match=r"refuses the key \(401: .*\[the key\]") as told:
        make(api_key="sk-wrong-123456")
    assert "sk-wrong" not in str(told.value)
    assert "sk-wrong" not in repr(told.value.__context__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "serves teacher, not other; set teacher.server.model"),
        ({"max_tokens": 512}, r"its context of 512 tokens is too short .* --max-model-len 513"),
    ],
)
def test_what_is_served_is_compared_with_the_recipe(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make(**options)


def test_a_redirect_does_not_take_the_key_along(make: Make, server: FaultyServer) -> None:
    scorer = make()
    server.faults.append("307")
    with pytest.raises(EngineError, match="answered 307"):
        scorer.score(REQUESTS[:1])


SERVED = ["teacher.server.retry_for_s=0.5", "teacher.server.first_pause_s=0.01", "teacher.server.api_key=env:T_KEY"]


@pytest.mark.usefixtures("fast_sessions")
def test_a_run_whose_teacher_fails_is_resumed_to_the_same_bytes_and_the_key_is_nowhere(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("T_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.faults.clear()
    overrides = ["stage1=null", "stage2.steps=4", *SERVED, f"teacher.server.urls=[{json.dumps(server.url)}]"]
    whole = open_tiny(tmp_path / "whole", "r", overrides)
    train(whole)

    run = open_tiny(tmp_path / "failing", "r", overrides)
    train(run, until=("stage2", 1))
    server.faults.append("echo*")
    with pytest.raises(EngineError, match=r"answered 500 \(.*\[the key\]"):
        train(open_run("r", artifacts=tmp_path / "failing"))
    assert is_published(run.paths.rollouts("stage2", 1))
    assert not is_published(run.paths.teacher("stage2", 1))
    close_sessions()
    server.faults.clear()
    train(open_run("r", artifacts=tmp_path / "failing"))

    assert differing(run, whole) == []
    rows = load_metrics(whole, "stage2")
    assert all(row["time/teacher_score_hidden_s"] > 0.0 for row in rows)  # while others were being generated
    assert f"Bearer {KEY}" in server.seen_keys
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []
    assert KEY not in caplog.text

    local = open_tiny(tmp_path / "local", "r", ["stage1=null", "stage2.steps=4"])
    train(local, until=("stage2", 1))
    for name in (
        local.paths.relative(local.paths.rollouts("stage2", 0)),
        local.paths.relative(local.paths.rewards("stage2", 0)),
    ):
        assert results(local)[name] == results(run)[name]
    scored = [read_table(each.paths.teacher("stage2", 0))["teacher_logprobs"].to_pylist() for each in (local, run)]
    for ours, theirs in zip(*scored, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"teacher.server.api_key={KEY}"], "a key does not belong in a recipe; say where it is, env:NAME"),
        (["teacher.server.api_key=env:sk-planted-9f8e7d6c5b4a"], "a key does not belong in a recipe; say where it is"),
        ([f"teacher.server.api_key:{KEY}"], r"--set \(not shown, as it may hold a key\): expected FIELD=VALUE"),
        ([f"teacher.server.api_key=[{KEY}"], r"api_key: the value is not YAML: line 1, column \d+ \(not shown"),
        ([f"teacher.server.api_key=!{KEY}"], r"api_key: the value is not YAML: line 1, column 1 \(not shown"),
        ([f"teacher={{server: {{api_key: '{KEY}"], r"--set teacher: the value is not YAML: line 1, column \d+ \(not"),
        ([f"teacher.server.urls=['http://me:{KEY}@h/v1']"], "carries a user, a password, a query or a fragment; a key"),
        ([f"teacher.server.urls=['http://h/v1?key={KEY}']"], "carries a user, a password, a query or a fragment; a"),
        ([f"teacher.server.urls=['http://h/v1#{KEY}']"], "carries a user, a password, a query or a fragment; a key"),
        (
            [f"teacher.server.urls=['http://me:{KEY}@h\u2100st/v1']"],
            r"URL 1 is not an http\(s\) URL; give http://HOST:PORT/v1",
        ),
        (["teacher.server.urls=['http://h:99999/v1']"], r"URL 1 is not an http\(s\) URL; give http://HOST:PORT/v1"),
        (["teacher.server.urls=['ftp://h']"], r"URL 1 is not an http\(s\) URL; give http://HOST:PORT/v1"),
        (["teacher.server.temperature=0.6"], r"but teacher.server.temperature is 0.6: served .*bake-teacher"),
    ],
)
def test_recipes_hold_no_keys(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as told:
        open_tiny(tmp_path, "r", ["teacher.server.urls=['http://127.0.0.1:1/v1']", *overrides])
    error: BaseException | None = told.value
    while error is not None:  # tracebacks show what an error was made from
        assert KEY not in f"{error}{error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert not (tmp_path / "runs").exists()


def test_secrets_are_found_or_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_KEY", f" {KEY}\n")
    assert resolve_secret("env:T_KEY") == KEY
    for broken in (f"{KEY}\n{KEY}", f"{KEY}\u043a"):
        monkeypatch.setenv("T_KEY", broken)
        with pytest.raises(SecretError, match="env:T_KEY holds a line break or another character") as told:
            resolve_secret("env:T_KEY")
        assert KEY not in str(told.value)
    monkeypatch.setenv("T_KEY", "")
    with pytest.raises(SecretError, match="env:T_KEY is empty"):
        resolve_secret("env:T_KEY")
    monkeypatch.delenv("T_KEY")
    with pytest.raises(SecretError, match="there is no environment variable T_KEY"):
        resolve_secret("env:T_KEY")
    with pytest.raises(SecretError, match="a secret is named by "):
        resolve_secret("vault:T_KEY")
    register_secret_source("test", lambda name: f"{name}-value")
    assert resolve_secret("test:x") == "x-value"
    assert issubclass(SecretError, KdrlError)


def test_a_program_does_not_wait_at_its_end_for_requests_in_flight(tmp_path: Path) -> None:
    """Of two, one is refused, which ends the call; the other hangs at its server for ten minutes."""
    program = f"""
import socket, threading, time
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.errors import EngineError
from kdrl_core.types import ScoreRequest
from pathlib import Path
from faulty_server import faulty_server
with faulty_server(Path({str(TEACHER)!r})) as server:
    scorer = HTTPScorer(ServedModel(urls=[server.url], concurrency=2))
    server.faults.extend(["sleep", "400"])
    try:
        scorer.score([ScoreRequest(prompt_token_ids=[5], token_ids=[n]) for n in (6, 7)])
    except EngineError as error:
        print(error)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=TESTS)
    assert "answered 400" in done.stdout
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 40
