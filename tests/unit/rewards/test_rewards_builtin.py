"""The functions that kdrl ships: golden values."""

import json
from pathlib import Path

import pytest

from kdrl_core.boxes.preflight import check_rewards
from kdrl_core.config import load_recipe
from kdrl_core.config.answers import BUILT_IN_REWARDS
from kdrl_core.errors import RecipeError
from kdrl_core.rewards import builtin

PROBLEM = {"problem_id": "q", "length": 0, "think_opened": False}
SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_the_recipe_knows_the_same_functions() -> None:
    assert tuple(builtin.BUILT_IN_FUNCTIONS) == BUILT_IN_REWARDS


def boxed(text: str) -> str:
    return rf"<think>\boxed{{0}}</think>\boxed{{{text}}}"


@pytest.mark.parametrize(
    ("function", "response", "answer", "arguments", "value"),
    [
        ("exact", boxed("a  b"), "a b", {}, 1.0),
        ("exact", boxed("A"), "a", {}, 0.0),
        ("exact", boxed("A"), "a", {"ignore_case": True}, 1.0),
        ("exact", "a", "a", {}, 0.0),  # no box
        ("exact", "answer: 1\nanswer: 2", "2", {"pattern": r"answer: (\d)"}, 1.0),
        ("exact", "answer: 2 or\nanswer: ", "2", {"pattern": r"answer: (\d)?"}, 0.0),  # the last has no group
        ("choice", boxed("(B)"), "B", {}, 1.0),
        ("choice", boxed("C"), "B", {}, 0.0),
        ("choice", "<think>A</think>So it goes.\nThe answer is (B)", "B", {}, 1.0),
        ("choice", "A or B", "B", {}, 0.0),
        ("choice", "The answer is **B**.", "B", {}, 1.0),
        ("choice", "**Answer:** B", "B", {}, 1.0),
        ("choice", "Therefore the answer is $B$", "B", {}, 1.0),
        ("choice", "The answer is A or B.", "B", {}, 0.0),
        ("choice", boxed("**B**"), "b", {}, 1.0),
        ("choice", boxed("(b)"), "B", {}, 1.0),
        ("numeric", boxed("1,234.5"), "1234.5", {}, 1.0),
        ("numeric", boxed(r"\frac{1}{2}"), "0.5", {}, 1.0),
        ("numeric", boxed("-3/4"), "-.75", {}, 1.0),
        ("numeric", boxed("3.14"), "3.14159", {}, 0.0),
        ("numeric", boxed("3.14"), "3.14159", {"absolute": 0.01}, 1.0),
        ("numeric", boxed("99"), "100", {"relative": 0.01}, 1.0),
        ("numeric", boxed("98.9"), "100", {"relative": 0.01}, 0.0),
        ("numeric", boxed("4.3"), "4", {"absolute": 0.3}, 1.0),
        ("numeric", boxed("3.7"), "4", {"absolute": 0.3}, 1.0),
        ("numeric", boxed("e5"), "100", {}, 0.0),
        ("numeric", boxed("."), "100", {}, 0.0),
        ("numeric", boxed("1.7e308"), "-1.7e308", {}, 0.0),
        ("numeric", boxed(r"\$18"), "18", {}, 1.0),
        ("numeric", boxed("many"), "100", {}, 0.0),
        ("numeric", boxed("1/0"), "100", {}, 0.0),
        ("regex", "<think>yes</think>no", "", {"pattern": "yes"}, 0.0),
        ("regex", "<think>no</think>yes!", "", {"pattern": "yes"}, 1.0),
        ("regex", "<think>no</think>yes!", "", {"pattern": "yes", "is_whole": True}, 0.0),
        ("json_schema", '<think></think>{"n": 1}', "", {"schema": SCHEMA}, 1.0),
        ("json_schema", 'Here:\n```json\n{"n": 1}\n```\n', "", {"schema": SCHEMA}, 1.0),
        ("regex", "<think>x</think>\nAnswer: 4", "", {"pattern": "^Answer"}, 1.0),
        ("json_schema", '```python\nx\n```\nHere:\n```JSON\n{"n": 1}\n```', "", {"schema": SCHEMA}, 1.0),
        ("json_schema", '{"n": NaN}', "", {"schema": {}}, 0.0),
        ("json_schema", '{"n": "1"}', "", {"schema": SCHEMA}, 0.0),
        ("json_schema", "{n: 1}", "", {"schema": SCHEMA}, 0.0),
    ],
)
def test_values(function: str, response: str, answer: str, arguments: dict, value: float) -> None:
    score = builtin.BUILT_IN_FUNCTIONS[function](response, answer, PROBLEM, **arguments)
    assert score.value == value
    assert score.reason


