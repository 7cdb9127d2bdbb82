#!/bin/bash
# All tests of the project: scripts/test.sh quick|full. Says what runs, ends at the first part that fails.
# quick: sized for two cores and eight minutes after the build. full: the same tests, longer and larger.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    quick) unset VOLD_TEST_FULL ;;
    full) export VOLD_TEST_FULL=1 ;;
    *) echo "usage: scripts/test.sh quick|full" >&2; exit 2 ;;
esac

part() { printf '\n== [%d s] %s\n' "$SECONDS" "$*"; }

part "format (cargo fmt --check)"
cargo fmt --all -- --check

part "lints (cargo clippy, warnings are errors)"
cargo clippy --workspace --all-targets --locked --quiet -- -D warnings

# Unit, property and end-to-end tests in one go: the scheduler fills both cores. End-to-end tests start real daemons and
# clients, two at a time.
if cargo nextest --version >/dev/null 2>&1; then
    part "unit, property and end-to-end tests, $1 (cargo nextest)"
    cargo nextest run --workspace --locked --no-fail-fast --test-threads "${VOLD_TEST_THREADS:-2}"
else
    part "unit, property and end-to-end tests, $1 (cargo test; cargo-nextest would be faster)"
    cargo test --workspace --locked --no-fail-fast --all-targets -- --test-threads "${VOLD_TEST_THREADS:-2}"
fi

part "documentation examples (cargo test --doc)"
cargo test --workspace --locked --doc --quiet

part "all tests passed"
