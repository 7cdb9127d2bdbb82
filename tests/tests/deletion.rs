//! Deleting a volume overwrites its keys and every extent of every replica before the space is free, whatever interrupts
//! it, and nothing of it comes back.

use std::time::Duration;

use rand::RngExt;
use vold_tests::content::{bytes, seeded};
use vold_tests::nbd::Client;
use vold_tests::raw::{RawStore, State};
use vold_tests::{Engine, Vold, scale, wait_for};

/// Fills the first `mebibytes` of the volume; free bytes of store a before.
fn filled(vold: &Vold, uri: &str, mebibytes: u64) {
    let mut client = Client::connect(uri);
    for i in 0..mebibytes {
        client.write(i << 20, &bytes(i, 1 << 20)).unwrap();
    }
    client.flush().unwrap();
    assert!(vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap() >= mebibytes << 20);
}

/// Every extent of a stopped daemon's store is free, and its data and checksum area are zeros.
#[track_caller]
fn all_zero(vold: &Vold, store: &str) {
    let raw = RawStore::open(&vold.store_path(store));
    for extent in raw.extents() {
        assert_eq!(extent.state, State::Free, "store {store}: {extent:?}");
        let data = raw.bytes(raw.data_at(extent.physical), raw.extent_bytes() as usize);
        assert!(
            data.iter().all(|byte| *byte == 0),
            "store {store}: {extent:?} holds data"
        );
        let sums = raw.bytes(raw.sums_at(extent.physical), raw.sum_area_bytes() as usize);
        assert!(
            sums.iter().all(|byte| *byte == 0),
            "store {store}: {extent:?} holds sums"
        );
    }
}

#[test]
fn a_destroyed_volume_leaves_zeros_on_every_raw_store_and_its_space_is_free_again() {
    for (engine, replicas) in [(Engine::Uring, 3), (Engine::Threads, 2)] {
        let mut vold = Vold::start_on(engine);
        let uri = vold.with_volume(replicas, "128M", "64M");
        let stores = &["a", "b", "c"][..replicas];
        let free = vold.store("a")["free_bytes"].clone();
        filled(&vold, &uri, 40);
        assert_ne!(vold.store("a")["free_bytes"], free);
        let id = vold.destroy("acme/vol");

        let shown = vold.ctl(&format!("destroy show {id}"));
        assert_eq!(shown["state"], "destroyed");
        let parts = shown["stores"].as_array().unwrap();
        assert_eq!(parts.len(), replicas);
        for part in parts {
            assert_eq!(part["state"], "done", "{shown}");
            assert!(part["extents"].as_u64().unwrap() >= 10, "{shown}");
            assert_eq!(part["bytes_done"], part["bytes_total"], "{shown}");
            assert!(part["bytes_total"].as_u64().unwrap() > 40 << 20, "{shown}");
        }
        for store in stores {
            let shown = vold.store(store);
            assert_eq!(shown["free_bytes"], free, "{shown}");
            assert_eq!(shown["allocated_bytes"], 0, "{shown}");
            assert_eq!(shown["pending_scrub_bytes"], 0, "{shown}");
        }
        assert_eq!(vold.refused("volume show acme/vol").code, "not_found");
        assert!(vold.ctl("volume list")["items"].as_array().unwrap().is_empty());
        vold.stop();
        for store in stores {
            all_zero(&vold, store);
        }
        vold.check_is_clean();
    }
}

