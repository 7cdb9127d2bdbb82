//! A guest whose kernel connects to its volume by itself, with nbd-client over TLS: what its own client makes different from a
//! drive that QEMU has. What is the same is in guest_smoke.rs and guest_events.rs.

use std::path::PathBuf;

use serde_json::Value;
use vold_tests::guest::Guest;
use vold_tests::transport::{Via, nbd_client_machine};
use vold_tests::{Vold, tls, wait_for};

fn is_clean_after(mut vold: Vold) {
    vold.stop();
    vold.check_is_clean();
}

/// Certificates of VMs that the volume is not attached to: of another customer, and of its own.
fn certificates_of_others(vold: &Vold) -> [PathBuf; 2] {
    vold.ctl("customer create globex");
    [("globex", "vm2"), ("acme", "vm3")].map(|(customer, vm)| {
        vold.ctl(&format!("vm create {vm} --customer {customer}"));
        tls::issued(vold, customer, vm)
    })
}

fn connections(vold: &Vold) -> Value {
    vold.ctl("attachment list")["items"][0]["connections"].clone()
}

/// nbd-client 3.24 does not connect again by itself, not even with `-persist`: requests fail, until somebody in the guest does.
#[test]
#[ignore = "long; make test-full runs it"]
fn what_the_kernels_nbd_client_has_synced_is_there_when_it_connects_again_after_kill_9_of_vold() {
    let via = Via::KernelNbd;
    let (mut vold, attached) = via.attached("96M");
    let mut guest = via.machine(&vold, &attached, "outage").start();
    guest.is_at("outage");
    guest.says("files are synced", |said| {
        let number: u64 = said.strip_prefix("synced ")?.parse().ok()?;
        (number >= 20).then_some(())
    });
    vold.kill();
    let command = tls::serve_command(&vold, tls::port(&attached), &["--tls-1-2"]);
    vold.restart_with(command);
    guest.go();
    guest.is_at("failed");
    assert_eq!(connections(&vold), 0, "nobody has connected again");
    guest.go();
    guest.passes();
    for replica in vold.volume("acme/vol")["replicas"].as_array().unwrap() {
        assert_eq!(replica["state"], "in_sync", "{replica}");
    }
    is_clean_after(vold);
}

fn counts_its_boots(guest: &mut Guest) -> u32 {
    guest.says("it counts its boots", |said| {
        said.strip_prefix("boots ")?.parse().ok()
    })
}

/// The host gives kernel and initramfs, which connects; everything else is on the volume.
#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_boots_through_its_kernels_nbd_client_and_another_customers_vm_does_not() {
    let via = Via::KernelNbd;
    let (vold, attached) = via.attached("96M");
    let boots = |expected: u32| {
        let mut guest = via.machine(&vold, &attached, "rooted").start();
        assert_eq!(counts_its_boots(&mut guest), expected);
        guest.passes();
    };
    boots(1);
    let [of_another_customer, _] = certificates_of_others(&vold);
    let mut guest = nbd_client_machine(&vold, &attached, "rooted", &of_another_customer).start();
    guest.says("it does not get its root", |said| {
        assert!(!said.starts_with("boots"), "{said}");
        said.starts_with("FAIL rooted").then_some(())
    });
    boots(2);
    is_clean_after(vold);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn the_kernels_nbd_client_gets_no_disk_with_the_certificate_of_another_vm() {
    let via = Via::KernelNbd;
    let (vold, attached) = via.attached("64M");
    let certificates = certificates_of_others(&vold);
    let names = ["globex-vm2", "acme-vm3"];
    let mut machine = via
        .machine(&vold, &attached, "refused")
        .parameter("refused", names.join(","));
    for certificate in &certificates {
        machine = machine.input(certificate);
    }
    let mut guest = machine.start();
    for name in names {
        let said = guest.says("it is refused", |said| {
            Some(said.strip_prefix("with ")?.strip_prefix(name)?.to_owned())
        });
        assert!(said.contains("no export of that name here"), "{name}{said}");
    }
    guest.is_at("refused");
    assert!(!vold.log().contains("connected, over TLS"), "{}", vold.log());
    assert_eq!(connections(&vold), 0);
    guest.go();
    guest.is_at("connected");
    wait_for("its own one is connected", || {
        (connections(&vold) == 1).then_some(())
    });
    assert!(vold.log().contains("connected, over TLS"), "{}", vold.log());
    guest.go();
    guest.passes();
    is_clean_after(vold);
}
