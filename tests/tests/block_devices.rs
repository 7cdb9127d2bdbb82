//! Block devices as stores: everything that was on them is overwritten before it is used, and what volumes leave is too.
//! One that somebody uses is never taken, and a read-only place keeps its store out at the daemon's start.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};

use vold_tests::content::bytes;
use vold_tests::devices::{LoopDevice, Mounted};
use vold_tests::nbd::Client;
use vold_tests::raw::{RawStore, State};
use vold_tests::{Engine, Vold};

#[test]
fn a_mirrored_volume_on_two_devices_is_served_destroyed_and_leaves_zeros() {
    for engine in Engine::ALL {
        let vold = Vold::start_on(engine);
        let devices: Vec<LoopDevice> = ["x", "y"]
            .iter()
            .map(|name| {
                let path = vold.path(name);
                let file = File::create(&path).unwrap();
                // Somebody's old data, everywhere but where a signature would be.
                file.set_len(96 << 20).unwrap();
                for i in 1..96u64 {
                    file.write_all_at(&bytes(i, 1 << 20), i << 20).unwrap();
                }
                LoopDevice::over(&path)
            })
            .collect();
        let mut vold = vold;
        for (name, device) in ["x", "y"].iter().zip(&devices) {
            let store = vold.ctl(&format!("store add {name} --path {}", device.path().display()));
            assert_eq!(store["state"], "online", "{store}");
            assert!(store["total_bytes"].as_u64().unwrap() > 64 << 20, "{store}");
        }
        vold.ctl("customer create acme");
        vold.ctl("vm create vm1 --customer acme");
        vold.ctl("volume create acme/vol --size 40M --replicas 2");
        let uri = vold.attach("acme/vol", "vm1");
        // Space that still waits for its scrub is waited for, not refused.
        let mut client = Client::connect(&uri);
        for i in 0..40u64 {
            client.write(i << 20, &bytes(500 + i, 1 << 20)).unwrap();
        }
        client.flush().unwrap();
        drop(client);
        vold.wait_until_scrubbed(&["x", "y"]);
        vold.kill();
        vold.restart();
        let mut client = Client::connect(&uri);
        for i in 0..40u64 {
            assert!(client.read(i << 20, 1 << 20).unwrap() == bytes(500 + i, 1 << 20));
        }
        drop(client);
        vold.destroy("acme/vol");
        vold.stop();
        for device in &devices {
            let raw = RawStore::open(device.path());
            for extent in raw.extents() {
                assert_eq!(extent.state, State::Free);
                let data = raw.bytes(raw.data_at(extent.physical), raw.extent_bytes() as usize);
                assert!(
                    data.iter().all(|byte| *byte == 0),
                    "{extent:?} still holds old data"
                );
            }
        }
        vold.check_is_clean();
    }
}

#[test]
fn extents_of_a_device_are_not_free_before_they_are_overwritten_and_read_back() {
    let vold = Vold::start();
    let path = vold.path("x");
    let file = File::create(&path).unwrap();
    file.set_len(96 << 20).unwrap();
    for i in 1..96u64 {
        file.write_all_at(&bytes(i, 1 << 20), i << 20).unwrap();
    }
    let device = LoopDevice::over(&path);
    let store = vold.ctl(&format!("store add x --path {}", device.path().display()));
    let of = |store: &serde_json::Value, field: &str| store[field].as_u64().unwrap();
    assert!(
        of(&store, "free_bytes") + of(&store, "pending_scrub_bytes") == of(&store, "total_bytes"),
        "{store}"
    );
    vold.wait_until_scrubbed(&["x"]);
    let store = vold.store("x");
    assert_eq!(store["free_bytes"], store["total_bytes"]);
}

