# make demo   the main job: the notebook's tables, a character model, a short benchmark
# make test   the tests
# make quick  those of Python, the CPU kernels and the plan: what needs no compiler, under two minutes on two cores
# make bench  the benchmark on the GPU, or the CPU where there is none; BENCH="--quick" and the like are its options
#             BENCH="--layer sequence --quick": of whole sequences, in less than three minutes on two cores
# make lint   ruff, mypy --strict, clang-format
# make wheel  a wheel with CUDA kernels for every supported architecture
# All of them make .venv and build the extension in place first, in one line a file (V=1: the whole commands).
# TORCH=torch==2.11.0 picks another torch.
TORCH ?= torch==2.14.1
PYTHON ?= python3
PY := .venv/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
ARCHS := 7.5;8.0;8.6;8.9;9.0a;10.0;12.0+PTX
ONE_LINE_A_FILE = sed -uE 's|^(\[[0-9/]+\]) .* -c $(CURDIR)/([^ ]+) -o .*|\1 \2|'
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'tests/*.cuh')

.PHONY: demo test quick bench lint wheel build clean

demo: build
	PYTHONPATH=. $(PY) benchmarks/demo.py

test: build
	$(PY) -m pytest -q -n auto --dist worksteal --durations=10

quick: build
	$(PY) -m pytest -q -n auto --dist worksteal -m "not slow"

bench: build
	PYTHONPATH=. $(PY) benchmarks/bench.py $(BENCH)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

wheel: .venv/ready
	TORCH_CUDA_ARCH_LIST="$(ARCHS)" $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

build: .venv/ready
	$(PY) setup.py -q build_ext --inplace$(if $(filter 1,$(V)),, | $(ONE_LINE_A_FILE))

.venv/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --upgrade 'pip>=25.1' 'setuptools>=77' wheel
	$(PY) -m pip install -q '$(TORCH)' --group dev
	touch $@

clean:
	rm -rf .venv build dist *.egg-info rnn_ext/_C.*.so rnn_ext/_C.*.json
