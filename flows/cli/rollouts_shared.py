"""Shared by the commands of `kdrl rollouts`: options, filters, opening runs, naming damaged files."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.shared import counted_progress, err, with_options
from kdrl_core.errors import DataError

if TYPE_CHECKING:
    from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore

_TOLD_DAMAGED = 5
_QUICK_STEPS = 50
"""Steps that are indexed without a progress bar."""

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Names of runs (see: kdrl status), or folders of runs.")
]
StageOption = Annotated[str | None, typer.Option(help="Of one stage, e.g. stage2.")]
StepsOption = Annotated[
    str | None, typer.Option("--step", metavar="STEP", help="Of one step, 143, or several: 140-150, 140-, -20.")
]
PromptOption = Annotated[str | None, typer.Option("--prompt", metavar="ID", help="Of one prompt, by its prompt_id.")]
FILTER_OPTIONS: dict[str, Any] = {
    "stage": StageOption,
    "step": StepsOption,
    "prompt_id": PromptOption,
    "sample": Annotated[int | None, typer.Option(min=0, help="Number of the response in its group, from 0.")],
    "verdicts": Annotated[
        list[str] | None,
        typer.Option("--verdict", help="correct, wrong, malformed, no_answer, timeout or error. Repeatable."),
    ],
    "finish_reason": Annotated[str | None, typer.Option("--finish", help="stop, or length: cut at the limit.")],
    "reward": Annotated[str | None, typer.Option(metavar="RANGE", help="E.g. 1, 0.5-, -0.5, 0..1.")],
    "length": Annotated[str | None, typer.Option(metavar="RANGE", help="Tokens, e.g. 512-, 10-20.")],
    "kl": Annotated[
        str | None, typer.Option(metavar="RANGE", help="Mean KL to the teacher over its tokens, e.g. 0.5-.")
    ],
    "text": Annotated[
        str | None, typer.Option(metavar="TEXT", help="Part of the prompt or the response, in any case.")
    ],
}
"""Options by the field of RolloutFilter that they fill. A range fills two: `<name>_min` and `<name>_max`."""


@contextmanager
def open_store(runs: Sequence[str]) -> Iterator["RolloutStore"]:
    """The runs' rollouts. Shows a progress bar while a large index is made, and damaged files at the end."""
    from kdrl_core.look.rollouts.query import RolloutStore

    with ExitStack() as stack:
        shown: Callable[[str, int, int | None], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if shown is None and total > _QUICK_STEPS:
                shown = stack.enter_context(counted_progress(err, "steps"))
            if shown is not None:
                shown("indexing", done, total)

        store = RolloutStore.open(runs, progress=progress)
    with store:
        yield store
        damaged = store.damaged
        for file in damaged[:_TOLD_DAMAGED]:
            err.say(f"left out: {file.path} {file.problem}", style="yellow")
        if len(damaged) > _TOLD_DAMAGED:
            err.print(f"… and {len(damaged) - _TOLD_DAMAGED} more damaged files: kdrl check RUN", style="yellow")


def whole_range(option: str, text: str | None) -> tuple[int | None, int | None]:
    """As `number_range`, of whole numbers."""
    low, high = number_range(option, text)
    for end in (low, high):
        if end is not None and end != int(end):
            raise DataError(f"{option} {text}: steps are whole numbers")
    return None if low is None else int(low), None if high is None else int(high)


def number_range(option: str, text: str | None) -> tuple[float | None, float | None]:
    """`5` is 5 alone, `5-8` or `5..8` from 5 to 8, `5-` or `5..` at least 5, `-8` or `..8` at most 8.

    A leading dash means "at most", since rewards and lengths below 0 are rare. `..-1` is at most −1.
    """
    if text is None:
        return None, None
    low, separator, high = text.partition("..")
    if not separator:
        low, separator, high = text.partition("-")
    try:
        ends = (float(low) if low.strip() else None, float(high) if high.strip() else None)
    except ValueError:
        ends = (None, None)
    if separator and None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
        raise DataError(f"{option} {text}: nothing is from {low} to {high}; give the smaller number first")
    if ends == (None, None):
        raise DataError(f"{option} {text}: give a number or a range, such as 5, 5-8, 5-, -8 or 0..1")
    return ends if separator else (ends[0], ends[0])


_RANGES: dict[str, Callable[[str, str | None], tuple[Any, Any]]] = {
    "step": whole_range,
    "reward": number_range,
    "length": number_range,
    "kl": number_range,
}


def make_filter(*, verdicts: list[str] | None, **given: Any) -> "RolloutFilter":
    """The filter that the values of FILTER_OPTIONS describe. Raises DataError for an invalid range or word."""
    from kdrl_core.look.rollouts.filters import RolloutFilter

    for name, parse in _RANGES.items():
        given[f"{name}_min"], given[f"{name}_max"] = parse(f"--{name}", given.pop(name))
    return RolloutFilter(verdicts=tuple(verdicts) if verdicts else None, **given)


with_filter = with_options("where", FILTER_OPTIONS, make_filter)
"""Give a command the options of a filter; its parameter `where` gets the RolloutFilter."""


def print_json(data: Any) -> None:
    """Print JSON in ASCII, which no terminal takes for anything else."""
    typer.echo(json.dumps(data, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """A number for DuckDB's sums of whole numbers, a text for all else that JSON has nothing for."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)


def why_nothing(store: "RolloutStore") -> str:
    """Why there is nothing to show."""
    infos = store.runs()
    if not any(info.num_rollouts for info in infos):
        return f"run {infos[0].name} has no rollouts yet (SFT stages have none); kdrl status says where it stands"
    stages = "; ".join(
        f"{info.name}: " + ", ".join(f"{stage} {count} steps" for stage, count in info.num_steps.items())
        for info in infos
    )
    return f"no rollout meets these conditions; there are {stages}"
