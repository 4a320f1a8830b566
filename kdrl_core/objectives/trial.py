"""A user's estimator or term, tried on two responses of three tokens before a run starts.

    python -m kdrl_core.objectives.trial estimator|term REFERENCE

The process ends afterwards, so whatever the code does is done there. It prints what is wrong with the function as a
JSON text, or null.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Literal

from kdrl_core.errors import RecipeError

Kind = Literal["estimator", "term"]
_MOST_S = 600.0


@lru_cache
def fault_of(kind: Kind, name: str, sha256: str) -> str | None:
    """What is wrong with the function that `name` refers to, tried in a process of its own; None if it can be used.

    Args:
        sha256: of its file; code that was tried is not tried again.
    """
    command = [sys.executable, "-P", "-m", __name__, kind, name]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MOST_S, check=False
        )
        found: str | None = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"{name}: tried on two responses, it has not finished in {_MOST_S:.0f} s"
    except ValueError:
        said = " ".join(done.stderr.split())[-300:]
        return f"{name}: tried on two responses, it ended the process with exit code {done.returncode}: {said}"
    return found


def _tried(kind: Kind, name: str) -> None:
    import torch

    from kdrl_core.objectives.inputs import Objective, Responses
    from kdrl_core.objectives.kl import kl_estimate
    from kdrl_core.objectives.terms import own_terms

    student, teacher = torch.full((2, 3), -1.0, requires_grad=True), torch.full((2, 3), -1.5)
    if kind == "estimator":
        kl_estimate(student, teacher, name)
        return
    responses = Responses(
        logprobs=student,
        response_mask=torch.ones(2, 3),
        advantages=torch.tensor([1.0, -1.0]),
        kd_weights=torch.ones(2),
        teacher_logprobs=teacher,
        ref_logprobs=teacher,
        rollout_logprobs=student.detach(),
        entropy=-student,
    )
    own_terms(responses, Objective(kind="kdrl", terms=((name, 1.0),)), torch.mean)


def main(kind: Kind, name: str) -> None:
    """Entry point of the process."""
    answer, found = os.dup(1), None
    os.dup2(2, 1)  # what the code prints is no answer
    try:
        _tried(kind, name)
    except RecipeError as error:
        found = str(error)
    except BaseException as error:  # SystemExit: user code may raise anything
        found = f"{name}: {type(error).__name__}: {error}"
    os.write(answer, json.dumps(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
