//! A real guest kernel uses a volume, one test for each way it can get at it: files, fio's checksummed blocks, syncs, trim,
//! and a reboot after which everything is there. The long tests of guests are in guest_events.rs and guest_kernel_nbd.rs.

use vold_tests::transport::Via;

/// What the script `filesystem` does, watched from outside.
fn uses_a_file_system(via: Via) {
    let (mut vold, attached) = via.attached("128M");
    let mut guest = via.machine(&vold, &attached, "filesystem").start();
    let allocated = || vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
    guest.is_at("full");
    let full = allocated();
    guest.go();
    guest.is_at("trimmed");
    let trimmed = allocated();
    assert!(
        trimmed + (16 << 20) <= full,
        "fstrim gives a deleted file's 24 MiB back: {full} bytes before, {trimmed} after"
    );
    guest.go();
    guest.passes();
    // (A mirrored volume says so if one replica could not follow.)
    for replica in vold.volume("acme/vol")["replicas"].as_array().unwrap() {
        assert_eq!(replica["state"], "in_sync", "{replica}");
    }
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_guest_uses_a_file_system_through_qemus_nbd_driver() {
    uses_a_file_system(Via::Nbd);
}

#[test]
fn a_guest_uses_a_file_system_through_vhost_user() {
    uses_a_file_system(Via::VhostUser);
}

#[test]
fn a_guest_uses_a_file_system_through_its_kernels_nbd_client_over_tls() {
    uses_a_file_system(Via::KernelNbd);
}
