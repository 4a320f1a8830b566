"""Shared by the commands of `kdrl rollouts`: options, filters, opening runs; sparklines, tables, colours, a pager."""

import io
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len, set_cell_size
from rich.table import Table as RichTable
from rich.text import Text

from flows.cli.printed_tables import PIPED_WIDTH, grid
from flows.cli.program import complete_run, complete_stage, complete_verdict
from flows.cli.shared import PlainConsole, counted_progress, err, interruptible, out, with_options
from kdrl_core.errors import DataError, visible

if TYPE_CHECKING:
    from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore

_TOLD_DAMAGED = 5
_QUICK_STEPS = 50
"""Steps that are indexed without a progress bar."""

RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN…", help="Names of runs (see: kdrl status), or folders of runs.", autocompletion=complete_run
    ),
]
StageOption = Annotated[str | None, typer.Option(help="Only this stage, e.g. stage2.", autocompletion=complete_stage)]
StepsOption = Annotated[
    str | None, typer.Option("--step", metavar="STEP", help="Only this step, 143, or a range: 140-150, 140-, -20.")
]
PromptOption = Annotated[str | None, typer.Option("--prompt", metavar="ID", help="Only this prompt, by its prompt_id.")]
FILTER_OPTIONS: dict[str, Any] = {
    "stage": StageOption,
    "step": StepsOption,
    "prompt_id": PromptOption,
    "sample": Annotated[int | None, typer.Option(min=0, help="Number of the response in its group, from 0.")],
    "verdicts": Annotated[
        list[str] | None,
        typer.Option(
            "--verdict",
            help="correct, wrong, malformed, no_answer, timeout or error. Repeatable.",
            autocompletion=complete_verdict,
        ),
    ],
    "finish_reason": Annotated[str | None, typer.Option("--finish", help="stop, or length: cut at the limit.")],
    "reward": Annotated[str | None, typer.Option(metavar="RANGE", help="E.g. 1, 0.5-, -0.5, 0..1.")],
    "length": Annotated[str | None, typer.Option(metavar="RANGE", help="Tokens, e.g. 512-, 10-20.")],
    "kl": Annotated[
        str | None, typer.Option(metavar="RANGE", help="Mean KL to the teacher over its tokens, e.g. 0.5-.")
    ],
    "text": Annotated[
        str | None, typer.Option(metavar="TEXT", help="Part of prompt or response, upper or lower case.")
    ],
}
"""Options by the field of RolloutFilter that they fill. A range fills two: `<name>_min` and `<name>_max`."""


@contextmanager
def open_store(runs: Sequence[str]) -> Iterator["RolloutStore"]:
    """The runs' rollouts. Shows a progress bar while a large index is made, and names damaged files at the end."""
    from kdrl_core.look.rollouts.query import RolloutStore

    with interruptible("nothing was changed", has_children=False), ExitStack() as stack:
        with ExitStack() as bar:
            shown: Callable[[str, int, int | None], None] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal shown
                if shown is None and total > _QUICK_STEPS:
                    shown = bar.enter_context(counted_progress(err, "steps"))
                if shown is not None:
                    shown("indexing", done, total)

            store = stack.enter_context(RolloutStore.open(runs, progress=progress))
        yield store
        damaged = store.damaged
        for file in damaged[:_TOLD_DAMAGED]:
            err.say(f"left out: {file.path} {file.problem}", style="yellow")
        if len(damaged) > _TOLD_DAMAGED:
            err.print(f"… and {len(damaged) - _TOLD_DAMAGED} more damaged files: kdrl check RUN", style="yellow")


