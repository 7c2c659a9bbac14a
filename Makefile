VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SAMPLE := datasets/sample
# The network that comes with the package needs no download. Where there is a network, leave this option out.
OFFLINE := --model.backbone musc-tiny

.PHONY: demo lint check docs test environment clean

demo: environment
	$(BIN)/python examples/sample_dataset $(SAMPLE)
	@for category in fabric gear; do \
		echo; echo "MuSc on $$category:"; \
		$(BIN)/anomalib test --model MuSc $(OFFLINE) --data MVTec --data.root $(SAMPLE) --data.category $$category \
			|| exit 1; \
	done
	@echo; echo "The same fabric as a plain folder, without labels:"
	$(BIN)/anomalib predict --model MuSc $(OFFLINE) --data $(SAMPLE)/fabric/test
	@echo; echo "Heatmaps:"; \
	for run in MVTecAD/fabric/latest MVTecAD/gear/latest latest; do echo "  results/MuSc/$$run/images/"; done; \
	echo "Table: results/MuSc/latest/predictions.csv"; echo "Page:  results/MuSc/latest/review.html"

# Linter, types and the rooms' contracts.
lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

# For the daily work: what needs neither Engine nor a process of its own.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/functional tests/decision/test_thresholds.py \
		tests/backbones/test_names.py tests/backbones/test_dino_embedding.py tests/pool/test_reader.py \
		tests/metrics tests/test_torch_model.py tests/test_post_processor.py tests/test_old_files.py

# The documentation, with warnings as errors, in build/docs.
docs: environment
	$(BIN)/mkdocs build --quiet --strict --site-dir build/docs

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

environment: $(VENV)/installed

$(VENV)/installed: pyproject.toml anomalib_musc/anomalib_musc.pth
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(SAMPLE) build results .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
