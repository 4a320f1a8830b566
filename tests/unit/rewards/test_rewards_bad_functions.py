"""What functions must not do: each is named with file, line and the response's id, and harms no other response."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from kdrl_core.boxes.preflight import check_inputs, check_rewards
from kdrl_core.config import load_recipe
from kdrl_core.config.answers import RewardConfig, VerificationConfig
from kdrl_core.errors import RecipeError
from kdrl_core.rewards.judge import Judge, Judgement, facts_of
from kdrl_core.rewards.loading import Term, load_function
from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier

LIMITS = VerificationConfig(workers=2, timeout_s=0.5, memory_limit_mb=384, max_failed_share=1.0)
CODE = """\
import os, sys; from enum import StrEnum
from kdrl_core.rewards import Score; print("at import")

def score(response, answer, problem):
    if response == "raise":
        return {}["x"]
    if response == "loop":
        while True:
            pass
    if response == "hog":
        return float(len([bytes(2**20) for _ in range(10**6)]))
    if response == "fork":
        os.fork()
    if response == "change":
        problem["question"] = "another"
    if response == "print":
        print("a  line\\nand another")
    if response == "die":
        os._exit(3)
    if response == "quit":
        sys.exit(1)
    if response == "import":
        import nothing_like_it
    if response == "odd error":
        raise Odd
    if response == "array":
        problem["question"] = Array()
    if response == "numpy":
        return Boolean()
    if response == "decimal":
        from decimal import Decimal; return Decimal("0.5")
    return VALUES.get(response, 1)

class Odd(Exception):
    def __str__(self):
        sys.exit(3)

class Array:
    def __eq__(self, other):
        raise ValueError("ambiguous")

class Boolean:
    def item(self):
        return True

