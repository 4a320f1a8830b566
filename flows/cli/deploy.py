"""`kdrl deploy`: the deployments of prefect.yaml at a Prefect server. flows.deployments does the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from flows.cli.printed_tables import grid
from flows.cli.shared import JsonOption, errors, out
from kdrl_core.config.faults import did_you_mean
from kdrl_core.errors import RunError

if TYPE_CHECKING:
    from prefect import Flow

_DECLARATION = Path(__file__).parents[1] / "prefect.yaml"
_NOT_IN_NAMES = "/%&<>"
"""What Prefect allows in no name."""


def declared() -> dict[str, dict[str, Any]]:
    """The deployments of prefect.yaml, by name. The package has the file at the top of the repository."""
    return {one["name"]: one for one in yaml.safe_load(_DECLARATION.read_text(encoding="utf-8"))["deployments"]}


def deploy(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Deployments, e.g. full-pipeline or kdrl/full-pipeline; default: all."),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Work pool, made if it is missing; default: kdrl.", show_default=False)
    ] = None,
    work_queue: Annotated[
        str | None, typer.Option(help="Queue of the pool; default: the queue default.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Register kdrl's flows with your Prefect server, so that its workers can run them. No checkout is needed.

    A work pool of type process is made if it is missing. Calling it again changes nothing, or brings the deployments up
    to date after kdrl was updated; schedules that you have added stay. The server is that of PREFECT_API_URL, or of
    your Prefect profile. A worker needs kdrl installed. Flow runs work in the folder where you call this command: paths
    in recipes start there, and the runs lie in its artifacts/, unless the worker has KDRL_ARTIFACTS set.

    \b
    prefect server start &
    export PREFECT_API_URL=http://127.0.0.1:4200/api
    kdrl deploy
    prefect worker start --pool kdrl &
    prefect deployment run kdrl/full-pipeline -p recipe=miniature -p run_name=mine --watch
    """
    with errors():
        chosen = _chosen(names or [])
        for one in chosen.values():
            one["work_pool"] = {
                "name": _checked("--pool", pool) or one["work_pool"]["name"],
                "work_queue_name": _checked("--work-queue", work_queue) or one["work_pool"]["work_queue_name"],
            }
        from flows.cli.local_prefect import use_set_prefect

        server = use_set_prefect()
        from flows.deployments import load_flow

        flows = {name: load_flow(one["entrypoint"]) for name, one in chosen.items()}
        for asked in names or []:
            _require_flow(asked, flows[_short(asked)].name)
        pools, deployments, commands = _register(chosen, flows, with_queue=work_queue is not None)
        if as_json:
            out.print_json(data={"server": server, "pools": pools, "deployments": deployments, "next": commands})
            return
        rows = [["work pool", *row] for row in pools.items()] + [["deployment", *row] for row in deployments.items()]
        out.say(f"server {server}\n")
        out.print(grid(["", "name", "state"], "LLl", rows, overflow="fold"))
        out.say("\nNext:")
        for command in commands:
            out.say(f"  {command}")


def _register(
    chosen: dict[str, dict[str, Any]], flows: "dict[str, Flow[..., Any]]", *, with_queue: bool
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What became of the pools and of the deployments, each by name, and the commands that come next."""
    from prefect.client.orchestration import get_client

    from flows.deployments import ensure_pool, register, wanted

    fields = {name: wanted(one, flows[name], Path.cwd()) for name, one in chosen.items()}
    with get_client(sync_client=True) as client:
        pools = {
            name: ensure_pool(client, name) for name in dict.fromkeys(one["work_pool_name"] for one in fields.values())
        }
        deployments = {
            f"{flows[name].name}/{name}": register(client, name, flows[name], one) for name, one in fields.items()
        }
    first, one = next(iter(fields.items()))
    queue = f" --work-queue {one['work_queue_name']}" if with_queue else ""
    required = one["parameter_openapi_schema"].get("required", [])
    given = "".join(f" -p {parameter}=…" for parameter in required if parameter not in one["parameters"])
    return (
        pools,
        deployments,
        [
            f"prefect worker start --pool {one['work_pool_name']}{queue}",
            f"prefect deployment run {flows[first].name}/{first}{given}",
        ],
    )


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _chosen(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The deployments of these names, all of them without a name, as prefect.yaml has them. Raises RunError."""
    known = declared()
    for name in names:
        if _short(name) not in known:
            hint = did_you_mean(_short(name), known)
            raise RunError(f"no deployment '{name}'{hint}{'' if hint else ';'} there are {', '.join(known)}")
    return {_short(name): known[_short(name)] for name in names or known}


def _require_flow(asked: str, flow: str) -> None:
    if "/" in asked and asked != f"{flow}/{_short(asked)}":
        raise RunError(f"no deployment '{asked}', did you mean '{flow}/{_short(asked)}'?")


def _checked(option: str, name: str | None) -> str | None:
    if name is not None and (not name.strip() or any(character in name for character in _NOT_IN_NAMES)):
        raise RunError(f"{option} {name!r}: give a name without any of {' '.join(_NOT_IN_NAMES)}")
    return name
