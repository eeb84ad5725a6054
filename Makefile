PYTHON ?= python
OUT ?= bench/results

check:  ## lint, format, types
	ruff check .
	ruff format --check .
	pyright

test:  ## the fast tier, what README and CI run
	$(PYTHON) -m pytest

evidence:  ## the slow tier: kill loops, long trainings
	$(PYTHON) -m pytest -m slow

bench:  ## kernel microbenchmarks
	$(PYTHON) -m pytest bench

gpu:  ## everything that needs a GPU; says so and fails without one
	@$(PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: no CUDA device here')"
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m senseflow.train --profile --out $(OUT)/profile-tiny

.PHONY: check test evidence bench gpu
