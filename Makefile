# The targets that people need: make help.

PYTHON ?= python3
PROMPT ?= Why does the moon have phases? Explain it in three short sentences.
# More arguments for 'teegpu run' or pytest, as in: make test ARGS="-k wire"
ARGS ?=
# Tests at once.
JOBS ?= 2
# Another index for PyTorch. The CPU build is much smaller: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Tests start hundreds of processes, which would compile all of teegpu anew each time where an environment says so.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run setup test test-all bench chaos fuzz lint format clean distclean

help:
	@echo "make run [PROMPT=\"...\"]   set up, fetch the default model once, and answer the prompt"
	@echo "make test [ARGS=\"...\"]    set up and run the tests"
	@echo "make test-all             these, and more of the same kind that take longer"
	@echo "make bench [MODEL=... LINKS=... REPEATS=5 MAX_SECONDS=120 OUT=bench-results]"
	@echo "                          the ladder over four links: JSON, tables and pictures; goes on where it was interrupted"
	@echo "make chaos                30 runs whose servers and links are killed, stopped and cut at any moment"
	@echo "make fuzz [FUZZ_SECONDS=600]  broken and false messages for the codec, the transports, the server, the runner"
	@echo "make setup                install everything into $(VENV), development tools included"
	@echo "make lint | format        check, or rewrite, the code's form"
	@echo "make clean | distclean    remove what tools left behind | and $(VENV) too"

# Through the environment, so that the shell does not read what the prompt says.
run: export TEXT := $(PROMPT)
run: $(VENV)/.runtime
	@$(BIN)/teegpu run "$$TEXT" $(ARGS)

setup: $(VENV)/.dev

# Those that measure times come after the others, by themselves. What fails is tried once more: who reads the first
# failure knows what to look for, and a machine that was busy is no fault. 5: none was selected, as ARGS may have it.
AGAIN := $(BIN)/python -m pytest --last-failed --last-failed-no-failures none
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone and not extra" $(ARGS) \
	  || case $$? in 1) $(AGAIN) -m "not alone and not extra" $(ARGS) ;; 5) ;; *) exit 1 ;; esac
	$(BIN)/python -m pytest -m "alone and not extra" $(ARGS) \
	  || case $$? in 1) $(AGAIN) -m "alone and not extra" $(ARGS) ;; 5) ;; *) exit 1 ;; esac

test-all: test
	$(BIN)/python -m pytest -m extra $(ARGS)

# What docs/benchmarks.md has of the ladder. A rung that takes long makes fewer repeats, and its table says how many.
bench: MODEL ?= smollm2-135m
bench: LINKS ?= loopback rtt=0.2ms,bandwidth=10gbit rtt=5ms,bandwidth=1gbit rtt=20ms,bandwidth=200mbit
bench: PROMPT_TOKENS ?= 1024
bench: DECODE_TOKENS ?= 32
bench: REPEATS ?= 5
bench: MAX_SECONDS ?= 120
bench: OUT ?= bench-results
bench: $(VENV)/.runtime
	@mkdir -p "$(OUT)" && set -- && for link in $(LINKS); do \
	  file="$(OUT)/ladder-$$(echo "$$link" | sed 's/[a-z]*=//g; s/,/-/g')"; \
	  flag="--link=$$link"; test "$$link" != loopback || flag=; \
	  echo "link $$link: $$file.json" >&2; \
	  $(BIN)/teegpu bench ladder --model "$(MODEL)" --prompt-tokens $(PROMPT_TOKENS) --decode-tokens $(DECODE_TOKENS) \
	    --repeats $(REPEATS) --max-seconds $(MAX_SECONDS) --resume --out "$$file.json" $$flag $(ARGS) || exit; \
	  set -- "$$@" "--from=$$file.json"; \
	done && \
	$(BIN)/teegpu bench ladder "$$@" --out "$(OUT)/ladder.md" --plot "$(OUT)/ladder-prefill.svg" && \
	if test "$(DECODE_TOKENS)" != 0; then \
	  $(BIN)/teegpu bench ladder "$$@" --out "$(OUT)/ladder.md" --plot "$(OUT)/ladder-decode.svg" --phase decode; \
	fi

chaos: export CHAOS_RUNS ?= 30
chaos: export CHAOS_STOP_SECONDS ?= 3
chaos: $(VENV)/.dev
	$(BIN)/python -m pytest -v tests/test_chaos.py $(ARGS)

# atheris follows coverage; it has packages for few versions of Python, and fuzzing goes on without it.
fuzz: FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	  $(PIP) install -q -c constraints.txt --only-binary atheris -e '.[fuzz]' || \
	  echo "atheris can't be installed for $$($(BIN)/python --version): going on without it" >&2
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each step is marked when it is done: an interrupted one is done again, a finished one is not.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no '$(PYTHON)'. On Debian: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "teegpu needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) can't make virtual environments. On Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.made pyproject.toml constraints.txt
	@$(BIN)/python -c 'import torch' 2>/dev/null || test -n "$(TORCH_INDEX)" || test -e /dev/nvidia0 || \
	  echo "No NVIDIA device here: 'make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu' downloads less." >&2
	$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find teegpu transports tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
