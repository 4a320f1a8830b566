"""The functions that make up a reward (docs/rewards.md): where each is, its weight and its arguments."""

import json
from typing import Self

from pydantic import Field, JsonValue, field_validator, model_validator

from kdrl_core.config.section import Section
from kdrl_core.objectives.plugins import is_reference, parse_reference

BUILT_IN = ("math", "exact", "choice", "numeric", "regex", "json_schema", "length_penalty")
"""Names of the functions that kdrl ships; `kdrl_core.rewards.builtin` has them."""
GIVEN = ("response", "answer", "problem")
"""Arguments that kdrl gives to every function."""


class RewardFunction(Section):
    """One term of the reward: weight × what the function returns."""

    function: str = Field(description="file.py:name, package.module:name, or the name of a built-in function")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$",
        max_length=60,
        description="its name in tables and metrics; null: the function's own",
    )
    weight: float = Field(1.0, description="0: recorded, but no part of the reward")
    arguments: dict[str, JsonValue] = Field({}, description="further arguments of the function, by name")

    @property
    def label(self) -> str:
        """Its name in tables and metrics."""
        return self.name or self.function.rpartition(":")[2]

    @property
    def is_own(self) -> bool:
        """Whether it is the user's code and not one of kdrl's functions."""
        return is_reference(self.function)

    @field_validator("function")
    @classmethod
    def _known(cls, function: str) -> str:
        """A built-in name, or a reference; a relative path in a reference becomes absolute."""
        if is_reference(function):
            return str(parse_reference(function))
        if function not in BUILT_IN:
            raise ValueError(
                f"no built-in function {function!r:.60}; there are {', '.join(BUILT_IN)}, "
                "or give file.py:name or package.module:name"
            )
        return function

    @field_validator("arguments")
    @classmethod
    def _are_arguments(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in arguments:
            if not name.isidentifier() or name in GIVEN:
                raise ValueError(f"{name!r:.60} cannot be an argument; kdrl itself gives {', '.join(GIVEN)}")
        json.dumps(arguments, allow_nan=False)  # raises ValueError for NaN and infinity
        return arguments

    @model_validator(mode="after")
    def _math_has_none(self) -> Self:
        if self.function == "math" and self.arguments:
            raise ValueError("math has no arguments; reward.require_format says whether the format counts")
        return self
