# The disk is unplugged while the machine runs, and plugged in again with everything that was on it.
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
sha256sum /mnt/file >/tmp/sum
umount /mnt
disconnect
at unplug
until_true gone
at replug
connect
/sbin/e2fsck -f -n $disk
mount -t ext4 $disk /mnt
sha256sum -c -s /tmp/sum
echo more >>/mnt/file
umount /mnt
no_errors
