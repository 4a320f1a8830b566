"""The world where thinking longer helps: chains of +, − and × modulo 10, worked at one of five depths.

A chain is written with a letter before each operator, `3a+5b*2`, so that a tiny model keeps its place. A thought is
a row of equations, each after a word. Its *depth* says how carefully it goes:

    depth 0   two operators an equation:  ` so 3a+5b*2=6`; short, and a small model often gets it wrong
    depth 1   one operator an equation:   ` so 3a+5=8 then 8b*2=6`
    depth 2+  every equation is worked again, depth − 1 times:  ` so 3a+5=8 again 3a+5=8 then 8b*2=6 check 8b*2=6`

The last result counts. Thoughts are *noisy*: in the training texts the first result of an equation is wrong with
probability `noise`, and each time that it is worked again with a quarter of the probability before. So depth 2 makes up
for most of the noise, and depth 3 and 4 add next to nothing: they are longer than they must be. The words mean nothing,
but for one thing: a word of one list opens an equation, a word of the other repeats it. They give the models a
vocabulary of hundreds of tokens, many of which are possible where a word stands, as in a language.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kdrl_core.miniature.problems import Problems, draw_problems
from kdrl_core.miniature.world import OPERATORS, apply

DEPTHS = range(5)
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
LETTERS = "abcdefghij"
_SINGLE = len("3a+5")
_KEPT_BY_CHECK = 0.25
"""Share of the noise that is left each time an equation is worked again."""


def draw_long_problems(*, scale: float = 1.0) -> Problems:
    """The problems of this world: chains of 3 to 6 digits; the harder ones have 7 or 8."""
    lengths = range(3, 7)
    return draw_problems(lengths=lengths, hard_lengths=range(7, 9), ood_lengths=lengths, num_stage2=1_024, scale=scale)


def lettered(chain: str) -> str:
    """A chain as this world's problems write it: `3+5*2` becomes `3a+5b*2`. Brackets stay."""
    letters = iter(LETTERS)
    return "".join(next(letters) + character if character in OPERATORS else character for character in chain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """How a model thinks, as its training texts show it."""

    depths: tuple[float, ...]
    """Share of the thoughts at each depth."""
    noise: float
    """Share of the equations whose first result is wrong."""
    word_slope: float
    """The word of rank r has weight r^(−slope): small for a broad vocabulary, large for a narrow one."""
    words_seed: int
    """Order of the words."""


def think(chain: str, habit: Habit, depth: int, rng: random.Random) -> str:
    """The response of one who has this habit to a chain, at one depth; its answer may be wrong."""
    openers, checkers = _ranked(OPENERS, habit.words_seed), _ranked(CHECKERS, habit.words_seed)
    value, text = int(chain[0]), ""
    steps = [*zip(LETTERS, chain[1::2], map(int, chain[2::2]), strict=False)]
    width = 2 if depth == 0 else 1
    for taken in (steps[start : start + width] for start in range(0, len(steps), width)):
        right, equation = value, str(value)
        for letter, operator, digit in taken:
            right, equation = apply(right, operator, digit), f"{equation}{letter}{operator}{digit}"
        for attempt in range(max(1, depth)):
            text += f" {_draw(checkers if attempt else openers, habit.word_slope, rng)} "
            value = _noisy(right, habit.noise * _KEPT_BY_CHECK**attempt, rng)
            text += f"{equation}={value}"
    return f"<think>{text}</think>\\boxed{{{value}}}"


def depth_of(response: str) -> int | None:
    """The depth at which a response thinks: 0 if half of its equations have two operators, else one more than the
    times that it repeats an equation, on average; None without an equation."""
    equations = re.findall(r" ([a-z]+) ([^= ]*)=", response)
    if not equations:
        return None
    if 2 * sum(len(equation) > _SINGLE for _, equation in equations) >= len(equations):
        return 0
    repeated = sum(word in CHECKERS for word, _ in equations)
    return 1 + round(repeated / max(1, len(equations) - repeated))


def _noisy(right: int, noise: float, rng: random.Random) -> int:
    return (right + rng.randrange(1, 10)) % 10 if rng.random() < noise else right


@lru_cache
def _ranked(words: tuple[str, ...], seed: int) -> tuple[str, ...]:
    return tuple(random.Random(seed).sample(words, len(words)))


def _draw(words: Sequence[str], slope: float, rng: random.Random) -> str:
    return rng.choices(words, [(rank + 1) ** -slope for rank in range(len(words))])[0]
