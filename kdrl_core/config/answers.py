"""How a problem is asked, how its answer is judged, and what is evaluated: appendix B.1.2 and Section 4.1."""

import json
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from kdrl_core.config.data import ColumnsConfig, DataFile
from kdrl_core.config.models import ModelConfig
from kdrl_core.config.section import Positive, Section, Share
from kdrl_core.objectives.plugins import is_reference, parse_reference
from kdrl_core.types import ThinkOpened

_SET_BY_KDRL = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are no variables of the template, or that kdrl sets."""


_OWN_MODELS = ("base", "teacher", "stage")
"""Beginnings of the names of models that every run evaluates."""

BUILT_IN_REWARDS = ("math", "exact", "choice", "numeric", "regex", "json_schema", "length_penalty", "python_tests")
"""Names of the functions that kdrl ships; `kdrl_core.rewards.builtin` has them."""
_GIVEN = ("response", "answer", "problem", "responses", "answers", "problems")
"""Arguments that kdrl gives to a function."""


class CallsConfig(Section):
    """How an `async def` is called, such as a judge over HTTP. The budget is that of a step, or of a shard of samples;
    responses beyond it fail."""

    at_once: Positive = Field(8, description="calls that are open at the same time")
    retries: int = Field(2, ge=0, description="further tries after an exception, after 0.25 s and then twice as long")
    timeout_s: float = Field(60.0, gt=0.0, description="seconds of one try")
    max_calls: Positive | None = Field(None, description="budget: tries")
    max_seconds: float | None = Field(None, gt=0.0, description="budget: seconds after which no try begins")


class RewardFunction(Section):
    """One term of the reward: weight × what the function returns."""

    function: str = Field(description="file.py:name, package.module:name, or the name of a built-in function")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$",
        max_length=60,
        description="its name in tables and metrics; null: the function's own",
    )
    weight: float = Field(1.0, ge=-1e6, le=1e6, description="0: recorded, but no part of the reward")
    arguments: dict[str, JsonValue] = Field({}, description="further arguments of the function, by name")
    batch_size: Positive | None = Field(None, description="the function takes lists of at most so many responses")
    calls: CallsConfig | None = Field(None, description="the function is an `async def`: how it is called")

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
        if function not in BUILT_IN_REWARDS:
            raise ValueError(
                f"no built-in function {function!r:.60}; there are {', '.join(BUILT_IN_REWARDS)}, "
                "or give file.py:name or package.module:name"
            )
        return function

    @field_validator("arguments")
    @classmethod
    def _are_arguments(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in arguments:
            if not name.isidentifier() or name in _GIVEN:
                raise ValueError(f"{name!r:.60} cannot be an argument; kdrl itself gives {', '.join(_GIVEN[:3])}")
        json.dumps(arguments, allow_nan=False)  # raises ValueError for NaN and infinity
        return arguments

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.function == "math" and self.arguments:
            raise ValueError("math has no arguments; reward.require_format says whether the format counts")
        if self.batch_size and self.calls:
            raise ValueError("batch_size is for functions of lists, calls for an async def; leave one of them out")
        if (self.batch_size or self.calls) and not self.is_own:
            raise ValueError(f"{self.function} takes one response at a time; leave batch_size and calls out")
        return self


class RewardConfig(Section):
    """r = r_format · r_acc (B.1.2); R1-Zero uses r_acc alone. With `functions`, r is their weighted sum."""

    require_format: bool = Field(True, description="multiply by the format reward")
    functions: list[RewardFunction] = Field(
        [], description="functions whose weighted sum is the reward; empty: math alone, as in the paper"
    )
    success_above: float = Field(
        0.0, description="with functions: a response with a greater reward is a success (masks, SFT, accuracy, labels)"
    )
    allow_code: bool = Field(False, description="python_tests may run the code of responses, behind the kernel's locks")

    @property
    def uses_math(self) -> bool:
        """Whether the verifier is asked."""
        return not self.functions or any(function.function == "math" for function in self.functions)

    @property
    def of_verdicts(self) -> dict[str, Any]:
        """The fields that a verdict of the verifier depends on."""
        return self.model_dump(exclude={"functions", "success_above", "allow_code"})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.allow_code and any(function.function == "python_tests" for function in self.functions):
            raise ValueError(
                "python_tests runs code that a model has written, without network or writing; it can still read the "
                "standard library and cheat its tests. If that is wanted, set reward.allow_code: true"
            )
        labels = [function.label for function in self.functions]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two functions are called {twice[0]}; give one of them another `name`")
        if sum(function.function == "math" for function in self.functions) > 1:
            raise ValueError("math is named twice; give it one weight")
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
