# With each of vold.refused, certificates of others, the kernel's NBD client gets no disk; with its own it gets one.
disk=/dev/nbd0
for certificate in $(parameter refused | tr , ' '); do
    # (In a shell of its own, in which -e ends what fails.)
    if sh -eu -c ". /tests/lib.sh; connect $certificate" >/tmp/said 2>&1; then false; fi
    say "with $certificate: $(tr '\n' ' ' </tmp/said)"
    gone
done
at refused
connect
at connected
dd if=$disk of=/dev/null bs=4k count=1 2>/dev/null
disconnect
no_errors
