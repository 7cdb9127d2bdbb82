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

# Whether a disk has its size by now.
has_size() { [ "$(cat "/sys/block/${1##*/}/size")" -gt 0 ]; }

# Makes the volume a disk of this guest; $disk is its path. By the kernel's own NBD client over TLS, or as it is.
connect() {
    if [ "$(parameter transport)" != nbd-client ]; then
        until_true find_disk >/dev/null
        disk=$(find_disk)
        return
    fi
    network
    inputs
    disk=/dev/nbd0
    /sbin/nbd-client 10.0.2.2 "$(parameter port)" $disk -N "$(parameter export)" -b 4096 -x -tlshostname localhost \
        -certfile /tmp/inputs/client-cert.pem -keyfile /tmp/inputs/client-key.pem -cacertfile /tmp/inputs/ca-cert.pem
    until_true has_size $disk
}

disconnect() {
    if [ "$(parameter transport)" = nbd-client ]; then /sbin/nbd-client -d $disk; fi
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
