# Each of these commands also installs what it needs into $(VENV).
#
#   make demo   runs both stages on the demo data, evaluates base, RW and SRPO, and writes a report
#   make saro   the whole method: data, RW, pairs of its own texts, SRPO, evaluation, report; recipes/laptop.mk
#   make ablation   six models, what each part of it buys; recipes/ablation.mk
#   make test   runs the tests
#   make trl    installs TRL and lm-eval and runs the tests that compare with them; without these, `make test` skips them
#   make lint   checks style and format
#
#   make demo TORCH_INDEX=URL   takes torch from another package index, such as PyTorch's CPU-only one
#   make demo DEMO="--train.max_steps 3"   passes options to both recipes
#   make demo DEMO_EVALUATE="--limit 8"    passes options to the evaluation

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DEMO ?=
DEMO_EVALUATE ?=
OUTPUT ?= output

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A process for each core, each with one thread; a file's tests stay together, because they share fixtures. The order of the
# files is that of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
LAUNCH := $(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help demo test trl lint clean

# What `make` does without a target: it prints the lines at the top of this file.
help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo
	$(LAUNCH) recipes/rw.py --config recipes/configs/demo_rw.yaml --train.output $(OUTPUT)/demo-rw --overwrite $(DEMO)
	$(LAUNCH) recipes/srpo.py --config recipes/configs/demo_srpo.yaml --model.name $(OUTPUT)/demo-rw/final \
		--train.output $(OUTPUT)/demo-srpo --overwrite $(DEMO)
	$(VENV)/bin/saro evaluate --models '["demo", "$(OUTPUT)/demo-rw", "$(OUTPUT)/demo-srpo"]' --names '[base, RW, SRPO]' \
		--suites demo --attacks prefill --attack_items 12 --max_tokens 160 --output $(OUTPUT)/demo-evaluation $(DEMO_EVALUATE)
	$(VENV)/bin/saro report $(OUTPUT)/demo-evaluation --runs '["$(OUTPUT)/demo-rw", "$(OUTPUT)/demo-srpo"]' --overwrite

test: $(VENV)/.test
	$(PYTEST)

# Only files that have such tests: to import all others takes as long as some of these tests.
trl: $(VENV)/.bench
	$(PYTEST) -m trl $$(grep -rl --include='test_*.py' mark.trl tests)
	$(PYTEST) tests/evaluate/test_saro_lm.py tests/evaluate/test_lm_eval.py tests/evaluate/test_export_suites.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.torch: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch setup.py pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[bench]'
	touch $@

include recipes/laptop.mk recipes/ablation.mk
