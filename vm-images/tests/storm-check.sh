# After a crash in the middle of storm: every file that was said to be synced is there and whole.
connect
mount -t ext4 $disk /mnt
for i in $(seq "$(parameter synced)"); do sha256sum -c -s /mnt/$i.sum; done
umount /mnt
/sbin/e2fsck -f -n $disk
no_errors
