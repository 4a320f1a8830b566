r"""Training problems that overlap evaluation problems, found by shared n-grams of words.

    overlap(a, b) = |ngrams(a) ∩ ngrams(b)| / min(|ngrams(a)|, |ngrams(b)|)

over distinct n-grams, so a benchmark problem inside a longer text has overlap 1. Problems shorter than n words
have no n-gram; they overlap only if their letters and digits are the same. Words are runs of letters or digits after
NFKC and lower-casing. LaTeX that changes only the look (`\left`, `\dfrac`, `\text`) is left out.

The rule is a share, not one common n-gram, since contest problems end in the same sentences ("where m and n are
relatively prime positive integers. Find m + n"). The 3,052 shipped problems had their overlaps removed before. A rule
of one shared 13-gram would still drop 220 of them. Half of the shorter problem's n-grams drops 4; two of these are
reworded benchmark problems.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kdrl_core.config import BenchmarkConfig, DecontaminationConfig
from kdrl_core.data.benchmarks import BenchmarkProblem, load_benchmark

_WORD = re.compile(r"[^\W\d_]+|\d+")
_LOOKS = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|mathbf|operatorname|quad|qquad|big|Big)(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The evaluation problem that a training problem overlaps most."""

    benchmark: str
    problem_id: str
    share: float
    """1 if they are equal."""


def words_of(text: str) -> list[str]:
    """The words of a problem that are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if "\\" in text:
        text = _LOOKS.sub(" ", _FRACTION.sub(r"\\frac", text))
    return _WORD.findall(text.lower())


def evaluation_problems(config: DecontaminationConfig) -> dict[str, list[BenchmarkProblem]]:
    """The problems of each file, by its path in the recipe. Raises DataError with file, row and field."""
    return {file: load_benchmark(BenchmarkConfig(name=_name(file), file=file)) for file in config.files}


def _name(file: str) -> str:
    return re.sub(r"\W", "_", file.split("/")[-1].rsplit(".", 1)[0])


class _Index:
    """Evaluation problems by their n-grams, and by their letters and digits alone."""

    def __init__(self, ngram: int) -> None:
        self.names: list[tuple[str, str]] = []
        self.sizes: list[int] = []
        self.equal: dict[str, int] = {}
        self.vocabulary: set[str] = set()
        self.numbers: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        self._ngram = ngram

    def add(self, benchmark: str, problem_id: str, words: list[str]) -> None:
        number = len(self.names)
        self.names.append((benchmark, problem_id))
        self.equal.setdefault("".join(words), number)
        self.vocabulary.update(words)
        ngrams = set(self.ngrams(words))
        self.sizes.append(len(ngrams))
        for ngram in ngrams:
            self.numbers[ngram].append(number)

    def ngrams(self, words: Sequence[str]) -> Iterable[tuple[str, ...]]:
        return zip(*(words[start:] for start in range(self._ngram)), strict=False)


@lru_cache(maxsize=2)
def _index(problems: tuple[tuple[str, str, str], ...], ngram: int) -> _Index:
    """The index of (benchmark, problem_id, question); the stages of a run share it."""
    index = _Index(ngram)
    for benchmark, problem_id, question in problems:
        index.add(benchmark, problem_id, words_of(question))
    return index


class Decontaminator:
    """Finds overlaps with evaluation problems. Raises DataError as `evaluation_problems` does."""

    def __init__(self, config: DecontaminationConfig) -> None:
        self._ngram = config.ngram
        self._min_overlap = config.min_overlap
        found = evaluation_problems(config)
        problems = tuple((_name(file), each.problem_id, each.question) for file in found for each in found[file])
        self._index = _index(problems, config.ngram)

    def find(self, question: str) -> Overlap | None:
        """The largest overlap with an evaluation problem, of at least `min_overlap`; None without one."""
        words = words_of(question)
        if (number := self._index.equal.get("".join(words))) is not None:
            return self._overlap(number, 1.0)
        if len(words) < self._ngram:
            return None
        shared: Counter[int] = Counter()
        for ngram in self._known_ngrams(words):
            shared.update(self._index.numbers.get(ngram, ()))
        if not shared:
            return None
        own = len(set(self._index.ngrams(words)))
        shares = {number: count / min(own, self._index.sizes[number]) for number, count in shared.items()}
        best = max(shares, key=lambda number: (shares[number], -number))
        return self._overlap(best, shares[best]) if shares[best] >= self._min_overlap else None

    def find_all(self, questions: Iterable[str]) -> list[Overlap | None]:
        """`find` for each question."""
        return [self.find(question) for question in questions]

    def _overlap(self, number: int, share: float) -> Overlap:
        benchmark, problem_id = self._index.names[number]
        return Overlap(benchmark=benchmark, problem_id=problem_id, share=share)

    def _known_ngrams(self, words: list[str]) -> set[tuple[str, ...]]:
        """The distinct n-grams whose words all occur in evaluation problems; no other n-gram can be shared."""
        known = self._index.vocabulary
        found: set[tuple[str, ...]] = set()
        start = 0
        for end, word in enumerate([*words, ""]):
            if word not in known:
                if end - start >= self._ngram:
                    found.update(self._index.ngrams(words[start:end]))
                start = end + 1
        return found
