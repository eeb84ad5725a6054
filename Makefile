PYTHON ?= $(if $(shell command -v python),python,python3)
BENCHES := $(filter $(wildcard bench/*.py),bench/ops.py bench/step.py bench/data.py)
# A checkout runs without being installed, as on a GPU machine that has no network.
export PYTHONPATH := $(CURDIR)/kernels:$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

MKDOCS ?= $(PYTHON) -m mkdocs
SANITIZER ?= compute-sanitizer
# Others' kernels (attention, whole blocks) and compilation alone are not ours to check there.
SANITIZED := $(filter-out tests/ops/test_aot% tests/ops/test_attention% tests/ops/test_mmdit%,$(wildcard tests/ops/test_*.py))

.PHONY: check test bench csrc gpu sanitize evidence docs gpu-pack clean

# Lint, format and types, as .ci/run does them.
check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $$($(PYTHON) -c 'import sys; print(sys.executable)')

# The fast tests; GPU tests skip with a reason where there is no GPU.
test:
	$(PYTHON) -m pytest

# csrc/'s libraries into the source tree, for a checkout that is not installed, and its C++ tests.
csrc:
	cmake -S . -B build/csrc && cmake --build build/csrc --parallel
	ctest --test-dir build/csrc --output-on-failure
	cmake --install build/csrc --prefix kernels/senseflow_kernels

# Every benchmark that this checkout has; results go to bench/results/.
bench:
	@test -n "$(BENCHES)$(wildcard bench/test_*.py)" || echo "bench: this checkout has no benchmarks"
	@set -e; for file in $(BENCHES); do \
	  module=bench.$$(basename $$file .py); echo "== $$module"; $(PYTHON) -m $$module; done
	$(if $(wildcard bench/test_*.py),$(PYTHON) -m pytest bench)

# On a GPU: the kernels' tests, the other GPU tests, the benchmarks, the kernels under compute-sanitizer where it is
# installed; one table at the end, also runs/gpu/table.md. One that fails does not stop the rest. PARTS="kernels
# bench-score" runs these alone. Without a GPU this is an error: nothing was shown.
gpu:
	@$(PYTHON) -m bench.gpu $(PARTS)

# The kernels' tests under NVIDIA's compute-sanitizer (of the CUDA toolkit; SANITIZER=/path/to/it). Every tensor in an
# allocation of its own, or an access beyond one would hit a neighbour unseen; CUDA graphs cannot have that.
sanitize:
	@command -v $(SANITIZER) >/dev/null || { echo "sanitize: no $(SANITIZER) here, so nothing was checked"; exit 1; }
	@set -e; for tool in memcheck racecheck synccheck; do echo "== $(SANITIZER) --tool $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 9 \
	  $(PYTHON) -m pytest -q $(SANITIZED) -k "not graph"; done

# The long tests behind the published figures (minutes on a CPU).
evidence:
	$(PYTHON) -m pytest -m slow -rs --durations=0

# README's and docs/'s numbers against the committed result files, links, names of code; then the site, in build/site/
# (needs `pip install -e '.[docs]'`). `python -m bench.docs --write` brings the numbers up to date.
docs:
	$(PYTHON) -m bench.docs
	NO_MKDOCS_2_WARNING=1 $(MKDOCS) build --strict --quiet

# dist/gpu-pack.tar.gz: this tree as it stands, the versions beside it, and packages that the GPU machine may lack, which
# needs no network. There: unpack, cd gpu-pack, make gpu.
gpu-pack:
	@rm -rf dist/gpu-pack && mkdir -p dist/gpu-pack
	@git ls-files -z --cached --others --exclude-standard \
	  | while IFS= read -r -d '' file; do [ ! -e "$$file" ] || printf '%s\0' "$$file"; done \
	  | tar --create --null --files-from=- | tar --extract --directory=dist/gpu-pack
	@$(PYTHON) -m bench.pack dist/gpu-pack
	@$(PYTHON) -m pip freeze --exclude-editable > dist/gpu-pack/versions.txt
	@git rev-parse --verify --quiet HEAD > dist/gpu-pack/commit.txt || echo none > dist/gpu-pack/commit.txt
	@tar --create --gzip --file=dist/gpu-pack.tar.gz --directory=dist gpu-pack
	@rm -rf dist/gpu-pack && ls -l dist/gpu-pack.tar.gz

# Build outputs and caches; never runs/.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

gpu-pack: SHELL := bash
