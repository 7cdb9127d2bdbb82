# A file system on the volume: copied files, fio's checksummed blocks, syncs, space given back; after a reboot all is there.
connect
if ! has_ext4 $disk; then
    /sbin/mke2fs -q -F -t ext4 $disk
    mount -t ext4 $disk /mnt
    mkdir /mnt/files
    cp -a /sbin /tests /modules /mnt/files
    /sbin/fio --name=verify --directory=/mnt --size=4M --rw=randwrite --bsrange=4k-64k --ioengine=psync --direct=1 --fsync=32 \
        --verify=crc32c --verify_fatal=1 --output-format=terse >/tmp/fio || { cat /tmp/fio; exit 1; }
    for i in $(seq 40); do
        dd if=/dev/urandom of=/mnt/files/synced-$i bs=4k count=1 conv=fsync 2>/dev/null
    done
    (cd /mnt/files && find . -type f -exec sha256sum {} + | sort -k 2 >/mnt/sums)
    dd if=/dev/urandom of=/mnt/ballast bs=1M count=24 conv=fsync 2>/dev/null
    at full
    rm /mnt/ballast
    sync
    fstrim /mnt
    at trimmed
    sync
    umount /mnt
    no_errors
    disconnect
    say rebooting
    reboot -f
    sleep 600
fi
/sbin/e2fsck -f -n $disk
mount -t ext4 $disk /mnt
(cd /mnt/files && sha256sum -c -s /mnt/sums)
[ "$(wc -l </mnt/sums)" -gt 50 ]
umount /mnt
no_errors
disconnect
