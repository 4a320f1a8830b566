"""The two tasks whose answers are no numbers: by hand, the same from one seed, and trained on by their recipes."""

import json
from pathlib import Path

import pytest

import kdrl_core as kdrl
from kdrl_core.config import resolve_path
from kdrl_core.miniature.other_tasks import (
    SIZES,
    TASKS,
    asserts_of,
    build_other_tasks,
    largest,
    questions_of,
    work_choice,
    work_code,
)
from kdrl_core.rewards.builtin import choice, python_tests

ASSETS = resolve_path("builtin:miniature-tasks/choice/test.jsonl").parents[1]
PROBLEM = {"think_opened": False, "length": 1}


def test_a_choice_golden() -> None:
    assert largest("4=A 6=B 1=C 0=D") == ("6", "B")
    assert work_choice("4=A 6=B 1=C 0=D") == "<think>6</think>\\boxed{B}"
    assert [choice(f"<think></think>\\boxed{{{letter}}}", "B", PROBLEM).value for letter in "BC"] == [1.0, 0.0]


def test_code_golden() -> None:
    response = work_code("a+b*3")
    assert response == "<think></think>```python\ndef f(a, b):\n    return (a+b)*3\n```"
    tests = asserts_of("a+b*3")
    assert tests.splitlines()[:2] == ["assert f(2, 5) == 21", "assert f(7, 3) == 30"]
    assert python_tests(response, tests, PROBLEM).value == 1.0
    assert python_tests(response.replace("(a+b)*3", "a+b*3"), tests, PROBLEM).value == 0.0  # 17 for 21
    assert python_tests(response.replace("(a+b)*3", "3*a+b*3"), tests, PROBLEM).value == 1.0  # other text, same values


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_worked_response_is_right_and_no_problem_is_in_two_files(task) -> None:  # type: ignore[no-untyped-def]
    found = questions_of(task)
    every = [question for questions in found.values() for question in questions]
    assert len({*every}) == len(every) == sum(SIZES.values())
    judge = choice if task.name == "choice" else python_tests
    for question in found["validation"][:20]:
        assert judge(task.worked(question), task.answer(question), PROBLEM).value == 1.0


def test_shipped_problems_are_what_the_command_builds(tmp_path: Path) -> None:
    for task in TASKS:
        for name, questions in questions_of(task).items():
            lines = (ASSETS / task.name / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line) for line in lines] == task.rows(name, questions)
    build_other_tasks(tmp_path, scale=0.004)
    assert {path.name for path in tmp_path.iterdir()} == {"student", "teacher", "choice", "code"}


@pytest.mark.parametrize(("name", "function"), [("choice", "choice"), ("code", "python_tests")])
def test_the_recipe_trains(name: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    run = kdrl.run(
        f"miniature-{name}",
        {
            "stage2.steps": 2,
            "stage2.prompts_per_step": 4,
            "stage2.mini_batch_prompts": 4,
            "stage2.evaluate_every": None,
            "evaluation.benchmarks.0.max_problems": 8,
            "evaluation.benchmarks.1.max_problems": 8,
        },
        name=name,
    )
    rollouts = run.rollouts()
    assert len(rollouts) == 2 * 4 * 8
    assert set(rollouts["verdict"]) == {"correct", "wrong"}
    assert rollouts["reason"].str.startswith(f"{function} ").all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["choice", "code"])
def test_the_recipe_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    run = kdrl.run(f"miniature-{name}", name=name)
    accuracy = run.accuracy()
    told = accuracy[accuracy["benchmark"] == "test"].set_index("label")["accuracy"]
    assert told["stage2"] > told["base"] + 0.1
