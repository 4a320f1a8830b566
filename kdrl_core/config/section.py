"""What every part of a recipe is: frozen, strict, without unknown fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Fields of a recipe that belong together."""

    # Values are not shown in errors: one may be a key that somebody wrote where it does not belong.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)
