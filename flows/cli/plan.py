"""`kdrl plan`: whether a recipe fits the GPUs at hand, and how long it takes. kdrl_core.look.planning does the work."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from flows.cli.printed_tables import grid
from flows.cli.shared import JsonOption, RecipeOption, SetOption, err, errors, out
from kdrl_core.errors import RecipeError

if TYPE_CHECKING:
    from kdrl_core.config import Recipe
    from kdrl_core.look.planning.candidates import Candidate
    from kdrl_core.look.planning.cluster import Cluster
    from kdrl_core.look.planning.cost import Rates
    from kdrl_core.look.planning.shapes import ModelShape
    from kdrl_core.look.planning.stage_plan import StagePlan

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_MAX_OTHERS = 3
_GPUS_PER_NODE, _GPU_MEMORY = 8, 80e9
_TIMES = {
    "rollout": "rollout",
    "teacher": "teacher_score",
    "reference": "reference_score",
    "verify": "verify",
    "update": "update",
    "comm.": "communication",
    "sync": "weight_sync",
    "sleep": "offload",
    "host": "host",
    "save": "checkpoint",
    "total": "total",
}
"""Columns and their fields of StepTime."""


def plan(
    recipe: RecipeOption,
    overrides: SetOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs in all; default: --nodes × --gpus-per-node, else this machine's, else what the recipe uses.",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of one GPU, e.g. 80GB or 24GiB; default: this machine's, else 80GB."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default: as many as the GPUs need.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of one machine; default: this machine's, else 8.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Share of the memory that a plan may use; CUDA gets the rest.")
    ] = 0.9,
    mean_response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean response length; default: 0.4 of the longest, an assumption.")
    ] = None,
    mean_prompt_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean prompt length; default: 256, an assumption.")
    ] = None,
    rollout_tokens_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Response tokens per second and GPU; default: from the bandwidth.")
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Peak of one GPU in bfloat16; default: this machine's, else an A100's 312."),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the peak that training and scoring reach.")
    ] = 0.35,
    memory_bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s of one GPU; default: this machine's, else an A100's 2,000.")
    ] = None,
    network_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s per GPU between nodes.")] = 25.0,
    storage_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s of the shared storage in all.")] = 5.0,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Problems that sft samples; default: data.max_problems, else 61,000.")
    ] = None,
    from_run: Annotated[
        str | None, typer.Option(metavar="RUN", help="Take tokens/s, FLOPs/s and lengths from this run's own steps.")
    ] = None,
    run_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that each phase of --from-run had; default: from its recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a recipe fits the GPUs, where its models go, and how long a step and all stages take.

    No model is loaded. kdrl reads only its config.json; of published models in the shipped recipes it needs the name
    alone. Memory is counted per GPU for each phase (rollout, teacher-score, update, …) and each component (weights,
    gradients, optimizer, activations, KV cache, …). Colocated placements run every phase on every GPU in turn. Split
    placements give the teacher GPUs of its own; with rollout.engine=server, some GPUs only generate. The fastest
    placement that fits is chosen. If none fits, the output says why, and what to change.

    The recipe sets engines, ZeRO stage, activation checkpointing and tensor parallelism: change them with --set, as for
    `kdrl run`. A plan uses all GPUs that you name (without options, this machine's), and lists the settings that a run
    needs to use them.

    \b
    kdrl plan --recipe paper-1.5b --gpus 8 --gpu-memory 80GB
    kdrl plan --recipe paper-1.5b --gpus 8 --gpu-memory 24GB --set trainer.zero_stage=3
    kdrl plan --recipe zero-3b --nodes 4 --peak-tflops 989 --memory-bandwidth 3350
    kdrl plan --recipe smollm2 --from-run first

    Times are arithmetic from peak rates and sizes, not promises: measure a few steps and plan again with --from-run.
    Exit code 0 if every stage fits, else 1.
    """
    from kdrl_core.config import load_recipe
    from kdrl_core.config.fetch import fetched
    from kdrl_core.look.planning.cluster import CPU_BANDWIDTH, engines_of, work_of
    from kdrl_core.look.planning.conditions import conditions, ranks_note
    from kdrl_core.look.planning.cost import Rates
    from kdrl_core.look.planning.stage_plan import plan_stage, total_hours

    with errors():
        loaded = fetched(load_recipe(recipe, overrides or []), weights=False)
        cluster = _cluster(
            loaded,
            gpus=_gpus(gpus, nodes, gpus_per_node),
            gpus_per_node=gpus_per_node,
            gpu_memory=None if gpu_memory is None else parse_size(gpu_memory),
            utilization=utilization,
            peak_flops=peak_tflops and peak_tflops * 1e12,
            mfu=mfu,
            memory_bandwidth=memory_bandwidth and memory_bandwidth * 1e9,
            network_bandwidth=network_bandwidth * 1e9,
            storage_bandwidth=storage_bandwidth * 1e9,
        )
        total = cluster.gpus
        if from_run is not None and memory_bandwidth is None and loaded.runtime.device == "cpu":
            cluster = replace(cluster, memory_bandwidth=CPU_BANDWIDTH)
        engines = engines_of(loaded)
        measured = None
        if from_run is not None:
            from kdrl_core.look.planning.measured import lengths_for, rates_of_run, scaled

            rates, measured = rates_of_run(from_run, gpus=run_gpus, cluster=cluster)
            if not as_json:
                err.say(f"rates of {from_run}, {measured.stage}: {_rates(rates)}")
        plans = []
        for stage in loaded.stages:
            config, mean, longest, prompt = loaded.stage(stage), mean_response_tokens, None, mean_prompt_tokens
            if measured is not None:
                found, longest = lengths_for(measured, limit=config.max_response_tokens)
                mean = mean or found
                prompt = prompt or min(measured.mean_prompt, config.max_prompt_tokens)
            work = work_of(
                loaded, stage, mean_response=mean, mean_prompt=prompt, longest_response=longest, problems=problems
            )
            used = Rates() if measured is None else scaled(rates, measured, work)
            if rollout_tokens_per_s is not None:
                used = replace(used, rollout_tokens_per_s=rollout_tokens_per_s, decoding_overhead_s=None)
            plans.append(plan_stage(work, engines, cluster, used))
        hours = total_hours(plans)
        if as_json:
            stages = [{**each.to_json(), "conditions": conditions(each, loaded)} for each in plans]
            out.print_json(data={"recipe": loaded.name, "hours": hours, "stages": stages})
        else:
            for each in plans:
                is_assumed = mean_response_tokens is None and measured is None
                _show(each, conditions(each, loaded), is_assumed=is_assumed)
            if hours is not None:
                if note := ranks_note(plans):
                    out.say(note)
                out.print(f"all stages: {_span(hours, total)}")
        if hours is None:
            if not as_json:
                failed = ", ".join(each.work.stage for each in plans if each.best is None)
                err.print(f"error: {failed} of {loaded.name} does not fit", style="red")
            raise SystemExit(1)


