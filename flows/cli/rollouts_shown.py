"""How `kdrl rollouts` shows things: sparklines, tables, one response in full, a pager."""

import io
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.table import Table as RichTable
from rich.text import Text

from flows.cli.shared import PlainConsole, out
from kdrl_core.errors import visible

_PIPED_WIDTH = 160
"""Characters of a line that is not for a terminal."""
_GAP = 3
_LEAST_ROOM = 20
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 60
_FULL_COLOUR_AT = 3.0
"""Nats of |log-ratio| from which a token has the full colour."""
_VERDICT_STYLES = {"correct": "green", "wrong": "red", "malformed": "yellow", "no_answer": "yellow"}


def sparkline(values: Sequence[float | None], *, width: int = _SPARK_WIDTH) -> str:
    """Means of up to `width` stretches of the values as bars, from the least to the greatest. A stretch without any
    value is a space."""
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
    """Mean of the values that are not None; None without one."""
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
    """A plain table; columns of `left` are aligned to the left.

    Args:
        width: of the console. The last column is cut to the room that the others leave.
    """
    if width is not None:
        room = max(_LEAST_ROOM, width - sum(widths(columns, rows)[:-1]) - _GAP * (len(columns) - 1))
        rows = [[*row[:-1], _cut(visible(str(row[-1])), room)] for row in rows]
    shown = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else plain(str(cell)) for cell in row))
    return shown


def widths(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    """How wide each column is."""
    cells = zip(columns, *([str(cell) for cell in row] for row in rows), strict=True)
    return [max(cell_len(cell) for cell in column) for column in cells]


def fits(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> bool:
    """Whether a table of these fits the console."""
    return sum(widths(columns, rows)) + _GAP * (len(columns) - 1) <= width


def _cut(text: str, room: int) -> str:
    return text if cell_len(text) <= room else f"{set_cell_size(text, room - 1).rstrip()}…"


def verdict(kind: str | None) -> Text:
    """A verdict in its colour."""
    return Text(kind or "–", _VERDICT_STYLES.get(kind or "", "magenta" if kind else ""))


def plain(text: str) -> Text:
    """A text as it is, with control characters spelled out: rich would drop some of them."""
    return Text(visible(text))


def one_line(text: str | None) -> str:
    """A text on one line."""
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
    """A console. On a terminal, output that is longer than it goes through a pager."""
    if not out.is_terminal:
        yield PlainConsole(width=None if "COLUMNS" in os.environ else _PIPED_WIDTH)
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
