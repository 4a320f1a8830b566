"""Checks of a recipe's inputs that load no model. They take a second and need no run."""

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from kdrl_core.config import ModelConfig, Recipe, resolve_path
from kdrl_core.config.models import TeacherConfig
from kdrl_core.config.outside import is_code, named_models, slots_of
from kdrl_core.config.secrets import is_known, resolve_secret
from kdrl_core.data import find_files
from kdrl_core.data.benchmarks import load_benchmark
from kdrl_core.data.decontamination import evaluation_problems
from kdrl_core.data.fitting import require_fitting
from kdrl_core.engines.vllm_support import how_to_install, install_fault, model_fault
from kdrl_core.errors import DataError, EngineError, ModelError, RecipeError
from kdrl_core.ledger import digest
from kdrl_core.models.devices import devices_of_ranks, named_devices, visible_devices
from kdrl_core.models.loading import check_device, check_model_dir, compare_tokenizers, context_limit, read_config
from kdrl_core.models.tokenizer import check_embedding, vocabulary_of
from kdrl_core.models.weights import architecture, compare_architecture, other_kind, stored_weights
from kdrl_core.objectives.plugins import is_reference, parse_reference
from kdrl_core.objectives.trial import fault_of

_logger = logging.getLogger("kdrl")


def check_inputs(recipe: Recipe) -> None:
    """Look at every file and model that the recipe names.

    Raises:
        RecipeError, ModelError, DataError, SecretError: what is missing or contradictory, with the field to change.
    """
    student = check_model_dir(recipe.student, role="student")
    _check_context(recipe, student)
    if recipe.teacher is not None:
        teacher = check_model_dir(recipe.teacher, role="teacher")
        _check_context(recipe, teacher, of_teacher=True)
        server = recipe.teacher.server
        if server is not None and server.api_key is not None and is_known(server.api_key):
            resolve_secret(server.api_key)
        compare_tokenizers(resolve_path(recipe.student.path), resolve_path(recipe.teacher.path))
        student_tokens = vocabulary_of(resolve_path(recipe.student.path))
        check_embedding(student_tokens, teacher, where=f"teacher.path={recipe.teacher.path}, the student's tokenizer")
    for name, model in recipe.evaluation.also.items():
        check_model_dir(model, role=f"evaluation.also.{name}")
    for name in recipe.stages:
        try:
            find_files(recipe.stage(name).data)
        except DataError as error:
            raise DataError(f"{name}.{error}") from error
        require_fitting(recipe, name)
        if (decontamination := recipe.stage(name).data.decontamination) is not None:
            evaluation_problems(decontamination)
    for benchmark in recipe.evaluation.benchmarks:
        load_benchmark(benchmark)
    check_estimators(recipe)
    check_rewards(recipe)
    check_device(recipe)
    check_trainer(recipe)
    check_devices(recipe)
    check_engines(recipe)
    check_trackers(recipe)
    check_weights(recipe)
    check_adapter(recipe)


def check_weights(recipe: Recipe) -> None:
    """Raise ModelError if a model could not be loaded when its turn comes, which may be hours away. It reads JSON files
    and the headers of weights. It warns in the log if config.json ties an output layer but the files hold another."""
    for slot, model in named_models(recipe).items():
        if model.gguf_file is not None:
            continue
        role = slot.removesuffix(".path")
        path, where = resolve_path(model.path), f"{slot}={model.path}"
        engine = model.engine if isinstance(model, TeacherConfig) else recipe.rollout.engine
        stored = stored_weights(path)
        kind = other_kind(stored, read_config(path))
        if kind is not None and (role == "student" or engine == "transformers"):
            more = ", or set teacher.engine=vllm if vLLM knows it" if role == "teacher" else ""
            raise ModelError(f"{where}: {path} {kind}{more}")
        if kind is not None or model.trust_remote_code:  # vLLM knows more kinds; own code knows its architecture
            continue
        if (own := compare_architecture(path, stored, where=where)) is None:
            continue
        told = f"{where}: config.json ties {own[0]} to {own[1]}, but the files hold both, and they differ"
        if engine != "transformers":
            raise ModelError(f"{told}; vLLM would leave {own[0]} out: set tie_word_embeddings to false in config.json")
        _logger.warning("%s. %s counts: it is used, trained and exported, with tie_word_embeddings=false", told, own[0])