@pytest.mark.parametrize(
    ("length", "value"),
    [(1, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (100, -1.0), (101, -1.0)],
)
def test_the_length_penalty_is_dapos_equation_13(length: int, value: float) -> None:
    """L_max = 100, L_cache = 40: 0 up to 60 tokens, then ((100 − 40) − |y|) / 40, and −1 beyond 100."""
    problem = {**PROBLEM, "length": length}
    assert builtin.length_penalty("", "", problem, max_tokens=100, cache=40).value == pytest.approx(value)


@pytest.mark.parametrize("function", ["choice", "numeric"])
def test_a_truth_of_another_kind_is_an_error(function: str) -> None:
    with pytest.raises(ValueError, match="correct the problem's answer"):
        builtin.BUILT_IN_FUNCTIONS[function](boxed("1"), "blue", PROBLEM)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("regex", {"pattern": "("}, "missing ), unterminated subpattern"),
        ("regex", {"pattern": "x", "is_whole": "false"}, "Input should be a valid boolean"),
        ("numeric", {"absolute": "0.1"}, "Input should be a valid number"),
        ("json_schema", {"schema": {"type": "integr"}}, "'integr' is not valid"),
        ("json_schema", {"schema": []}, "schema: expected a JSON schema, an object, given []"),
        (
            "json_schema",
            {"schema": {"items": {"$ref": "#/nope"}}},
            "$ref '#/nope' is not in the schema",
        ),
        (
            "json_schema",
            {"schema": {"$ref": "http://127.0.0.1:9/a"}},
            "is not in the schema; nothing is fetched",
        ),
        ("numeric", {"absolute": -1.0}, "must not be negative"),
        ("numeric", {"relative": True}, "relative: Input should be a valid number; correct the arguments"),
        ("length_penalty", {"max_tokens": 10, "cache": 11}, "cache=11 must be above 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_run(function: str, arguments: dict, said: str) -> None:
    recipe = load_recipe(
        "miniature", [f"reward.functions=[{json.dumps({'function': function, 'arguments': arguments})}]"]
    )
    with pytest.raises(RecipeError, match=rf"field 'reward.functions.0.arguments': {function}: ") as told:
        check_rewards(recipe)
    assert said in str(told.value)


@pytest.mark.parametrize(
    "text",
    [
        "First:\n```bash\npip install x\n```\nThen:\n```python\n{code}\n```\n",
        "```python\n{code}\n```\nOutput:\n```text\n1\n```\nand\n```text\n1\n```\n",
        "```python\n{code}\n```\nIt prints:\n```\n1\n```\n",
        "```Python3 title=x\r\n{code}\r\n```",
        "1. So:\n   ```py\n   {code}\n   ```",
        "~~~python\n{code}\n~~~",
        "```python\nno\n```\nNo, rather:\n```python\n{code}\n```",
        "```\n{code}\n```\n```bash\nls\n```",
        "```python\nx = '```'\n{code}\n```",
    ],
)
def test_the_last_block_of_python_is_run(text: str) -> None:
    found = builtin._last_block(text.replace("{code}", "y = 1"), "python", "python3", "py")
    assert found is not None
    assert found.splitlines()[-1] == "y = 1"


@pytest.mark.parametrize("tests", ["def check(f):\n    assert f() == 1", "import os\nclass Test: pass\nx = 1"])
def test_tests_that_only_define_are_refused(tests: str) -> None:
    with pytest.raises(ValueError, match="the tests only define things, so any code passes; add the lines that call"):
        builtin.python_tests("```\npass\n```", tests, PROBLEM)


TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ADD, "the tests pass"),
        (f"import asyncio, random, threading\nasyncio.run(asyncio.sleep(0))\n{ADD}", "the tests pass"),
        (ADD.replace("+", "-"), "tests, line 1: AssertionError: "),
        ("def add(:", "code, line 1: SyntaxError: invalid syntax (code, line 1)"),
        ("import numpy", "code, line 1: ModuleNotFoundError: No module named 'numpy'"),
        ("while True: pass", "no result within 1 s of CPU time"),
        ("x = bytes(10**9)", "code, line 1: MemoryError: "),
        ("import os\nos._exit(0)", "it ended its process (exit code 0)"),
        ("import os\nwhile True:\n    os.write(3, b'x' * 999)", "xxxxxxxxxx"),
        ("import socket\nsocket.socket()", "code, line 2: PermissionError: "),
        ("import os\nos.fork()", "code, line 2: PermissionError: "),
        ("import subprocess\nsubprocess.run(['/bin/true'])", "code, line 2: PermissionError: "),
        ("import os\nos.kill(os.getppid(), 9)", "code, line 2: PermissionError: "),
        ("open('{file}').read()", "code, line 1: PermissionError: "),
        ("open('{file}', 'a')", "code, line 1: PermissionError: "),
        ("import os\nos.unlink('{file}')", "code, line 2: PermissionError: "),
        ("import os\nos.chmod('{file}', 0)", "code, line 2: PermissionError: "),
        ("import os\nos.listdir('/proc')", "code, line 2: PermissionError: "),
        (
            "import resource as r\nr.setrlimit(r.RLIMIT_CPU, r.getrlimit(r.RLIMIT_CPU))",
            "code, line 2: ValueError: not allowed",
        ),
    ],
)
def test_code_of_answers_runs_behind_locks(code: str, said: str, tmp_path: Path) -> None:
    (file := tmp_path / "secret").write_text("x")
    response = f"<think>```\nno\n```</think>So:\n```python\n{code.replace('{file}', str(file))}\n```"
    try:
        score = builtin.python_tests(response, TESTS, PROBLEM, cpu_s=1, memory_mb=256)
    except RuntimeError as error:
        pytest.skip(str(error))  # a kernel without the locks
    assert score.reason.startswith(said)
    assert score.value == float(said == "the tests pass")
    assert file.read_text() == "x"


def test_code_needs_a_block_tests_and_leave() -> None:
    assert builtin.python_tests(ADD, TESTS, PROBLEM).reason == "no code block outside the thought"
    with pytest.raises(ValueError, match="the true answer has no tests"):
        builtin.python_tests(f"```\n{ADD}\n```", " ", PROBLEM)
    named = "reward.functions=[{function: python_tests}]"
    with pytest.raises(RecipeError, match=r"set reward.allow_code: true"):
        load_recipe("miniature", [named])
    assert load_recipe("miniature", [named, "reward.allow_code=true"]).reward.functions
