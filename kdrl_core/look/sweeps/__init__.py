"""Sweeps: variants × seeds of a recipe as runs that share what they have in common. Imports no torch, no Prefect."""

from kdrl_core.look.sweeps.cells import Cell, expand
from kdrl_core.look.sweeps.spec import SweepSpec, dump_sweep, list_sweeps, load_sweep, validate_sweep

__all__ = [
    "Cell",
    "SweepSpec",
    "dump_sweep",
    "expand",
    "list_sweeps",
    "load_sweep",
    "validate_sweep",
]