def whole_range(option: str, text: str | None) -> tuple[int | None, int | None]:
    """`number_range` for whole numbers."""
    low, high = number_range(option, text)
    for end in (low, high):
        if end is not None and not end.is_integer():
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
    """Print JSON in ASCII, so that no terminal can mistake it for control characters."""
    typer.echo(json.dumps(data, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """DuckDB's sums of whole numbers as numbers, and all else that JSON does not know as text."""
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


_GAP = 3
_LEAST_ROOM = 20
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 60
_FULL_COLOUR_AT = 3.0
"""Nats of |log-ratio| from which a token has the full colour."""
_VERDICT_STYLES = {"correct": "green", "wrong": "red", "malformed": "yellow", "no_answer": "yellow"}


def sparkline(values: Sequence[float | None], *, width: int = _SPARK_WIDTH) -> str:
    """Up to `width` bars, each the mean of a stretch of values, scaled from the least to the greatest mean. A stretch
    without values is a space."""
    means = [mean(part) for part in stretches(list(values), width)]
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if one is None else _BARS[min(len(_BARS) - 1, round((one - low) * scale))] for one in means)


def stretches(values: list[Any], count: int) -> list[list[Any]]:
    """`values` in at most `count` parts of similar length, in order."""
    count = min(count, len(values))
    bounds = [round(number * len(values) / count) for number in range(count + 1)] if count else []
    return [values[start:end] for start, end in pairwise(bounds)]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: Any, digits: int = 3) -> str:
    """A number as text; – for None."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[str] = (), width: int | None = None
) -> RichTable:
    """A plain table; columns of `left` are aligned to the left. With the console's `width`, the last column is cut to
    the room that the others leave."""
    if width is not None:
        room = max(_LEAST_ROOM, width - sum(widths(columns, rows)[:-1]) - _GAP * (len(columns) - 1))
        rows = [[*row[:-1], _cut(visible(str(row[-1])), room)] for row in rows]
    kinds = "".join("L" if name in left else "R" for name in columns)
    cells = [[cell if isinstance(cell, Text) else plain(str(cell)) for cell in row] for row in rows]
    return grid(columns, kinds, cells, pad_edge=False)


def widths(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    cells = zip(columns, *([str(cell) for cell in row] for row in rows), strict=True)
    return [max(cell_len(cell) for cell in column) for column in cells]


def fits(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> bool:
    """Whether a table of these rows fits the console."""
    return sum(widths(columns, rows)) + _GAP * (len(columns) - 1) <= width


def _cut(text: str, room: int) -> str:
    return text if cell_len(text) <= room else f"{set_cell_size(text, room - 1).rstrip()}…"


def verdict(kind: str | None) -> Text:
    return Text(kind or "–", _VERDICT_STYLES.get(kind or "", "magenta" if kind else ""))


def plain(text: str) -> Text:
    """A text as it is, with control characters spelled out: rich would drop some of them."""
    return Text(visible(text))


def one_line(text: str | None) -> str:
    return " ".join(visible(text or "").split())


def token_text(tokens: Sequence[str], log_ratios: Sequence[float | None]) -> Text:
    """The tokens, each on the colour of its log-ratio R = log π_T − log π_θ: red if the teacher finds it less likely
    than the student, blue if more likely."""
    shown = Text()
    for token, ratio in zip(tokens, log_ratios, strict=True):
        shown.append(visible(token), _heat(ratio))
    return shown


def legend() -> Text:
    """What the colours mean."""
    shown = Text("teacher − student, nats: ")
    for ratio in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        shown.append(f" {ratio:+.0f} ", _heat(ratio))
    return shown


def _heat(ratio: float | None) -> str:
    if ratio is None or ratio != ratio:
        return ""
    strength = min(1.0, abs(ratio) / _FULL_COLOUR_AT)
    if strength < 0.05:
        return ""
    faded = round(235 * (1 - strength))
    return (
        f"black on rgb(235,{faded},{faded})" if ratio < 0 else f"black on rgb({faded},{round(235 - 85 * strength)},235)"
    )


def log_ratios(record: dict[str, Any]) -> list[float | None] | None:
    """R of each token of a response, from the trainer's logprobs, or before the update from the engine's. None without
    a teacher."""
    teacher, student = record["teacher_logprobs"], record["logprobs"] or record["rollout_logprobs"]
    if teacher is None or student is None:
        return None
    return [None if t is None or s is None else t - s for t, s in zip(teacher, student, strict=True)]


@contextmanager
def paged() -> Iterator[PlainConsole]:
    """A console. On a terminal, output that is longer than the screen goes through a pager."""
    if not out.is_terminal:
        yield PlainConsole(width=None if "COLUMNS" in os.environ else PIPED_WIDTH)
        return
    if (pager := _pager()) is None:
        yield out
        return
    buffer = io.StringIO()
    console = PlainConsole(
        file=buffer,
        force_terminal=True,
        width=out.width,
        color_system=out.color_system or "auto",
        no_color=out.no_color,
    )
    yield console
    text = buffer.getvalue()
    if text.count("\n") < out.height:
        out.file.write(text)
        return
    environment = {"LESS": "-FRX", **os.environ, "LESSSECURE": "1"}
    subprocess.run(pager, input=text.encode(errors="replace"), env=environment, check=False)


def _pager() -> list[str] | None:
    """$PAGER, or less, if it is there."""
    command = shlex.split(os.environ.get("PAGER", "")) or ["less"]
    return command if shutil.which(command[0]) else None
