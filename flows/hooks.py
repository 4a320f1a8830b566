"""Names of flow runs, and the message when one fails: stage, step, cause, and the command that continues it."""

from pathlib import Path
from typing import Any

from httpx import HTTPError
from prefect import Flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectException
from prefect.logging import get_logger
from prefect.states import State

from kdrl_core.alarms import resume_command
from kdrl_core.boxes.make import read_progress
from kdrl_core.errors import KdrlError, RunError
from kdrl_core.ledger import RunPaths, open_run_dir
from kdrl_core.ledger.lock import log_file


def flow_run_name() -> str:
    """`<run>-<stage or flow>` from the parameters of a stage flow."""
    parameters = runtime.flow_run.parameters
    what = parameters.get("stage") or str(runtime.flow_run.flow_name).removeprefix("kdrl-")
    return f"{Path(parameters['run_dir']).name}-{what}"


def on_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Log where the run stands and how to continue it; keep the same text as a Markdown artifact."""
    root = run_root(flow_run)
    if root is None:
        return
    lines = [f"**{flow_run.name}** failed: {state.message}"]
    if progress := read_progress(RunPaths(root)):
        lines.append(f"- last seen: {progress['stage']}, step {progress['step']}, {progress['phase']}")
    lines += [f"- files: `{root}`", f"- log: `{log_file(root)}`"]
    lines.append(f"- go on with: `{_way_on(root)}`")
    get_logger("kdrl").error(" ".join(line.replace("`", "").replace("*", "").removeprefix("- ") for line in lines))
    artifact = ArtifactCreate(
        key="kdrl-failure",
        type="markdown",
        description=f"why {flow_run.name} failed",
        data="\n".join(lines),
        flow_run_id=flow_run.id,
    )
    try:
        with get_client(sync_client=True) as client:
            client.create_artifact(artifact)
    except (PrefectException, HTTPError) as error:  # the server may be what failed
        get_logger("kdrl").warning("the failure could not be kept as an artifact: %s", error)


def _way_on(root: Path) -> str:
    """The command that continues the run, also if an alarm has stopped it."""
    try:
        return resume_command(open_run_dir(root))
    except KdrlError:  # the run may be what failed
        return f"kdrl resume {root.name}"


def run_root(flow_run: FlowRun) -> Path | None:
    """The run's folder; None if it has none yet."""
    if run_dir := flow_run.parameters.get("run_dir"):
        return Path(run_dir)
    try:
        root = RunPaths.of(flow_run.parameters.get("run_name") or flow_run.name).root
    except RunError:
        return None
    return root if root.is_dir() else None
