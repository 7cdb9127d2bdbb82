//! What happens to a guest's disk while the guest uses it: it grows, is unplugged, loses its machine, its daemon or a
//! replica, and is booted from. Over QEMU's NBD driver, over vhost-user and, where it needs nothing of its own, through the kernel's
//! NBD client (what does is in guest_kernel_nbd.rs).

use serde_json::{Value, json};
use vold_tests::guest::{Guest, Machine, image, nbd_blockdev};
use vold_tests::tls::Tls;
use vold_tests::tools::{run, succeed, tool};
use vold_tests::transport::{Names, Via, qemu_args};
use vold_tests::vold::parse_uri;
use vold_tests::{Vold, wait_for};

const MIB: u64 = 1 << 20;

fn replicas_are_in_sync(vold: &Vold) {
    wait_for("both replicas are in sync", || {
        let volume = vold.volume("acme/vol");
        let mut replicas = volume["replicas"].as_array().unwrap().iter();
        replicas
            .all(|replica| replica["state"] == "in_sync")
            .then_some(())
    });
}

fn is_clean_after(mut vold: Vold) {
    vold.stop();
    vold.check_is_clean();
}

/// QEMU knows the size that its connection began with. A new connection takes the old one's place below the drive; and
/// a restart of vold makes QEMU connect anew, too.
#[test]
fn a_volume_grows_under_a_mounted_file_system() {
    let (mut vold, attached) = Via::Nbd.attached("48M");
    let (first, second) = (80 * MIB, 112 * MIB);
    let mut guest = Via::Nbd
        .machine(&vold, &attached, "grow")
        .parameter("sizes", format!("{first},{second}"))
        .start();
    let names = Names::of(&attached);
    guest.is_at("small");
    vold.ctl("volume resize acme/vol --size 80M");
    guest.qmp("blockdev-add", nbd_blockdev(&attached, "grown"));
    let drive = json!({
        "driver": "raw",
        "node-name": names.drive,
        "file": "grown",
        "cache": {"direct": true},
        "discard": "unmap",
    });
    guest.qmp("blockdev-reopen", json!({"options": [drive]}));
    guest.qmp("blockdev-del", json!({"node-name": names.connection}));
    guest.qmp("block_resize", json!({"node-name": names.drive, "size": first}));
    guest.go();

    guest.is_at("small");
    vold.ctl("volume resize acme/vol --size 112M");
    vold.stop();
    vold.restart();
    // (It does so when the guest wants something.)
    wait_for("QEMU has connected anew and sees the size", || {
        let resize = json!({"node-name": names.drive, "size": second});
        guest.try_qmp("block_resize", resize).ok()
    });
    guest.go();
    guest.passes();
    is_clean_after(vold);
}

/// Nobody does anything on the host but to resize it.
fn grows_by_the_guest_alone(via: Via) {
    let (vold, attached) = via.attached("48M");
    let mut guest = via
        .machine(&vold, &attached, "grow")
        .parameter("sizes", format!("{},{}", 80 * MIB, 112 * MIB))
        .start();
    for size in ["80M", "112M"] {
        guest.is_at("small");
        vold.ctl(&format!("volume resize acme/vol --size {size}"));
        guest.go();
    }
    guest.passes();
    is_clean_after(vold);
}

/// vold tells QEMU, and QEMU the guest.
#[test]
fn a_volume_over_vhost_user_grows_by_itself() {
    grows_by_the_guest_alone(Via::VhostUser);
}

/// The kernel does not ask for the size again: the guest unmounts, disconnects and connects.
#[test]
#[ignore = "long; make test-full runs it"]
fn a_volume_of_the_kernels_nbd_client_grows_when_it_connects_anew() {
    grows_by_the_guest_alone(Via::KernelNbd);
}

