# fio writes checksummed blocks and reads them again while the host breaks things; the guest notices nothing of it.
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
round() {
    /sbin/fio --name=load --directory=/mnt --size=24M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=8 \
        --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 --output-format=terse >/tmp/fio || { cat /tmp/fio; return 1; }
}
round
say "at load"
# On and on until the host says that it is done.
rounds=0
(line=; until [ "$line" = go ]; do read -r line; done; touch /tmp/done) </dev/console &
until [ -e /tmp/done ] && [ $rounds -ge 2 ]; do
    round
    rounds=$((rounds + 1))
    say "round $rounds"
done
umount /mnt
/sbin/e2fsck -f -n $disk
mount -t ext4 $disk /mnt
/sbin/fio --name=load --directory=/mnt --size=24M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=8 \
    --direct=1 --verify=crc32c --verify_fatal=1 --verify_only --output-format=terse >/tmp/fio || { cat /tmp/fio; exit 1; }
umount /mnt
no_errors
