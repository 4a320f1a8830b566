"""Values as JSON that a browser reads without loss.

JSON has no infinities or NaN, and JavaScript rounds integers beyond 2⁵³ (seeds are uint64). These are sent as text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

_EXACT = 2**53


def plain(value: Any) -> Any:
    """`value` as dicts, lists, text, finite floats, exact integers, booleans and None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if -_EXACT <= value <= _EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain(each) for each in value]
    if hasattr(value, "item"):  # numpy's scalars
        return plain(value.item())
    return str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as one list per column, with None where a row lacks it. As JSON a third of the size of rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [plain(row.get(name)) for row in rows] for name in names}
