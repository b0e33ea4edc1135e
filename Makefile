# Everything one does with this tree. `make run` and `make test` work on a fresh Debian with a Rust toolchain.

CARGO ?= cargo
TOOLS := conf/packaging/install-tools.sh
# nginx and haproxy are in /usr/sbin, which a user's PATH may lack.
export PATH := $(PATH):/usr/sbin:/sbin

# Stories that run by both drivers: our own, and Pingora's for all exchanges.
BOTH := proxying|header|filters|retry|slow|buffer|pace|framing

# Most tests wait for a clock or for another process: two at a time for each core use it better than one.
AT_ONCE = $$(( 2 * $$(nproc) ))

.DEFAULT_GOAL := help
.PHONY: help run demo test fuzz check build quick release package package-test fmt lint doc manual bench gate clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: quick ## build a program to play with and run the demo: gateway, origin, three lines to try
	@exec $(CARGO) run --locked --profile fast --quiet -- run --demo

demo: quick ## show what one worker does for four clients, cycle by cycle, out of its own records
	@exec $(CARGO) run --locked --profile fast --quiet -- timeline

test: ## run all tests, against real servers too; installs them without starting them
	@$(TOOLS) build test
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --locked --test-threads $(AT_ONCE) && $(CARGO) test --locked --doc && \
		FOREBAY_TEST_DRIVER=pingora $(CARGO) nextest run --locked --test-threads $(AT_ONCE) --test it -E 'test(/^($(BOTH))::/)'; \
	else \
		set -x; $(CARGO) test --locked; \
	fi

fuzz: ## explore every fuzz target for ten minutes: tests/fuzz/README.md
	@$(TOOLS) build test
	FOREBAY_FUZZ_SECONDS=$${FOREBAY_FUZZ_SECONDS:-600} $(CARGO) nextest run --locked --profile fuzz

check: lint test doc ## formatting, clippy, tests and documentation: all that must hold before a commit

build: ## build target/release/forebay, with LTO
	@$(TOOLS) build
	$(CARGO) build --locked --release

# Without LTO it is built in a fraction of the time.
quick:
	@$(TOOLS) build
	@[ -x target/fast/forebay ] || echo "The first build takes several minutes; most of it is BoringSSL and crates that are built once."
	$(CARGO) build --locked --profile fast --bin forebay

release: ## build target/dist/release/forebay, with LTO and PGO: what packages hold; takes long
	@$(TOOLS) build release
	conf/packaging/release.sh

package: release ## the Debian package and the tarball of that, in target/dist
	@$(TOOLS) package
	conf/packaging/package.sh

package-test: ## install, start, upgrade and purge that package in a fresh Debian; as root
	@$(TOOLS) package-test
	conf/packaging/package-test.sh

fmt: ## format the code
	$(CARGO) fmt

lint: ## is the code formatted, and is clippy content
	@$(TOOLS) build
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --no-default-features -- -D warnings

doc: ## build the documentation; a broken link is an error
	@$(TOOLS) build
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps

manual: ## make the manual as HTML, in target/manual
	@$(TOOLS) manual
	conf/packaging/manual.py target/manual

bench: build ## compare with nginx and haproxy, one worker each; ARGS picks cells and rounds, see tests/bench/README.md
	@$(TOOLS) bench
	$(CARGO) bench --locked --profile dev --bench compare -- $(ARGS)

gate: quick ## count the instructions of an exchange under callgrind; fails where there are more than allowed
	@$(TOOLS) gate
	$(CARGO) bench --locked --profile dev --bench instructions -- $(ARGS)

clean: ## remove what was built
	$(CARGO) clean
