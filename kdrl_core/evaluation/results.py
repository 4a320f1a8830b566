"""Results of a published evaluation, read back."""

from pathlib import Path
from typing import Any

from kdrl_core.config.paths import read_json
from kdrl_core.errors import DamagedArtifactError

RESULTS = "results.json"


def read_results(path: Path) -> dict[str, Any]:
    """`results.json` of a published evaluation: `label`, `model`, `date`, `seconds`, and `benchmarks` by name.

    `date` is when sampling began, in Unix time; evaluations of older versions have none.

    Raises:
        DamagedArtifactError: the file is missing, or is not such JSON.
    """
    file = path / RESULTS
    try:
        content: dict[str, Any] = read_json(file)
        if not isinstance(content["benchmarks"], dict):
            raise TypeError("benchmarks is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifactError(
            f"{file} cannot be read ({type(error).__name__}: {error})",
            f"kdrl check says what else is damaged; move {path} away and go on: it is made anew",
        ) from error
    return content
