"""`kdrl evaluate` as a flow: the deployment `kdrl-model-evaluation/model-evaluation`."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.stopping import stoppable
from kdrl_core.config import load_recipe
from kdrl_core.evaluation.evaluate import evaluate_plan
from kdrl_core.evaluation.evaluation_plan import EvaluationOptions, plan_evaluation
from kdrl_core.ledger import artifacts_root
from tasks.secrets import register_blocks


@flow(name="kdrl-model-evaluation")
@stoppable
def model_evaluation(
    model: str,
    recipe: str = "miniature",
    benchmarks: list[str] | None = None,
    samples: int | None = None,
    max_problems: int | None = None,
    gguf_file: str | None = None,
    overrides: list[str] | None = None,
    served_as: str | None = None,
    api_key: str | None = None,
    concurrency: int = 32,
) -> list[str]:
    """Evaluate a model as `kdrl evaluate` does. Returns each benchmark's folder of responses and results.

    Args:
        model: Hugging Face directory, `run:NAME`, or URL of an OpenAI-compatible API.
        recipe: name of a shipped recipe, or path of a YAML file.
        benchmarks: names from the recipe, or `NAME=FILE`; None: all in the recipe.
        samples: responses per problem; None: each benchmark's own.
        max_problems: use only that many problems of each benchmark, the first ones.
        gguf_file: GGUF file in the directory.
        overrides: changes to the recipe, each like `evaluation.temperature=1.0`.
        served_as: name of the model at the URL; None: the URL serves only one.
        api_key: `env:NAME` or `block:NAME`.
        concurrency: requests in flight at the URL.
    """
    register_blocks()
    loaded = load_recipe(recipe, overrides or [])
    options = EvaluationOptions(
        benchmarks=benchmarks or (),
        samples=samples,
        max_problems=max_problems,
        gguf_file=gguf_file,
        served_as=served_as,
        api_key=api_key,
        concurrency=concurrency,
    )
    plan = plan_evaluation(loaded, model, options)
    found = evaluate_plan(plan, artifacts_root())
    rows = [
        {
            "benchmark": each.name,
            **{name: each.result[name] for name in ("accuracy", "low", "high", "maj_at_k", "length_mean")},
            "folder": str(each.folder),
        }
        for each in found
    ]
    create_table_artifact(rows, key="model-evaluation", description=f"{model}: accuracy in [0, 1]")
    for each in found:
        get_run_logger().info(
            "%s: %.3f [%.3f, %.3f], %s",
            each.name,
            *(each.result[name] for name in ("accuracy", "low", "high")),
            each.folder,
        )
    return [str(each.folder) for each in found]
