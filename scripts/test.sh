#!/bin/bash
# All tests of the project: scripts/test.sh quick|full. Says what runs, ends at the first part that fails.
# quick: sized for two cores and eight minutes after the build. full: the same tests, longer and larger.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    quick)
        unset VOLD_TEST_FULL
        nextest=() libtest=()
        ;;
    full)
        export VOLD_TEST_FULL=1
        # Seeds of the simulated power cuts: of volumes FROM..TO, of stores how many.
        export VOLD_SEEDS="${VOLD_SEEDS:-1000..1600}" VOLD_STORE_SEEDS="${VOLD_STORE_SEEDS:-400}"
        nextest=(--profile full --run-ignored all) libtest=(--include-ignored)
        ;;
    *) echo "usage: scripts/test.sh quick|full" >&2; exit 2 ;;
esac

part() { printf '\n== [%d s] %s\n' "$SECONDS" "$*"; }

part "format (cargo fmt --check)"
cargo fmt --all -- --check

part "lints (cargo clippy, warnings are errors)"
cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
# What the fuzz targets are made of, as they get it; the targets themselves are a line each (make fuzz builds them).
cargo clippy --package vold --lib --features fuzzing --locked --quiet -- -D warnings

part "virtual machines for the tests, from distribution packages (vm-images/build.sh)"
vm-images/build.sh guest
[ "$1" = quick ] || vm-images/build.sh disk

# Unit, property and end-to-end tests in one go: the scheduler fills both cores. End-to-end tests start real daemons and
# clients, two at a time.
if cargo nextest --version >/dev/null 2>&1; then
    part "unit, property and end-to-end tests, $1 (cargo nextest)"
    cargo nextest run --workspace --locked --no-fail-fast --test-threads "${VOLD_TEST_THREADS:-2}" "${nextest[@]}"
else
    part "unit, property and end-to-end tests, $1 (cargo test; cargo-nextest would be faster)"
    cargo test --workspace --locked --no-fail-fast --all-targets -- --test-threads "${VOLD_TEST_THREADS:-2}" "${libtest[@]}"
fi

# A build of its own: nothing else may contain the switches.
part "broken rules are noticed by the simulated world (feature sabotage)"
cargo test --package vold-tests --locked --features sabotage --test sabotage --quiet

part "documentation examples (cargo test --doc)"
cargo test --workspace --locked --doc --quiet

# A test holds licences and sources to deny.toml in any case; cargo-deny, where it is, also knows of duplicates.
if cargo deny --version >/dev/null 2>&1; then
    part "licences, sources, duplicates (cargo deny)"
    cargo deny --locked check bans licenses sources
fi

printf '\n== all tests passed in %d seconds\n' "$SECONDS"
