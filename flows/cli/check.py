"""`kdrl check`: compare a run's published files with their manifests. The work is in kdrl_core.boxes.check."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from flows.cli.shared import JsonOption, RunArgument, counted_progress, err, errors, out


def check(
    run_name: RunArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged verdicts and scores of past steps again from their rollouts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every published file of a run with its manifest: hashes, sizes, inputs, missing steps.

    It only reads, so you may use it while the run is going on. `kdrl resume` checks the files that it continues from,
    and makes damaged ones again; this command also finds damage in past steps. Exit code 1 if damage is left.
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
                out.say(f"made again: {path}")
            for reason in refused:
                out.say(f"not made again: {reason}")
            if report.findings:
                table = RichTable(box=SIMPLE_HEAD, show_edge=False)
                for column in ("artifact", "problem", "made whole by"):
                    table.add_column(column, overflow="fold")
                for finding in report.findings:
                    table.add_row(finding.path, finding.problem, finding.remedy)
                out.print(table)
            verdict = f"{len(report.findings)} damaged" if report.findings else "all as published"
            size = report.num_bytes / 2**20
            out.print(f"{report.num_artifacts} artifacts, {size:,.1f} MiB compared: {verdict}")
        if report.findings:
            raise SystemExit(1)
