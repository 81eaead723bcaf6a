# Everything here needs a Rust toolchain, Python 3.11 or later and make; the tests and the demo also need nats-server,
# which scripts/nats-server.py finds or fetches. `make verify` is what CI runs.

CARGO ?= cargo
PYTHON ?= python3
# Seeds that `make simulate` plays.
SEEDS ?= 10000
# Extra flags for `make demo`, for example ARGS=--json.
ARGS ?=

# One target directory for every command, wherever a user's own Cargo configuration would put it.
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
THALWEG = $(CARGO_TARGET_DIR)/release/thalweg
# The server the tests are written against. The demo and the benchmarks take any that is recent enough.
TEST_NATS_VERSION = 2.15.1
OLDEST_NATS_VERSION = 2.11.0
CARGO_DENY_VERSION = 0.20.2

# Recipe lines that need a server start with one of these; THALWEG_NATS_SERVER, where set, names it.
WITH_NATS = server=$$($(PYTHON) scripts/nats-server.py) && THALWEG_NATS_SERVER="$$server"
WITH_TEST_NATS = server=$$($(PYTHON) scripts/nats-server.py --version $(TEST_NATS_VERSION)) && \
	oldest=$$(env -u THALWEG_NATS_SERVER $(PYTHON) scripts/nats-server.py --version $(OLDEST_NATS_VERSION)) && \
	THALWEG_NATS_SERVER="$$server" THALWEG_OLDEST_NATS_SERVER="$$oldest"

# Where the Python package is tested; its requirements are pinned.
PYTHON_ENV = .venv
# PyTorch is the distribution's, with the distribution's Python and numpy.
TORCH_ENV = .venv-torch
SYSTEM_PYTHON ?= /usr/bin/python3
# A current one is from PyPI.
TORCH_CURRENT_ENV = .venv-torch-current
PYTHON_PACKAGE = sdk/python/python/thalweg

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

.PHONY: release
release: ## build the thalweg binary, optimised
	$(CARGO) build --release --package thalweg

.PHONY: demo
demo: release ## train a model on handwritten digits through a local cluster (ARGS=... for more flags)
	@$(WITH_NATS) "$(THALWEG)" demo $(ARGS)

# The whole-system tests start the thalweg binary, which `cargo test` by itself does not build for another package; the
# Python package loads its native module. With the features of the tests, so that nothing is built twice.
.PHONY: build-tested
build-tested:
	$(CARGO) build --workspace --features thalweg/failpoints

.PHONY: test
test: build-tested ## run all tests, with fail points, against nats-server 2.15.1 (and the model of it also against 2.11.0)
	@if $(CARGO) nextest --version >/dev/null 2>&1; then set -- nextest run; else set -- test --tests; fi; \
	echo "$(CARGO) $$* --workspace --features thalweg/failpoints"; \
	$(WITH_TEST_NATS) $(CARGO) "$$@" --workspace --features thalweg/failpoints
	$(CARGO) test --workspace --features thalweg/failpoints,thalweg/kubernetes --test kubernetes
	$(CARGO) test --doc --workspace --features thalweg/failpoints
	$(MAKE) test-python

.PHONY: deps
deps: ## install what comes from the distribution (Debian, as root): PyTorch with OpenBLAS (ten times faster), Prometheus
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends python3-torch python3-venv \
		libopenblas0-pthread prometheus

$(PYTHON_ENV)/.made: PYTHON_OF_ENV = $(PYTHON)
$(PYTHON_ENV)/.made: sdk/python/requirements.txt
$(TORCH_CURRENT_ENV)/.made: PYTHON_OF_ENV = $(PYTHON)
$(TORCH_CURRENT_ENV)/.made: sdk/python/requirements-torch-current.txt
$(TORCH_ENV)/.made: PYTHON_OF_ENV = $(SYSTEM_PYTHON)
$(TORCH_ENV)/.made: VENV_FLAGS = --system-site-packages
$(TORCH_ENV)/.made: sdk/python/requirements-torch.txt
# An environment with its pinned requirements, which finds the package where its sources are.
%/.made:
	$(PYTHON_OF_ENV) -m venv $(VENV_FLAGS) $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	echo "$(CURDIR)/sdk/python/python" > "$$($*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/thalweg.pth"
	touch $@

# The package's sources as they are, with what was just built beside them.
.PHONY: python
python: build-tested $(PYTHON_ENV)/.made ## build the Python package into the environment .venv
	install -D $(CARGO_TARGET_DIR)/debug/libthalweg_python.so $(PYTHON_PACKAGE)/_native.abi3.so
	mkdir -p $(PYTHON_PACKAGE)/bin
	ln -sf $(CARGO_TARGET_DIR)/debug/thalweg $(PYTHON_PACKAGE)/bin/thalweg

.PHONY: test-python
test-python: python ## run the Python package's tests, and check its types and stubs
	cd sdk/python && ../../$(PYTHON_ENV)/bin/mypy python/thalweg
	cd sdk/python/python && MYPYPATH=. ../../../$(PYTHON_ENV)/bin/python -m mypy.stubtest thalweg._native \
		--mypy-config-file ../pyproject.toml
	$(WITH_TEST_NATS) env -C sdk/python ../../$(PYTHON_ENV)/bin/python -m pytest --ignore tests/test_torch.py
	$(WITH_TEST_NATS) $(PYTHON_ENV)/bin/python -m pytest -rs deploy/kubernetes deploy/compose/test_rules.py \
		deploy/compose/test_metrics.py
	@if $(SYSTEM_PYTHON) -c 'import torch' 2>/dev/null; then $(MAKE) test-torch; else \
	echo "SKIPPED: the tests of thalweg.torch, because $(SYSTEM_PYTHON) has no torch (make deps)"; \
	test -z "$(REQUIRE_TORCH)"; fi

