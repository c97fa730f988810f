VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-faults test-cluster env clean

# The embedded town: render, shard, train on two ranks, evaluate, show the table.
demo: $(READY)
	$(BIN)/rerankvpr demo

# Lint, types, tests. RERANKVPR_TEST_DATA and RERANKVPR_TEST_WEIGHTS switch on the tests on real photographs.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Trainings killed at random moments, in full counts. Not part of `make test`.
test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults

# A real SLURM with virtual nodes, hosts in network namespaces, an MLflow server: root on Debian. Not part of `make test`.
test-cluster: $(READY)
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
	$(BIN)/python -m pytest tests/cluster

env: $(READY)

$(READY): requirements.lock pyproject.toml
	python3 -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 13) else f"python3 is {v[0]}.{v[1]}; rerankvpr needs 3.10, 3.11 or 3.12")'
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(READY)

clean:
	rm -rf data/town data/town_shards runs/demo
