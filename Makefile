# make quickstart    the whole way in a few minutes on two cores: train, attack, look, pack, load back
# make test          lint and tests (CIFAR10_ROOT=DIR adds those on real CIFAR-10)
# make test-slow     the long tests
# make timm-tests    timm's own model tests with our names, for both versions of timm; about ten minutes
# make torture       200 kills, 2,000 flipped bits, hostile files, full disks: what was lost; an hour at most
# make bench         speed against the peers on a CPU, ten minutes or more (CIFAR10_ROOT=DIR adds AutoAttack)
# Each sets up VENV first; set it from outside to keep one environment for several checkouts.

VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
# PyPI's robustbench pins timm 1.0.9; the models and the bridge are tested with this one as well.
NEWEST = timm==1.0.31 huggingface-hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5
# what timm and huggingface_hub have a part in
NEWEST_TESTS = tests/models tests/weights tests/data/test_folders.py $(addprefix tests/test_,attacks.py convert.py converted_runs.py recognise.py robustbench.py) \
	$(addprefix tests/hub/test_,hub.py card.py upload.py)
PYTEST = OMP_NUM_THREADS=1 $(PY) -W ignore -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-slow timm-tests torture bench lint install

quickstart: install
	@$(PY) -W ignore -m hub.quickstart

test: lint
	$(PYTEST)
	PYTHONPATH=$(abspath $(VENV))/newest $(PYTEST) $(NEWEST_TESTS)

test-slow: install
	$(PYTEST) -m slow

torture: install
	PYTHONPATH=. $(PY) -W ignore tests/torture.py --output tests/benchmarks/results/torture.json

# timm's tests are in its sdists; tests/timm_tests.py puts our names into them.
TIMM_TESTS = $(foreach timm,$(shell grep -h ^timm== constraints.txt) $(filter timm==%,$(NEWEST)),$(VENV)/tests-of-$(timm))

timm-tests: $(TIMM_TESTS)
	for tests in $(TIMM_TESTS); do \
		case $$tests in *$(firstword $(NEWEST))) newest=:$(abspath $(VENV))/newest;; *) newest=;; esac; \
		PYTHONPATH=tests$$newest $(PY) -W ignore -m pytest -q -rs -p timm_tests -p no:cacheprovider \
			-c /dev/null --rootdir $$tests $$tests/tests/test_models.py || exit; \
	done

$(VENV)/tests-of-%: | install
	$(PY) -m pip download -q --no-deps --no-binary timm --dest $@.sdist $*
	mkdir -p $@.part && tar xzf $@.sdist/*.tar.gz -C $@.part --strip-components=1 --wildcards '*/tests'
	mv $@.part $@

bench: install $(VENV)/peers
	$(PY) -W ignore tests/benchmarks/bench.py --peers $(VENV)/peers --output tests/benchmarks/results/cpu.json

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
	@echo 'installs PyTorch with CUDA and the other packages of constraints.txt into $(VENV): several GB to download,'
	@echo '6.2 GB on the disk, some minutes'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --no-deps --upgrade --target $(VENV)/newest $(NEWEST)
	echo "$(CURDIR)" > $(VENV)/.checkout
	touch $@
