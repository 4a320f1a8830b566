"""`kdrl evaluate`: any model on any benchmark (Sec. 4.1). The work is in kdrl_core.evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.printed_tables import grid
from flows.cli.shared import (
    ColumnsOption,
    JsonOption,
    RecipeOption,
    SetOption,
    counted_progress,
    err,
    errors,
    interruptible,
    out,
)

if TYPE_CHECKING:
    from kdrl_core.evaluation.evaluate import EvaluatedBenchmark


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face directory, hf://OWNER/NAME, run:NAME (a run's student), or URL of an OpenAI-compatible "
            "API up to /v1.",
        ),
    ],
    recipe: RecipeOption,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            metavar="NAME[=FILE]",
            help="A benchmark of the recipe, or your own as NAME=FILE (problems and answers, in any format of kdrl "
            "filter); repeatable; default: all of the recipe's.",
        ),
    ] = None,
    columns: ColumnsOption = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses per problem; default: each benchmark's own.")
    ] = None,
    max_problems: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N problems of each benchmark.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(metavar="FILE", help="GGUF file in the directory.")] = None,
    served_as: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model at the URL; default: the only one.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="env:NAME|block:NAME", help="Where the URL's key is, not the key itself.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at the URL.")] = 32,
    timeout: Annotated[float, typer.Option(min=1.0, metavar="S", help="Limit of one request in seconds.")] = 3600.0,
    retry_for: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="S", help="Seconds after a request's first fault in which temporary faults are retried."
        ),
    ] = 120.0,
    overrides: SetOption = None,
    lm_eval: Annotated[
        Path | None,
        typer.Option("--lm-eval", metavar="FILE", help="Write all results in lm-evaluation-harness's JSON format."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model: Avg@k, pass@k and maj@k with 95 % intervals, response lengths, every response kept.

    The recipe sets prompt, temperature, context and engine (--set evaluation.temperature=0.6). Earlier results with the
    same model, problems and settings are read, not sampled again. You may interrupt it at any time (Ctrl-C): the same
    command continues where it stopped.

    \b
    kdrl evaluate models/Qwen2.5-3B -r paper-1.5b -b aime24 -b math500
    kdrl evaluate run:my-run -r miniature -b mine=problems.jsonl --samples 16
    kdrl evaluate http://127.0.0.1:8000/v1 -r paper-1.5b --api-key env:MY_KEY
    """
    from kdrl_core.config import ColumnsConfig, load_recipe
    from kdrl_core.ledger import artifacts_root, replace_file, require_writable

    with errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.evaluation.evaluation_plan import EvaluationOptions, plan_evaluation

        if (api_key or "").startswith("block:"):
            from tasks.secrets import register_blocks

            register_blocks()
        options = EvaluationOptions(
            benchmarks=benchmarks or (),
            columns=None if columns is None else ColumnsConfig.of(columns),
            samples=samples,
            max_problems=max_problems,
            gguf_file=gguf_file,
            served_as=served_as,
            api_key=api_key,
            concurrency=concurrency,
            timeout_s=timeout,
            retry_for_s=retry_for,
        )
        plan = plan_evaluation(loaded, model, options)
        root = artifacts_root()
        require_writable(root, free_mb=64)
        if lm_eval is not None:
            require_writable(lm_eval.absolute().parent, free_mb=1)
        from kdrl_core.evaluation.evaluate import combined_lm_eval, evaluate_plan

        told = "the same command continues after the last response"
        with interruptible(told), counted_progress(err, "responses") as progress:
            found = evaluate_plan(plan, root, on_progress=progress)
        if lm_eval is not None:
            replace_file(lm_eval.absolute(), combined_lm_eval(found))
        if as_json:
            out.print_json(
                data=[
                    {"benchmark": e.name, "folder": str(e.folder), "seconds": e.seconds, "is_new": e.is_new, **e.result}
                    for e in found
                ]
            )
        else:
            _print(found)


def _print(found: "list[EvaluatedBenchmark]") -> None:
    header = ["benchmark", "problems", "accuracy, 95 %", "pass@k", "maj@k", "tokens", "cut %", "time"]
    rows = [
        [
            each.name,
            f"{result['num_problems']}×{result['num_samples']}",
            f"{100 * result['accuracy']:.1f} [{100 * result['low']:.1f}, {100 * result['high']:.1f}]",
            f"{100 * result['pass_at_k'][max(result['pass_at_k'], key=int)]:.1f}",
            f"{100 * result['maj_at_k']:.1f}",
            f"{result['length_mean']:.1f}",
            f"{100 * result['clip_ratio']:.1f}",
            f"{each.seconds:.0f} s" if each.is_new else "before",
        ]
        for each in found
        for result in [each.result]
    ]
    out.print(grid(header, "LRRRRRRR", rows, padding=(0, 0), pad_edge=False))
    if len(found) > 1:
        mean = sum(each.result["accuracy"] for each in found) / len(found)
        out.print(f"mean of {len(found)} benchmarks  {100 * mean:.1f}", highlight=False)
    k = {max(int(k) for k in each.result["pass_at_k"]) for each in found}
    note = f"k = {k.pop()}" if len(k) == 1 else "k: the largest power of two within each benchmark's samples"
    out.print(f"accuracy is Avg@samples in %; pass@{note}; maj@samples", highlight=False)
    for each in found:
        out.print(f"{each.name}  {each.folder}", highlight=False, soft_wrap=True)
