# make demo   set up, then teach the embedded Stable Diffusion a subject and show the result
# make studio set up, then open the studio, a web app, on this machine
# make test   set up, then run the tests
# make stress the long forms of the studio's tests: kills, hostile uploads, 20 open tabs
# make check  ruff, mypy and the tests: what every commit passes
# make bench  speed and memory beside peft and diffusers, into benchmarks/results/
# make bench-accuracy DATA=FOLDER  six small data sets against full fine-tuning and peft; goes on where it was stopped
# make bench-methods DATA=FOLDER  every method on the embedded models; goes on where it was stopped
# make assets-eval DATA=FOLDER  the figures in the cards of assets/, measured again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= ../shared/data

.PHONY: browser demo studio test stress check bench bench-accuracy bench-methods assets-eval clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	touch $@

demo: $(READY)
	$(BIN)/vismodal dreambooth

studio: $(READY)
	$(BIN)/vismodal studio

test: $(READY) browser
	$(BIN)/python -m pytest --numprocesses 2

# for the tests of the studio in a browser, which are skipped without one
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && timeout 600 sh -c 'apt-get update && \
		apt-get install --yes --no-install-recommends chromium' >/dev/null 2>&1; } || echo "no Chromium here, and none to be had"

check: $(READY) browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

stress: $(READY)
	VISMODAL_STRESS_KILLS=20 VISMODAL_STRESS_UPLOADS=200 $(BIN)/python -m pytest tests/test_studio_jobs.py tests/test_studio_intake.py
	$(BIN)/python benchmarks/studio_load.py --quick false

bench: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/speed.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/dreambooth_step.py
	$(BIN)/python benchmarks/memory.py

bench-accuracy: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accuracy.py --data $(DATA)

bench-methods: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods.py --data $(DATA)

assets-eval: $(READY)
	$(BIN)/python pipelines/pretrain/evaluate.py --data $(DATA)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
