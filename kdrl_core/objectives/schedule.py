"""β schedules (Sec. 3.3): β(step) = max(β_init − δ · step, β_min); constant when δ = 0.

A function of the optimiser step alone, so that a resumed run has the same β. Computed in decimal: the values are those
that the formula gives on paper, and the floor is reached at exactly the step that it says (5e-3, 5e-5, 1e-3: step 80).
"""

from dataclasses import dataclass
from decimal import Decimal

from kdrl_core.objectives.checks import check_not_negative


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """`BetaSchedule(init, decay, minimum)(step)` is β at `step`, which counts from 0.

    Args:
        init: β_init ≥ 0.
        decay: δ ≥ 0 per step; 0 keeps β constant at `init`.
        minimum: β_min ≥ 0, at most `init` where δ > 0.

    Raises:
        ValueError: a value is negative or not finite, `minimum` is above `init` with δ > 0, or (when called) `step` is
            negative or no whole number.
    """

    init: float
    decay: float = 0.0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("init", "decay", "minimum"):
            check_not_negative(name, getattr(self, name))
        if self.decay > 0.0 and self.minimum > self.init:
            raise ValueError(
                f"minimum: expected at most init = {self.init}, given {self.minimum}; β is annealed downwards"
            )

    def __call__(self, step: int) -> float:
        """β at `step`."""
        if step < 0 or step != int(step):
            raise ValueError(f"step: expected a whole number of at least 0, given {step}")
        if self.decay == 0.0:
            return float(self.init)
        init, decay, minimum = (Decimal(str(value)) for value in (self.init, self.decay, self.minimum))
        return float(max(init - decay * int(step), minimum))