def check_adapter(recipe: Recipe) -> None:
    """Raise RecipeError if peft is not installed for the student's adapter, and ModelError if a target is no layer of
    the student. A GGUF file and code of the model's own are seen only when the trainer starts."""
    student = recipe.student
    if student.lora is None:
        return
    from kdrl_core.models import lora

    if find_spec("peft") is None:
        raise RecipeError(f"recipe {recipe.name}, field 'student.lora': {lora.NOT_INSTALLED}")
    if student.gguf_file is None and not student.trust_remote_code:
        path = resolve_path(student.path)
        model = architecture(path, where=f"student.path={student.path}")
        lora.targets_of(model, student.lora, where=f"recipe {recipe.name}, field 'student")


def check_estimators(recipe: Recipe) -> None:
    """Raise RecipeError if a user's estimator or term is not there, or fails when it is tried in another process."""
    for slot, name in slots_of(recipe).items():
        if is_code(slot) and slot.startswith("stage") and is_reference(name):
            where = f"recipe {recipe.name}, field '{slot}'"
            try:
                (reference := parse_reference(name)).check()
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from error
            file = reference.located()
            sha256 = "" if file is None else digest(file)[1]
            if fault := fault_of("term" if ".terms" in slot else "estimator", name, sha256):
                raise RecipeError(f"{where}: {fault}")


def check_rewards(recipe: Recipe) -> None:
    """Raise RecipeError if a function of the reward cannot be used. Users' code is imported, in a worker that ends."""
    if not recipe.reward.functions:
        return
    from kdrl_core.rewards.pool import check_functions

    try:
        check_functions(recipe.reward, recipe.verification)
    except RecipeError as error:
        raise RecipeError(f"recipe {recipe.name}, {error}") from error


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError if a tracker's package is not installed."""
    for name in recipe.tracking.trackers:
        if find_spec(name) is None:
            raise RecipeError(
                f"recipe {recipe.name}, field 'tracking.trackers': {name} is not installed; run pip install {name}, "
                "or leave it out"
            )


def _check_context(recipe: Recipe, config: dict[str, object], *, of_teacher: bool = False) -> None:
    if (limit := context_limit(config)) is None:
        return
    for name in recipe.stages:
        stage = recipe.stage(name)
        needed = stage.max_prompt_tokens + stage.max_response_tokens
        if needed <= limit or (of_teacher and not stage.uses_teacher):
            continue
        if of_teacher:
            raise ModelError(
                f"teacher.path={recipe.teacher and recipe.teacher.path}: its context of {limit} tokens is shorter than "
                f"{name}'s prompt and response limits ({needed}); lower {name}.max_response_tokens"
            )
        raise RecipeError(
            f"recipe {recipe.name}, field '{name}.max_response_tokens': {stage.max_response_tokens} response and "
            f"{stage.max_prompt_tokens} prompt tokens are {needed}, beyond the student's context of {limit}; "
            f"lower it to {limit - stage.max_prompt_tokens} or less"
        )


