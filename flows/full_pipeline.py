"""filter → stage 1 → stage 2 → evaluate → report: the deployment `kdrl/full-pipeline`."""

from prefect import flow, runtime

from flows import hooks, shown, stopping
from flows.evaluation import evaluation
from flows.filtering import filtering
from flows.reporting import reporting
from flows.sft_stage import sft_stage
from flows.training_stage import training_stage
from kdrl_core.boxes.completion import is_finished, require_finished
from kdrl_core.config import load_recipe
from kdrl_core.config.fetch import fetched
from kdrl_core.ledger import create_run, run_lock, sweep_temporaries
from kdrl_core.look.planning.machine import require_runnable
from tasks.boxes import adopt
from tasks.secrets import register_blocks


def default_run_name() -> str:
    """The parameter `run_name`, or recipe and flow-run id: a retry has the same name and continues the same files."""
    parameters, flow_run_id = runtime.flow_run.parameters, str(runtime.flow_run.id)[:8]
    return parameters.get("run_name") or f"{parameters.get('recipe', 'miniature').split('/')[-1]}-{flow_run_id}"


@flow(name="kdrl", flow_run_name=default_run_name, on_failure=[hooks.on_failure], on_crashed=[hooks.on_failure])
@stopping.stoppable
def full_pipeline(
    recipe: str = "miniature",
    run_name: str | None = None,
    overrides: list[str] | None = None,
    share_with: list[str] | None = None,
) -> str:
    """Run the whole method, or continue it where the files of `run_name` end. Returns the run's folder.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        run_name: folder below artifacts/runs; an existing run is resumed.
        overrides: changes to the recipe, each like `stage2.steps=100`.
        share_with: other runs; their finished parts of the same work are taken over.
    """
    register_blocks()
    require_runnable(loaded := fetched(load_recipe(recipe, overrides or [])))
    run = create_run(run_name or default_run_name(), loaded)
    with run_lock(run.paths.lock):
        sweep_temporaries(run.paths.root)  # of an interrupted publication
        shown.run_opened(run)
        if is_finished(run, verify=True):
            shown.nothing_to_do(run)
            return str(run.paths.root)
        run_dir = str(run.paths.root)
        adopt(run_dir, share_with)
        filtering(run_dir)
        for stage in run.recipe.stages:
            (sft_stage if run.recipe.stage(stage).objective == "sft" else training_stage)(run_dir, stage)
        adopt(run_dir, share_with)
        evaluation(run_dir)
        reporting(run_dir)
        require_finished(run)
        return run_dir
