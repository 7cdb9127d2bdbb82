# Writes small files and syncs each, and says so, until the host has seen enough.
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
sync
i=0
while :; do
    i=$((i + 1))
    dd if=/dev/urandom of=/mnt/$i bs=4k count=3 2>/dev/null
    sha256sum /mnt/$i >/mnt/$i.sum
    sync /mnt/$i /mnt/$i.sum
    # A directory's entry is synced with the file system alone.
    sync -f /mnt
    say "synced $i"
    # What is not synced may be there after a crash, or not.
    dd if=/dev/urandom of=/mnt/ballast bs=64k count=4 2>/dev/null
done
