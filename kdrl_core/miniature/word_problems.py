"""Sums and one-line word problems for a small real model: `python -m kdrl_core.miniature.word_problems --output DIR`.

    train.jsonl        72 problems of each of six kinds; `kdrl label` adds difficulty labels (docs/recipes.md)
    validation.jsonl   the same kinds, other numbers
    test.jsonl         the same kinds, other numbers again
    hard.jsonl         the same kinds, the first number larger than any in training
    ood.jsonl          three kinds that nothing is trained on: sums of three, two steps, and doubles

A problem is a kind and its numbers. Each tuple of numbers is dealt to one file, so no problem of a kind is in two. Two
kinds may share numbers: `4 * 6 = ?` and `4 boxes of 6 pens. How many pens?` are two problems. So are `5 + 7 = ?` and
`7 + 5 = ?`: of the test problems 15 of 128 are training problems with their two numbers exchanged, of `hard` 8 of 64.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from operator import add, mul, sub
from pathlib import Path

SEED = 11
NUM_TRAIN = 72
"""Training problems of each kind. The files below have their total, spread over the kinds."""
SIZES = {"test": 128, "validation": 64, "hard": 64, "ood": 64}


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done with the numbers of a problem, and which numbers there are."""

    answer: Callable[..., int]
    numbers: tuple[range, ...]
    """What each number may be."""
    hard: tuple[range, ...] = ()
    """The same for the harder benchmark; no problem is in both."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of question."""

    name: str
    text: str
    """The question, with a `{}` for each number."""
    operation: Operation

    def row(self, values: tuple[int, ...]) -> dict[str, str]:
        """The problem of these numbers, in kdrl's own format; its id tells the kind."""
        return {
            "id": "-".join([self.name, *map(str, values)]),
            "problem": self.text.format(*values),
            "answer": str(self.operation.answer(*values)),
            "source": f"kdrl word problems: {self.name}",
        }


PLUS = Operation(add, (range(3, 30), range(3, 10)), (range(30, 60), range(11, 30)))
MINUS = Operation(sub, (range(6, 33), range(2, 6)), (range(33, 60), range(6, 20)))
TIMES = Operation(mul, (range(2, 10), range(3, 17)), (range(10, 20), range(3, 10)))
KINDS = (
    Kind("sum", "{} + {} = ?", PLUS),
    Kind("difference", "{} - {} = ?", MINUS),
    Kind("product", "{} * {} = ?", TIMES),
    Kind("bought", "{} apples, {} more are bought. How many apples are there?", PLUS),
    Kind("eaten", "{} apples, {} are eaten. How many apples are left?", MINUS),
    Kind("boxes", "{} boxes of {} pens. How many pens?", TIMES),
)
"""Kinds of the training problems."""
OTHER_KINDS = (
    Kind("three", "{} + {} + {} = ?", Operation(lambda a, b, c: a + b + c, (range(3, 10),) * 3)),
    Kind(
        "boxes-and-more",
        "{} boxes of {} pens and {} more pens. How many pens?",
        Operation(lambda a, b, c: a * b + c, (range(2, 6), range(2, 10), range(2, 10))),
    ),
    Kind("twice", "{} apples, and twice as many pens. How many pens?", Operation(lambda a: 2 * a, (range(3, 30),))),
)
"""Kinds of the out-of-domain benchmark."""


def problems(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Every file's rows by its name, which depend on `seed` alone."""
    rng = random.Random(seed)
    hard = [_shuffled(rng, kind, kind.operation.hard) for kind in KINDS]
    other = [_shuffled(rng, kind, kind.operation.numbers) for kind in OTHER_KINDS]
    found = {"hard": _dealt(hard, SIZES["hard"]), "ood": _dealt(other, SIZES["ood"])}
    own = [_shuffled(rng, kind, kind.operation.numbers) for kind in KINDS]
    for name in ("test", "validation"):
        found[name] = _dealt(own, SIZES[name])
    return {**found, "train": _dealt(own, NUM_TRAIN * len(KINDS))}


def build_word_problems(output: Path) -> None:
    """Write the five files into the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in problems().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _shuffled(rng: random.Random, kind: Kind, numbers: tuple[range, ...]) -> list[dict[str, str]]:
    """Every problem of a kind, in random order."""
    every = list(itertools.product(*numbers))
    rng.shuffle(every)
    return [kind.row(values) for values in every]


def _dealt(piles: list[list[dict[str, str]]], count: int) -> list[dict[str, str]]:
    """`count` rows, one from each pile in turn; they are taken off the piles."""
    return [piles[turn % len(piles)].pop() for turn in range(count)]


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Write the problems of the recipe smollm2-zero (seconds).")
    parser.add_argument("--output", type=Path, required=True, help="folder to write five .jsonl files into")
    build_word_problems(parser.parse_args().output)


if __name__ == "__main__":
    main()
