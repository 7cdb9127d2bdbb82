# Writes small files and syncs each, and says so, until the host has seen enough.
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
sync
storm