def check_trainer(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe's trainer is not installed, or its hostfile does not give its ranks."""
    trainer, field = recipe.trainer, f"recipe {recipe.name}, field 'trainer"
    if trainer.engine == "torch":
        return
    if find_spec("deepspeed") is None:
        raise RecipeError(
            f"{field}.engine': deepspeed is not installed; install the extra with pip install 'kdrl[deepspeed]', "
            "or set trainer.engine=torch"
        )
    if trainer.hostfile is not None and (missing := [tool for tool in ("ssh", "pdsh") if which(tool) is None]):
        raise RecipeError(
            f"{field}.hostfile': DeepSpeed starts ranks on other hosts with {' and '.join(missing)}, which is not "
            "installed here; on Debian: apt-get install openssh-client pdsh"
        )
    if trainer.hostfile is not None and (slots := hostfile_slots(Path(trainer.hostfile))) != trainer.ranks:
        raise RecipeError(
            f"{field}.ranks': {trainer.ranks}, but {trainer.hostfile} has {slots} slots; set trainer.ranks={slots}"
        )


def check_devices(recipe: Recipe) -> None:
    """Raise RecipeError if this process may use fewer GPUs than the recipe's ranks or engines take, or if DeepSpeed
    would take others than CUDA_VISIBLE_DEVICES names."""
    if recipe.runtime.device == "cpu":
        return
    where, trainer, vllm = f"recipe {recipe.name}, field", recipe.trainer, recipe.vllm
    engines = [recipe.rollout.engine]
    if recipe.teacher is not None and recipe.teacher.server is None:
        engines.append(recipe.teacher.engine)
    try:
        if trainer.hostfile is None:
            field = "trainer.ranks"
            devices_of_ranks(trainer.ranks)
        if "vllm" in engines:
            field, count = "vllm.replicas", vllm.replicas * vllm.tensor_parallel
            visible_devices(
                count, needed_for=f"vllm.replicas={vllm.replicas} × vllm.tensor_parallel={vllm.tensor_parallel}"
            )
    except EngineError as error:
        raise RecipeError(f"{where} '{field}': {error}") from error
    names = named_devices()
    if trainer.hostfile is not None and names is not None and names != [str(n) for n in range(len(names))]:
        raise RecipeError(
            f"{where} 'trainer.hostfile': DeepSpeed gives the ranks of a host its GPUs 0, 1, …, not those of "
            f"CUDA_VISIBLE_DEVICES={','.join(names)}; unset the variable, or set trainer.hostfile=null"
        )


def check_engines(recipe: Recipe) -> None:
    """Raise RecipeError if an engine of the recipe is not installed, not in the release that kdrl works with, or cannot
    run its model."""
    roles: list[tuple[str, str, ModelConfig]] = [("rollout.engine", recipe.rollout.engine, recipe.student)]
    if recipe.teacher is not None and recipe.teacher.server is None:
        roles.append(("teacher.engine", recipe.teacher.engine, recipe.teacher))
    roles += [("rollout.engine", recipe.rollout.engine, model) for model in recipe.evaluation.also.values()]
    for field, engine, model in roles:
        if engine != "vllm":
            continue
        where, device = f"recipe {recipe.name}, field", recipe.runtime.device
        if (fault := install_fault()) is not None:
            how = how_to_install(device)
            raise RecipeError(f"{where} '{field}': {fault}; install it with {how}, or set {field}=transformers")
        config = check_model_dir(model, role=field.partition(".")[0])
        found = model_fault(
            config,
            tensor_parallel=recipe.vllm.tensor_parallel,
            kv_cache_gb=recipe.vllm.kv_cache_gb,
            device=device,
            dtype=recipe.runtime.dtype,
            tokens=_longest(recipe, config),
            batch_invariant=recipe.vllm.batch_invariant,
        )
        if found is not None and found[0]:
            raise RecipeError(f"{where} 'vllm.{found[0]}': {found[1]} ({model.path})")
        if found is not None:
            raise RecipeError(f"{where} '{field}': {model.path} has {found[1]}. Set {field}=transformers")


def _longest(recipe: Recipe, config: dict[str, Any]) -> int:
    """Tokens of the longest sequence that a model of the recipe sees: in a stage, or in the evaluation."""
    stages = [recipe.stage(name) for name in recipe.stages]
    evaluated = recipe.evaluation.max_context_tokens
    return max(
        min(evaluated, context_limit(config) or evaluated),
        *(stage.max_prompt_tokens + stage.max_response_tokens for stage in stages),
    )


def hostfile_slots(path: Path) -> int:
    """Ranks that a DeepSpeed hostfile gives. Raises RecipeError if it cannot be read or has an invalid line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"field 'trainer.hostfile': {path} cannot be read ({error}); correct the path") from error
    slots = 0
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            found = re.match(r"[A-Za-z0-9][\w.:-]*\s+slots=(\d+)", line)
            if found is None:
                raise RecipeError(f"{path} line {number}: {line!r} is not `HOST slots=N`; correct it")
            slots += int(found[1])
    return slots
