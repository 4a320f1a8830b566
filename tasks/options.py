"""What all tasks have in common."""

from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import State


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another try may help: a dropped connection may come back, a bad recipe does not get better."""
    try:
        state.result()
    except (ConnectionError, TimeoutError):
        return True
    except BaseException:
        return False
    return False


STEP_OPTIONS: dict[str, Any] = {
    # The ledger on disk decides what is done: Prefect's cache remembers return values, not files.
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [1, 10],
    "retry_condition_fn": is_transient,
}