def parse_size(text: str) -> float:
    """Bytes of `80GB` or `24GiB`. Raises RecipeError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) == 0.0:
        raise RecipeError(f"--gpu-memory {text}: expected a size such as 80GB or 24GiB")
    return float(found[1]) * unit


def _cluster(
    recipe: "Recipe", *, gpus: int | None, gpus_per_node: int | None, gpu_memory: float | None, **given: float | None
) -> "Cluster":
    """The cluster of the options; what they leave open is this machine's, if they name no other GPUs."""
    from kdrl_core.look.planning.cluster import Cluster, default_gpus
    from kdrl_core.look.planning.machine import cluster_of
    from kdrl_core.models.devices import gpus as gpus_here

    found = [gpu for gpu in gpus_here() if gpu.memory] if gpu_memory is None and gpus is None else []
    node = gpus_per_node or len(found) or _GPUS_PER_NODE
    total = gpus or len(found) or default_gpus(recipe, gpus_per_node=node)
    base = cluster_of(found) if found else Cluster(gpus=total, gpus_per_node=node, gpu_memory=_GPU_MEMORY)
    changes = {name: value for name, value in {"gpu_memory": gpu_memory, **given}.items() if value is not None}
    return replace(base, gpus=total, gpus_per_node=min(node, total), **changes)


def _gpus(gpus: int | None, nodes: int | None, gpus_per_node: int | None) -> int | None:
    gpus_per_node = gpus_per_node or _GPUS_PER_NODE
    if gpus is not None and nodes is not None and gpus != nodes * gpus_per_node:
        raise RecipeError(
            f"--gpus {gpus} is not --nodes {nodes} × --gpus-per-node {gpus_per_node} = {nodes * gpus_per_node}; "
            "leave one of them out"
        )
    return gpus or (nodes * gpus_per_node if nodes else None)


def _rates(rates: "Rates") -> str:
    """What was measured, in words."""
    shown = [f"{rates.rollout_tokens_per_s:,.0f} response tokens/s"] if rates.rollout_tokens_per_s else []
    for name, value in (("scoring", rates.score_flops), ("updates", rates.update_flops)):
        if value:
            shown.append(f"{name} at {value / 1e12:.3g} TFLOP/s")
    return ", ".join(shown) + " per GPU"


