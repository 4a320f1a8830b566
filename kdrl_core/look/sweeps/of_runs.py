"""Any runs as the cells of a comparison: runs that differ only in their seed are one variant."""

import re
from collections.abc import Collection, Mapping, Sequence

from kdrl_core.config import TrackingConfig, config_hash
from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, open_run
from kdrl_core.look.sweeps.results import SweepResults, read_results_of
from kdrl_core.look.sweeps.state import CellStatus, list_started, state_of

_SAME = {"seed": 0, "name": "recipe", "description": "", "alarms": AlarmsConfig(), "tracking": TrackingConfig()}
"""Fields in which the runs of one variant may differ."""


def read_runs(names: Sequence[str], labels: Mapping[str, str] | None = None) -> SweepResults:
    """The results of runs so far, finished or not.

    Args:
        names: of the runs, in the order of their variants.
        labels: run → name of its variant; default: the run's name; with several seeds the first one's, without its
            number.

    Raises:
        RunError: no such run; a label for a run that is not among them; two labels for one variant, or one for two.
    """
    labels = labels or {}
    for name in labels:
        if name not in names:
            raise RunError(f"--label {name}=…: '{name}' is not among the runs of the report; name it as well")
    runs = [_open(name) for name in dict.fromkeys(names)]
    statuses, recipes = [], {}
    for label, group in _variants(runs, labels):
        recipes[label] = group[0].recipe
        for run in group:
            state, detail = state_of(run.name)
            statuses.append(CellStatus(run=run.name, variant=label, seed=run.recipe.seed, state=state, detail=detail))
    recipe = ", ".join(dict.fromkeys(run.recipe.name for run in runs))
    title = _listed(dict.fromkeys(status.variant for status in statuses), "variants", max_chars=80)
    listed = _listed([run.name for run in runs], "runs", max_chars=200)
    return read_results_of(title, listed if listed != title else "", recipe, statuses, recipes=recipes)


def _listed(names: Collection[str], what: str, *, max_chars: int) -> str:
    text = ", ".join(names)
    return text if len(text) <= max_chars else f"{len(names)} {what}"


def _open(name: str) -> Run:
    try:
        return open_run(name)
    except RunError:
        if name in list_started():
            raise RunError(f"'{name}' is a sweep, no run; for its report: kdrl sweep report {name}") from None
        raise


def _variants(runs: Sequence[Run], labels: Mapping[str, str]) -> list[tuple[str, list[Run]]]:
    """Runs by recipe, with the label of each recipe. A second run of the same recipe and seed is another variant."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        same = config_hash(run.recipe.model_copy(update=_SAME))
        turn = sum(run.recipe.seed == other.recipe.seed for key, g in groups.items() if key[0] == same for other in g)
        groups.setdefault((same, turn), []).append(run)
    found = [(_label(group, labels), group) for group in groups.values()]
    taken = [label for label, _ in found]
    for label in labels.values():
        if taken.count(label) > 1:
            raise RunError(f"--label: '{label}' would be the name of two variants; give one of them another")
    return [(label if taken.count(label) == 1 else group[0].name, group) for label, group in found]


def _label(group: Sequence[Run], labels: Mapping[str, str]) -> str:
    given = list(dict.fromkeys(labels[run.name] for run in group if run.name in labels))
    if len(given) > 1:
        raise RunError(
            f"--label: '{given[0]}' and '{given[1]}' are for runs of one variant, which differ in their seed alone; "
            "give one of them"
        )
    if given:
        return given[0]
    if len(group) == 1:
        return group[0].name
    return re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", group[0].name) or group[0].name
