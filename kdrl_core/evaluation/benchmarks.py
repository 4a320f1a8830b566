"""Benchmarks: JSON Lines with `id`, `problem`, `answer`, read and checked before anything is generated."""

import json
from dataclasses import dataclass

from kdrl_core.config import BenchmarkConfig, resolve_path
from kdrl_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkProblem:
    """One problem of a benchmark."""

    problem_id: str
    question: str
    answer: str


def load_benchmark(config: BenchmarkConfig) -> list[BenchmarkProblem]:
    """The problems of a benchmark, the first `max_problems` of them.

    Raises:
        DataError: the file is missing, empty, or a row lacks a field; file, row and field are named.
    """
    path = resolve_path(config.file)
    if not path.is_file():
        raise DataError(f"benchmark {config.name}: no file {path}; correct evaluation.benchmarks file={config.file}")
    problems: list[BenchmarkProblem] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path.name} row {number}: not JSON ({error}); one object per line is expected"
                ) from error
            for name in ("id", "problem", "answer"):
                if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                    raise DataError(
                        f"{path.name} row {number}, field '{name}': missing or empty; fill it in or drop the row"
                    )
            problems.append(BenchmarkProblem(problem_id=row["id"], question=row["problem"], answer=row["answer"]))
            if len(problems) == config.max_problems:
                break
    if not problems:
        raise DataError(f"benchmark {config.name}: {path} has no problems; give a file with at least one row")
    if len({p.problem_id for p in problems}) != len(problems):
        raise DataError(f"benchmark {config.name}: {path} has two rows with the same id; make ids unique")
    return problems
