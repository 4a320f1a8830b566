"""Sweeps: variants × seeds of a recipe as runs that share what they have in common. Imports no torch, no Prefect."""

from kdrl_core.boxes.sharing import Part, adopt_parts, is_finished_part, parts_of
from kdrl_core.look.sweeps.cells import Cell, expand
from kdrl_core.look.sweeps.spec import SweepSpec, dump_sweep, list_sweeps, load_sweep, validate_sweep

__all__ = [
    "Cell",
    "Part",
    "SweepSpec",
    "adopt_parts",
    "dump_sweep",
    "expand",
    "is_finished_part",
    "list_sweeps",
    "load_sweep",
    "parts_of",
    "validate_sweep",
]
