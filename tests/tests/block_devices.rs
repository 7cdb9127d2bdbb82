//! Block devices as stores: everything that was on them is overwritten before it is used, and what volumes leave is too.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vold_tests::content::bytes;
use vold_tests::devices::LoopDevice;
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
