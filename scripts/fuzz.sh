#!/bin/bash
# make fuzz: scripts/fuzz.sh [--minutes N] [--target handshake|transmission|tls|api|virtqueue]. Runs the fuzz targets of tests/fuzz one
# after the other, by default all of them for five minutes each, and says what they have done. What a run has learnt stays in
# target/fuzz/corpus for the next one. A target that finds something ends the run with the input's place.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { echo "usage: scripts/fuzz.sh [--minutes N] [--target handshake|transmission|tls|api|virtqueue]" >&2; exit 2; }
minutes=5 targets=(handshake transmission tls api virtqueue)
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || usage; minutes=$2; shift 2 ;;
        --target) [[ " ${targets[*]} " == *" ${2:-} "* ]] || usage; targets=("$2"); shift 2 ;;
        *) usage ;;
    esac
done

say() { printf 'fuzz: %s\n' "$*"; }
if ! cargo fuzz --version >/dev/null 2>&1; then
    say "cargo-fuzz is not installed; installing it (cargo install cargo-fuzz)"
    cargo install cargo-fuzz --locked
fi

# Sanitizer and coverage are switches of the compiler that a stable one takes only when told so.
export RUSTC_BOOTSTRAP=1
options=(--fuzz-dir tests/fuzz --target-dir target/fuzz)
if ! ls "$(rustc --print target-libdir)"/librustc-*_rt.asan.a >/dev/null 2>&1; then
    say "this toolchain has no AddressSanitizer; running without, with assertions and overflow checks"
    options+=(--sanitizer none)
fi
say "building (cargo fuzz build)"
cargo fuzz build "${options[@]}"

# Memory is freed soon, so that it does not need to be had anew each time; leaks are counted by the targets themselves, in
# tasks and devices, and the API's threads make the sanitizer look for them after each input.
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8:malloc_context_size=4
status=0
for target in "${targets[@]}"; do
    corpus=target/fuzz/corpus/$target log=target/fuzz/$target.log
    mkdir -p "$corpus"
    say "$target for $minutes min; the log is $log"
    nice cargo fuzz run "${options[@]}" "$target" "$corpus" "tests/fuzz/seeds/$target" -- \
        -max_total_time=$((minutes * 60)) -rss_limit_mb=1024 -timeout=60 -detect_leaks=0 >"$log" 2>&1 || status=1
    counters=$(sed -n 's/.*modules *(\([0-9]*\) inline.*/\1/p' "$log" | sed -n 1p)
    last=$(grep -a 'DONE *cov:' "$log" | tail -n 1 || true)
    if [ "$status" -ne 0 ]; then
        grep -a -A 2 'panicked at\|ERROR: \|SUMMARY: ' "$log" | sed -n 1,12p >&2 || true
        say "$target has found something: $(grep -a -o 'Test unit written to .*' "$log" || echo "see $log")" >&2
        say "again: RUSTC_BOOTSTRAP=1 cargo fuzz run ${options[*]} $target THAT-FILE" >&2
        exit 1
    fi
    executions=$(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) second.*/\1 executions in \2 s/p' "$log" | tail -n 1)
    say "$target: $executions, $(sed 's/.*exec\/s: \([0-9]*\).*/\1/' <<<"$last") a second; $(sed 's/.*cov: \([0-9]*\) .*/\1/' <<<"$last") of $counters edges covered; nothing found"
done