fn is_unplugged_and_plugged_in_again(via: Via) {
    let (vold, attached) = via.attached("64M");
    let mut guest = via.machine(&vold, &attached, "replug").start();
    guest.is_at("unplug");
    via.unplug(&mut guest, &attached);
    wait_for("QEMU has let the volume go", || {
        let list = vold.ctl("attachment list");
        (list["items"][0]["connections"] == 0).then_some(())
    });
    guest.go();
    guest.is_at("replug");
    // Attached anew, under the next epoch.
    vold.ctl("detach acme/vol --vm vm1");
    let again = via.attach(&vold);
    assert!(again["epoch"].as_u64() > attached["epoch"].as_u64(), "{again}");
    via.plug(&mut guest, &again);
    guest.go();
    guest.passes();
    is_clean_after(vold);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_disk_is_unplugged_and_plugged_in_again() {
    is_unplugged_and_plugged_in_again(Via::Nbd);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_disk_over_vhost_user_is_unplugged_and_plugged_in_again() {
    is_unplugged_and_plugged_in_again(Via::VhostUser);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_disk_of_the_kernels_nbd_client_is_unplugged_and_plugged_in_again() {
    is_unplugged_and_plugged_in_again(Via::KernelNbd);
}

fn survives_kill_9_of_its_qemu(via: Via) {
    let (vold, attached) = via.attached("96M");
    for enough in [5, 40, 150] {
        let mut guest = via.machine(&vold, &attached, "storm").start();
        let synced = guest.says("files are synced", |said| {
            let number: u64 = said.strip_prefix("synced ")?.parse().ok()?;
            (number >= enough).then_some(number)
        });
        guest.kill();
        via.machine(&vold, &attached, "storm-check")
            .parameter("synced", synced)
            .start()
            .passes();
    }
    is_clean_after(vold);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn what_a_guest_has_synced_survives_kill_9_of_its_qemu() {
    survives_kill_9_of_its_qemu(Via::Nbd);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn what_a_guest_has_synced_over_vhost_user_survives_kill_9_of_its_qemu() {
    survives_kill_9_of_its_qemu(Via::VhostUser);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn what_the_kernels_nbd_client_has_synced_survives_kill_9_of_its_qemu() {
    survives_kill_9_of_its_qemu(Via::KernelNbd);
}

/// Starts the script `load` and waits until it writes and verifies.
fn loaded(via: Via, vold: &Vold, attached: &Value) -> Guest {
    let mut guest = via.machine(vold, attached, "load").start();
    guest.is_at("load");
    guest
}

fn another_round(guest: &mut Guest) {
    guest.says("another round of the load", |said| {
        said.starts_with("round ").then_some(())
    });
}

/// Killed and, every other time, stopped as it should be.
fn notices_nothing_of_restarts(via: Via) {
    let (mut vold, attached) = via.attached("96M");
    let mut guest = loaded(via, &vold, &attached);
    for restarts in 0..4 {
        if restarts % 2 == 0 {
            vold.kill();
        } else {
            vold.stop();
        }
        vold.restart();
        another_round(&mut guest);
    }
    guest.go();
    guest.passes();
    replicas_are_in_sync(&vold);
    is_clean_after(vold);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_notices_nothing_of_kill_9_of_vold() {
    notices_nothing_of_restarts(Via::Nbd);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_over_vhost_user_notices_nothing_of_kill_9_of_vold() {
    notices_nothing_of_restarts(Via::VhostUser);
}

/// A limit on file sizes makes the kernel refuse writes to the files of both stores; so one of them is a loop device.
fn notices_nothing_of_a_replica_that_fails_and_comes_back(via: Via) {
    let vold = via.daemon();
    let backing = vold.path("image");
    std::fs::File::create(&backing)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    let device = vold_tests::devices::LoopDevice::over(&backing);
    vold.ctl(&format!("store add a --path {}", device.path().display()));
    vold.ctl(&format!(
        "store add b --path {} --size 256M",
        vold.store_path("b").display()
    ));
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme");
    vold.ctl("volume create acme/vol --size 96M --replicas 2");
    let attached = via.attach(&vold);
    vold.wait_until_scrubbed(&["a", "b"]);
    let mut guest = loaded(via, &vold, &attached);
    let limit_files = |limit: &str| {
        run(
            "prlimit",
            [
                format!("--pid={}", vold.pid()),
                format!("--fsize={limit}:unlimited"),
            ],
        );
    };
    limit_files(&(8 * MIB).to_string());
    wait_for("the replica is dropped", || {
        let volume = vold.volume("acme/vol");
        let mut replicas = volume["replicas"].as_array().unwrap().iter();
        replicas
            .any(|replica| replica["state"] != "in_sync")
            .then_some(())
    });
    another_round(&mut guest);
    limit_files("unlimited");
    replicas_are_in_sync(&vold);
    another_round(&mut guest);
    guest.go();
    guest.passes();
    replicas_are_in_sync(&vold);
    let mut vold = vold;
    vold.stop();
    vold.check_is_clean();
    drop(device);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_notices_nothing_of_a_replica_that_fails_and_comes_back() {
    notices_nothing_of_a_replica_that_fails_and_comes_back(Via::Nbd);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_over_vhost_user_notices_nothing_of_a_replica_that_fails_and_comes_back() {
    notices_nothing_of_a_replica_that_fails_and_comes_back(Via::VhostUser);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_of_the_kernels_nbd_client_notices_nothing_of_a_replica_that_fails_and_comes_back() {
    notices_nothing_of_a_replica_that_fails_and_comes_back(Via::KernelNbd);
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_boots_from_a_volume_and_another_customers_vm_does_not() {
    let (tls, attached) = Tls::serving(2, "256M", "96M", &[]);
    let vold = &tls.vold;
    vold.ctl("customer create globex");
    // (Another VM of its own customer has no way to the volume either, as long as it is attached elsewhere.)
    for (vm, customer) in [("vm2", "globex"), ("vm3", "acme")] {
        vold.ctl(&format!("vm create {vm} --customer {customer} --uid 12345"));
    }
    let disk = image("disk").join("disk.img");
    let mut nbdcopy = tool("nbdcopy");
    nbdcopy.arg("--flush").arg(&disk);
    succeed(nbdcopy.arg(attached["uri"].as_str().unwrap()));

    for boots in 1..=2 {
        let mut guest = Machine::booting(&vold.path(""))
            .with(&attached["qemu_args"])
            .start();
        let counted: u32 = guest.says("it counts its boots", |said| {
            said.strip_prefix("boots ")?.parse().ok()
        });
        assert_eq!(counted, boots);
        guest.passes();
    }

    // Over TLS, with each one's own certificates.
    let with_certificates = |customer: &str, vm: &str| {
        let directory = tls.issue(customer, vm).display().to_string();
        let mut arguments = attached["over_tls"][0]["qemu_args"].clone();
        let object = arguments[1]
            .as_str()
            .unwrap()
            .replace("/etc/pki/qemu", &directory);
        arguments[1] = object.into();
        Machine::booting(&vold.path("")).with(&arguments)
    };
    for (customer, vm) in [("globex", "vm2"), ("acme", "vm3"), ("globex", "vm1")] {
        let said = with_certificates(customer, vm).refuses_to_start();
        assert!(said.contains("acme/vol"), "{said}");
    }
    // On the attachment's socket, as the other VMs' user.
    let said = Machine::booting(&vold.path(""))
        .with(&attached["qemu_args"])
        .user(12345)
        .refuses_to_start();
    let (socket, _) = parse_uri(attached["uri"].as_str().unwrap());
    let denied = format!("'{}': Permission denied", socket.display());
    assert!(said.contains(&denied), "{said}");
    // The right one's does it.
    let mut guest = with_certificates("acme", "vm1").start();
    let counted: u32 = guest.says("it counts its boots", |said| {
        said.strip_prefix("boots ")?.parse().ok()
    });
    assert_eq!(counted, 3);
    guest.passes();
    is_clean_after(tls.vold);
}

/// Attach's arguments, but QEMU does not try again when it cannot connect.
fn only_once(attached: &Value) -> Value {
    qemu_args(attached)
        .iter()
        .map(|argument| {
            let options = argument
                .split(',')
                .filter(|option| !option.starts_with("reconnect"));
            options.collect::<Vec<_>>().join(",")
        })
        .collect()
}

/// The image is put onto the volume over NBD, and booted over vhost-user.
#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_boots_over_vhost_user_and_another_vms_user_does_not() {
    let vold = Vold::start();
    vold.with_detached_volume(2, "256M", "96M");
    let attached = Via::Nbd.attach(&vold);
    let mut nbdcopy = tool("nbdcopy");
    nbdcopy.arg("--flush").arg(image("disk").join("disk.img"));
    succeed(nbdcopy.arg(attached["uri"].as_str().unwrap()));
    vold.ctl("detach acme/vol --vm vm1");
    let attached = Via::VhostUser.attach(&vold);
    let boots = |expected: u32| {
        let mut guest = Machine::booting_by_uefi(&vold.path(""))
            .with(&attached["qemu_args"])
            .start();
        let counted: u32 = guest.says("it counts its boots", |said| {
            said.strip_prefix("boots ")?.parse().ok()
        });
        assert_eq!(counted, expected);
        guest.passes();
    };
    boots(1);
    boots(2);
    // As the other VMs' user.
    let said = Machine::booting(&vold.path(""))
        .with(&only_once(&attached))
        .user(12345)
        .refuses_to_start();
    assert!(said.contains("Permission denied"), "{said}");
    boots(3);
    is_clean_after(vold);
}

/// The mode of the socket is not all: who comes past it as another user is turned away.
#[test]
#[ignore = "long; make test-full runs it"]
fn another_vms_user_who_passes_the_sockets_mode_gets_no_disk_over_vhost_user() {
    let vold = Vold::start();
    vold.add_stores(&["a"], "256M");
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme --uid 12345");
    vold.ctl("volume create acme/vol --size 96M");
    let attached = Via::VhostUser.attach(&vold);
    // (Root passes every mode.)
    let said = Machine::booting(&vold.path(""))
        .with(&only_once(&attached))
        .refuses_to_start();
    println!("{said}");
    assert!(vold.log().contains("turned away"), "{}", vold.log());
    is_clean_after(vold);
}
