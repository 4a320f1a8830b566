"""Benchmarks: problems in any shape that training data may have, read and checked before anything is generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain

from kdrl_core.config import BenchmarkConfig, DataConfig
from kdrl_core.data.read import find_files, read_file
from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Fault


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
    """The problems of a benchmark, at most the first `max_problems`, from a file of any shape that problems may have.

    Raises:
        DataError: the file is missing, empty, or a row lacks a field; file, row and field are named.
    """
    problems: list[BenchmarkProblem] = []
    place_of: dict[str, str] = {}
    try:
        for place, found in _rows(config):
            if len(problems) == config.max_problems:
                break
            if isinstance(found, Fault):
                raise DataError(f"{found}; fill it in or drop the row")
            if (first := place_of.setdefault(found.problem_id, place)) != place:
                raise DataError(
                    f"{place}, field 'id': {found.problem_id!r} stands in {first} as well; make ids unique, and remove "
                    "repeated problems"
                )
            problems.append(found)
    except DataError as error:  # the benchmark's own field, in place of a stage's
        raise DataError(str(error).replace("<stage>.data.", f"benchmark {config.name}'s ")) from error
    if not problems:
        raise DataError(f"benchmark {config.name}: {config.file} has no problems; give a file with at least one row")
    return problems


def _rows(config: BenchmarkConfig) -> Iterator[tuple[str, BenchmarkProblem | Fault]]:
    """Place and problem, or fault, of each row."""
    data = DataConfig(files=[config.file], columns=config.columns)
    try:
        files = find_files(data, field="evaluation.benchmarks file")
    except DataError as error:
        raise DataError(f"benchmark {config.name}: {error}") from error
    for batch in chain.from_iterable(read_file(path, data) for path in files):
        found: list[tuple[int, BenchmarkProblem | Fault]] = [(fault.row, fault) for fault in batch.faults]
        columns = (batch.problems[name].to_pylist() for name in ("problem_id", "question", "answer"))
        for row, problem_id, question, answer in zip(batch.rows.tolist(), *columns, strict=True):
            found.append((row, BenchmarkProblem(problem_id=problem_id, question=question, answer=answer)))
        for row, one in sorted(found, key=lambda each: each[0]):
            yield f"{batch.origin} row {row}", one
