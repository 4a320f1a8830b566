"""Which cell to start next, so that no work is done twice: a cell waits if another one is making a part of it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdrl_core.boxes.sharing import Part, parts_of
from kdrl_core.config import Recipe
from kdrl_core.look.sweeps.cells import Cell


def next_cell(
    pending: Sequence[Cell], running: Iterable[Cell], made: Collection[str], parts: Mapping[str, Sequence[Part]]
) -> Cell | None:
    """The first pending cell that shares no unfinished part with a running cell; None if all have to wait.

    Args:
        made: keys of the parts that some run has finished.
        parts: of each cell, by the name of its run.
    """
    under_way = {part.key for cell in running for part in parts[cell.run]} - set(made)
    for cell in pending:
        if not any(part.is_waited_for and part.key in under_way for part in parts[cell.run]):
            return cell
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Optimiser steps of a sweep."""

    alone: int
    """If every cell did all of its stages itself."""
    shared: int
    """How many of these are taken over from another cell."""
    by_part: Mapping[str, tuple[int, int]]
    """Part → number of cells that have it, and how often it is made."""

    @property
    def to_train(self) -> int:
        """Steps that are left to train."""
        return self.alone - self.shared


def estimate(cells: Sequence[Cell]) -> Estimate:
    """The work of a sweep from its start, and how much of it is shared."""
    alone = trained = 0
    seen: set[str] = set()
    counts: dict[str, list[int]] = {}
    for cell in cells:
        for part in parts_of(cell.recipe):
            count = counts.setdefault(part.name, [0, 0])
            count[0] += 1
            count[1] += part.key not in seen
            steps = _steps(cell.recipe, part)
            alone += steps
            trained += 0 if part.key in seen else steps
            seen.add(part.key)
    return Estimate(
        alone=alone, shared=alone - trained, by_part={name: (have, made) for name, (have, made) in counts.items()}
    )


def _steps(recipe: Recipe, part: Part) -> int:
    return recipe.stage(part.name).steps if part.name in recipe.stages else 0
