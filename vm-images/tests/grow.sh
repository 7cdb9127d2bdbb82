# The volume grows under a file system, which takes the new room in use: once for each of vold.sizes.
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
dd if=/dev/urandom of=/mnt/old bs=1M count=8 conv=fsync 2>/dev/null
sha256sum /mnt/old >/tmp/sums
free() { df -k /mnt | awk 'NR == 2 { print $4 }'; }
size() { cat "/sys/class/block/${disk#/dev/}/size"; }
is_of() { [ "$(size)" = $(($1 / 512)) ]; }
# While it is mounted.
grow() {
    until_true is_of $1
    /sbin/resize2fs $disk
}
# The kernel's NBD client keeps the size that it has connected with.
grow_connected_anew() {
    [ "$(size)" = $size_before ]
    umount /mnt
    disconnect
    until_true gone
    connect
    is_of $1
    # (resize2fs insists on a check that is written down.)
    /sbin/e2fsck -f -p $disk
    /sbin/resize2fs $disk
    mount -t ext4 $disk /mnt
}
if by_nbd_client; then
    writer=
else
    # Something is always to be done: a connection that was lost is made anew for a request only.
    (until [ -e /tmp/done ]; do date >/mnt/now; sync -f /mnt; sleep 0.2; done) &
    writer=$!
fi
for size in $(parameter sizes | tr , ' '); do
    before=$(free)
    size_before=$(size)
    at small
    if by_nbd_client; then grow_connected_anew $size; else grow $size; fi
    [ $(free) -gt $((before + 24000)) ]
    # More than had room before.
    dd if=/dev/urandom of=/mnt/new-$size bs=1k count=$((before + 4096)) conv=fsync 2>/dev/null
    sha256sum /mnt/new-$size >>/tmp/sums
done
touch /tmp/done
wait $writer
umount /mnt
/sbin/e2fsck -f -n $disk
mount -t ext4 $disk /mnt
sha256sum -c -s /tmp/sums
umount /mnt
no_errors