.PHONY: test-torch
test-torch: $(TORCH_ENV)/.made
	$(WITH_TEST_NATS) env -C sdk/python ../../$(TORCH_ENV)/bin/python -m pytest tests/test_torch.py tests/test_rounds.py \
		--deselect tests/test_rounds.py::test_bfloat16_goes_in_and_out

# A download of 3 GB: not part of `make test`.
.PHONY: test-torch-current
test-torch-current: python $(TORCH_CURRENT_ENV)/.made ## run the tests of thalweg.torch with a current PyTorch from PyPI (a download of 3 GB)
	$(WITH_TEST_NATS) env -C sdk/python ../../$(TORCH_CURRENT_ENV)/bin/python -m pytest tests/test_torch.py tests/test_rounds.py

# Takes minutes, most of it for the image. CI sets REQUIRE_DOCKER where it has found an engine.
.PHONY: test-compose
test-compose: $(PYTHON_ENV)/.made ## run docker-compose.yml for real: up, trains, what dies, what is lost (needs a Docker Engine)
	@if docker version >/dev/null 2>&1 && command -v docker-compose >/dev/null; then \
	echo "pytest deploy/compose"; $(PYTHON_ENV)/bin/python -m pytest -rs -s deploy/compose/test_compose.py; else \
	echo "SKIPPED: what needs a Docker Engine and docker-compose of the tests of docker-compose.yml"; \
	test -z "$(REQUIRE_DOCKER)" && $(PYTHON_ENV)/bin/python -m pytest -rs deploy/compose/test_compose.py; fi

# Not in CI: in a virtual machine that has to wait for its host, the kernel may let a thread run for longer.
.PHONY: test-cgroup
test-cgroup: ## run the test of CPU quotas by cgroups in a virtual machine (Debian: qemu-system-x86 busybox-static cpio)
	$(PYTHON) scripts/cgroup-vm.py

.PHONY: image
image: ## build the container image thalweg:VERSION (ARGS=... for docker build, such as --build-arg FEATURES=kubernetes)
	docker build --tag thalweg:$(VERSION) --build-arg VERSION=$(VERSION) \
		--build-arg COMMIT="$$(git rev-parse --short=12 HEAD 2>/dev/null)" \
		--build-arg SOURCE="$$(git remote get-url origin 2>/dev/null | grep '^https://')" $(ARGS) .

# Optimised, and with the binary in it; what `pip install` takes.
.PHONY: wheel
wheel: release $(PYTHON_ENV)/.made ## build the wheel of the Python package into target/wheels
	rm -f $(PYTHON_PACKAGE)/_native.abi3.so $(PYTHON_PACKAGE)/bin/thalweg
	rm -f $(CARGO_TARGET_DIR)/wheels/thalweg-*.whl
	install -D --strip $(THALWEG) $(PYTHON_PACKAGE)/bin/thalweg
	cd sdk/python && ../../$(PYTHON_ENV)/bin/maturin build --release --strip --out $(CARGO_TARGET_DIR)/wheels

.PHONY: verify
verify: cargo-deny ## everything CI checks: lock file, format, lints, tests, docs, dependencies
	$(CARGO) metadata --locked --format-version 1 >/dev/null
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --package thalweg-autoscaler --package thalweg --features thalweg/kubernetes --all-targets -- -D warnings
	$(MAKE) test
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps
	$(CARGO) deny check bans licenses sources

# Asked first, so that a missing tool does not show at the end of a long run.
.PHONY: cargo-deny
cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || { \
	echo "cargo-deny is missing: cargo install cargo-deny --locked --version $(CARGO_DENY_VERSION)" >&2; exit 1; }

.PHONY: simulate
simulate: ## play SEEDS seeds of the simulation (default 10000)
	$(CARGO) run --release --package thalweg-simulation -- --seeds $(SEEDS)

.PHONY: bench
bench: release ## measure all-reduce against raw NATS, the store, a round of 10,000, joining, snapshots and idle jobs
	@$(WITH_NATS) "$(THALWEG)" bench allreduce --workers 4 --mib 64 --rounds 20 --vs raw --json
	@$(WITH_NATS) "$(THALWEG)" bench store --json
	@$(WITH_NATS) "$(THALWEG)" bench contributors --json
	@$(WITH_NATS) "$(THALWEG)" bench service --snapshot-mib 256 --json

# With the wheel as a user installs it: an environment of its own.
.PHONY: bench-python
bench-python: wheel ## measure what Python adds to a round of 64 MiB (ARGS=... for more flags)
	$(CARGO) build --release --package thalweg-sdk --example rounds
	$(PYTHON) -m venv --clear $(CARGO_TARGET_DIR)/bench-python
	$(CARGO_TARGET_DIR)/bench-python/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint sdk/python/requirements.txt $(CARGO_TARGET_DIR)/wheels/thalweg-*.whl
	@$(WITH_NATS) $(CARGO_TARGET_DIR)/bench-python/bin/python sdk/python/benchmarks/overhead.py \
		--rust $(CARGO_TARGET_DIR)/release/examples/rounds $(ARGS)

.PHONY: diloco
diloco: python $(TORCH_ENV)/.made ## compare DiLoCo with synchronous training, which takes an hour (ARGS=... for less)
	@$(WITH_NATS) $(PYTHON_ENV)/bin/python sdk/python/benchmarks/diloco.py --python $(TORCH_ENV)/bin/python \
		--plot $(CARGO_TARGET_DIR)/diloco.png $(ARGS)

.PHONY: clean
clean: ## remove what was built (the fetched nats-server in .tools stays)
	$(CARGO) clean
