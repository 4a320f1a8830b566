"""Two tasks whose answers are no numbers, with models: `python -m kdrl_core.miniature.other_tasks --output DIR`.

    student/ teacher/                            both models know both tasks, the student less well
    choice/{train,validation,test}.jsonl         the letter of the largest digit: the recipe miniature-choice
    code/{train,validation,test}.jsonl           a Python function that works a chain: the recipe miniature-code

A problem of `choice` is four digits, `4=A 6=B 1=C 0=D`. Its answer is the letter of the largest.

A problem of `code` is a chain of `a`, `b` and digits, to be worked from left to right: `a+b*3`. The response is a
function in a code block. Python multiplies first, so its brackets must be right: `(a+b)*3`. The answer is tests, which
any function with the right values passes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kdrl_core.config import resolve_path
from kdrl_core.miniature.models import Example, build_tokenizer, save_model, train_model
from kdrl_core.miniature.world import OPERATORS, bracket
from kdrl_core.models.loading import load_model

SEED = 13
SIZES = {"test": 128, "validation": 64, "train": 768}
LETTERS = "ABCD"
CODE_LENGTHS = range(3, 6)
"""Operands per chain."""
OPERANDS = "ab0123456789"
TESTED = ((2, 5), (7, 3), (4, 4), (0, 9), (6, 1))
"""Values of `a` and `b` in the tests."""
OPENING, CLOSING = "```python\ndef f(a, b):\n    return ", "\n```"
UNITS = (*LETTERS, "a", "b", OPENING, CLOSING)
NUM_STEPS = {"student": 220, "teacher": 500}
"""Model → steps of its SFT. It begins as the miniature's teacher, which works chains."""
LABEL_SMOOTHING = {"student": 0.04, "teacher": 0.01}


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of problem: how one is drawn, and what is right."""

    name: str
    draw: Callable[[random.Random], str]
    worked: Callable[[str], str]
    """A right response."""
    answer: Callable[[str], str]
    """As the data has it."""

    def rows(self, name: str, questions: list[str]) -> list[dict[str, str]]:
        source = f"kdrl miniature {self.name}"
        return [
            {"id": f"{self.name}-{name}-{number}", "problem": text, "answer": self.answer(text), "source": source}
            for number, text in enumerate(questions)
        ]


def draw_choice(rng: random.Random) -> str:
    """Four different digits with their letters."""
    digits = rng.sample(range(10), len(LETTERS))
    return " ".join(f"{digit}={letter}" for letter, digit in zip(LETTERS, digits, strict=True))


def largest(question: str) -> tuple[str, str]:
    """The largest digit and its letter."""
    digit, letter = max(each.split("=") for each in question.split())
    return digit, letter


def work_choice(question: str) -> str:
    digit, letter = largest(question)
    return f"<think>{digit}</think>\\boxed{{{letter}}}"


def draw_code(rng: random.Random) -> str:
    """A chain of operands; at least one is a variable."""
    while True:
        count = rng.choice(CODE_LENGTHS)
        chain = rng.choice(OPERANDS) + "".join(rng.choice(OPERATORS) + rng.choice(OPERANDS) for _ in range(count - 1))
        if "a" in chain or "b" in chain:
            return chain


def work_code(question: str) -> str:
    return f"<think></think>{OPENING}{bracket(question)}{CLOSING}"


def asserts_of(question: str) -> str:
    """Lines of `assert` for the values of TESTED."""
    return "\n".join(f"assert f({a}, {b}) == {_value(question, a, b)}" for a, b in TESTED)


def _value(chain: str, a: int, b: int) -> int:
    """The chain's result from left to right, without a modulus."""
    variables = {"a": a, "b": b}
    result, *numbers = (variables[each] if each in variables else int(each) for each in chain[::2])
    for operator, number in zip(chain[1::2], numbers, strict=True):
        result = {"+": result + number, "-": result - number, "*": result * number}[operator]
    return result


TASKS = (
    Task("choice", draw_choice, work_choice, lambda question: largest(question)[1]),
    Task("code", draw_code, work_code, asserts_of),
)


def questions_of(task: Task, *, scale: float = 1.0) -> dict[str, list[str]]:
    """Distinct questions for each file of a task, from one seed. `scale` shrinks the numbers, for tests."""
    rng = random.Random(f"{SEED} {task.name}")
    drawn: dict[str, None] = {}
    sizes = {name: max(8, round(size * scale)) for name, size in SIZES.items()}
    while len(drawn) < sum(sizes.values()):
        drawn[task.draw(rng)] = None
    every = iter(drawn)
    return {name: [next(every) for _ in range(size)] for name, size in sizes.items()}


def worked_batches(name: str, exclude: set[str]) -> Iterator[list[Example]]:
    """Endless batches for a model, half of each task, without the questions of `exclude`."""
    rng = random.Random(f"{SEED} {name}")

    def examples(task: Task) -> Iterator[Example]:
        while True:
            if (question := task.draw(rng)) not in exclude:
                yield question, task.worked(question)

    streams = [examples(task) for task in TASKS]
    while True:
        yield [next(streams[number % len(streams)]) for number in range(64)]


def build_other_tasks(output: Path, *, scale: float = 1.0) -> None:
    """Build every asset below `output`. For tests, `scale` shrinks the number of problems and of SFT steps."""
    torch.set_num_threads(1)
    exclude: set[str] = set()
    for task in TASKS:
        (output / task.name).mkdir(parents=True, exist_ok=True)
        for name, questions in questions_of(task, scale=scale).items():
            text = "".join(json.dumps(row) + "\n" for row in task.rows(name, questions))
            (output / task.name / f"{name}.jsonl").write_text(text, encoding="utf-8")
            if name != "train":
                exclude.update(questions)
    tokenizer = build_tokenizer(UNITS)
    for name, num_steps in NUM_STEPS.items():
        model = load_model(resolve_path("builtin:miniature/teacher"))
        model.resize_token_embeddings(len(tokenizer))
        train_model(
            model,
            tokenizer,
            worked_batches(name, exclude),
            learning_rate=2e-3,
            num_steps=max(1, round(num_steps * scale)),
            label_smoothing=LABEL_SMOOTHING[name],
        )
        save_model(model.half(), tokenizer, output / name)


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Build the problems and models of the other tasks (minutes).")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; shipped: kdrl_core/assets/miniature-tasks"
    )
    build_other_tasks(parser.parse_args().output)


if __name__ == "__main__":
    main()
