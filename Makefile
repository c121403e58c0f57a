# `make train` (the whole pipeline on the synthetic world), `make test` and others. Each makes its environment first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests have an environment of their own: PyTorch, an oracle of theirs, must never be importable where a run is made.
TEST_VENV := .venv-test
TEST_BIN := $(TEST_VENV)/bin
CONFIG ?= experiments/configs/synthetic.py
# Further flags of experiments/train.py, for instance ARGS=--config.rl.num_generations=8
ARGS ?=
# A second transformers, one major version back, that exported models must load in as well.
TRANSFORMERS4 := .compat/transformers4

.PHONY: train smoke check test plan docs figures lock clean

train: $(BIN)/.installed
	$(BIN)/python experiments/train.py --config=$(CONFIG) $(ARGS)

smoke: $(BIN)/.installed
	$(BIN)/python experiments/train.py --config=$(CONFIG):smoke $(ARGS)

# What every commit passes: without PyTorch, whole runs or the TPU compiler. Types are checked beside the tests, on a core
# of their own, and their errors come last.
check: $(BIN)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/basedpyright > $(VENV)/types.txt & types=$$!; \
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m pytest --lane=fast -q $(ARGS); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.txt; exit $$((tests ? tests : types))

# In two lanes: tests against PyTorch compile as users do, all others quickly. A lane may have none of those in ARGS (5).
test: $(TEST_BIN)/.installed $(TRANSFORMERS4)/.installed
	for lane in rest torch; do \
		JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \
			$(TEST_BIN)/python -m pytest -n 2 --dist loadfile --lane=$$lane $(ARGS) \
			|| test $$? = 5 || failed="$$failed $$lane"; \
	done; test -z "$$failed"

# Sheets of docs/plans: minutes of compiling each, without a TPU. One of them: make plan PLANS=omni_3b.py:v5e:4x4
# Those of GPUs need the extra plan-gpu as well: make plan PLANS=omni_3b.py:h100:1
PLANS ?= omni_3b.py:v5e:4x4 omni_3b.py:v5e:2x4 omni_7b.py:v5e:2x4 omni_3b.py:v5p:2x2x4 omni_7b.py:v5p:2x2x4 \
	omni_7b.py:v6e:4x4 omni_7b.py:v5e:16x16

plan: $(BIN)/.installed-plan
	set -e; for plan in $(PLANS); do \
		$(BIN)/python experiments/plan.py --config=experiments/configs/$$plan --topology=$${plan#*:} $(ARGS) \
			|| test $$? = 1; \
	done

# The documentation, into site/: a dead link, or a page that is nowhere in the menu, is an error.
docs: $(BIN)/.installed-docs
	$(BIN)/python experiments/reference_page.py
	$(BIN)/python experiments/tutorial.py
	$(BIN)/zensical build --clean --strict

# The drawings of docs/ and the README, and the tutorial notebook with its page, run anew (about two minutes).
# CLIP_MODEL: the run that answers about the clip; CLIP_NOTE: what it has been through.
CLIP_MODEL ?= runs/synthetic
CLIP_NOTE ?= after make train

figures: $(BIN)/.installed-docs
	$(BIN)/python experiments/variance_figure.py
	$(BIN)/python experiments/clip_figure.py --model=$(CLIP_MODEL) --note="$(CLIP_NOTE)"
	$(BIN)/python experiments/tutorial.py --execute

# requirements/: what a run takes on each Python, with hashes. Made again where setup.cfg or requirements.txt changes.
lock: $(BIN)/.installed-dev
	set -e; for minor in 11 12 13; do \
		file=requirements/run-py3$$minor.txt; \
		{ echo "# What a run takes on Python 3.$$minor, for Linux on x86-64, with the hashes of every file; tests and tools left out:"; \
		  echo "#     pip install --require-hashes -r $$file && pip install --no-deps ."; \
		  echo "# Made by \`make lock\` from setup.cfg and the versions in requirements.txt."; \
		  $(BIN)/uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.$$minor \
			--python-platform x86_64-manylinux_2_28 -c requirements.txt setup.cfg; } > $$file.new; \
		mv $$file.new $$file; \
	done

$(BIN)/python $(TEST_BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mer-r1-jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Use make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(@D:/bin=)

$(BIN)/.installed: $(BIN)/python setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[dev]'
	touch $@

$(BIN)/.installed-docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[docs]'
	touch $@

# The TPU compiler, without PyTorch.
$(BIN)/.installed-plan: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[plan]'
	touch $@

$(TEST_BIN)/.installed: $(TEST_BIN)/python setup.cfg requirements.txt
	$(TEST_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(TEST_BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[test]'
	touch $@

$(TRANSFORMERS4)/.installed: $(TEST_BIN)/python
	$(TEST_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRANSFORMERS4) --upgrade \
		transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.0 \
		requests urllib3 charset-normalizer certifi idna
	touch $@

clean:
	rm -rf $(VENV) $(TEST_VENV) .compat build *.egg-info
