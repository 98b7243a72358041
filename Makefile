# Two commands on a machine that has Python >= 3.11 and make:
#   make run     the README's job: .venv, installation, every arm, the table
#   make test    ruff, then every test that is not slow
#   make ladder  every arm under three seeds, and both sweeps: at most 90 minutes
#   make chaos   fifty kills at random moments, and damaged files, into results/: 25 minutes
# Also test-fast, test-medium, test-slow, math-smoke, test-tpu, test-gpu, clean. FLAGS goes to the job
# (make run FLAGS=--config.arms=bridge), and PIP_FLAGS to pip. On Linux the default index's torch
# includes CUDA; PyTorch's installation page names an extra index with the small CPU build.

PYTHON ?= python3
VENV ?= .venv
FLAGS ?=
PIP_FLAGS ?=
WORKERS ?= 2
# Whole files, in the order of tests/conftest.py, which puts the longest first.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Stands before pytest for the longer tests, whose time is mostly compilation: XLA optimizes little and
# compiles in less than half of the time (tests/conftest.py). `make test-medium QUICK=` and `make
# test-slow QUICK=` compile as a user's run does, and so does `make test-fast`.
QUICK := S2D_QUICK_COMPILES=1

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
  --constraint constraints.txt

# No built-in rules; a recipe that fails leaves no stamp behind.
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.PHONY: run ladder chaos test test-fast test-medium test-slow math-smoke test-tpu test-gpu lint clean

run: $(VENV)/.installed
	PYTHON=$(BIN)/python bash launch/local.sh $(FLAGS)

ladder: $(VENV)/.installed
	mkdir -p runs/ladder
	cp results/arithmetic/choice.md runs/ladder
	set -e; for sweep in seeds label_budget bridge_split; do \
	  $(BIN)/s2d-jax run --config=configs/sweep_$$sweep.py --workdir=runs/ladder \
	    $(FLAGS) > /dev/null; done
	$(BIN)/s2d-jax report runs/ladder

chaos: $(VENV)/.installed-test
	$(BIN)/python -m tests.end_to_end.chaos --kills=50 --seed=0 --out=results

test: test-fast
	$(QUICK) $(BIN)/python -m pytest -m "medium and not slow and not tpu and not gpu" $(SPREAD)

test-fast: lint
	$(BIN)/python -m pytest -m "not slow and not medium and not tpu and not gpu" $(SPREAD)

# What `make test` has beside `make test-fast`, and what compares with torch, which Python 3.12 may lack.
test-medium: lint
	$(QUICK) $(BIN)/python -m pytest -m "(medium or torch) and not slow and not tpu and not gpu" $(SPREAD)

test-slow: $(VENV)/.installed-test
	$(QUICK) $(BIN)/python -m pytest -m slow $(SPREAD) --durations 10

# The mathematics configs, tiny, from folders to tables; `make test-slow` has it too. The published
# tokenizers are used where tokenizers/ of the folder S2D_REAL_MODELS has them.
math-smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s tests/end_to_end/test_math_smoke.py

# libtpu in .venv would claim the machine's accelerator, so it has a separate environment.
test-tpu: .venv-tpu/.installed
	S2D_QUICK_COMPILES= JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
	  JAX_ENABLE_COMPILATION_CACHE=false \
	  .venv-tpu/bin/python -m pytest -m tpu tests/tpu -n $(WORKERS)

# The plugin would look for a driver in .venv. Here it compiles for cards that are absent.
test-gpu: .venv-gpu/.installed
	S2D_QUICK_COMPILES= JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false \
	  .venv-gpu/bin/python -m pytest -m gpu tests/gpu -n $(WORKERS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) .venv-312 .venv-tpu .venv-gpu build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: installed once, and again when the requirements change.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than Python 3.11: name a newer one, as in make PYTHON=python3.11"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[test,math]'
	touch $@ $(VENV)/.installed

.venv-tpu/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  --constraint constraints.txt --editable '.[tpu]' pytest pytest-xdist
	touch $@

# Without their dependencies: neither a driver nor cuBLAS is needed to compile.
.venv-gpu/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  --constraint constraints.txt --editable . pytest pytest-xdist
	version=$$(.venv-gpu/bin/python -c 'import jax; print(jax.__version__)') && \
	  .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version \
	  nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12
	touch $@
