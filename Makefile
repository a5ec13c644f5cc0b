# make serve   the server in the foreground with the bundled model; flags go in ARGS="--num-gpus 4 --port 30010"
# make test    all tests; a choice of them goes in ARGS="tests/lora -k merge"
# make quick   the tests that start neither a server nor a gang of ranks
# make fuzz    thousands of requests that nobody thought of, new ones each time
# make lint    ruff and mypy
# make chaos   200 jobs from 16 clients while processes of the server are killed, ten times over

PYTHON ?= python3
ARGS ?=
# All tests run in two workers, which is what two cores can take; a choice of them (ARGS) in one, unless it says more.
WORKERS ?= $(if $(ARGS),0,2)
DISTRIBUTION := --dist loadscope --no-loadscope-reorder
CONSTRAINTS := .ci/constraints.txt
LITELLM_CONSTRAINTS := .ci/constraints-litellm.txt

.PHONY: serve test quick coverage fuzz chaos lint clean
.DELETE_ON_ERROR:

serve: .venv/installed
	.venv/bin/ditserve serve $(ARGS)

# Ray would else ask for a token that it writes into the home folder, and diffusers for models on the internet.
test quick coverage: export RAY_AUTH_MODE := disabled
test quick coverage: export RAY_USAGE_STATS_ENABLED := 0
test quick coverage: export HF_HUB_OFFLINE := 1
# Ray gives its workers little of a core that others want, here the tests: servers would wait for what tests them. And it
# starts some in reserve.
test quick coverage: export RAY_worker_niceness := 0
test quick coverage: export RAY_prestart_worker_first_driver := 0
# Serve kills a proxy that is not ready after 5 s, and a server's start with it: beside another one's start, it may not be.
test quick coverage: export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S := 60
# Servers and ranks of several tests share the cores: threads that wait must not spin, and for tiny models one is best.
test quick coverage: export OMP_WAIT_POLICY := PASSIVE
test quick coverage: export OMP_NUM_THREADS := 1
test: .venv/installed .venv-litellm/installed
	.venv/bin/python -m pytest --numprocesses $(WORKERS) $(DISTRIBUTION) $(ARGS)

quick: .venv/installed
	.venv/bin/python -m pytest -m "not processes" --numprocesses 2 $(DISTRIBUTION) $(ARGS)

# Which lines and branches the tests execute, in all their processes. Takes twice as long as the tests.
coverage: .venv/installed .venv-litellm/installed
	.venv/bin/python -m benchmarks.coverage_of_tests --numprocesses $(WORKERS) $(DISTRIBUTION) $(ARGS)

chaos: .venv/installed
	.venv/bin/python -m benchmarks.chaos $(ARGS)

fuzz: .venv/installed
	.venv/bin/python -m pytest --hypothesis-profile=fuzz tests/deployments/api/test_fuzzing.py $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-litellm

pinned = $(shell grep '^$(1)==' $(2))

# setuptools warns of folders that have the packages' names, which are the packages themselves: no warnings of Python's.
# torch comes first and by its exact version: that alone lets pip take a CPU build where one is offered, in place of
# gigabytes of CUDA. The build backend is then in place too (torch requires setuptools), at its pinned version.
.venv/installed: pyproject.toml $(CONSTRAINTS)
	rm -rf .venv
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(call pinned,pip,$(CONSTRAINTS))
	.venv/bin/pip install --quiet --constraint $(CONSTRAINTS) $(call pinned,torch,$(CONSTRAINTS))
	PYTHONWARNINGS=ignore .venv/bin/pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test]'
	touch $@

# LiteLLM is the second client that the end-to-end tests talk with. It needs openai 2 where .venv has 3.
.venv-litellm/installed: $(LITELLM_CONSTRAINTS)
	rm -rf .venv-litellm
	$(PYTHON) -m venv .venv-litellm
	.venv-litellm/bin/pip install --quiet $(call pinned,pip,$<)
	.venv-litellm/bin/pip install --quiet --constraint $< litellm
	touch $@
