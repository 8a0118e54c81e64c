# `make demo` and `make test` work on a fresh machine with Python >= 3.10; everything lands in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Small models on small machines: one thread a process is faster than many processes fighting for the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
# Commands and tests start many processes, each of which would compile the package again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test check bench clean

.venv/.installed: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.installed-test: setup.cfg .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: .venv/.installed   ## install, fine-tune the embedded tiny model on real video files, sample from it
	OMP_NUM_THREADS=$$(nproc --all) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/demo.py

test: .venv/.installed-test   ## every test that needs no GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

check: .venv/.installed-test   ## what CI runs before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/rules

bench: .venv/.installed   ## print the figures of docs/benchmarks.md that this machine can give; faults.py, learnability.py and condition_used.py take an hour more, gpu_check.py a GPU
	for script in $(filter-out benchmarks/faults.py benchmarks/learnability.py benchmarks/condition_used.py benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv runs samples