VALUES = {
    "object": object(), "text": "1", "nan": float("nan"), "list": [1.0, 2.0], "dict of text": {"a": "b"}, "empty": {},
    "odd key": {"\\ud800": 1.0}, "great": 1e10, "plain": {StrEnum("Key", ["B"]).B: 1.0},
    "dict": {"a": 0.25, "b": 0.5}, "score": Score(-2, "because", {"part": 3}), "none": None, "true": True,
}
"""
LINE = 4
EXPECTED = {
    "raise": "{file}:6, {id}: KeyError: 'x'",
    "hog": "{file}:score, line 4, {id}: the function reached the memory limit; the worker was replaced",
    "fork": "{file}:13, {id}: PermissionError: os.fork is refused in a worker; use subprocess, or do without",
    "change": "{file}:4, {id}: it changed its argument problem (question)",
    "die": "{file}:score, line 4, {id}: the worker died (exit code 3) and was replaced",
    "quit": "{file}:21, {id}: SystemExit: 1",
    "import": "{file}:23, {id}: ModuleNotFoundError: No module named 'nothing_like_it'",
    "odd error": "{file}:25, {id}: Odd",
    "array": "{file}:4, {id}: it changed its argument problem (question)",
    "object": "{file}:4, {id}: it returned object <object object>; return a number, None, a dictionary of numbers, "
    "or a Score",
    "text": "{file}:4, {id}: it returned str '1'; return a number, None, a dictionary of numbers, or a Score",
    "nan": "{file}:4, {id}: it returned nan; return a finite number, or None if the function does not apply",
    "list": "{file}:4, {id}: it returned list [1.0, 2.0]; return a number, None, a dictionary of numbers, or a Score",
    "dict of text": "{file}:4, {id}: it returned a dictionary in which 'a' is str 'b'; return a number, None, "
    "a dictionary of numbers, or a Score",
    "odd key": "{file}:4, {id}: it returned a dictionary with the key str '\\ud800'; name its values with letters, "
    "digits, _ and -",
    "great": "{file}:4, {id}: it returned 1e+10; return a number between -1e+09 and 1e+09",
    "empty": "{file}:4, {id}: it returned a dictionary without values; return None if the function does not apply",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """Never asked: no test here has `math`."""
    with closing(Verifier(workers=1)) as verifier:
        yield verifier


def judge(
    file: Path, responses: list[str], verifier: Verifier, limits: VerificationConfig = LIMITS
) -> dict[str, Judgement]:
    reward = RewardConfig.model_validate({"functions": [{"function": f"{file}:score"}]})
    items = [(text, "4", facts(number)) for number, text in enumerate(responses)]
    with closing(Judge(reward, limits, verifier)) as judge:
        return dict(zip(responses, judge.judge_batch(items), strict=True))


def facts(number: int) -> dict:
    return facts_of(
        problem_id=f"q-{number}", question="2+2?", source="mine", sample=3, length=7, finish_reason="stop",
        think_opened=False,
    )  # fmt: skip


def test_each_misdeed_is_an_error_of_its_own_response(tmp_path: Path, verifier: Verifier) -> None:
    (file := tmp_path / "mine.py").write_text(CODE)
    responses = ["fine", *EXPECTED, "loop", "print", "plain", "dict", "score", "none", "true", "numpy", "decimal"]
    responses.append("also fine")
    found = judge(file, responses, verifier)
    for number, text in enumerate(responses):
        if text in EXPECTED:
            who = f"problem q-{number}, sample 3"
            assert found[text].verdict.reason == f"score error: {EXPECTED[text].format(file=file, id=who)}"
            assert (found[text].verdict.kind, found[text].verdict.reward) == (VerdictKind.ERROR, 0.0)
            assert found[text].values == {"score": None}
    loop = found["loop"].verdict
    assert loop.kind is VerdictKind.TIMEOUT
    assert f"{file}:score, line 4, problem q-18, sample 3: no result within 0.5 s; the worker was killed" in loop.reason
    assert found["fine"].verdict.kind is found["also fine"].verdict.kind is VerdictKind.CORRECT
    assert found["print"].verdict.reason == "score 1: (printed: a line and another)"
    assert found["dict"].values == {"score": 0.75, "score.a": 0.25, "score.b": 0.5}
    assert found["plain"].values == {"score": 1.0, "score.b": 1.0}
    score = found["score"]
    assert (score.values, score.verdict.reason) == ({"score": -2.0, "score.part": 3.0}, "score -2: because, part 3")
    assert (score.verdict.kind, score.verdict.reward) == (VerdictKind.WRONG, -2.0)
    assert found["none"].verdict.reason == "none of reward.functions applies to this problem"
    assert found["none"].verdict.kind is VerdictKind.ERROR
    assert found["true"].verdict.reward == found["numpy"].verdict.reward == 1.0
    assert found["decimal"].verdict.reward == 0.5


def test_what_a_killed_worker_has_started_ends_with_it(tmp_path: Path, verifier: Verifier) -> None:
    (file := tmp_path / "mine.py").write_text(
        f"import subprocess\ndef score(response, answer, problem):\n"
        f"    subprocess.Popen(['sleep', '987'])\n    open({str(tmp_path / 'begun')!r}, 'a').write('x')\n"
        "    while True: pass\n"
    )
    assert judge(file, ["1"], verifier)["1"].verdict.kind is VerdictKind.TIMEOUT
    assert (tmp_path / "begun").read_text()
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "987"]]
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_set_has_one_order_in_every_worker(tmp_path: Path, verifier: Verifier) -> None:
    (file := tmp_path / "mine.py").write_text(
        "def score(response, answer, problem):\n    return float([*{'a', 'b', 'c', 'd', 'e'}].index('a'))\n"
    )
    values = {judge(file, ["1"], verifier)["1"].verdict.reward for _ in range(3)}
    assert len(values) == 1


def test_a_function_that_always_hangs_costs_a_few_timeouts_and_not_one_a_response(
    tmp_path: Path, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrl_core.rewards.pool._SUSPECTS_AT_ONCE", 1)
    (file := tmp_path / "mine.py").write_text("def score(response, answer, problem):\n    while True: pass\n")
    limits = LIMITS.model_copy(update={"max_failed_share": 0.05, "timeout_s": 0.1, "workers": 1})
    found = list(judge(file, [f"{number}" for number in range(20)], verifier, limits).values())
    assert sum(one.verdict.kind is VerdictKind.TIMEOUT for one in found) == 2  # then 5 % are exceeded
    assert "not judged, since more than verification.max_failed_share" in found[-1].verdict.reason


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("score = lambda response, answer, problem: 1", "line 1: it is a lambda"),
        ("class A:\n    def score(self, r, a, p): ...\nscore = A().score", "line 2: it is a method and not a function"),
        ("class A:\n    def score(self, r, a): ...\nscore = A.score", "line 2: A.score is a method"),
        ("\nscore = 3", "score is not callable in"),
        ("\nclass score: ...", "line 2: it is type and not a function"),
        ("def other(response, answer, problem): ...", "score is not there in"),
        ("def score(response, answer): ...", "mine.py:1: it cannot be called as score(response, answer, problem)"),
        ("def score(response, answer, problem, scale): ...", "missing a required argument: 'scale'"),
        (
            "async def score(response, answer, problem): ...",
            "line 1: it is an async def; say in the recipe how",
        ),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'; correct it there (line 1)"),
        ("x = 1\ndef score(", "SyntaxError: '(' was never closed"),
    ],
)
def test_what_is_no_function_is_refused(tmp_path: Path, code: str, said: str) -> None:
    (file := tmp_path / "mine.py").write_text(code + "\n")
    with pytest.raises(RecipeError) as told:
        load_function(Term(f"{file}:score", "score", {}))
    assert said in str(told.value)


def test_users_code_is_imported_in_a_worker_before_anything_starts(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").write_text("import os\nos._exit(4)\n")
    recipe = load_recipe("miniature", [f"reward.functions=[{{function: math}}, {{function: '{file}:score'}}]"])
    with pytest.raises(RecipeError) as told:
        check_inputs(recipe)
    expected = f"recipe miniature, field 'reward.functions.1': {file}:score: its import: the worker died (exit code 4)"
    assert str(told.value).startswith(expected)


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ("[{function: maths}]", "no built-in function 'maths'; there are math, exact"),
        ("[{function: nowhere.py:score}]", "nowhere.py does not exist; correct the path"),
        ("[{function: 'a b:score'}]", "is no reference to a function; give file.py:name or package.module:name"),
        ("[{function: exact}, {function: exact}]", "two functions are called exact; give one of them another `name`"),
        ("[{function: math, arguments: {a: 1}}]", "math has no arguments"),
        ("[{function: exact, arguments: {answer: 1}}]", "'answer' cannot be an argument"),
        ("[{function: exact, weight: .inf}]", "finite"),
        ("[{function: exact, wieght: 1}]", "unknown field, did you mean 'weight'?"),
    ],
)
def test_a_recipe_is_refused(functions: str, said: str) -> None:
    with pytest.raises(RecipeError) as told:
        load_recipe("miniature", [f"reward.functions={functions}"])
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("{function: nothing_installed.x:score}", "package nothing_installed is not installed"),
        ("{function: exact, arguments: {patern: x}}", "got an unexpected keyword argument 'patern'"),
        ("{function: regex}", "missing a required argument: 'pattern'"),
    ],
)
def test_modules_and_arguments_are_checked_too(function: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"field 'reward.functions.0': ") as told:
        check_rewards(load_recipe("miniature", [f"reward.functions=[{function}]"]))
    assert said in str(told.value)