def _show(plan: "StagePlan", needed: Sequence[str], *, is_assumed: bool) -> None:
    from kdrl_core.look.planning.placement import host_bytes
    from kdrl_core.look.planning.stage_plan import kv_note, many

    chosen, work, cluster = plan.candidates[0], plan.work, plan.cluster
    teacher = f", teacher {_model(work.teacher)}" if work.teacher else ""
    where = f"{many(cluster.gpus, 'GPU')} on {many(cluster.nodes, 'node')}"
    out.say(
        f"{work.stage}: student {_model(work.student)}{teacher}; {where}, "
        f"{cluster.usable_memory / 1e9:.1f} GB usable on each",
        style="bold",
    )
    if plan.best is None:
        out.say(f"  {chosen.reason}", style="red")
        for remedy in plan.remedies:
            out.say(f"  would fit with: {remedy}")
        if not plan.remedies:
            out.print("  no single change that was tried makes it fit; take a smaller model")
    else:
        out.say(f"  placement: {chosen.placement.name}; {kv_note(plan, chosen)}")
        for each in needed:
            out.say(f"  {each}")
    out.print(_memory_table(chosen, plan))
    if host := host_bytes(work, plan.engines, cluster, chosen.placement):
        size = f"{_number(host / 1e9)} GB" if host >= 1e9 else f"{_number(host / 1e6)} MB"
        out.print(f"  host memory per node, for sleeping models and offload: {size}")
    out.print()
    if plan.best is None or plan.step_s is None or plan.hours is None:
        return
    out.print(_time_table(plan))
    if work.sampled:
        span = _span(plan.sampling_s / 3600, cluster.gpus)
        out.say(f"  before the first step, {work.sampled:,} responses of the teacher: {span}")
    out.say(
        f"  {many(work.steps, 'step')} of {_number(plan.step_s)} s{_evaluations(plan)}: "
        f"{_span(plan.hours, cluster.gpus)}; "
        f"mean response {work.mean_response:,.0f} tokens{' (assumed)' if is_assumed else ''}\n"
    )
    if plan.reported_step_s is not None:
        out.print(f"  the paper: {plan.reported_step_s:,.0f} s a step (4.3: about 80 hours), on GPUs unknown to us\n")


def _evaluations(plan: "StagePlan") -> str:
    """What the stage's time has beside the steps."""
    from kdrl_core.look.planning.stage_plan import many

    parts = [f"{many(plan.work.evaluations, 'evaluation')} during training"] if plan.work.evaluations else []
    if plan.final_evaluation_s:
        parts.append(f"{_number(plan.final_evaluation_s)} s for the final evaluation")
    return "".join(f", {part}" for part in parts)


def _memory_table(chosen: "Candidate", plan: "StagePlan") -> RichTable:
    unit, size = ("GB", 1e9) if chosen.worst.total >= 1e9 else ("MB", 1e6)
    rows = []
    for phase in chosen.memory:
        parts = sorted(phase.components.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {value / size:.2f}" for name, value in parts if value)
        over = "" if phase.total <= plan.cluster.usable_memory * (1 + 1e-9) else "  ✗"
        rows.append([phase.phase, phase.gpus, f"{phase.total / size:.2f}{over}", shown])
    header = ["phase", "on", unit, "components"]
    return grid(header, "LLRl", rows, title=f"{unit} per GPU by phase", title_justify="left")


def _model(shape: "ModelShape") -> str:
    size = shape.parameters
    return f"{shape.name} ({f'{size / 1e9:.2f}B' if size >= 1e9 else f'{size / 1e6:.2f}M'})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _span(hours: float, gpus: int) -> str:
    """Time in a fitting unit; from an hour on, also in GPU-hours."""
    if hours * 60 < 1:
        return f"{_number(hours * 3600)} seconds"
    if hours < 1:
        return f"{_number(hours * 60)} minutes"
    return f"{_number(hours)} hours, {_number(hours * gpus)} GPU-hours"


def _time_table(plan: "StagePlan") -> RichTable:
    from kdrl_core.look.planning.stage_plan import NOTICED, time_alone

    fitting = [one for one in plan.candidates if one.fits][: 1 + _MAX_OTHERS]
    shown = [(one.placement.name, one.time) for one in fitting]
    alone = time_alone(plan, fitting[0])
    if alone.total > (1 + NOTICED) * fitting[0].time.total:
        shown.append((f"{fitting[0].placement.name}, one engine each", alone))
    columns = {name: [getattr(time, field) for _, time in shown] for name, field in _TIMES.items()}
    digits = 1 if fitting[0].time.total >= 10 else 3
    columns = {name: values for name, values in columns.items() if any(round(value, digits) for value in values)}
    rows = [
        [name, *(f"{values[row]:,.{digits}f}" for values in columns.values())] for row, (name, _) in enumerate(shown)
    ]
    kinds = "l" + "R" * len(columns)
    table = grid(
        ["placement", *columns],
        kinds,
        rows,
        pad_edge=False,
        collapse_padding=True,
        title="seconds per step",
        title_justify="left",
    )
    table.columns[0].min_width = max(len(word) for name, _ in shown for word in name.split())
    return table
