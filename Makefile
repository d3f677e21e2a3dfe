# make train       set up and run the main job on this machine       make train ARGS="--steps 100"
# make test        set up, lint, check types, run the tests          make test PYTEST_ARGS="-k floors"
# make fast        the same with the tests that train nothing: under two minutes
# make lint        set up, lint, check types
# make gpu-check   every check and measurement that needs a CUDA GPU       make gpu-check ARGS="--only correctness"
#   WHEELS=FOLDER      with what that folder has of packages that are missing here; no .venv, no network
# make gpu-proof   every kernel compiled for real cards, without one       make gpu-proof ARGS="--quick --archs 90"
# make export-check  llama.cpp beside this project on an exported model; installs its Python package once, into .llama/
# make harness-check  scores beside lm-evaluation-harness; installs it once, into .harness/
# make wheels      download those wheels for Python 3.12 on x86-64 Linux (into wheels/, or WHEELS=FOLDER)
# PYTHON=python3 after any of them uses that Python with the packages it has, and makes no .venv.
# TORCH=2.11.0 after any of them makes .venv with that PyTorch in place of the lock's.

# Two processes: most of the tests' time is spent in programs that they start.
PYTEST_ARGS = -n 2 --dist worksteal
# The tests of `make fast`: structure, options, the model, the data order, readers, metrics.
FAST = $(addprefix tests/, text/test_readers.py text/test_rows.py kernels/test_ops.py engine/test_optim.py engine/test_precision.py \
	tasks/test_metrics.py tasks/test_objectives.py tasks/test_order.py test_dataset.py test_imports.py test_model.py \
	test_options.py test_size.py)
# lm-evaluation-harness and what it needs of packages, without their own: typepy wants another python-dateutil than the lock's.
HARNESS = lm-eval==0.4.13 evaluate pytablewriter DataProperty mbstrdecoder tabledata tcolorpy 'typepy<2' pathvalidate sqlitedict \
	word2number more-itertools 'chardet<7' 'python-dateutil<3' pytz
# The Python that will install the wheels.
TARGET = 3.12
# Another PyTorch than the lock's, and the Triton that belongs to it.
TORCH =
TRITON = $(if $(filter 2.11.%,$(TORCH)),3.6.0,3.7.1)

.PHONY: train test fast gpu-check gpu-proof export-check harness-check wheels lint setup clean
.SILENT:

ifeq ($(origin PYTHON),command line)
SETUP =
else ifeq ($(origin WHEELS),command line)
PYTHON = python3
SETUP =
else
PYTHON = .venv/bin/python
SETUP = setup
endif

# What a sound .venv has in .venv/installed: the sum of what it was made from and how many files that gave.
# An interrupted set-up, a deletion or a new lock makes the next make start it afresh.
SUM = { cat pyproject.toml constraints.txt; echo "$(TORCH)"; } | cksum
FILES = find .venv -type f ! -name '*.pyc' | wc -l

train: $(SETUP)
	gpus=$$($(PYTHON) -c 'import torch; print(max(1, torch.cuda.device_count()))') && \
	$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$$gpus train_gpt2.py $(ARGS)

# The tests start hundreds of programs, and without bytecode each would compile the project again.
test: lint
	unset PYTHONDONTWRITEBYTECODE; $(PYTHON) -m pytest $(PYTEST_ARGS)

fast: lint
	$(PYTHON) -m pytest $(PYTEST_ARGS) $(FAST)

# With a PYTHONPATH set, ty does not search tests/ by itself.
lint: $(SETUP)
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --check --quiet .
	unset PYTHONPATH; $(PYTHON) -m ty check --output-format concise --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

# The wheels go to a folder that only this call sees: this Python's own packages stay as they are.
ifeq ($(origin WHEELS),command line)
gpu-check:
	set -e; site=$$(mktemp -d); trap 'rm -rf "$$site"' EXIT; \
	$(PYTHON) -m benchmarks.wheels install "$(WHEELS)" "$$site"; \
	PYTHONPATH="$$site$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu_check $(ARGS)
else
WHEELS = wheels
gpu-check: $(SETUP)
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)
endif

wheels: PYTHON = python3
wheels:
	$(PYTHON) -m benchmarks.wheels download "$(WHEELS)" --python $(TARGET)

gpu-proof: $(SETUP)
	$(PYTHON) -m benchmarks.gpu_proof $(ARGS)

export-check: $(SETUP)
	[ -d .llama/xllamacpp ] || $(PYTHON) -m pip install --quiet --target .llama --no-deps xllamacpp
	$(PYTHON) train_gpt2.py --preset micro --steps 60 --device cpu --no-compile --out runs/export-check > /dev/null
	PYTHONPATH=.llama $(PYTHON) -m benchmarks.export_check runs/export-check

harness-check: $(SETUP)
	[ -d .harness/lm_eval ] || $(PYTHON) -m pip install --quiet --target .harness --no-deps $(HARNESS)
	PYTHONPATH=.harness $(PYTHON) -m pytest -q tests/test_evaluate.py -k harness

setup:
	set -e; { read -r sum && read -r files; } 2> /dev/null < .venv/installed || sum=; \
	[ "$$sum" != "$$($(SUM))" ] || [ "$$($(FILES))" -lt "$$files" ] || exit 0; \
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || \
		{ echo "Python 3.11 or newer is needed; python3 here is: $$(python3 --version 2>&1)" >&2; exit 1; }; \
	echo "Setting up .venv (once, some minutes)"; \
	python3 -m venv --clear .venv; \
	if [ -z "$(TORCH)" ]; then cp constraints.txt .venv/lock; else \
		grep -vE '^(torch|triton|setuptools|nvidia-[a-z0-9-]*|cuda-[a-z]*)==' constraints.txt > .venv/lock; \
		printf 'torch==%s\ntriton==%s\n' "$(TORCH)" "$(TRITON)" >> .venv/lock; fi; \
	.venv/bin/python -m pip install -qq --disable-pip-version-check -c .venv/lock -e '.[dev]'; \
	{ $(SUM); $(FILES); } > .venv/setting-up; mv .venv/setting-up .venv/installed

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
