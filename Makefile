# Two commands: `make bench` (the embedded default run) and `make test` (checks and tests). Both create .venv from
# requirements.txt once and reuse it as long as that file is unchanged.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
RUN     = $(VENV)/bin/python
READY   = $(VENV)/.ready-$(shell cksum < requirements.txt | cut -d' ' -f1)
# One thread per test worker, and idle ones asleep: two workers then share two cores without getting in each
# other's way.
TESTENV = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false WANDB_MODE=offline HF_HUB_OFFLINE=1
WORKERS ?= 2

.PHONY: bench test quick check environment clean

bench: environment ## SACPO on the embedded benchmark: table, record, picture
	$(RUN) main.py $(ARGS)

test: check ## style, types and every test
	$(TESTENV) $(RUN) -m pytest -n $(WORKERS) --dist loadfile

quick: check ## without the slow tests
	$(TESTENV) $(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

check: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

environment: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	@rm -f $(VENV)/.ready-*
	@touch $@

clean: ## forget the environment; outputs/ and store/ stay
	rm -rf $(VENV)
