"""Whether Python, the packages, torch's CUDA and the driver are those that kdrl works with.

The pins are not written here again: they are read from the installed kdrl (its pyproject.toml), and for vLLM from
`kdrl_core.engines.vllm_support`. Nothing is imported, so a package that crashes at import is looked at as well.
"""

import os
import platform
import re
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import kdrl_core
from kdrl_core.config import Recipe
from kdrl_core.engines.vllm_support import how_to_install, install_fault, vllm_version
from kdrl_core.look.doctor.checks import CheckFailed, NotApplicable, Observed
from kdrl_core.models.devices import Gpu

_DISTRIBUTION = "kdrl"
_SHOWN = ("torch", "transformers", "deepspeed", "peft", "safetensors", "prefect", "pyarrow", "math-verify", "numpy")
_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major release → the oldest driver that runs it (NVIDIA's table "CUDA Toolkit and Minimum Required Driver")."""
_PINNED_CUDA = (13, 0)
"""CUDA of the torch that the pinned vLLM needs on a GPU."""


def check_python() -> Observed:
    """Python's version against the one that kdrl asks for."""
    found, needed = platform.python_version(), _python_needed()
    if not SpecifierSet(needed).contains(found, prereleases=True):
        raise CheckFailed(
            f"Python {found}, kdrl needs {needed}", f"make the environment with Python {needed}", python=found
        )
    return Observed(says=found, figures={"python": found})


def check_packages(recipe: Recipe) -> Observed:
    """Every package of the recipe's engines against the range that kdrl works with."""
    faults, remedies = [], []
    for requirement in required_packages(recipe):
        fault = package_fault(requirement)
        if fault is not None:
            faults.append(fault)
            remedies.append(f"'{requirement.name}{requirement.specifier}'")
    how = [f"pip install {' '.join(remedies)}"] if remedies else []
    if uses_vllm(recipe) and (fault := install_fault()) is not None:
        faults.append(fault)
        how.append(how_to_install(recipe.runtime.device))
    figures = installed_versions()
    if faults:
        raise CheckFailed("; ".join(faults), "; ".join(how), **figures)
    return Observed(says=", ".join(f"{name} {found}" for name, found in figures.items()), figures=figures)


def uses_vllm(recipe: Recipe) -> bool:
    """Whether an engine of the recipe is vLLM on this machine."""
    teacher = recipe.teacher
    return recipe.rollout.engine == "vllm" or (
        teacher is not None and teacher.server is None and teacher.engine == "vllm"
    )


def required_packages(recipe: Recipe) -> Iterator[Requirement]:
    """kdrl's requirements that apply to the recipe here. vLLM is left out: `install_fault` knows its two builds."""
    used = {"deepspeed": recipe.trainer.engine == "deepspeed", "lora": recipe.student.lora is not None}
    extras = ["", *(name for name, is_used in used.items() if is_used)]
    for requirement in map(Requirement, _requirements()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def package_fault(requirement: Requirement) -> str | None:
    """Why an installed package does not meet a requirement; None if it does."""
    try:
        found = Version(version(requirement.name))
    except PackageNotFoundError:
        return f"{requirement.name} is not installed, kdrl works with {requirement.specifier}"
    if requirement.specifier.contains(found.public, prereleases=True):
        return None
    return f"{requirement.name} {found} is installed, kdrl works with {requirement.specifier}"


def installed_versions() -> dict[str, str]:
    """Package → version, of the packages that matter for results and speed, where they are installed."""
    found = {"kdrl": kdrl_core.__version__}
    for name in _SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if (vllm := vllm_version()) is not None:
        found["vllm"] = vllm
    return found


def check_torch_cuda(recipe: Recipe) -> Observed:
    """Whether torch is a CUDA build, if the recipe asks for GPUs."""
    if recipe.runtime.device == "cpu":
        raise NotApplicable("runtime.device=cpu")
    found = torch_cuda()
    if found is None:
        raise CheckFailed(
            "torch is a CPU build, and runtime.device=cuda",
            "install a CUDA build (on a GPU node: pip install -e '.[vllm,deepspeed]'), or set runtime.device=cpu",
        )
    text = ".".join(map(str, found))
    return Observed(says=f"CUDA {text}", figures={"cuda": text})


def check_compiler(recipe: Recipe) -> Observed:
    """Whether there are a C compiler and Python's headers: Triton, on which vLLM's CUDA code is built, compiles small C
    files when an engine first starts."""
    if recipe.runtime.device == "cpu" or not uses_vllm(recipe):
        raise NotApplicable("no engine that compiles C files")
    found = which(os.environ.get("CC", "gcc")) or which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = [*(["a C compiler"] if found is None else []), *([] if header.is_file() else [f"{header}"])]
    if lacking:
        raise CheckFailed(f"not there: {', '.join(lacking)}", "install gcc and Python's headers (apt: gcc python3-dev)")
    return Observed(says=f"{found}, {header}")


def check_driver(recipe: Recipe, found: Sequence[Gpu]) -> Observed:
    """The driver against the CUDA of torch."""
    if recipe.runtime.device == "cpu":
        raise NotApplicable("runtime.device=cpu")
    if not found:
        raise NotApplicable("no GPU, so no driver")
    driver, cuda = found[0].driver, torch_cuda() or _PINNED_CUDA
    least = _LEAST_DRIVER.get(cuda[0])
    says = f"driver {driver}, CUDA {cuda[0]}.{cuda[1]} of torch needs {least} or later"
    if least is not None and int(driver.partition(".")[0]) < least:
        raise CheckFailed(
            says,
            f"update the driver to {least} or later (with the forward-compatibility package cuda-compat-{cuda[0]}-"
            f"{cuda[1]} an older data-centre driver may do), or take a node that has one",
            driver=driver,
        )
    return Observed(says=says, figures={"driver": driver})


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA release that torch was built for; None for a CPU build. torch is not imported."""
    spec = find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(place) / "version.py"
        if file.is_file() and (found := re.search(r"^cuda\b.*?=\s*'(\d+)\.(\d+)", file.read_text(), re.MULTILINE)):
            return int(found[1]), int(found[2])
    return None


def _requirements() -> list[str]:
    """Requirements of kdrl, extras included; from pyproject.toml if kdrl is used without being installed."""
    try:
        return requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        project = _project()
        extras = project.get("optional-dependencies", {})
        of_extras = [f"{each}; extra == '{extra}'" for extra, names in extras.items() for each in names]
        return [*project.get("dependencies", []), *of_extras]


def _python_needed() -> str:
    with suppress(PackageNotFoundError):
        return metadata(_DISTRIBUTION)["Requires-Python"] or ""
    return str(_project().get("requires-python", ""))


def _project() -> dict[str, Any]:
    file = Path(kdrl_core.__file__).parents[1] / "pyproject.toml"
    found: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return dict(found.get("project", {}))
