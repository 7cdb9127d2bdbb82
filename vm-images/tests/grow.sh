# The volume grows under a mounted file system, which takes the new room in use.
connect
/sbin/mke2fs -q -t ext4 $disk
mount -t ext4 $disk /mnt
dd if=/dev/urandom of=/mnt/old bs=1M count=8 conv=fsync 2>/dev/null
sha256sum /mnt/old >/tmp/old
free() { df -k /mnt | awk 'NR == 2 { print $4 }'; }
before=$(free)
at small
sectors() { [ "$(cat /sys/class/block/${disk#/dev/}/size)" = "$(($(parameter size) / 512))" ]; }
until_true sectors
/sbin/resize2fs $disk
[ $(free) -gt $((before + 60000)) ]
# More than had room before.
dd if=/dev/urandom of=/mnt/new bs=1k count=$((before + 8192)) conv=fsync 2>/dev/null
sha256sum /mnt/new >/tmp/new
umount /mnt
/sbin/e2fsck -f -n $disk
mount -t ext4 $disk /mnt
sha256sum -c -s /tmp/old
sha256sum -c -s /tmp/new
umount /mnt
no_errors
