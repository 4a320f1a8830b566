"""β schedules (Sec. 3.3): β(step) = max(β_init − δ · step, β_min); constant by default (δ = 0).

A function of the optimiser step alone, so that a resumed run has the same β. Computed in decimal: the values are those
that the formula gives on paper, and the floor is reached at exactly the step that it says (5e-3, 5e-5, 1e-3: step 80).
"""

from dataclasses import dataclass
from decimal import Decimal

from kdrl_core.objectives.scalars import as_number, check_not_negative


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """`BetaSchedule(init, decay, minimum)(step)` is β at `step`, which counts from 0.

    Args:
        init: β_init ≥ 0.
        decay: δ ≥ 0 per step; 0 keeps β constant.
        minimum: β_min ≥ 0. Above `init` it is β throughout, as the formula has it; recipes refuse that.

    Raises:
        ValueError: a value is no finite number or negative, or (when called) `step` is negative or no whole number.
    """

    init: float
    decay: float = 0.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("init", "decay", "minimum"):
            check_not_negative(name, getattr(self, name))

    def __call__(self, step: int) -> float:
        """β at `step`."""
        if not (as_number(step) >= 0 and as_number(step).is_integer()):
            raise ValueError(f"step: expected a whole number of at least 0, given {step!r:.50}")
        init, decay, minimum = (Decimal(str(value)) for value in (self.init, self.decay, self.minimum))
        return float(max(init - decay * int(step), minimum))
