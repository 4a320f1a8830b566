"""`kdrl report`: any runs side by side, as one HTML page and Markdown. The work is in kdrl_core.look.sweeps."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.printed_tables import print_comparison
from flows.cli.shared import JsonOption, errors, out
from kdrl_core.errors import RunError, StorageError

_STEM = "report"


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Names of runs, finished or not (kdrl status).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; files of an earlier report in it are replaced.")
    ],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="RUN=TEXT", help="Name of the run's variant in the report. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: report.html (one page, no network), report.md, report.csv and report.json in a folder.

    Runs that differ only in their seed are one variant, with intervals over problems and seeds; every other run is a
    variant of its own. All others are compared with the first run's variant. An unfinished run is shown with the
    results that it has, and is listed as missing.

    \b
    kdrl report mine --output report
    kdrl report kdrl-0 kdrl-1 grpo-0 grpo-1 --label kdrl-0=KDRL --label grpo-0=GRPO -o report
    """
    from kdrl_core.look.sweeps.comparison import read_runs, write_comparison

    with errors():
        if output.exists() and not output.is_dir():
            raise RunError(f"--output {output} is a file; name a folder")
        results = read_runs(runs, _labels(label or []))
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"--output {output}: the folder cannot be made ({error.strerror}); name another"
            ) from None
        table = write_comparison(results, output, stem=_STEM)
        if as_json:
            out.print_json(data=table.to_json())
        else:
            print_comparison(table, output / f"{_STEM}.html")


def _labels(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        run, equals, label = text.partition("=")
        if not equals or not run or not label.strip():
            raise RunError(f"--label {text}: expected RUN=TEXT, e.g. --label mine=KDRL")
        if run in found:
            raise RunError(f"--label {text}: {run} has a label already, {found[run]}; give one")
        found[run] = label.strip()
    return found
