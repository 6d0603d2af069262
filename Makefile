# Two commands for everyone: `make demo` and `make test`. Both set up .venv with everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format fuzz tsan clean

$(BIN)/python:
	@echo "== Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: yivl-edge needs Python 3.10 or newer, found $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "error: no C++ compiler; on Debian: apt install g++"; exit 1; }
