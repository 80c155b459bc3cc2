# make quickstart    the whole way in five minutes on two cores: train, attack, look, pack, load back
# make test          lint and tests (CIFAR10_ROOT=DIR adds those on real CIFAR-10)
# make test-slow     the long tests
# make bench         speed against the peers on a CPU, under ten minutes (CIFAR10_ROOT=DIR adds AutoAttack)
# Each sets up VENV first; set it from outside to keep one environment for several checkouts.

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
# PyPI's robustbench pins timm 1.0.9; the models and the bridge are tested with this one as well.
NEWEST = timm==1.0.31 huggingface-hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5
PYTEST = $(PY) -W ignore -m pytest -n 2 --dist loadfile
export OMP_NUM_THREADS = 1

.PHONY: quickstart test test-slow bench lint install

quickstart: install
	env -u OMP_NUM_THREADS $(PY) -W ignore -m hub.quickstart

test: lint
	$(PYTEST)
	PYTHONPATH=$(abspath $(VENV))/newest $(PYTEST) tests/test_models.py tests/test_model_weights.py tests/test_robustbench.py tests/test_hub.py tests/test_zoo.py tests/test_checkpoint.py tests/test_convert.py

test-slow: install
	$(PYTEST) -m slow

bench: install $(VENV)/peers
	env -u OMP_NUM_THREADS $(PY) -W ignore tests/benchmarks/bench.py --peers $(VENV)/peers --output tests/benchmarks/results/cpu.json

# Only to be compared with; it brings an old robustbench along, so it is kept apart.
$(VENV)/peers:
	$(PY) -m pip install -q --no-deps --target $@ torchattacks==3.5.1

lint: install
	$(PY) -m ruff check .
	$(PY) -m mypy

# A shared VENV holds the dependencies; the package itself is always that of this checkout.
install: $(VENV)/.installed
	@[ "$$(cat $(VENV)/.checkout)" = "$(CURDIR)" ] || { \
		$(PY) -m pip install -q --no-deps --no-build-isolation -e . && echo "$(CURDIR)" > $(VENV)/.checkout; }

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[all]'
	$(PY) -m pip install -q --no-deps --upgrade --target $(VENV)/newest $(NEWEST)
	echo "$(CURDIR)" > $(VENV)/.checkout
	touch $@
