# Every target installs what it needs, also on a bare Debian machine; see scripts/setup.

PYTHON_BIN = .venv/bin
PYTEST_ARGS ?=
PICTURES ?=
QEMU_TESTS = tests/contract $(addprefix tests/real/test_,health_words.py api_real.py agent_target.py doctor.py)
BENCH_ARGS ?=
SOAK_ARGS ?=

# Without compiled bytecode the checks take a third longer, and each start of the agent 0.1 s more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-python test-qemu test-ha test-machines check docs deb test-install bench bench-compare bench-fleet bench-libvirt bench-policy soak stress clean
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: ## real guests, a real broker and the agent on this machine; cleans up after itself
	@scripts/setup run lab
	@$(PYTHON_BIN)/qmpballoon demo

test: check ## everything that check does, then scenarios, real guests and a real broker; PYTEST_ARGS="-k name"
	@scripts/setup dev lab
	$(PYTHON_BIN)/pytest -n 3 --dist worksteal tests --ignore=tests/unit --ignore=tests/property $(PYTEST_ARGS)

test-python: ## unit and property tests under Python 3.11 to 3.14, as far as they are installed
	@scripts/test-python

test-qemu: ## contract, health, API and targets with QEMU 5.2, 10.0 and 11.1, which scripts/fetch-qemu downloads
	@scripts/setup dev lab
	@set -e; directories=$$(scripts/fetch-qemu all); for bin in $$directories; do \
	    $$bin/qemu-system-x86_64 --version | sed -n 1p; \
	    PATH=$$bin:$$PATH QMPBALLOON_CACHE=$${bin%/bin}/lab \
	        $(PYTHON_BIN)/pytest -n 3 --dist worksteal $(QEMU_TESTS) $(PYTEST_ARGS); \
	done

test-ha: ## Home Assistant itself, in an environment of its own, a real broker and guest; ten minutes at first; PICTURES=docs
	@scripts/setup dev lab
	@set -e; python=$$(scripts/home-assistant); \
	    QMPBALLOON_HOME_ASSISTANT=$$python QMPBALLOON_PICTURES=$(PICTURES) $(PYTHON_BIN)/pytest tests/ha $(PYTEST_ARGS)

test-machines: ## guests of aarch64 and s390x, whose kernels and QEMUs are downloaded at first; half a minute
	@scripts/setup dev lab
	@directories=$$(scripts/fetch-guest aarch64 s390x) && \
	    QMPBALLOON_GUESTS="$$directories" $(PYTHON_BIN)/pytest tests/real/test_machines.py $(PYTEST_ARGS)

check: ## lint, types, unit and property tests: under 30 s, no guests
	@scripts/setup dev
	$(PYTHON_BIN)/ruff check
	$(PYTHON_BIN)/ruff format --check
	$(PYTHON_BIN)/mypy
	$(PYTHON_BIN)/pytest -n 3 --dist worksteal tests/unit tests/property

docs: ## build/site: the documents as a site; a link that leads nowhere is an error
	@scripts/setup docs
	$(PYTHON_BIN)/sphinx-build --fail-on-warning --keep-going -E -q docs build/site

deb: ## build/qmpballoon_VERSION_all.deb, for Debian 12 and 13 on every machine
	@scripts/setup run
	@scripts/make-deb

test-install: ## package and README's lines in bare Debian 12 and 13 roots, by chroot, as root; five minutes
	@scripts/setup run
	@scripts/test-install

bench: ## the agent with 10 to 1000 VMs, five minutes; BENCH_ARGS="--json", "--only sizes --vms 100", "--quick"
	@scripts/setup dev lab
	@$(PYTHON_BIN)/python scripts/bench.py $(BENCH_ARGS)

bench-compare: ## this tree and another commit in turns, four minutes; BASE=main BENCH_ARGS="--vms 100"
	@: $(or $(BASE),$(error BASE=<commit> is missing))
	@scripts/setup dev lab
	@$(PYTHON_BIN)/python scripts/bench_compare.py $(BENCH_ARGS) -- $(BASE)

bench-libvirt: ## the agent and libvirt poll the same real guests in turns; needs libvirt-daemon
	@scripts/setup dev lab
	@$(PYTHON_BIN)/python scripts/bench_libvirt.py $(BENCH_ARGS)

bench-fleet: ## one broker with 200 pretended agents and 4,000 VMs, three minutes; BENCH_ARGS="--hosts 20"
	@scripts/setup dev lab
	@$(PYTHON_BIN)/python scripts/bench_fleet.py $(BENCH_ARGS)

bench-policy: ## every policy on eight real guests, 25 minutes; BENCH_ARGS="--rate 40 --policies fairshare"
	@scripts/setup run lab
	@$(PYTHON_BIN)/python scripts/bench_policy.py $(BENCH_ARGS)

soak: ## ten minutes of faults at random around 200 simulated and 4 real VMs; SOAK_ARGS="--minutes 60 --seed 7"
	@scripts/setup run lab
	@$(PYTHON_BIN)/python scripts/soak.py $(SOAK_ARGS)

stress: ## 200 requests a second for a minute, and a flood of one VM beside others; STRESS_ARGS="--seconds 10"
	@$(PYTHON_BIN)/python scripts/stress.py $(STRESS_ARGS)

clean: ## remove .venv and the files of tools; the guest image stays in its cache
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
