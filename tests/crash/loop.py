"""A run's loop without Prefect, to be killed: `python loop.py RUN_DIR`; goes on where the files end."""

import sys

from kdrl_core.ledger import open_run_dir, run_lock, sweep_temporaries
from kdrl_core.steps.checkpoints import remaining_steps
from kdrl_core.steps.filter import filter_run
from kdrl_core.steps.rollout import rollout_step
from kdrl_core.steps.score import score_step
from kdrl_core.steps.session import close_sessions, stage_session
from kdrl_core.steps.update import update_step
from kdrl_core.steps.verify import verify_step


def main(run_dir: str) -> None:
    run = open_run_dir(run_dir)
    with run_lock(run.paths.lock):
        sweep_temporaries(run.paths.root)
        filter_run(run)
        for stage in run.recipe.stages:
            for step in remaining_steps(run, stage):
                session = stage_session(run_dir, stage)
                rollout_step(session, step)
                score_step(session, step)
                verify_step(session, step)
                update_step(session, step)
    close_sessions()


if __name__ == "__main__":
    main(sys.argv[1])
