"""Benchmarks: JSON Lines with `id`, `problem`, `answer`, read and checked before anything is generated."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from kdrl_core.config import BenchmarkConfig, resolve_path
from kdrl_core.data.text import is_unicode
from kdrl_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkProblem:
    """One problem of a benchmark."""

    problem_id: str
    question: str
    answer: str


def select_benchmarks(known: Sequence[BenchmarkConfig], names: Sequence[str] | None) -> list[BenchmarkConfig]:
    """The benchmarks that are named, in the order of `known`; all if `names` is None.

    Raises:
        DataError: a name is not known; the known ones and the nearest are listed.
    """
    of_name = {benchmark.name: benchmark for benchmark in known}
    for name in names or ():
        if name not in of_name:
            close = get_close_matches(name, of_name, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise DataError(f"no benchmark '{name}' (known: {', '.join(of_name)}){hint}")
    return [benchmark for benchmark in known if names is None or benchmark.name in names]


def load_benchmark(config: BenchmarkConfig) -> list[BenchmarkProblem]:
    """The problems of a benchmark, at most the first `max_problems`.

    Raises:
        DataError: the file is missing, empty, or a row lacks a field; file, row and field are named.
    """
    path = resolve_path(config.file)
    if not path.is_file():
        raise DataError(f"benchmark {config.name}: no file {path}; correct evaluation.benchmarks file={config.file}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from error
    problems: list[BenchmarkProblem] = []
    row_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path.name} row {number}: not JSON ({error}); one object per line is expected") from error
        for name in ("id", "problem", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(
                    f"{path.name} row {number}, field '{name}': missing, empty or no text; fill it in or drop the row"
                )
            if not is_unicode(row[name]):
                raise DataError(
                    f"{path.name} row {number}, field '{name}': half of a surrogate pair (\\ud835, say), which is no "
                    "character; correct the text"
                )
        if (first := row_of.setdefault(row["id"], number)) != number:
            raise DataError(
                f"{path.name} row {number}, field 'id': {row['id']!r} stands in row {first} as well; make ids unique"
            )
        problems.append(BenchmarkProblem(problem_id=row["id"], question=row["problem"], answer=row["answer"]))
        if len(problems) == config.max_problems:
            break
    if not problems:
        raise DataError(f"benchmark {config.name}: {path} has no problems; give a file with at least one row")
    return problems
