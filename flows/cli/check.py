"""`kdrl check`: whether all that a run has published is as it was. The work is in kdrl_core.boxes.check."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from flows.cli.shared import JsonOption, RunArgument, counted_progress, err, errors, out


def check(
    run_name: RunArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make verdicts and scores of past steps again from their rollouts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every published file of a run with its manifest: hashes, sizes, inputs, missing steps.

    Reads only, and may be used while the run goes on. What a run goes on from, `kdrl resume` checks by itself and makes
    again; this finds damage in past steps as well. Exit code 1 if anything is damaged and was not repaired.
    """
    from kdrl_core.boxes.check import check_run, repair_run
    from kdrl_core.ledger import open_run

    with errors():
        run = open_run(run_name)
        with counted_progress(err, "artifacts") as progress:
            report = check_run(run, on_checked=lambda done, total: progress("comparing", done, total))
        repaired, refused = repair_run(run, report) if repair and report.findings else ([], [])
        if repaired:
            report = check_run(run)
        if as_json:
            out.print_json(data={"run": run_name, **asdict(report), "repaired": repaired, "refused": refused})
        else:
            for path in repaired:
                out.print(f"made again: {path}", highlight=False, soft_wrap=True)
            for reason in refused:
                out.print(f"not made again: {reason}", highlight=False, soft_wrap=True)
            if report.findings:
                table = RichTable(box=SIMPLE_HEAD, show_edge=False)
                for column in ("artifact", "problem", "made whole by"):
                    table.add_column(column, overflow="fold")
                for finding in report.findings:
                    table.add_row(finding.path, finding.problem, finding.remedy)
                out.print(table)
            verdict = f"{len(report.findings)} damaged" if report.findings else "all as published"
            size = report.num_bytes / 2**20
            out.print(f"{report.num_artifacts} artifacts, {size:,.1f} MiB compared: {verdict}", highlight=False)
        if report.findings:
            raise SystemExit(1)
