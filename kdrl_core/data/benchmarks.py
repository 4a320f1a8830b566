"""Benchmarks: problems in any shape that training data may have, read and checked before anything is generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from kdrl_core.config import BenchmarkConfig, DataConfig
from kdrl_core.data.normalize import Normalized
from kdrl_core.data.read import find_files, read_file
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
    """The problems of a benchmark, at most the first `max_problems`, from a file of any shape that problems may have.

    Raises:
        DataError: the file is missing, empty, or a row lacks a field; file, row and field are named.
    """
    problems: list[BenchmarkProblem] = []
    place_of: dict[str, tuple[str, int]] = {}
    try:
        for batch in _batches(config):
            fault = next(iter(batch.faults), None)
            for row, problem in _usable(batch):
                if fault is not None and fault.row < row:
                    break
                if len(problems) == config.max_problems:
                    return problems
                first = place_of.setdefault(problem.problem_id, (batch.origin, row))
                if first != (batch.origin, row):
                    place = f"row {first[1]}" if first[0] == batch.origin else f"{first[0]} row {first[1]}"
                    raise DataError(
                        f"{batch.origin} row {row}, field 'id': {problem.problem_id!r} stands in {place} as well; "
                        "make ids unique, and remove repeated problems"
                    )
                problems.append(problem)
            if fault is not None and len(problems) != config.max_problems:
                raise DataError(f"{fault.what}; fill it in or drop the row")
    except DataError as error:  # the benchmark's own field, in place of a stage's
        raise DataError(str(error).replace("<stage>.data.", f"benchmark {config.name}'s ")) from error
    if not problems:
        raise DataError(f"benchmark {config.name}: {config.file} has no problems; give a file with at least one row")
    return problems


def _batches(config: BenchmarkConfig) -> Iterator[Normalized]:
    data = DataConfig(files=[config.file], columns=config.columns)
    try:
        files = find_files(data, field="evaluation.benchmarks file")
    except DataError as error:
        raise DataError(f"benchmark {config.name}: {error}") from error
    for path in files:
        yield from read_file(path, data)


def _usable(batch: Normalized) -> Iterator[tuple[int, BenchmarkProblem]]:
    """The rows of a batch with their numbers."""
    columns = (batch.problems[name].to_pylist() for name in ("problem_id", "question", "answer"))
    for row, problem_id, question, answer in zip(batch.rows.tolist(), *columns, strict=True):
        yield row, BenchmarkProblem(problem_id=problem_id, question=question, answer=answer)