#[test]
fn a_device_in_use_is_busy_and_nobody_is_told_to_clear_it() {
    let vold = Vold::start();
    let refused = |device: &std::path::Path| {
        let refusal = vold.refused(&format!("store add n --path {}", device.display()));
        assert_eq!(refusal.code, "busy", "{refusal:?}");
        for word in [
            device.to_str().unwrap(),
            "mounted or in use by another process",
            "free it",
        ] {
            assert!(
                refusal.message.contains(word),
                "{word:?} is missing in: {refusal:?}"
            );
        }
        assert!(!refusal.message.contains("wipefs"), "{refusal:?}");
    };
    // Mounted: it holds a file system, but what matters is that it is in use.
    let mounted = Mounted::new(&vold.path("fs"), 128 << 20, &vold.path("mnt"));
    std::fs::write(vold.path("mnt/file"), "somebody's").unwrap();
    refused(mounted.device());
    assert_eq!(std::fs::read(vold.path("mnt/file")).unwrap(), b"somebody's");
    drop(mounted);

    // Another vold's store.
    let other = Vold::start();
    let path = other.path("x");
    File::create(&path).unwrap().set_len(96 << 20).unwrap();
    let device = LoopDevice::over(&path);
    other.ctl(&format!("store add x --path {}", device.path().display()));
    refused(device.path());
    assert_eq!(other.store("x")["state"], "online");

    // Once it is let go, what it holds is the reason.
    let mut other = other;
    other.stop();
    let refusal = vold.refused(&format!("store add n --path {}", device.path().display()));
    assert_eq!(refusal.code, "exists", "{refusal:?}");
    assert!(refusal.message.contains("a vold store"), "{refusal:?}");
    other.restart();
    assert_eq!(other.store("x")["state"], "online", "its store is as it was");
}

#[test]
fn a_store_on_a_read_only_place_stays_offline_until_it_can_be_written() {
    let mut vold = Vold::start();
    let mounted = Mounted::new(&vold.path("fs"), 160 << 20, &vold.path("mnt"));
    let place = vold.path("mnt/m.store");
    vold.ctl(&format!("store add m --path {} --size 96M", place.display()));
    vold.add_stores(&["a"], "96M");
    vold.stop();
    let offline = |vold: &Vold, name: &str, words: &[&str]| {
        let store = vold.store(name);
        assert_eq!(store["state"], "offline", "{store}");
        let reason = store["reason"].as_str().unwrap();
        for word in words {
            assert!(reason.contains(word), "{word:?} is missing in: {reason}");
        }
    };

    mounted.remount(true);
    std::fs::set_permissions(vold.store_path("a"), std::fs::Permissions::from_mode(0o400)).unwrap();
    vold.restart();
    offline(
        &vold,
        "m",
        &[place.to_str().unwrap(), "mounted read-only", "make it writable"],
    );
    offline(
        &vold,
        "a",
        &["store-a", "nobody has write permission", "make it writable"],
    );
    assert_eq!(vold.ctl("status")["warnings"].as_array().unwrap().len(), 2);
    let refusal = vold.refused(&format!(
        "store add n --path {} --size 64M",
        vold.path("mnt/n.store").display()
    ));
    assert_eq!(refusal.code, "read_only", "{refusal:?}");
    assert!(refusal.message.contains("n.store"), "{refusal:?}");
    vold.stop();

    mounted.remount(false);
    std::fs::set_permissions(vold.store_path("a"), std::fs::Permissions::from_mode(0o600)).unwrap();
    vold.restart();
    for name in ["m", "a"] {
        assert_eq!(vold.store(name)["state"], "online");
    }
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn store_show_says_what_kind_of_medium_it_is_and_by_what_it_knows() {
    let mut vold = Vold::start();
    let mounted = Mounted::new(&vold.path("fs"), 160 << 20, &vold.path("mnt"));
    vold.ctl(&format!(
        "store add m --path {} --size 96M",
        vold.path("mnt/m.store").display()
    ));
    let image = vold.path("x");
    File::create(&image).unwrap().set_len(96 << 20).unwrap();
    let device = LoopDevice::over(&image);
    vold.ctl(&format!("store add x --path {}", device.path().display()));
    // The layers from the top: a file system on a loop device, and a loop device. What is below is this machine's own.
    let device_name = |device: &std::path::Path| device.file_name().unwrap().to_str().unwrap().to_owned();
    let layers = [
        (
            "m",
            format!("ext4 on {} (loop) on ", device_name(mounted.device())),
        ),
        ("x", format!("{} (loop) on ", device_name(device.path()))),
    ];
    for (name, beginning) in layers {
        let store = vold.store(name);
        let class = store["medium"].as_str().unwrap();
        assert!(
            ["in_place", "not_in_place", "unknown"].contains(&class),
            "{store}"
        );
        let reason = store["medium_reason"].as_str().unwrap();
        assert!(reason.starts_with(&beginning), "{beginning:?}: {reason}");
    }
    vold.stop();
    drop(mounted);
    vold.restart();
    // A file system that is gone tells nothing.
    let store = vold.store("m");
    assert_eq!(
        (store["medium"].as_str(), store["medium_reason"].as_str()),
        (Some("unknown"), Some("the store is not open")),
        "{store}"
    );
}
