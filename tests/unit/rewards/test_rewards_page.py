"""docs/rewards.md: every example is run as it stands, but for the address of the judge."""

import json
import re
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import DOCS

from kdrl_core.config import load_recipe
from kdrl_core.rewards.builtin import BUILT_IN_FUNCTIONS
from kdrl_core.rewards.judge import Judge, facts_of
from kdrl_core.verify import Verifier

PAGE = (DOCS / "rewards.md").read_text(encoding="utf-8")
FACTS = {"source": "mine", "sample": 0, "length": 9, "finish_reason": "stop", "think_opened": False}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


class Grader(BaseHTTPRequestHandler):
    """Half a point for a question of one word."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"score": 0.5, "why": f"saw {asked['question']}"}).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_the_examples_score_as_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths in a recipe are of this folder
    Path("mine.py").write_text("\n".join(blocks("python")))
    (first, lists, calls, _), server = blocks("yaml"), HTTPServer(("127.0.0.1", 0), Grader)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    written = yaml.safe_load(first)["reward"]
    written["functions"] += yaml.safe_load(lists) + yaml.safe_load(calls.replace(":9000", f":{server.server_port}"))
    limits = "verification={workers: 1, timeout_s: 5, memory_limit_mb: 1024}"
    recipe = load_recipe("miniature", [f"reward={json.dumps(written)}", limits])
    right, words = r"<think>so</think> a a \boxed{4}", "word " * 31
    items = [(right, "4", facts_of(problem_id="a", question="2+2", **FACTS))]
    items.append((words, "4", facts_of(problem_id="b", question="2+2", **FACTS)))
    with Verifier(workers=1) as verifier, closing(Judge(recipe.reward, recipe.verification, verifier)) as judge:
        good, bad = judge.judge_batch(items, require_format=True, think_opened=False)
    server.shutdown()
    server.server_close()
    # math · short, at most 30 words · varied: 3 of 4 words differ, 1 of 31 · judged
    assert good.values == {"math": 1.0, "short": 1.0, "varied": 3 / 4, "judged": 0.5}
    assert bad.values == {"math": 0.0, "short": 0.0, "varied": pytest.approx(1 / 31), "judged": 0.5}
    assert good.verdict.reward == pytest.approx(1 + 0.2 * 1 + 0.1 * 3 / 4 + 0.5)
    assert "short 0: 31 words" in bad.verdict.reason
    assert "judged 0.5: saw 2+2" in bad.verdict.reason


def test_the_recipe_for_code_is_one() -> None:
    overrides = [f"{name}={json.dumps(value)}" for name, value in yaml.safe_load(blocks("yaml")[3])["reward"].items()]
    (function,) = load_recipe("miniature", [f"reward.{each}" for each in overrides]).reward.functions
    assert BUILT_IN_FUNCTIONS[function.function](
        "```python\ndef add(a, b):\n    return a + b\n```", "assert add(1, 2) == 3", FACTS, **function.arguments
    ).value


def test_the_table_names_every_function_and_its_arguments() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \|([^|]*)\|$", PAGE, re.M))
    assert rows.keys() >= BUILT_IN_FUNCTIONS.keys()
    for name, function in BUILT_IN_FUNCTIONS.items():
        code = function.__code__
        arguments = {*code.co_varnames[3 : 3 + code.co_kwonlyargcount]}
        shared = {"pattern"} if name in ("exact", "choice", "numeric") else set()  # told below the table
        shared |= {"require_format"} if name == "math" else set()
        assert set(re.findall(r"`(\w+)", rows[name])) == arguments - shared, name
