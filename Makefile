VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test check lint lint-apart tests test-faults fuzz test-cluster gpu wheelhouse env lock licences audit wheel docs notebooks clean

# The embedded town: render, shard, train on two ranks, evaluate, show the table.
demo: $(READY)
	$(BIN)/rerankvpr demo

# Lint and types beside all tests; what the former print is shown at the end.
# RERANKVPR_TEST_DATA and RERANKVPR_TEST_WEIGHTS switch on the tests on real photographs.
test: $(READY)
	@$(LINT_AND_TESTS)

# The inner loop: lint and types beside the tests that take moments: one rank, no training, no server.
check: $(READY)
	@$(LINT_AND_TESTS) SELECTED="-m 'not slow'"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/rumdl check --quiet .
	@$(BIN)/typos --format brief
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then $(BIN)/mypy; else echo 'types are checked on Python 3.11 alone: NumPy for others declares others'; fi

LINT_AND_TESTS = said=$$(mktemp) && trap 'cat "$$said"; rm "$$said"' EXIT && \
  $(MAKE) --no-print-directory --jobs 2 --keep-going lint-apart tests SAID="$$said"

lint-apart:
	@$(MAKE) --no-print-directory lint > '$(SAID)' 2>&1

# Tests wait at times, so there is one process more than two cores; with five the tests take as long and time out more.
PROCESSES := $(if $(filter Linux,$(shell uname)),3,1)
# Bytecode is written, whatever containers say of it: a test's program need not compile what another one did.
tests:
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --processes $(PROCESSES) $(SELECTED)

# Trainings killed at random moments, in full counts. Not part of `make test`.
test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults

# Ten thousand mutations of the files that each reader reads, and a table of what they ended in.
MUTATIONS := 10000
fuzz: $(READY)
	$(BIN)/python -m tests.fuzzing --mutations $(MUTATIONS)

# A real SLURM with virtual nodes, hosts in network namespaces, an MLflow server: root on Debian. Not part of `make test`.
test-cluster: $(READY)
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
	$(BIN)/python -m pytest tests/cluster

# The tests and measurements that a GPU is for, in under nine minutes, with the Python that holds PyTorch there:
# `make gpu PYTHON=python3 OUT=folder`. It needs no network; what that Python lacks comes from wheelhouse/, if it is there.
# Without a GPU the same runs at reduced sizes on the CPU: it shows that all parts work, and measures nothing.
OUT := runs/gpu
gpu:
	@if [ -d wheelhouse ]; then \
	  $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(OUT)/site wheelhouse/*.whl; fi
	PYTHONPATH=$(OUT)/site:. $(GPU_PYTHON) -m benchmarks.gpu --out $(OUT)

GPU_PYTHON = $(if $(wildcard wheelhouse),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))

# What a machine with PyTorch and no network lacks, in at most 60 MiB of wheels: `make wheelhouse HAVE=freeze.txt`, where
# freeze.txt is what `pip list --format=freeze` printed there.
HAVE := benchmarks/pytorch_image.txt
wheelhouse: $(READY)
	$(BIN)/python -m benchmarks.wheelhouse --have $(HAVE)

# The environment: uv makes it if there is one, else python3; then the lock's versions, each file held to the lock's hashes.
# `make env PYTHON=python3.13` takes another Python than the first one found.
env: $(READY)

PYTHON := python3
UV := $(shell command -v uv 2> /dev/null)
INSTALL := $(or $(UV),$(BIN)/uv) pip install --quiet --python $(BIN)/python

$(READY): requirements.lock pyproject.toml
ifdef UV
	@$(UV) venv --quiet --allow-existing --python '$(if $(filter file,$(origin PYTHON)),>=3.10$(COMMA)<3.15,$(PYTHON))' $(VENV)
else
	@command -v '$(PYTHON)' > /dev/null || $(call STOP,no $(PYTHON) here; install Python 3.10 to 3.14 or uv)
	@'$(PYTHON)' -c 'import sys; v = sys.version_info; sys.exit(not (3, 10) <= v < (3, 15))' || $(call STOP,$(PYTHON) is none of Python 3.10 to 3.14; name one that is (make env PYTHON=python3.13) or install uv)
	@'$(PYTHON)' -c 'import ensurepip' 2> /dev/null || $(call STOP,$(PYTHON) has no venv; install it (Debian: apt-get install python3-venv) or uv)
	@'$(PYTHON)' -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/uv.lock
endif
	$(INSTALL) --compile-bytecode --require-hashes --build-constraints requirements.lock --requirements requirements.lock
	$(INSTALL) --no-deps --build-constraints requirements.lock --editable .
	@touch $(READY)

STOP = { echo 'make env: $(1)' >&2; exit 1; }
COMMA := ,

# The lock anew from pyproject.toml. Versions that still fit stay; `make lock UPGRADE=--upgrade` takes the newest.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --generate-hashes $(UPGRADE) \
	  --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

# docs/licences.md, from the lock and the metadata of what is installed.
licences: $(READY)
	$(BIN)/python docs/licences.py

# The site of docs/ in build/site; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'build/site/index.html; with search: python3 -m http.server --directory build/site'

# The notebooks of docs/notebooks anew, with what they print and draw; after `make demo`.
notebooks: $(READY)
	$(BIN)/python docs/run_notebooks.py

# Known vulnerabilities of the lock's versions for the oldest and the newest Python; asks PyPI's advisories.
audit: $(if $(UV),,$(READY))
	for python in 3.10 3.14; do \
	  $(or $(UV),$(BIN)/uv) tool run --python $$python pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock || exit 1; \
	done

# A wheel in dist/, installed with all that it needs into an empty environment and tried there.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/uv build --quiet --wheel --build-constraints requirements.lock --python $(BIN)/python
	$(BIN)/uv venv --quiet --python $(BIN)/python build/elsewhere
	$(BIN)/uv pip install --quiet --python build/elsewhere/bin/python --constraints requirements.lock --build-constraints requirements.lock dist/*.whl
	cd build/elsewhere && for verb in --help 'train demo --help' 'eval --list'; do bin/rerankvpr $$verb > /dev/null || exit 1; done
	@ls dist/*.whl

clean:
	rm -rf data/town data/town_shards runs/demo
