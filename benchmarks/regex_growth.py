"""How the time of every regex of kdrl_core/verify and kdrl_core/data grows with its text: `make bench-regexes`.

Every module of the two packages is searched for compiled patterns, so a new one is covered. Worst cases are made from
the pattern itself: a piece that it could match, or two in turns, many times over, after a beginning and before an end
that cannot match. A pattern is tried in the ways in which the code of its module calls it (`search`, `fullmatch`, …).

The time is the least of several, in CPU seconds of this thread. The table has, for each pattern, its slowest text, the
times at three lengths, and the exponent of the growth between the last two: about 1 is linear, 2 is quadratic.
"""

import argparse
import ast
import importlib
import inspect
import itertools
import math
import pkgutil
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import kdrl_core.data
import kdrl_core.verify

_parser: Any = getattr(re, "_parser")  # noqa: B009 (private: the type checker does not know it)

PACKAGES = (kdrl_core.verify, kdrl_core.data)
CALLS: dict[str, Callable[[re.Pattern[str], str], Any]] = {
    "search": lambda pattern, text: pattern.search(text),
    "match": lambda pattern, text: pattern.match(text),
    "fullmatch": lambda pattern, text: pattern.fullmatch(text),
    "sub": lambda pattern, text: pattern.sub("", text),
}
_SAME = {"subn": "sub", "finditer": "sub", "findall": "sub", "split": "sub"}
LENGTH = 4_096
"""Characters of the longest text: the limit of an answer."""
ENDS = ("", "\x00", "\n")
MAX_PIECES = 12
FLOOR_S = 2e-4
"""Times below say nothing about growth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One pattern, and how it is called."""

    name: str
    pattern: re.Pattern[str]
    call: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The slowest text of a pattern."""

    target: Target
    text: str
    """How the text is made, in words."""
    seconds: tuple[float, float, float]
    """At a quarter of the length, at half of it, and at all of it."""

    @property
    def exponent(self) -> float:
        """Of length; 0 if the time is too short to tell."""
        _, before, after = self.seconds
        return math.log2(after / before) if after > FLOOR_S else 0.0


def targets() -> list[Target]:
    """Every pattern of the packages, with every way in which the packages call it."""
    names: dict[re.Pattern[str], str] = {}
    called: dict[re.Pattern[str], set[str]] = {}
    for module in _modules():
        calls = _calls(module)
        for name, pattern in _patterns(module):
            names.setdefault(pattern, f"{module.__name__.removeprefix('kdrl_core.')}.{name}")
            called.setdefault(pattern, set()).update(calls.get(name.partition("[")[0], ()))
    return [
        Target(name=names[pattern], pattern=pattern, call=call)
        for pattern, calls in called.items()
        for call in sorted(calls or CALLS)
    ]


def _modules() -> list[ModuleType]:
    return [
        importlib.import_module(info.name)
        for package in PACKAGES
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def _patterns(module: ModuleType) -> Iterator[tuple[str, re.Pattern[str]]]:
    """The compiled patterns among a module's attributes, also those in tuples, lists and dicts."""

    def inside(name: str, value: Any) -> Iterator[tuple[str, re.Pattern[str]]]:
        if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
            yield name, value
        elif isinstance(value, dict):
            for key, each in value.items():
                yield from inside(f"{name}[{key!r}]", each)
        elif isinstance(value, list | tuple | set | frozenset):
            for number, each in enumerate(value):
                yield from inside(f"{name}[{number}]", each)

    for name, value in vars(module).items():
        if not name.startswith("__"):
            yield from inside(name, value)


def _calls(module: ModuleType) -> dict[str, set[str]]:
    """The methods that the module's code calls on each name, and on what a loop over it yields."""
    found: dict[str, set[str]] = {}
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            _note(found, node.value.id, node.attr)
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Name):
            drawn = {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
            for inner in (each for line in node.body for each in ast.walk(line)):
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in drawn:
                    _note(found, node.iter.id, inner.attr)
    return found


def _note(found: dict[str, set[str]], name: str, method: str) -> None:
    if (call := _SAME.get(method, method)) in CALLS:
        found.setdefault(name, set()).add(call)


def uncompiled() -> list[str]:
    """Calls such as `re.sub("…", …)` in the packages: `targets` cannot see their patterns."""
    return [
        f"{module.__name__}:{node.lineno}"
        for module in _modules()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "re"
        and (node.attr in CALLS or node.attr in _SAME)
    ]


def pieces(pattern: re.Pattern[str]) -> list[str]:
    """Short texts that parts of the pattern match: its words, and characters of its classes."""
    found: dict[str, None] = {}

    def walk(parsed: Any) -> None:
        run = ""
        for op, value in [*parsed, ("END", None)]:
            kind = str(op)
            if kind == "LITERAL":
                run += chr(value)
                continue
            if run:
                found.update(dict.fromkeys([run, run[0]]))
                run = ""
            if kind in ("IN", "NOT_LITERAL", "ANY"):
                found.update(dict.fromkeys(_chars(kind, value)))
            for each in _parts(kind, value):
                walk(each)

    walk(_parsed(pattern))
    words = list(found)
    return list(dict.fromkeys([*words[:: math.ceil(len(words) / MAX_PIECES) or 1], *words[:3], " "]))


def sample(parsed: Any, rng: random.Random) -> str:
    """A text that the pattern matches, or nearly: it looks at no assertion about what follows."""
    text = ""
    for op, value in parsed:
        kind = str(op)
        if kind == "LITERAL":
            text += chr(value)
        elif kind in ("IN", "NOT_LITERAL", "ANY"):
            text += rng.choice(_chars(kind, value))
        elif kind == "BRANCH":
            text += sample(rng.choice(value[1]), rng)
        elif kind.endswith("_REPEAT"):
            least, most, body = value
            text += "".join(sample(body, rng) for _ in range(rng.randint(least, min(most, least + 2))))
        elif kind in ("ATOMIC_GROUP", "SUBPATTERN") or (kind == "ASSERT" and value[0] < 0):
            text += sample(_parts(kind, value)[0], rng)
    return text


def _parsed(pattern: re.Pattern[str]) -> Any:
    return _parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE)


