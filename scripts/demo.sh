#!/bin/bash
# make demo: the main job on real data, end to end. scripts/demo.sh DIRECTORY-OF-BINARIES
# Every step says in one line what it shows; a step that does not show it ends the demo with the step's name. Nothing stays
# behind.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=$(cd "${1:?usage: scripts/demo.sh DIRECTORY-OF-BINARIES}" && pwd)
PATH="$bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"
image_mib=192 volume_mib=256 store_mib=512

step_number=0 step_name="before the first step"
step() {
    step_number=$((step_number + 1)) step_name=$1
    printf '\n\033[1m%2d. %s\033[0m\n' "$step_number" "$1"
}
note() { printf '    %s\n' "$*"; }
fail() { printf '\nmake demo FAILED in step %d (%s): %s\n' "$step_number" "$step_name" "$*" >&2; exit 1; }

# Short, because Unix sockets' paths must be; not in /tmp, which may be memory without direct I/O.
work=$(mktemp -d /var/tmp/vold-demo.XXXXXX)
chmod 711 "$work"
data=$work/d
export VOLD_API="unix:$data/api.sock"
vold_pid=

finish() {
    local status=$?
    if [ -n "$vold_pid" ] && kill -0 "$vold_pid" 2>/dev/null; then
        kill -9 "$vold_pid" 2>/dev/null || true
        wait "$vold_pid" 2>/dev/null || true
    fi
    if [ "$status" -ne 0 ]; then
        printf '\nmake demo ended in step %d (%s).\n' "$step_number" "$step_name" >&2
        if [ -f "$work/vold.log" ]; then echo "--- the daemon's last words ---" >&2; tail -n 20 "$work/vold.log" >&2; fi
    fi
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

start_vold() {
    vold serve --data-dir "$data" >"$work/ready" 2>>"$work/vold.log" &
    vold_pid=$!
    local i
    for i in $(seq 600); do
        if grep -q ' ready' "$work/ready"; then note "$(cat "$work/ready")"; return; fi
        kill -0 "$vold_pid" 2>/dev/null || fail "vold ended: $(tail -n 1 "$work/vold.log")"
        sleep 0.1
    done
    fail "vold is not ready after a minute"
}

stop_vold() {
    kill -TERM "$vold_pid"
    wait "$vold_pid" || fail "vold ended with status $?"
    vold_pid=
}

# Occurrences of a text in a file, 0 included.
count() { LC_ALL=C grep -a -c -F -- "$1" "$2" || true; }
sha() { sha256sum "$1" | cut -d' ' -f1; }
json() { volctl --output json "$@"; }
show() { sed 's/^/    /'; }

step "A disk image from real files of this machine: the tenant's data"
files=$work/files
mkdir "$files"
# Text that a search will look for, and whatever this machine has in its documentation directories.
for i in $(seq 2000); do echo "acme-confidential customer record number $i"; done >"$files/customers.txt"
for source in /usr/share/common-licenses /usr/share/perl /usr/share/zoneinfo /usr/lib/python3 /usr/include /usr/bin; do
    [ -d "$source" ] || continue
    # Up to what fits beside the rest: a copy of real trees, not of a whole disk.
    kib=$(du -sk "$source" | cut -f1)
    used=$(du -sk "$files" | cut -f1)
    if [ $((used + kib)) -lt $((image_mib * 1024 * 3 / 4)) ]; then cp -a "$source" "$files/" 2>/dev/null || true; fi
done
truncate -s "${image_mib}M" "$work/web.img"
mke2fs -q -t ext4 -d "$files" -F "$work/web.img"
e2fsck -fn "$work/web.img" >/dev/null 2>&1 || fail "the image's file system is not clean"
needle="acme-confidential customer record number 7"
[ "$(count "$needle" "$work/web.img")" -gt 0 ] || fail "the search does not find the text in the plain image"
note "$(find "$files" -type f | wc -l) files, $(du -sm "$files" | cut -f1) MiB in an ext4 image of $image_mib MiB; the text \"$needle\" is found in it"

step "vold starts in an empty directory and takes two stores, each a failure domain"
start_vold
volctl store add left --path "$work/left.store" --size "${store_mib}M" --zone rack-1 >/dev/null
volctl store add right --path "$work/right.store" --size "${store_mib}M" --zone rack-2 >/dev/null
volctl store list | show

step "Two customers with a VM each, and an encrypted volume of two replicas for acme"
volctl customer create acme >/dev/null
volctl customer create globex >/dev/null
volctl vm create acme-vm --customer acme >/dev/null
volctl vm create globex-vm --customer globex >/dev/null
volctl volume create acme/web --size "${volume_mib}M" --replicas 2 | show

step "globex's VM is refused acme's volume"
if refusal=$(volctl attach acme/web --vm globex-vm 2>&1); then fail "globex's VM got acme's volume"; fi
note "$refusal"

step "acme's VM gets it: an NBD address, and the arguments for QEMU"
volctl attach acme/web --vm acme-vm | show
uri=$(json attach acme/web --vm acme-vm | jq -r .uri)

step "nbdcopy writes the image into the volume, reads it back, and the hashes are equal"
truncate -s "${volume_mib}M" "$work/web.img"
nbdcopy --flush "$work/web.img" "$uri"
nbdcopy "$uri" "$work/back.img"
before=$(sha "$work/web.img") after=$(sha "$work/back.img")
[ "$before" = "$after" ] || fail "the image came back changed: $before, $after"
note "sha256 $before, both"
rm "$work/back.img"

step "The raw stores hold none of the plaintext"
for store in left right; do
    found=$(count "$needle" "$work/$store.store")
    [ "$found" -eq 0 ] || fail "the text is in the raw store $store"
    note "\"$needle\" in $store.store: $found times"
done

step "Bytes flipped on one store's disk are read through, repaired from the other replica, and counted"
stop_vold
# A MiB of what the store holds: an eighth into its file, well past the metadata.
offset=$((store_mib * 1024 * 1024 / 8))
dd if="$work/left.store" bs=4096 skip=$((offset / 4096)) count=256 status=none | tr '\000-\377' '\377\000-\376' >"$work/garbage"
dd if="$work/garbage" of="$work/left.store" bs=4096 seek=$((offset / 4096)) conv=notrunc status=none
if report=$(vold check --data-dir "$data" 2>&1); then fail "vold check does not see the damage"; fi
note "vold check on the stopped daemon: $(tail -n 1 <<<"$report")"
start_vold
for pass in 1 2 3 4 5 6; do
    nbdcopy "$uri" "$work/back.img"
    [ "$(sha "$work/back.img")" = "$before" ] || fail "damage reached the reader"
    healed=$(json volume show acme/web | jq .healed_blocks)
    [ "$healed" -lt 256 ] || break
done
[ "$healed" -gt 0 ] || fail "no block was repaired"
note "read back with the same hash; $healed blocks repaired"
stop_vold
vold check --data-dir "$data" | tail -n 1 | show || fail "vold check still finds damage"
start_vold

step "Deletion overwrites the keys and every extent of every replica, and reads them back"
volctl detach acme/web --vm acme-vm >/dev/null
id=$(json volume show acme/web | jq -r .id)
volctl volume delete acme/web --now >/dev/null
volctl destroy wait "$id" | show
volctl store list | show

step "vold stops cleanly: on SIGTERM it ends with status 0, and its sockets are gone"
stop_vold
[ ! -e "$data/api.sock" ] || fail "the API's socket is still there"
note "the log's last line: $(tail -n 1 "$work/vold.log" | sed 's/.*vold::serve: //')"

step "The extents are zeros on the raw stores"
for store in left right; do
    # Data extents begin on a multiple of 4 MiB after the metadata; everything from 1/8 of the file on is data.
    if ! tail -c +$((offset + 1)) "$work/$store.store" | cmp -s -n $(($(stat -c %s "$work/$store.store") - offset)) - /dev/zero; then
        fail "$store.store still holds something"
    fi
    note "$store.store: $(($(stat -c %s "$work/$store.store") - offset)) bytes compared, all zero"
done
vold check --data-dir "$data" | tail -n 1 | show || fail "vold check finds damage"

printf '\nAll %d steps shown in %d seconds; everything the demo made is removed again.\n' "$step_number" "$SECONDS"
