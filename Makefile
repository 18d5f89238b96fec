# make demo   set up, then teach the embedded Stable Diffusion a subject and show the result
# make test   set up, then run the tests
# make check  ruff, mypy and the tests: what every commit passes
# make bench  the comparison with peft, into benchmarks/results/
# make bench-methods DATA=FOLDER  every method on the embedded models; goes on where it was stopped
# make assets-eval DATA=FOLDER  the figures in the cards of assets/, measured again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= ../shared/data

.PHONY: demo test check bench bench-methods assets-eval clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	touch $@

demo: $(READY)
	$(BIN)/vismodal dreambooth

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

bench: $(READY)
	$(BIN)/python benchmarks/speed.py

bench-methods: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods.py --data $(DATA)

assets-eval: $(READY)
	$(BIN)/python pipelines/pretrain/evaluate.py --data $(DATA)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
