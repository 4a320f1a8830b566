"""Raised alarms: kept in the manifest of the step's update, which is written once, and collected in alarms.parquet.

So an alarm stays on record when the rules are changed later. Neither file holds the run's name, a date or a path: equal
runs have equal bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdrl_core.ledger import Run
from kdrl_core.tables.metrics import load_alarm_rows

_LOOK_AT = {
    "reward_collapse": "Compare responses before and after it, and the mix of verdicts: malformed and no_answer say "
    "that the form was lost, wrong that the policy was. A KL or gradient norm that rises just before points at the "
    "learning rate.",
    "clip_ratio": "Responses are cut before their answer. Read some to the end: reasoning that goes on wants a larger "
    "max_response_tokens, reasoning that goes round in circles is the policy's fault.",
    "repetition": "Responses that are cut repeat themselves: the policy has found loops. Read the longest.",
    "length_explosion": "Read the longest responses: do they think longer, or never stop?",
    "kl_jump": "Look for the responses with the largest kl_mean, and in them for the tokens on which student and "
    "teacher part.",
    "ref_kl_jump": "The policy runs away from where the stage began: look at learning rate and gradient norm.",
    "entropy_jump": "Falling entropy says that the policy settles on few answers (a group's responses become one), "
    "rising entropy that it loses what it knew. Compare the responses of one group before and after.",
    "logprob_gap": "The engine samples from another policy than the trainer trains: weights that did not arrive, "
    "another temperature or dtype. Of rounding alone, importance weights make up for it (tis_cap).",
    "timeouts": "Answers that cost the verifier its time limit: read the slow ones. verification.max_failed_share "
    "stops the stage if they become too many.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm of one step."""

    stage: str
    step: int
    """The step whose update raised it."""
    rule: str
    """Name in the recipe's `alarms`."""
    severity: str
    metric: str
    value: float
    """The value that was compared: the mean for a fall, else the metric."""
    threshold: float
    """The limit that it was compared with."""
    since: int
    """First of the `patience` steps that breached the rule."""
    text: str
    """What happened, in words."""

    @property
    def advice(self) -> str:
        """What to look at."""
        return _LOOK_AT.get(self.rule, "")  # a rule of another version

    def commands(self, run: str) -> list[str]:
        """Commands that show the step and the steps around it."""
        before = max(0, self.since - 10)
        return [
            f"kdrl rollouts stats {run} --stage {self.stage} --step {before}-{self.step} --all",
            f"kdrl rollouts show {run} --stage {self.stage} --step {self.step}",
        ]


def sentence(alarm: Alarm) -> str:
    """One line: `stage2 step 143, reward_collapse (critical): …`."""
    return f"{alarm.stage} step {alarm.step}, {alarm.rule} ({alarm.severity}): {alarm.text}"


def to_metadata(alarms: Sequence[Alarm]) -> list[dict[str, Any]]:
    """Alarms as the manifest of their step's update holds them."""
    return [{name: value for name, value in asdict(a).items() if name not in ("stage", "step")} for a in alarms]


def load_alarms(run: Run, stage: str) -> list[Alarm]:
    """Everything that was raised in a stage, ascending by step.

    Raises:
        DamagedArtifactError: alarms.parquet cannot be read.
    """
    return [Alarm(stage=stage, **row) for row in load_alarm_rows(run, stage)]
