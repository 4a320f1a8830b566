"""The sections of a stage: β, Top-K, terms of one's own, SFT, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kdrl_core.config.section import Positive, Section, require_one_of
from kdrl_core.objectives.kinds import SFT_AGGREGATIONS
from kdrl_core.objectives.plugins import reference_in


class BetaConfig(Section):
    """β = max(init − decay · step, minimum) (Sec. 3.3); constant when decay is 0."""

    init: float = Field(ge=0.0)
    decay: float = Field(0.0, ge=0.0)
    minimum: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def _minimum_below_init(self) -> Self:
        if self.minimum > self.init:
            raise ValueError(f"minimum {self.minimum} is above init {self.init}; β is annealed downwards (Sec. 3.3)")
        return self


class TopKConfig(Section):
    """The Top-K teacher of Sec. 2.3 and A.3, read where kl_estimator is topk."""

    k: Positive = Field(20, description="teacher logits kept per token; kdrl's choice")
    floor: float = Field(
        -20.0, le=0.0, description="log-probability of each other token, −∞ in the paper; mass there costs −floor nats"
    )


class SFTConfig(Section):
    """SFT by rejection sampling (B.2), read where objective is sft: teacher samples → verify → SFT on the right ones.

    The stage's steps, learning_rate and token limits apply, and its temperature to the teacher's sampling;
    prompts_per_step and group_size do not.
    """

    samples: Positive = Field(8, description="teacher samples per problem (B.2: 8)")
    keep: Literal["accuracy", "reward"] = Field(
        "accuracy", description="keep what is right (B.2), or what has reward 1, which may also ask for the format"
    )
    batch_size: Positive = Field(128, description="responses per optimiser step (B.2: 128)")
    temperature: float = Field(1.0, gt=0.0, le=10.0, description="of the likelihood (B.2: the model's own, T = 1)")
    aggregation: Annotated[str, BeforeValidator(lambda name: require_one_of(name, SFT_AGGREGATIONS))] = Field(
        "response_mean", description="length-normalised: each response weighs the same (14); token_mean: each token"
    )
    shard_prompts: Positive = Field(64, description="problems sampled and published together")


class CheckpointConfig(Section):
    """When a stage publishes its weights and optimiser. Steps in between are replayed from their rollouts."""

    every: Positive = Field(1, description="steps between checkpoints")
    keep_last: Positive = Field(2, description="checkpoints kept besides the stage's final one")
    keep_every: Positive | None = Field(None, description="keep every Nth step's checkpoint for good")


class TermConfig(Section):
    """A term of one's own: coefficient × the mean of the function's values is added to the joint loss."""

    function: str = Field(description="file.py:name, package.module:name, or an entry point of the group kdrl.terms")
    coefficient: float = Field(description="0 measures the term and leaves it out of the loss")

    @field_validator("function", mode="before")
    @classmethod
    def _known_function(cls, name: object) -> object:
        """A reference; a relative path in it becomes absolute."""
        if (found := reference_in(name, group="kdrl.terms")) is None:
            raise ValueError("give a function as file.py:name or package.module:name")
        return str(found)
