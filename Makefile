# The two commands are `make demo` and `make test`; both set up .venv first and are safe to run twice.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long check format clean

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; make PYTHON=/path/to/python3.12")'
	@echo "setting up .venv ..."
	@start=$$(date +%s); \
	$(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	echo "set up in $$(( $$(date +%s) - start )) s (download included)"
	@touch $@

demo: .venv/.installed  ## train on real pictures, measure, write runs/emoji/report.html
	@start=$$(date +%s); \
	$(BIN)/vlm train emoji --resume auto eval.suite=configs/suites/emoji_demo.yaml && \
	echo "demo took $$(( $$(date +%s) - start )) s; open runs/emoji/report.html"

check: .venv/.installed  ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: .venv/.installed check  ## everything that must hold
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile tests notebooks --nbmake

LEDGER := benchmarks/results/faults.jsonl

test-long: .venv/.installed  ## the long forms, and every fault into the ledger
	rm -f $(LEDGER)
	VLM_FAULTS_OUT=$(LEDGER) $(BIN)/pytest -q -m "long or not long" tests/faults tests/training/test_elastic.py
	$(BIN)/pytest -q -m long --ignore tests/faults --ignore tests/training/test_elastic.py

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist
