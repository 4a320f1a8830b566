"""`kdrl check`: compare a run's published files with their manifests. `kdrl recover`: free a run after a crash."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.printed_tables import grid
from flows.cli.shared import JsonOption, RunArgument, counted_progress, err, errors, out
from kdrl_core.errors import RunError, RunLockedError

if TYPE_CHECKING:
    from kdrl_core.ledger import Run


def check(
    run_name: RunArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged verdicts and scores of past steps again from their rollouts.")
    ] = False,
    replace: Annotated[
        str | None,
        typer.Option(
            "--replace",
            metavar="ARTIFACT",
            help="Give up this damaged artifact and all later work made from it; kdrl resume makes them anew. "
            "The old files are kept in the run's .replaced.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every published file of a run with its manifest: hashes, sizes, inputs, missing steps. Models, data and
    code that the recipe names are compared with the hashes that the run has recorded.

    Without --repair and --replace it only reads, so you may use it during the run. `kdrl resume` checks the files that
    it continues from, and makes damaged ones again; this command also finds damage in past steps. Exit code 1 if damage
    is left.

    \b
    kdrl check first
    kdrl check first --repair
    """
    from kdrl_core.boxes.check import check_run, repair_run, replace_artifact
    from kdrl_core.ledger import open_run

    with errors():
        run = open_run(run_name)
        with counted_progress(err, "artifacts") as progress:
            report = check_run(run, on_checked=lambda done, total: progress("comparing", done, total))
        repaired, refused = repair_run(run, report) if repair and report.findings else ([], [])
        replaced = replace_artifact(run, report, replace) if replace else []
        if repaired or replaced:
            report = check_run(run)
        if as_json:
            out.print_json(
                data={"run": run_name, **asdict(report), "repaired": repaired, "refused": refused, "replaced": replaced}
            )
        else:
            for path in repaired:
                out.say(f"made again: {path}")
            for reason in refused:
                out.say(f"not made again: {reason}")
            for path in replaced:
                out.say(f"given up, kept in .replaced: {path}")
            if replaced:
                out.say(f"make them anew with: kdrl resume {run_name}")
            if report.findings:
                rows = [[one.path, one.problem, one.remedy] for one in report.findings]
                out.print(grid(["artifact", "problem", "made whole by"], "lll", rows, overflow="fold"))
            verdict = f"{len(report.findings)} damaged" if report.findings else "all as published"
            size = report.num_bytes / 2**20
            outside = f", {report.num_outside} places outside of the run" if report.num_outside else ""
            out.say(f"{report.num_artifacts} artifacts, {size:,.1f} MiB{outside} compared: {verdict}")
        if report.findings:
            raise SystemExit(1)


_PAGE = 200
_WHY = "kdrl recover: no process holds the run's lock"


def recover(run_name: RunArgument, as_json: JsonOption = False) -> None:
    """Free a run that Prefect still shows as running although its process was killed.

    On the server of PREFECT_API_URL, flow runs of RUN that are running, pending or being cancelled become Crashed,
    which also frees their concurrency slots. Unfinished files are deleted; published files stay. The command is refused
    while a process holds the run's lock. Then continue: kdrl resume RUN, or the deployment with the same run name.

    \b
    kdrl recover first
    """
    with errors():
        from kdrl_core.ledger import lock_holder, open_run, run_lock, sweep_temporaries

        run = open_run(run_name)
        if holder := lock_holder(run.paths.lock):
            raise RunLockedError(
                f"run {run_name} is in use by {holder}: nothing is to be recovered; stop that process first"
            )
        with run_lock(run.paths.lock):
            swept = sweep_temporaries(run.paths.root)
            server = os.environ.get("PREFECT_API_URL")
            ended = _end_flow_runs(run) if server else []
        if as_json:
            out.print_json(data={"run": run_name, "server": server, "crashed": ended, "swept": swept})
            return
        lines = [f"{one['name']}: {one['was']} since {one['since']} → Crashed" for one in ended]
        if not server:
            lines.append("PREFECT_API_URL is not set: no server was asked (a run of kdrl run leaves none behind)")
        elif not ended:
            lines.append(f"no flow run of {run_name} is running on {server}")
        lines.append(f"unfinished files swept: {swept}")
        lines.append(f"go on with: kdrl resume {run_name}")
        for line in lines:
            out.say(line)


def _end_flow_runs(run: "Run") -> list[dict[str, Any]]:
    """Force every live flow run of the run to Crashed. Returns them as they were."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import FlowRun, StateType
    from prefect.exceptions import PrefectException
    from prefect.states import Crashed

    from flows.hooks import run_root

    live = FlowRunFilter(
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
        )
    )
    found: list[FlowRun] = []
    ended: list[dict[str, Any]] = []
    try:
        with get_client(sync_client=True) as client:
            while page := client.read_flow_runs(flow_run_filter=live, limit=_PAGE, offset=len(found)):
                found += page
            for flow_run in found:
                was = flow_run.state
                if was is None or run_root(flow_run) != run.paths.root:
                    continue
                client.set_flow_run_state(flow_run.id, Crashed(message=_WHY), force=True)
                since = was.timestamp.isoformat(" ", "seconds")
                ended.append({"id": str(flow_run.id), "name": flow_run.name, "was": was.name, "since": since})
    except (HTTPError, PrefectException) as error:
        raise RunError(
            f"the Prefect server at {os.environ['PREFECT_API_URL']} cannot be asked ({type(error).__name__}); "
            "start it, or unset PREFECT_API_URL, and run kdrl recover again"
        ) from error
    return ended
