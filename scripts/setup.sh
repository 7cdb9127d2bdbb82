#!/bin/bash
# Installs what the build and the tests need from Debian or Ubuntu, only what is missing, and says so.
# Works as root or with sudo. Rust (cargo) itself is expected to be there.
set -euo pipefail
cd "$(dirname "$0")/.."

# command:package. Build tools first (aws-lc needs a C compiler), then the programs that tests, demo and benchmarks use
# (tests/src/tools.rs looks packages up here, for its messages).
needed=(
    gcc:gcc make:make pkg-config:pkg-config
    fio:fio nbdinfo:libnbd-bin nbdcopy:libnbd-bin nbdkit:nbdkit
    qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils qemu-storage-daemon:qemu-utils
    mke2fs:e2fsprogs e2fsck:e2fsprogs resize2fs:e2fsprogs blkid:util-linux
    # Virtual machines, and what vm-images/build.sh makes them of (the kernel itself it fetches, and does not install).
    qemu-system-x86_64:qemu-system-x86 busybox:busybox-static nbd-client:nbd-client tar:tar dpkg-deb:dpkg xz:xz-utils zstd:zstd
    losetup:mount mount:mount umount:mount fsfreeze:util-linux setpriv:util-linux prlimit:util-linux cmp:diffutils jq:jq getconf:libc-bin
)

# Debian's PATH of ordinary users leaves these out, and mke2fs and losetup are there.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

command -v cargo >/dev/null || fail "cargo is not installed; install Rust first: https://rustup.rs"
rust_needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rust_there=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$rust_needed" "${rust_there%%-*}" | sort -V | sed -n 1p)" != "$rust_needed" ]; then
    fail "Rust $rust_there is older than the $rust_needed that is needed; run: rustup update stable"
fi
cargo fmt --version >/dev/null 2>&1 || fail "rustfmt is not installed; run: rustup component add rustfmt"
cargo clippy --version >/dev/null 2>&1 || fail "clippy is not installed; run: rustup component add clippy"

missing_commands=()
missing_packages=()
find_missing() {
    missing_commands=() missing_packages=()
    local entry command package
    for entry in "${needed[@]}"; do
        command=${entry%%:*} package=${entry#*:}
        command -v "$command" >/dev/null && continue
        missing_commands+=("$command")
        [[ " ${missing_packages[*]} " == *" $package "* ]] || missing_packages+=("$package")
    done
    # No libc headers, no C programs: gcc alone only recommends them.
    if ! [ -e /usr/include/stdlib.h ]; then missing_packages+=(libc6-dev); fi
}

# Distributions may build fio without it.
check_fio() {
    grep -qw nbd <<<"$(fio --enghelp)" || fail "this fio ($(command -v fio)) has no nbd engine; install the distribution's: apt-get install fio"
}

find_missing
if [ ${#missing_packages[@]} -eq 0 ]; then
    check_fio
    say "everything needed is installed"
    exit 0
fi
say "missing: ${missing_commands[*]:-libc headers}; installing ${missing_packages[*]}"

command -v apt-get >/dev/null || fail "no apt-get here; install these yourself: ${missing_commands[*]}"
if [ "$(id -u)" -eq 0 ]; then
    as_root=(env)
elif command -v sudo >/dev/null; then
    as_root=(sudo)
else
    fail "run as root, or install sudo: apt-get install ${missing_packages[*]}"
fi

# Where another part of QEMU came from backports, Debian's own does not fit it: versions must be equal.
from_suite=()
if [[ " ${missing_packages[*]} " == *" qemu-"* ]]; then
    backport=$(dpkg-query --show --showformat '${Version}\n' 'qemu-*' 2>/dev/null | grep -o 'bpo[0-9]*' | sed -n 1p || true)
    if [ -n "$backport" ]; then
        suite=$(. /etc/os-release && echo "$VERSION_CODENAME-backports")
        from_suite=(--target-release "$suite")
        if ! grep -q "a=[a-z-]*backports\|n=$suite" <<<"$(apt-cache policy)"; then
            say "the installed QEMU is a backport: adding the suite $suite"
            echo "deb http://deb.debian.org/debian $suite main" \
                | "${as_root[@]}" tee "/etc/apt/sources.list.d/vold-$suite.list" >/dev/null
        fi
    fi
fi

export DEBIAN_FRONTEND=noninteractive
# A third party's list that cannot be fetched must not stop an installation from the distribution's.
"${as_root[@]}" apt-get update -qq || say "some package lists could not be updated; going on with what is there"
qemu=() others=()
for package in "${missing_packages[@]}"; do
    if [[ $package == qemu-* ]]; then qemu+=("$package"); else others+=("$package"); fi
done
install=("${as_root[@]}" apt-get install -y -qq --no-install-recommends)
[ ${#qemu[@]} -eq 0 ] || "${install[@]}" "${from_suite[@]}" "${qemu[@]}"
[ ${#others[@]} -eq 0 ] || "${install[@]}" "${others[@]}"

find_missing
[ ${#missing_commands[@]} -eq 0 ] || fail "still missing after the installation: ${missing_commands[*]}"
check_fio
say "done"
