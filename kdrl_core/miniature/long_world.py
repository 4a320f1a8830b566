"""The world where thinking longer helps: chains of +, − and × modulo 10, worked at one of five depths.

A chain is written with a letter before each operator, `3a+5b*2`, so that a tiny model keeps its place; an operator and
its digit are one token. A thought is a row of equations, each after a word. Its *depth* says how carefully it goes:

    depth 0   three operators an equation:  ` so 3a+5b*2c-7=9 then 9d+4=3`
    depth 1   two:                          ` so 3a+5b*2=6 then 6c-7d+4=3`
    depth 2   one:                          ` so 3a+5=8 then 8b*2=6 next 6c-7=9 now 9d+4=3`
    depth 3   one, each worked again:       ` so 3a+5=8 again 3a+5=8 then 8b*2=6 check 8b*2=6 …`
    depth 4   one, each worked again twice

The results of a chain follow from each other, and a small model can do few of them in its head. So deeper thoughts are
right more often, down to depth 2; depth 3 and 4 only repeat, and are longer than they must be. The last result counts.
The words mean nothing, but for one thing: a word of one list opens an equation, a word of the other repeats it. They
give the models a vocabulary of hundreds of tokens, many of which are possible where a word stands, as in a language.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kdrl_core.miniature.problems import Problems, draw_problems
from kdrl_core.miniature.world import OPERATORS, apply

_OPENERS = """
    so then next now first here thus hence well okay right good fine onward further after later also plus and but
    still yet meanwhile moreover besides likewise similarly accordingly therefore consequently subsequently
    afterwards finally lastly secondly thirdly onwards continuing proceeding moving going taking using adding
    working computing calculating evaluating finding getting having seeing noting writing reading turning
    stepping carrying keeping holding giving making putting setting letting bringing coming leaving starting
    beginning ending closing simply clearly surely plainly directly quickly easily naturally evidently obviously
    indeed truly really actually basically essentially generally usually normally carefully slowly gently firmly
    neatly exactly precisely
"""
OPENERS = tuple(_OPENERS.split())
_CHECKERS = """
    again wait check recheck verify reverify confirm recompute redo repeat review revisit reconsider rethink retry
    double twice once more another look back careful hmm hold sure truthfully certain doubt test retest prove
    inspect examine reexamine audit compare recalculate reassess validate ensure assure secure settle scan
    rescan trace retrace replay rerun rework remake reread rewrite recount retake recast restate reiterate
    resume reaffirm restore return revise correct proof crosscheck counter question challenge dispute suspect
    query ask wonder ponder weigh balance measure gauge probe try attempt undo reverse mirror match align
"""
CHECKERS = tuple(_CHECKERS.split())
WORDS = (*OPENERS, *CHECKERS)
LETTERS = "abcdefghijk"
UNITS = (*LETTERS, *(f"{operator}{digit}" for operator in OPERATORS for digit in range(10)), *(f" {w} " for w in WORDS))
"""What is one token in this world, beside single digits and signs."""
_FORMS = ((3, 1), (2, 1), (1, 1), (1, 2), (1, 3))
"""Operators in an equation, and how often it is worked, at each depth."""
DEPTHS = range(len(_FORMS))


def draw_long_problems(*, scale: float = 1.0) -> Problems:
    """The problems of this world: chains of 5 to 9 digits; the harder ones have 10 or 11."""
    lengths = range(5, 10)
    return draw_problems(
        lengths=lengths, hard_lengths=range(10, 12), ood_lengths=lengths, num_stage2=1_024, scale=scale
    )


def lettered(chain: str) -> str:
    """A chain as this world's problems write it: `3+5*2` becomes `3a+5b*2`. Brackets stay."""
    letters = iter(LETTERS)
    return "".join(next(letters) + character if character in OPERATORS else character for character in chain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """How a model thinks, as its training texts show it."""

    depths: tuple[float, ...]
    """Share of the thoughts at each depth."""
    word_slope: float
    """The word of rank r has weight r^(−slope): small for a broad vocabulary, large for a narrow one."""
    seed: int
    """Of the order of the words."""


def think(chain: str, habit: Habit, depth: int, rng: random.Random) -> str:
    """The response of one who has this habit to a chain, at one depth."""
    openers, checkers = _ranked(OPENERS, habit.seed), _ranked(CHECKERS, habit.seed)
    width, times = _FORMS[depth]
    value, text = int(chain[0]), ""
    steps = [*zip(LETTERS, chain[1::2], map(int, chain[2::2]), strict=False)]
    for taken in (steps[start : start + width] for start in range(0, len(steps), width)):
        equation, result = str(value), value
        for letter, operator, digit in taken:
            equation, result = f"{equation}{letter}{operator}{digit}", apply(result, operator, digit)
        for words in (openers, *[checkers] * (times - 1)):
            text += f" {_draw(words, habit.word_slope, rng)} {equation}={result}"
        value = result
    return f"<think>{text}</think>\\boxed{{{value}}}"


def depth_of(response: str) -> int | None:
    """The depth at which a response thinks, by the operators of its longest equation and how often it works one, on
    average; None without an equation."""
    equations = re.findall(r" ([a-z]+) ([^= ]*)=", response)
    if not equations:
        return None
    width = max(sum(equation.count(letter) for letter in LETTERS) for _, equation in equations)
    times = len(equations) / max(1, sum(word in OPENERS for word, _ in equations))
    return min(DEPTHS, key=lambda depth: (_FORMS[depth][0] - width) ** 2 + (_FORMS[depth][1] - times) ** 2)


@lru_cache
def _ranked(words: tuple[str, ...], seed: int) -> tuple[str, ...]:
    return tuple(random.Random(seed).sample(words, len(words)))


def _draw(words: Sequence[str], slope: float, rng: random.Random) -> str:
    return rng.choices(words, [(rank + 1) ** -slope for rank in range(len(words))])[0]
