"""Results of a published evaluation, read back."""

import json
from pathlib import Path
from typing import Any

RESULTS = "results.json"


def read_results(path: Path) -> dict[str, Any]:
    """`results.json` of a published evaluation: `label`, `model`, `date`, `seconds`, and `benchmarks` by name.

    `date` is when sampling began, in Unix time; evaluations of older versions have none.
    """
    content: dict[str, Any] = json.loads((path / RESULTS).read_text(encoding="utf-8"))
    return content
