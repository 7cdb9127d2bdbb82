# The volume grows under a mounted file system, which takes the new room in use: once for each of vold.sizes.
connect
/sbin/mke2fs -q -t ext4 $disk
mount -t ext4 $disk /mnt
dd if=/dev/urandom of=/mnt/old bs=1M count=8 conv=fsync 2>/dev/null
sha256sum /mnt/old >/tmp/sums
free() { df -k /mnt | awk 'NR == 2 { print $4 }'; }
is_of() { [ "$(cat /sys/class/block/${disk#/dev/}/size)" = $(($1 / 512)) ]; }
# Something is always to be done: a connection that was lost is made anew for a request only.
(until [ -e /tmp/done ]; do date >/mnt/now; sync -f /mnt; sleep 0.2; done) &
writer=$!
for size in $(parameter sizes | tr , ' '); do
    before=$(free)
    at small
    until_true is_of $size
    /sbin/resize2fs $disk
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
