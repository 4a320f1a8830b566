"""Functions of lists, and `async def`s that ask a real server over HTTP: order, tries, deadlines, budget, failures."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.boxes.preflight import check_rewards
from kdrl_core.config import load_recipe
from kdrl_core.config.answers import RewardConfig, VerificationConfig
from kdrl_core.errors import RecipeError
from kdrl_core.rewards.judge import Judge, Judgement, facts_of
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier

LIMITS = VerificationConfig(workers=1, timeout_s=0.3, memory_limit_mb=384, max_failed_share=1.0)
CODE = """\
import asyncio

def sizes(responses, answers, problems):
    if "short" in responses:
        return [0.0] * (len(responses) - 1)
    if "raise" in responses:
        raise KeyError("x")
    if "change" in responses:
        responses.clear()
        return [0.0] * len(answers)
    values = [float(len(responses))] * len(responses)
    return [float("nan") if text == "nan" else value for text, value in zip(responses, values)]

async def ask(response, answer, problem, port):
    while response == "loop":
        pass
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET /{response} HTTP/1.0\\r\\n\\r\\n".encode())
        head, _, body = (await reader.read()).partition(b"\\r\\n\\r\\n")
    finally:
        writer.close()
    if b" 200 " not in head.splitlines()[0]:
        raise ConnectionError(head.splitlines()[0].decode())
    return float(body)
"""


class Server(ThreadingHTTPServer):
    """Answers each path with its number; `/busy…` once with 503, `/down` always, `/slow` after a second."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked = Counter[str]()
        self.open, self.most_open = 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path[1:]
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        time.sleep(1.0 if path == "slow" else 0.02)
        with self.server.lock:
            self.server.open -= 1
        is_down = path == "down" or (path.startswith("busy") and self.server.asked[path] == 1)
        self.send_response(503 if is_down else 200)
        self.end_headers()
        self.wfile.write(path.removeprefix("busy").encode())

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a call that was given up
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def judge(reward: dict, responses: list[str]) -> dict[str, Judgement]:
    facts = {"question": "", "source": "", "sample": 0, "length": 1, "finish_reason": "stop", "think_opened": False}
    items = [(text, "4", facts_of(problem_id=f"q-{number}", **facts)) for number, text in enumerate(responses)]
    with closing(Judge(RewardConfig(**reward), LIMITS, Verifier(workers=1))) as judge:  # which starts no comparison
        return dict(zip(responses, judge.judge_batch(items), strict=True))


def test_lists_and_calls(tmp_path: Path, server: Server) -> None:
    (file := tmp_path / "mine.py").write_text(CODE)
    sizes = {"function": f"{file}:sizes", "batch_size": 4}
    calls = {"at_once": 3, "retries": 1, "timeout_s": 0.2}
    ask = {"function": f"{file}:ask", "arguments": {"port": server.server_port}, "calls": calls}
    numbers = [str(number) for number in range(6)]
    bad = ["raise", "short", "change", "nan"]
    responses = [*numbers, *bad, "busy7", "down", "slow", "word", "8", "9"]
    found = judge({"functions": [sizes, ask]}, responses)
    # Lists of 4: 0-3 · 4, 5, raise, short · change, nan, busy7, down · slow, word, 8, 9. One with a failure is
    # looked at alone, response by response.
    told = {text: one.values for text, one in found.items()}
    assert [told[text]["sizes"] for text in responses] == [
        *[4.0] * 4, *[1.0] * 2, *[None] * 4, *[1.0] * 2, *[4.0] * 4
    ]  # fmt: skip
    for text, said in {
        "raise": f"{file}:7, problem q-6, sample 0: KeyError: 'x'",
        "short": f"{file}:3, problem q-7, sample 0: it returned 0 values for 1 responses; return one for each",
        "change": f"{file}:3, problem q-8, sample 0: it changed a list that it was given; copy it first",
        "nan": f"{file}:3, problem q-9, sample 0: it returned nan; return a finite number, or None",
    }.items():
        assert f"sizes error: {said}" in found[text].verdict.reason
    assert [told[text]["ask"] for text in [*numbers, "busy7", "8", "9"]] == [*map(float, numbers), 7.0, 8.0, 9.0]
    for text, kind, said in (
        ("down", "error", f"{file}:24, problem q-11, sample 0: ConnectionError: HTTP/1.0 503 Service Unavailable"),
        ("slow", "timeout", "problem q-12, sample 0: TimeoutError: no result within 0.2 s"),
        ("word", "error", f"{file}:25, problem q-13, sample 0: ValueError: could not convert string to float"),
    ):
        assert f"ask {kind}: " in found[text].verdict.reason
        assert said in found[text].verdict.reason
        assert found[text].verdict.kind is VerdictKind(kind)
    # An exception is tried again, a wrong return value is not.
    assert server.asked == {text: 1 if text.isdigit() or text == "nan" else 2 for text in responses}
    assert server.most_open in (3, 4)  # the server still works at one that was given up


