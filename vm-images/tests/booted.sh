# On a machine that booted from the volume: counts its boots in the file system beside the one it was booted from.
connect
mount -t ext4 ${disk}2 /mnt
count_boots /mnt
umount /mnt
no_errors
