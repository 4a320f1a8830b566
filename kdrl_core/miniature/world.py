"""The miniature task: left-to-right chains of +, − and × modulo 10. Each step is a table look-up.

The answer to `3+5*2` is `<think>3+5=8,8*2=6</think>\\boxed{6}`. A tiny model can learn the hundred entries of each
table. It fails on a chain if it misses one of them, so accuracy falls with the length of the chain.
"""

import random
from collections.abc import Iterator

OPERATORS = "+-*"
MODULUS = 10
LENGTHS = range(2, 8)
"""Digits per chain in training and in the in-distribution benchmarks."""
HARD_LENGTHS = range(8, 10)
"""Digits per chain in the harder benchmark: longer than any that an RL stage trains on."""

BRACKETED_LENGTHS = range(3, 8)
"""Digits per chain in the out-of-domain benchmark, whose chains are written with brackets."""


def solve(question: str) -> tuple[str, str]:
    """The worked response to a chain and its answer: (`<think>…</think>\\boxed{6}`, `6`)."""
    value, steps = int(question[0]), []
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        result = apply(value, operator, int(digit))
        steps.append(f"{value}{operator}{digit}={result}")
        value = result
    return f"<think>{','.join(steps)}</think>\\boxed{{{value}}}", str(value)


def solve_result_first(question: str) -> str:
    """Another way to work a chain, every step written result first: `<think>8=3+5,6=8*2</think>\\boxed{6}`.

    A model must know a result before it has written the operands, which is hard for a small model.
    """
    worked, answer = solve(question)
    steps = worked.removeprefix("<think>").removesuffix(f"</think>\\boxed{{{answer}}}").split(",")
    turned = (f"{result}={operation}" for operation, result in (step.split("=") for step in steps))
    return f"<think>{','.join(turned)}</think>\\boxed{{{answer}}}"


def bracket(question: str) -> str:
    """The chain with brackets that show the order of its steps: `3+5*2` becomes `(3+5)*2`."""
    digits = question[::2]
    text = digits[0]
    for position, (operator, digit) in enumerate(zip(question[1::2], digits[1:], strict=True)):
        text = f"({text}){operator}{digit}" if position else f"{text}{operator}{digit}"
    return text


def apply(left: int, operator: str, right: int) -> int:
    """One look-up: left operator right, modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS


def sample_questions(rng: random.Random, count: int, lengths: range, *, exclude: set[str]) -> list[str]:
    """`count` distinct chains, none of them in `exclude`, lengths drawn evenly."""
    chosen: dict[str, None] = {}
    for question in stream_chains(rng, lengths):
        if question not in exclude and question not in chosen:
            chosen[question] = None
            if len(chosen) == count:
                return list(chosen)
    raise AssertionError("the stream of chains does not end")


def stream_chains(rng: random.Random, lengths: range) -> Iterator[str]:
    """Endless chains, lengths drawn evenly."""
    while True:
        digits = rng.choice(lengths)
        question = str(rng.randrange(10))
        for _ in range(digits - 1):
            question += rng.choice(OPERATORS) + str(rng.randrange(10))
        yield question
