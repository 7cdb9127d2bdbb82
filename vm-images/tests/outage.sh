# The daemon goes away in the middle of storm and comes back. The kernel's NBD client does not connect again by itself, though
# it is told to: requests fail. Connected anew, all that was said to be synced is there.
# (Without -timeout, requests that are under way may wait until it is disconnected.)
nbd_options='-persist -timeout 60'
connect
/sbin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
sync
storm &
storm=$!
at outage
if wait $storm; then false; fi
at failed
synced=$(cat /tmp/synced)
disconnect
umount /mnt
until_true gone
dmesg -c >/tmp/outage
connect
mount -t ext4 $disk /mnt
has_all_synced $synced
# And is used as before.
echo more >/mnt/more
umount /mnt
/sbin/e2fsck -f -n $disk
no_errors
disconnect
