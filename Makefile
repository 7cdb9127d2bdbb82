# Everything a checkout needs: make help. Each target calls cargo and small scripts, installs what it needs from the
# distribution and says what it does.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

SAY := printf '\n== %s\n'

.PHONY: help as-root setup build demo test test-full soak fuzz bench bench-recovery fmt clippy

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Install missing Debian or Ubuntu packages (build tools and the clients that tests use)
	@scripts/setup.sh

build: setup ## Build vold, volctl and the tests
	@$(SAY) "building (cargo build --workspace)"
	cargo build --workspace --locked

demo: build ## Show the main job on real data, end to end, in under two minutes
	@scripts/demo.sh target/debug

# Before the build, so that nobody waits for it in vain.
as-root:
	@[ "$$(id -u)" -eq 0 ] || { echo 'the tests need root (loop devices, mounts, other users'"'"' ids); run: sudo env "PATH=$$PATH" make $(MAKECMDGOALS)' >&2; exit 1; }

test: as-root build ## Format, lints, unit, property and end-to-end tests, as root; within 8 minutes after the build
	@scripts/test.sh quick

test-full: as-root build ## The same tests, longer and larger, as root
	@scripts/test.sh full

soak: setup ## Crash simulation until stopped; SOAK="--from 1000 --crash-points 1000000" passes options
	@$(SAY) "building with optimisation (cargo build --release)"
	cargo build --release --locked --package vold-tests --bin soak
	target/release/soak $(SOAK)

fuzz: setup ## Fuzz NBD and API, five minutes a target; FUZZ="--minutes 30 --target handshake" passes options
	@$(SAY) "fuzzing, each target after the other (scripts/fuzz.sh)"
	@scripts/fuzz.sh $(FUZZ)

bench: setup ## Compare with qemu-storage-daemon in one run; BENCH="--rounds 5 --only randread" passes options
	@$(SAY) "building with optimisation (cargo build --release)"
	cargo build --release --locked --bin vold --bin volctl --bin compare
	target/release/compare $(BENCH)

bench-recovery: setup ## First I/O after a crash, and how fast all marked extents are reconciled
	@$(SAY) "building with optimisation (cargo build --release)"
	cargo build --release --locked --bin vold --bin volctl --bin recovery
	target/release/recovery $(BENCH)

fmt: ## Format the sources
	cargo fmt --all

clippy: ## Lints, as make test runs them
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --package vold --lib --features fuzzing --locked -- -D warnings