#[test]
fn killed_at_random_points_a_destruction_goes_on_at_the_next_start_and_completes() {
    let mut random = seeded("kill points");
    for round in 0..scale(4, 20) {
        let mut vold = Vold::start();
        let uri = vold.with_volume(2, "256M", "160M");
        filled(&vold, &uri, scale(100, 150));
        vold.ctl("detach acme/vol --vm vm1");
        let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
        // Now and then the very request is cut off.
        let mut request = vold.volctl("volume delete acme/vol --now");
        let mut request = request
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        if round % 2 == 0 {
            request.wait().unwrap();
        }
        let mut kills = 0;
        for _ in 0..scale(3, 6) {
            std::thread::sleep(Duration::from_micros(random.random_range(0..60_000)));
            vold.kill();
            kills += 1;
            vold.restart();
            // A volume whose destruction was recorded is not usable in between.
            if vold
                .volctl("volume show acme/vol")
                .output()
                .unwrap()
                .status
                .success()
            {
                let shown = vold.ctl("volume list");
                println!("round {round}, kill {kills}: {shown}");
            }
        }
        let _ = request.wait();
        // The request may have been cut off before anything was recorded: then the volume is whole, and deleted now.
        let recorded = !vold.ctl("destroy list")["items"].as_array().unwrap().is_empty();
        if !recorded {
            let uri = vold.attach("acme/vol", "vm1");
            assert!(
                Client::connect(&uri).read(5 << 20, 1 << 20).unwrap() == bytes(5, 1 << 20),
                "a volume that is not being destroyed is whole"
            );
            vold.ctl("detach acme/vol --vm vm1");
            vold.ctl("volume delete acme/vol --now");
        }
        let done = vold.ctl(&format!("destroy wait {id} --timeout 110s"));
        assert_eq!(done["state"], "destroyed");
        vold.wait_until_scrubbed(&["a", "b"]);
        // Its name and its space can be used again at once.
        vold.ctl("volume create acme/vol --size 160M --replicas 2");
        let uri = vold.attach("acme/vol", "vm1");
        let mut client = Client::connect(&uri);
        for i in (0..100).step_by(9) {
            assert!(
                client
                    .read(i << 20, 1 << 20)
                    .unwrap()
                    .iter()
                    .all(|byte| *byte == 0),
                "something came back"
            );
        }
        drop(client);
        vold.destroy("acme/vol");
        vold.stop();
        all_zero(&vold, "a");
        all_zero(&vold, "b");
        vold.check_is_clean();
    }
}

#[test]
fn a_replica_that_is_away_is_waited_for_and_finished_when_it_returns() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "64M");
    filled(&vold, &uri, 20);
    vold.ctl("detach acme/vol --vm vm1");
    vold.stop();
    let (path, aside) = (vold.store_path("b"), vold.path("aside"));
    std::fs::rename(&path, &aside).unwrap();
    vold.restart();
    let destroy = vold.ctl("volume delete acme/vol --now");
    let id = destroy["volume_id"].as_str().unwrap().to_owned();
    let of = |shown: &serde_json::Value, store: &str| {
        let parts = shown["stores"].as_array().unwrap();
        parts.iter().find(|part| part["store"] == store).unwrap()["state"].clone()
    };
    wait_for("store a is done and b is away", || {
        let shown = vold.ctl(&format!("destroy show {id}"));
        assert_eq!(
            shown["state"], "destroying",
            "nothing is called destroyed while a replica is away"
        );
        (of(&shown, "a") == "done" && of(&shown, "b") == "away").then_some(())
    });
    let refusal = vold.refused(&format!("destroy wait {id} --timeout 1s"));
    assert!(refusal.message.contains("\"b\""), "{refusal:?}");
    vold.stop();
    std::fs::rename(&aside, &path).unwrap();
    vold.restart();
    let done = vold.ctl(&format!("destroy wait {id} --timeout 110s"));
    assert_eq!(done["state"], "destroyed");
    vold.stop();
    all_zero(&vold, "a");
    all_zero(&vold, "b");
    vold.check_is_clean();
}

#[test]
fn other_volumes_are_untouched_while_one_is_destroyed() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "256M", "64M");
    filled(&vold, &uri, 60);
    vold.ctl("volume create acme/other --size 32M --replicas 2");
    let other = vold.attach("acme/other", "vm1");
    let mut client = Client::connect(&other);
    vold.ctl("detach acme/vol --vm vm1");
    let id = vold.ctl("volume delete acme/vol --now")["volume_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for i in 0..32u64 {
        client.write(i << 20, &bytes(1000 + i, 1 << 20)).unwrap();
    }
    client.flush().unwrap();
    vold.ctl(&format!("destroy wait {id} --timeout 110s"));
    for i in 0..32u64 {
        assert!(client.read(i << 20, 1 << 20).unwrap() == bytes(1000 + i, 1 << 20));
    }
    drop(client);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn delete_without_now_is_refused_until_there_is_a_recycle_bin() {
    let vold = Vold::start();
    vold.with_volume(1, "128M", "8M");
    vold.ctl("detach acme/vol --vm vm1");
    let refusal = vold.refused("volume delete acme/vol");
    assert!(refusal.message.contains("--now"), "{refusal:?}");
    assert_eq!(vold.volume("acme/vol")["state"], "available");
}
