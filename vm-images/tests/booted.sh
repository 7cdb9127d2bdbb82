# On a machine that booted from the volume: counts its boots in the file system beside the one it was booted from.
connect
mount -t ext4 ${disk}2 /mnt
boots=$(($(cat /mnt/boots 2>/dev/null || echo 0) + 1))
echo $boots >/mnt/boots
dd if=/dev/urandom of=/mnt/boot-$boots bs=1M count=2 2>/dev/null
sha256sum /mnt/boot-$boots >>/mnt/sums
sha256sum -c -s /mnt/sums
umount /mnt
no_errors
say "boots $boots"
