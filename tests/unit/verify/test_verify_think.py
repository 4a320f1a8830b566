"""`<think>` in training (format required) and in evaluation (accuracy alone), by how the prompt leaves the thought.

One rule for all four: what lies inside the thought is no answer, and a thought that never ends is all there is.
"""

from collections.abc import Iterator

import pytest

from kdrl_core.types import ThinkOpened
from kdrl_core.verify import Verifier

# response to a problem whose answer is 8 → reward with the format required, and by accuracy alone
OPENED = {
    "8 it is</think>\n\n\\boxed{8}": (1, 1),
    "\\boxed{9}, no</think>\\boxed{8}": (1, 1),  # the box in the thought is none
    "<think>8</think>\\boxed{8}": (0, 1),  # opened twice
    "8</think>\\boxed{8}</think>\\boxed{8}": (0, 1),
    "8 it is, \\boxed{8}": (0, 0),  # cut off while thinking
    "8 it is, the final answer is $8$": (0, 0),
    "<think>8 it is, \\boxed{8}": (0, 0),
    "\\boxed{8}</think>so 8": (0, 0),
    "8</think>\\boxed{8} <think>or \\boxed{9}": (0, 1),
    "8</think>\\boxed{9}": (0, 0),
    "": (0, 0),
}
NOT_OPENED = {
    "<think>8 it is</think>\n\n\\boxed{8}": (1, 1),
    "<think>\\boxed{9}, no</think>\\boxed{8}": (1, 1),
    "8</think>\\boxed{8}": (0, 1),  # never opened
    "8 it is, \\boxed{8}": (0, 1),  # no thought at all: R1-Zero's usual response
    "8 it is, the final answer is $8$": (0, 1),
    "<think>8 it is, \\boxed{8}": (0, 0),  # cut off while thinking
    "\\boxed{8}<think>or \\boxed{9}": (0, 1),  # answered, then cut off in a second thought
    "<think>\\boxed{8}</think>so 8": (0, 0),
    "<think>8</think>\\boxed{9}": (0, 0),
    "": (0, 0),
}

CLOSED = {
    "\\boxed{8}": (1, 1),
    "8 it is, \\boxed{8}.": (1, 1),
    "8 it is, the final answer is $8$": (0, 1),
    "<think>8 it is</think>\n\n\\boxed{8}": (0, 1),  # a second thought
    "8</think>\\boxed{8}": (0, 1),
    "\\boxed{8}<think>or \\boxed{9}": (0, 1),
    "\\boxed{8": (0, 0),
    "\\boxed{}": (0, 0),
    "\\boxed{9}": (0, 0),
    "": (0, 0),
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as verifier:
        yield verifier


@pytest.mark.parametrize("require_format", [True, False])
@pytest.mark.parametrize(("opened", "cases"), [(True, OPENED), (False, NOT_OPENED), ("closed", CLOSED)])
def test_the_thought(
    verifier: Verifier, opened: ThinkOpened, cases: dict[str, tuple[int, int]], require_format: bool
) -> None:
    verdicts = verifier.verify_batch(
        [(response, "8") for response in cases], require_format=require_format, think_opened=opened
    )
    found = {response: verdict.reward for response, verdict in zip(cases, verdicts, strict=True)}
    assert found == {response: rewards[0 if require_format else 1] for response, rewards in cases.items()}
    # Accuracy says the same whether the format is required or not, but for answers that are announced without a box.
    for (response, rewards), verdict in zip(cases.items(), verdicts, strict=True):
        assert verdict.accuracy_reward == (rewards[1] if "$8$" not in response or not require_format else 0.0)
