"""Does thinking longer help in the long miniature world? `python -m kdrl_core.miniature.long_properties`

Measures, before any training, the three properties for which the recipe `miniature-long` is built. Each model gives 16
responses to the validation problems, at the recipe's temperature.

    longer is right more often   accuracy by depth of thought, and of the longer and the shorter half of the responses
                                 to the *same* problem, so that hard problems do not count as long thoughts
    the teacher thinks longer    mean length; longer than it must: its longest quarter beside the quarter before; past
                                 the student's limit: the share of its responses that the limit cuts
    the student can do both      share and accuracy of its thoughts at each depth
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.miniature.long_world import DEPTHS, depth_of, draw_long_problems, lettered
from kdrl_core.miniature.problems import is_right, respond
from kdrl_core.models.loading import load_model, load_tokenizer
from kdrl_core.types import Rollout

NAMES = ("student", "teacher-weak", "teacher", "teacher-zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """Of one model, whose limit is twice the student's: shares in [0, 1], lengths in tokens."""

    accuracy: float
    length: float
    by_quarter: tuple[float, float, float, float]
    """Accuracy of the shortest to the longest quarter of the responses to each problem."""
    by_depth: dict[int, tuple[float, float, float]]
    """Share of the thoughts, accuracy, length."""
    limited: float
    """Accuracy within the student's limit."""
    cut: float
    """Share of the responses that the student's limit cuts."""

    @property
    def longer_gains(self) -> float:
        """Accuracy of the longer half of the responses to a problem, minus that of the shorter half."""
        first, second, third, last = self.by_quarter
        return (third + last - first - second) / 2


def measure(model_dir: Path, chains: Sequence[str]) -> Properties:
    """The properties of a model, by 16 responses to each chain."""
    stage = load_recipe("miniature-long").stage("stage2")
    tokenizer, model = load_tokenizer(model_dir), load_model(model_dir)
    limit = stage.max_response_tokens
    free = respond(
        model, tokenizer, chains, temperature=stage.temperature, max_response_tokens=2 * limit, notation=lettered
    )
    by_chain: dict[str, list[Rollout]] = {}
    for response in free:
        by_chain.setdefault(response.prompt_id, []).append(response)
    ranked = [sorted(found, key=lambda response: len(response.token_ids)) for found in by_chain.values()]
    depths = {depth: [response for response in free if depth_of(response.text) == depth] for depth in DEPTHS}
    return Properties(
        accuracy=_accuracy(free),
        length=_length(free),
        by_quarter=(*(_accuracy([r for row in ranked for r in row[4 * q : 4 * q + 4]]) for q in range(4)),),  # type: ignore[arg-type]
        by_depth={
            d: (len(found) / len(free), _accuracy(found), _length(found)) for d, found in depths.items() if found
        },
        limited=fmean(is_right(response) and len(response.token_ids) <= limit for response in free),
        cut=fmean(len(response.token_ids) > limit for response in free),
    )


def _depth_cells(one: Properties) -> list[str]:
    """A cell for every depth, also for one at which the model never thinks."""
    return [
        "–"
        if (at := one.by_depth.get(depth)) is None
        else f"{100 * at[0]:.0f} %: {100 * at[1]:.0f}, {at[2]:.0f} tokens"
        for depth in DEPTHS
    ]


def _accuracy(responses: Sequence[Rollout]) -> float:
    return fmean(map(is_right, responses))


def _length(responses: Sequence[Rollout]) -> float:
    return fmean(len(response.token_ids) for response in responses)


def main() -> None:
    """Command line of the module: the properties of every shipped model, as Markdown."""
    torch.set_num_threads(1)
    chains = draw_long_problems().benchmarks["validation"]
    print("| model | accuracy, % | tokens | shortest to longest quarter, % | cut, % | within the limit, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = {name: measure(resolve_path(f"builtin:miniature-long/{name}"), chains) for name in NAMES}
    for name, one in found.items():
        quarters = ", ".join(f"{100 * accuracy:.1f}" for accuracy in one.by_quarter)
        shown = (
            f"{100 * one.accuracy:.1f} | {one.length:.1f} | {quarters} | {100 * one.cut:.1f} | {100 * one.limited:.1f}"
        )
        print(f"| {name} | {shown} |")
    print("\n| model | " + " | ".join(f"depth {depth}" for depth in DEPTHS) + " |")
    print("| --- |" + " --- |" * len(DEPTHS))
    for name, one in found.items():
        print(f"| {name} | {' | '.join(_depth_cells(one))} |")


if __name__ == "__main__":
    main()
