"""What every part of a recipe has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, without unknown fields, without conversions, without infinities.

    Values are not shown in errors: one may be a key that somebody wrote where it does not belong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)