def test_a_budget_ends_calls_and_a_loop_harms_no_other(tmp_path: Path, server: Server) -> None:
    (file := tmp_path / "mine.py").write_text(CODE)
    ask = {
        "function": f"{file}:ask",
        "arguments": {"port": server.server_port},
        "calls": {"at_once": 2, "max_calls": 5},
    }
    found = list(judge({"functions": [ask]}, [str(number) for number in range(8)]).values())
    assert sum(server.asked.values()) == 5
    assert [one.values["ask"] for one in found] == [0.0, 1.0, 2.0, 3.0, 4.0, None, None, None]
    assert "BudgetSpentError: the budget calls.max_calls is spent" in found[-1].verdict.reason
    looped = judge({"functions": [{**ask, "calls": {}}]}, ["0", "loop"])
    assert looped["0"].values == {"ask": 0.0}
    assert "problem q-1, sample 0: no result within 0.3 s; the worker was killed" in looped["loop"].verdict.reason


ODD = """\
import asyncio, sys

def pops(responses, answers, problems):
    if "bad" in responses:
        problems.pop()
    return [1.0] * len(responses)

def unordered(responses, answers, problems):
    return {float(len(text)) for text in responses}

async def quits(response, answer, problem):
    async def part():
        if response == "bad":
            sys.exit(0)
    async with asyncio.TaskGroup() as group:
        group.create_task(part())
    return 1.0
"""


@pytest.mark.parametrize(
    ("function", "more", "said"),
    [
        ("pops", {"batch_size": 4}, "it changed a list that it was given; copy it first"),
        ("unordered", {"batch_size": 4}, "it returned set; return a list with a value for each response"),
        ("quits", {"calls": {"retries": 0}}, "SystemExit: 0"),
    ],
)
def test_what_would_end_the_pool_or_the_run_is_an_error_of_its_response(
    tmp_path: Path, function: str, more: dict[str, Any], said: str
) -> None:
    (file := tmp_path / "mine.py").write_text(ODD)
    found = judge({"functions": [{"function": f"{file}:{function}", **more}]}, ["a", "bad", "ccc"])
    assert said in found["bad"].verdict.reason
    assert found["bad"].verdict.kind is VerdictKind.ERROR
    if function != "unordered":
        assert found["a"].values == found["ccc"].values == {function: 1.0}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("sizes, calls: {}", "it is no async def; leave `calls` out of the recipe"),
        ("ask, batch_size: 4", "it is an async def; say in the recipe how it is called"),
        ("ask, batch_size: 4, calls: {}", "batch_size is for functions of lists, calls for an async def"),
        ("ask, calls: {at_once: 0}", "at_once"),
    ],
)
def test_the_recipe_and_the_function_must_agree(tmp_path: Path, function: str, said: str) -> None:
    (file := tmp_path / "mine.py").write_text(CODE)
    name, _, more = function.partition(", ")
    with pytest.raises(RecipeError) as told:
        check_rewards(load_recipe("miniature", [f"reward.functions=[{{function: '{file}:{name}', {more}}}]"]))
    assert said in str(told.value)


def test_judgements_that_are_kept_are_not_made_again_but_failures_are(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text(
        "def noted(response, answer, problem, log):\n"
        "    with open(log, 'a') as lines:\n"
        "        lines.write(response + '\\n')\n"
        "    return float(response)\n"
    )
    facts = {"question": "", "source": "", "sample": 0, "length": 1, "finish_reason": "stop", "think_opened": False}
    items = [(text, "4", facts_of(problem_id=f"q-{text}", **facts)) for text in ("1", "2", "bad", "3")]
    for num_kept, expected in ((8, [1, 1, 2, 1]), (1, [2, 2, 2, 1]), (0, [2, 2, 2, 2])):
        log = tmp_path / f"log-{num_kept}"
        reward = RewardConfig(functions=[{"function": f"{file}:noted", "arguments": {"log": str(log)}}])
        with closing(Judge(reward, LIMITS, Verifier(workers=1), num_kept=num_kept)) as judge:
            assert judge.judge_batch(items) == judge.judge_batch(items)
        assert [log.read_text().split().count(item[0]) for item in items] == expected
