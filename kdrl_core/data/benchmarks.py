"""Benchmarks: problems in any shape that training data may have, read and checked before anything is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kdrl_core.config import BenchmarkConfig, DataConfig
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
    where = f"benchmark {config.name}"
    data = DataConfig(files=[config.file], columns=config.columns)
    problems: list[BenchmarkProblem] = []
    place_of: dict[str, tuple[str, int]] = {}
    for path in _files(data, config):
        for batch in read_file(path, data):
            columns = (batch.problems[name].to_pylist() for name in ("problem_id", "question", "answer"))
            faults = iter(batch.faults)
            fault = next(faults, None)
            for row, *fields in zip(batch.rows.tolist(), *columns, strict=True):
                if fault is not None and fault.row < row:
                    break
                if len(problems) == config.max_problems:
                    return problems
                problem = BenchmarkProblem(problem_id=fields[0], question=fields[1], answer=fields[2])
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
    if not problems:
        raise DataError(f"{where}: {config.file} has no problems; give a file with at least one row")
    return problems


def _files(data: DataConfig, config: BenchmarkConfig) -> list[Path]:
    try:
        return find_files(data, field="evaluation.benchmarks file")
    except DataError as error:
        raise DataError(f"benchmark {config.name}: {error}") from error
