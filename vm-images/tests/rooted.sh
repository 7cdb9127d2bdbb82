# The root file system is on the volume. What the host has booted puts a system there if there is none, and hands over to it
# (init does, when something is mounted at /root): the script root runs from there.
connect
if ! has_ext4 $disk; then
    /sbin/mke2fs -q -F -t ext4 $disk
    mount -t ext4 $disk /mnt
    mkdir /mnt/dev /mnt/proc /mnt/sys /mnt/tmp /mnt/sbin
    cp -a /init /tests /bin /mnt
    cp -a /sbin/busybox /mnt/sbin
    umount /mnt
fi
/sbin/e2fsck -f -n $disk
mkdir -p /root
mount -t ext4 $disk /root
