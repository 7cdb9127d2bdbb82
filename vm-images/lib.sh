# What the tests' scripts share. They run with -eu: a command that fails ends the test, and fails it.
# (busybox prefers its own commands to programs of the same name: those of packages are called by their path.)

say() { echo "vold-test: $*"; }

# A parameter of the kernel command line: vold.NAME=VALUE.
parameter() { sed -n "s/.*vold\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

# Waits for a condition; the host ends what takes too long.
until_true() { until "$@"; do sleep 0.1; done; }

# Tells the host where the test is, and goes on when it says so.
at() {
    say "at $*"
    local line=
    until [ "$line" = "go" ]; do read -r line; done
}

# The virtio disk that is not the one with the inputs. Fails when there is none.
find_disk() {
    local disk
    for disk in /sys/block/vd*; do
        if [ -e "$disk" ] && [ "$(cat "$disk/serial")" != inputs ]; then
            echo "/dev/${disk##*/}"
            return 0
        fi
    done
    return 1
}

# Unpacks what the host gave along into /tmp/inputs.
inputs() {
    local disk
    mkdir -p /tmp/inputs
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" != inputs ] || tar -x -C /tmp/inputs -f "/dev/${disk##*/}"
    done
}

# QEMU's user-mode network: the host is 10.0.2.2.
network() {
    until_true test -e /sys/class/net/eth0
    ip link set lo up
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
}

# Whether the kernel's own NBD client is how the volume gets here.
by_nbd_client() { [ "$(parameter transport)" = nbd-client ]; }

# Whether a disk has its size by now.
has_size() { [ "$(cat "/sys/block/${1##*/}/size")" -gt 0 ]; }

# Makes the volume a disk of this guest; $disk is its path. By the kernel's own NBD client over TLS, with the certificate
# vold.certificate or the one named, and with $nbd_options; or as it is. Again after a disconnect.
connect() {
    if ! by_nbd_client; then
        until_true find_disk >/dev/null
        disk=$(find_disk)
        return
    fi
    if ! [ -e /tmp/inputs ]; then
        network
        inputs
    fi
    local files=/tmp/inputs/${1:-$(parameter certificate)}
    disk=/dev/nbd0
    /sbin/nbd-client 10.0.2.2 "$(parameter port)" $disk -N "$(parameter export)" -b 4096 -x -tlshostname localhost ${nbd_options:-} \
        -certfile $files/client-cert.pem -keyfile $files/client-key.pem -cacertfile $files/ca-cert.pem
    until_true has_size $disk
}

disconnect() {
    if by_nbd_client; then /sbin/nbd-client -d $disk; fi
}

# Whether the disk is no longer there.
gone() {
    if by_nbd_client; then ! has_size $disk; else ! find_disk >/dev/null; fi
}

# The kernel has reported no failed request and no damage of the file system.
no_errors() {
    if dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Buffer I/O|blk_update_request|critical .* error'; then
        say "the kernel reported errors"
        return 1
    fi
}

# Whether a disk has a file system of ours.
has_ext4() { /sbin/blkid "$1" | grep -q 'TYPE="ext4"'; }

# Writes small files to /mnt and syncs each, and says so, without end.
storm() {
    local i=0
    while :; do
        i=$((i + 1))
        dd if=/dev/urandom of=/mnt/$i bs=4k count=3 2>/dev/null
        sha256sum /mnt/$i >/mnt/$i.sum
        sync /mnt/$i /mnt/$i.sum
        # A directory's entry is synced with the file system alone.
        sync -f /mnt
        echo $i >/tmp/synced
        say "synced $i"
        # What is not synced may be there after a crash, or not.
        dd if=/dev/urandom of=/mnt/ballast bs=64k count=4 2>/dev/null
    done
}

# Every file that storm said to be synced, up to this number, is there and whole.
has_all_synced() {
    local i
    for i in $(seq "$1"); do sha256sum -c -s /mnt/$i.sum; done
}

# Counts the boots in a file system, each of which leaves a file there, and says how many it were.
count_boots() {
    local boots
    boots=$(($(cat "$1/boots" 2>/dev/null || echo 0) + 1))
    echo $boots >"$1/boots"
    dd if=/dev/urandom of="$1/boot-$boots" bs=1M count=2 2>/dev/null
    sha256sum "$1/boot-$boots" >>"$1/sums"
    sha256sum -c -s "$1/sums"
    sync
    say "boots $boots"
}
