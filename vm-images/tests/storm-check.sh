# After a crash in the middle of storm: every file that was said to be synced is there and whole.
connect
mount -t ext4 $disk /mnt
has_all_synced "$(parameter synced)"
umount /mnt
/sbin/e2fsck -f -n $disk
no_errors
