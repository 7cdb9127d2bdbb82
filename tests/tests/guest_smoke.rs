//! A real guest kernel uses a volume, one test for each way it can get at it: files, fio's checksummed blocks, syncs, trim,
//! and a reboot after which everything is there. The long tests of guests are in guest_events.rs.

use vold_tests::Vold;
use vold_tests::guest::{Guest, Machine};
use vold_tests::tls::Tls;

/// What the script `filesystem` does, watched from outside.
fn uses_a_file_system(vold: &Vold, mut guest: Guest) {
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
}

#[test]
fn a_guest_uses_a_file_system_through_qemus_nbd_driver() {
    let mut vold = Vold::start();
    vold.with_volume(2, "256M", "128M");
    let attached = vold.ctl("attach acme/vol --vm vm1");
    let machine = Machine::running(&vold.path(""), "filesystem").with(&attached["qemu_args"]);
    uses_a_file_system(&vold, machine.start());
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_guest_uses_a_file_system_through_vhost_user() {
    let mut vold = Vold::start();
    vold.with_detached_volume(2, "256M", "128M");
    let attached = vold.ctl("attach acme/vol --vm vm1 --via vhost-user");
    let machine = Machine::running(&vold.path(""), "filesystem").with(&attached["qemu_args"]);
    uses_a_file_system(&vold, machine.start());
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_guest_uses_a_file_system_through_its_kernels_nbd_client_over_tls() {
    let (mut tls, _) = Tls::serving(2, "256M", "128M", &["--tls-1-2"]);
    let certificate = tls.issue("acme", "vm1");
    let mut machine = Machine::running(&tls.vold.path(""), "filesystem")
        .network()
        .parameter("transport", "nbd-client")
        .parameter("port", tls.port)
        .parameter("export", "acme/vol");
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        machine = machine.input(&certificate.join(file));
    }
    uses_a_file_system(&tls.vold, machine.start());
    tls.vold.stop();
    tls.vold.check_is_clean();
}
