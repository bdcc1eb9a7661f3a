# Everything runs from a virtual environment in VENV, made by `make install`; an existing one is reused.
VENV ?= .venv
PYTHON ?= python3
MODEL ?= out/model
HOST_SIZE ?= 4GB
PORT ?= 30000
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.sglang-cached-attention
CHECKED := cached_attention benchmark docs examples python

# Few and short enough for two cores: 6 conversations come back twice each, in 2 rounds over 3 servers.
DEMO := --conversations 6 --turns 3 --history 2048 --new 100 --out 16 --rounds 2 --concurrency 1

.PHONY: help install demo serve test kernels lint docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F: '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "  variables: VENV=$(VENV) PYTHON=$(PYTHON) MODEL=$(MODEL) HOST_SIZE=$(HOST_SIZE) PORT=$(PORT) JOBS=$(JOBS)"

install: $(INSTALLED)  ## SGLang and this package, editable, into VENV

$(INSTALLED): pyproject.toml
	@echo "Installing SGLang and this package into $(VENV): about 11 GB, minutes on a fast network."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar on -e '.[test]'
	@echo "Compiling what was installed, on all cores: pip would on one."
	-@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	@touch $@

out/model: | $(INSTALLED)
	$(BIN)/python -m benchmark.model $@ --size 100m --context 4096

demo: $(INSTALLED) | out/model  ## stock SGLang, CachedAttention and an endless device compared, on the spot
	@echo "Three servers, then the same conversations on each: about 10 minutes on two cores."
	$(BIN)/python -m benchmark.multiturn --compare --model-path out/model $(DEMO) --output out/multiturn

# SGLang's default would serve the float32 demo model in float16.
serve: $(INSTALLED) | $(filter out/model,$(MODEL))  ## a server with CachedAttention for MODEL on PORT
	$(BIN)/python -m sglang.launch_server --model-path $(MODEL) --port $(PORT) \
		--enable-cached-attention --cached-attention-host-size $(HOST_SIZE) \
		$(if $(filter out/model,$(MODEL)),--dtype float32) $(ARGS)

test: $(INSTALLED)  ## all tests, in JOBS processes; ARGS goes to pytest, e.g. ARGS="-m 'not e2e'"
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

kernels: $(INSTALLED)  ## CUDA code for sm_80, sm_90a and sm_100 into the package, for a wheel; needs no GPU
	$(BIN)/python -m cached_attention.kernels

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

docs: $(INSTALLED)  ## the documentation, into site/; a dead link or a page out of nav is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:  ## models, results and logs of the demo, and site/; VENV stays
	rm -rf out site