def _parts(kind: str, value: Any) -> list[Any]:
    """The patterns inside a node of a parsed pattern."""
    if kind == "BRANCH":
        return list(value[1])
    if kind == "ATOMIC_GROUP":
        return [value]
    if kind.endswith("_REPEAT") or kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return []


def _chars(kind: str, value: Any) -> list[str]:
    """A few characters of a class."""
    usual = ("a", "1", " ", "+")
    if kind == "ANY":
        return ["a"]
    if kind == "NOT_LITERAL":
        return [char for char in usual if ord(char) != value]
    if str(value[0][0]) == "NEGATE":
        excluded = {chr(each) for op, each in value if str(op) == "LITERAL"}
        return [char for char in usual if char not in excluded]
    categories = {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " ", "CATEGORY_WORD": "a"}
    chars = []
    for op, each in value:
        if str(op) == "CATEGORY":
            chars.append(categories.get(str(each), "a"))
        else:
            chars.append(chr(each if str(op) == "LITERAL" else each[0]))
    return chars[:4]


Make = Callable[[int], str]


def texts(pattern: re.Pattern[str], *, num_random: int = 600) -> Iterator[tuple[str, Make]]:
    """Texts that may be slow, as a description and a function of their length."""
    found, rng, parsed = pieces(pattern), random.Random(pattern.pattern), _parsed(pattern)

    def text(begin: str, unit: str, end: str) -> tuple[str, Make]:
        return f"{begin!r} {unit!r}* {end!r}", lambda n: begin + (unit * (n // len(unit) + 1))[:n] + end

    for unit in [*found, *(a + b for a, b in itertools.permutations(found, 2))]:
        for end in ENDS:
            yield text("", unit, end)
    for first, second in itertools.permutations(found, 2):
        yield f"{first!r}* {second!r}*", lambda n, a=first, b=second: a * (n // len(a) // 2) + b * (n // len(b) // 2)  # type: ignore[misc]
    for _ in range(num_random):
        whole = sample(parsed, rng)
        begin = whole[: rng.randint(0, len(whole))]
        unit = "".join(rng.choices(found, k=rng.randint(1, 3))) if rng.random() < 0.7 else whole or "a"
        yield text(begin, unit, rng.choice([*ENDS, *found]))


def seconds_of(target: Target, text: str, *, repeats: int = 1) -> float:
    call = CALLS[target.call]
    best = math.inf
    for _ in range(repeats):
        started = time.thread_time()
        call(target.pattern, text)
        best = min(best, time.thread_time() - started)
    return best


def measure(target: Target, *, length: int = LENGTH) -> Growth:
    """The growth on the slowest text that was found. A quarter of the length is enough to find it."""
    short = length // 4
    tried = [(seconds_of(target, make(short)), name, make) for name, make in texts(target.pattern)]
    slowest = sorted(tried, key=lambda each: each[0], reverse=True)[:5]
    growths = []
    for _, name, make in slowest:
        times = tuple(seconds_of(target, make(n), repeats=3) for n in (short, length // 2, length))
        growths.append(Growth(target=target, text=name, seconds=times))  # type: ignore[arg-type]
        if times[-1] > 1.0:
            break
    return max(growths, key=lambda growth: growth.seconds[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Time every regex of verify and data against its worst case.")
    parser.add_argument("--length", type=int, default=LENGTH, help="characters of the longest text")
    parser.add_argument("--only", default="", help="patterns whose name holds this")
    options = parser.parse_args()
    print(
        f"{'pattern':44} {'call':9} {'ms at ' + str(options.length // 4):>11} {'half':>9} {'whole':>9} exponent  text"
    )
    for target in targets():
        if options.only in target.name:
            growth = measure(target, length=options.length)
            quarter, half, whole = (f"{1000 * each:9.3f}" for each in growth.seconds)
            line = (
                f"{target.name:44} {target.call:9} {quarter:>11} {half} {whole} {growth.exponent:8.2f}  {growth.text}"
            )
            print(line.encode("ascii", "backslashreplace").decode())
    for where in uncompiled():
        print(f"not compiled: {where}", file=sys.stderr)


if __name__ == "__main__":
    main()
