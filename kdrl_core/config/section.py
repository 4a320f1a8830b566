"""The base of every part of a recipe: frozen, strict, without unknown fields."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Fields of a recipe that belong together."""

    # Values are not shown in errors: one may be a key that somebody wrote where it does not belong.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def require_one_of(value: object, choices: Iterable[str]) -> object:
    """`value` if it is one of the `choices`, else a ValueError with the text of a pydantic Literal."""
    names = [repr(choice) for choice in choices]
    if not isinstance(value, str) or repr(value) not in names:
        raise ValueError(f"Input should be {' or '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}")
    return value


LocalEngine = Literal["transformers", "vllm"]
"""Engines that sample or score in this process."""

EngineName = Literal[LocalEngine, "server"]
"""Engines that sample: in this process, or as replicas of vLLM (`server`)."""
