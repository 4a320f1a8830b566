"""How a problem is asked, how its answer is judged, and what is evaluated: appendix B.1.2 and Section 4.1."""

import json
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from kdrl_core.config.data import ColumnsConfig, DataFile
from kdrl_core.config.models import ModelConfig
from kdrl_core.config.rewards import RewardFunction
from kdrl_core.config.section import Positive, Section, Share
from kdrl_core.types import ThinkOpened

_SET_BY_KDRL = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are no variables of the template, or that kdrl sets."""


_OWN_MODELS = ("base", "teacher", "stage")
"""Beginnings of the names of models that every run evaluates."""


class RewardConfig(Section):
    """r = r_format · r_acc (B.1.2); R1-Zero uses r_acc alone. With `functions`, r is their weighted sum."""

    require_format: bool = Field(True, description="multiply by the format reward")
    functions: list[RewardFunction] = Field(
        [], description="functions whose weighted sum is the reward; empty: math alone, as in the paper"
    )
    success_above: float = Field(
        0.0, description="with functions: a response with a greater reward is a success (masks, SFT, accuracy, labels)"
    )

    @property
    def of_verdicts(self) -> dict[str, Any]:
        """The fields that a verdict of the verifier depends on."""
        return self.model_dump(exclude={"functions", "success_above"})

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        labels = [function.label for function in self.functions]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two functions are called {twice[0]}; give one of them another `name`")
        if not self.functions and self.success_above != 0.0:
            raise ValueError("success_above is for reward.functions; without them a right answer is a success")
        return self


class PromptConfig(Section):
    """How a problem becomes a prompt: the template's text as a user turn of the student's chat template."""

    template: str = Field("{question} Let's think step by step and output the final answer within \\boxed{}.")
    think_opened: ThinkOpened | None = Field(
        None,
        description="true: the prompt ends with <think>; closed: with </think>; false: with neither; null: look at it",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="variables of the chat template, such as enable_thinking: false"
    )

    @model_validator(mode="after")
    def _has_question(self) -> Self:
        if self.template.count("{question}") != 1:
            raise ValueError("template must contain {question} exactly once")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_a_template(cls, variables: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in variables:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not the name of a variable; give names such as enable_thinking")
            if name in _SET_BY_KDRL:
                raise ValueError(f"kdrl itself sets {name}; leave it out")
        json.dumps(variables, allow_nan=False)  # raises ValueError: NaN and infinity are no values of a template
        return variables


class VerificationConfig(Section):
    """Limits of the verifier's worker processes."""

    workers: Positive = 2
    timeout_s: float = Field(10.0, gt=0.0, description="seconds of CPU time per answer, a hard limit")
    memory_limit_mb: Positive = 2_048
    max_failed_share: Share = Field(0.1, description="timeouts and errors per step beyond which the stage stops")

    @property
    def pool_options(self) -> dict[str, Any]:
        """Keyword arguments of `Verifier`."""
        return self.model_dump(exclude={"max_failed_share"})


class BenchmarkConfig(Section):
    """One benchmark: Avg@k over `samples` responses a problem; Pass@1 is samples = 1."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    file: DataFile = Field(min_length=1, description="problems with answers, in any format that data.files may have")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="columns of your own, as in data.columns")
    samples: Positive = 1
    max_problems: Positive | None = Field(None, description="the first N problems only")


class EvaluationConfig(Section):
    """Sec. 4.1: temperature 0.6, top-p 1.0, context 32K (8K for Zero), accuracy reward as the criterion."""

    benchmarks: list[BenchmarkConfig] = Field(min_length=1)
    periodic: list[str] = Field([], description="benchmarks evaluated during training; never the test set")
    temperature: float = Field(0.6, ge=0.0, description="0 is greedy")
    top_p: float = Field(1.0, ge=1.0, le=1.0, description="only 1.0: the paper's setting")
    max_context_tokens: Positive = 32_768
    also: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=60)], ModelConfig] = Field(
        {}, description="name → a further model that is evaluated for comparison, with the engine of rollouts"
    )

    @field_validator("also")
    @classmethod
    def _other_names(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        if taken := [name for name in models if name.startswith(_OWN_MODELS)]:
            raise ValueError(f"{taken[0]!r} begins like the name of a model of the run; rename it")
        return models

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [b.name for b in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"two benchmarks have the same name: {names}")
        if "avg" in names:
            raise ValueError("a benchmark cannot be named avg, which tables call the benchmarks' mean; rename it")
        if unknown := sorted(set(self.periodic) - set(names)):
            raise ValueError(f"periodic names {unknown}, which are not among the benchmarks {names}")
        return self
