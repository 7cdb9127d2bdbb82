//! The integrity scrub finds and repairs damage that no client has read, tells exactly what it found, survives restarts,
//! and leaves clients alone.

use std::sync::atomic::{AtomicBool, Ordering};

use rand::RngExt;
use serde_json::Value;
use vold_tests::content::{bytes, seeded};
use vold_tests::nbd::{Client, EIO};
use vold_tests::raw::RawStore;
use vold_tests::tools::{run, same_bytes};
use vold_tests::{Engine, Vold, wait_for};

const SIZE: usize = 24 << 20;

/// A filled volume of two replicas on a stopped daemon.
fn stopped(engine: Engine) -> (Vold, String, String) {
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(2, "128M", &SIZE.to_string());
    std::fs::write(vold.path("plain"), bytes(4, SIZE)).unwrap();
    run("nbdcopy", ["--flush", vold.path("plain").to_str().unwrap(), &uri]);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    vold.check_is_clean();
    (vold, uri, id)
}

/// Flips bytes of blocks in either store.
fn damage(vold: &Vold, id: &str, in_a: &[u64], in_b: &[u64]) {
    for (store, blocks) in [("a", in_a), ("b", in_b)] {
        let raw = RawStore::open(&vold.store_path(store));
        let extents = raw.extents_of(raw.slot(id).unwrap().dataset);
        let per_extent = raw.extent_bytes() / 4096;
        for block in blocks {
            let physical = extents[&((block / per_extent) as u32)];
            raw.flip(raw.data_at(physical) + block % per_extent * 4096 + 7, 3);
        }
    }
}

fn status(vold: &Vold, volume: &str) -> Value {
    let all = vold.ctl("scrub status");
    let items = all["items"].as_array().unwrap();
    let found = items.iter().find(|scrub| scrub["volume"] == volume);
    found
        .unwrap_or_else(|| panic!("{volume} is not in {all}"))
        .clone()
}

/// Waits until a volume's scrub is idle; gives its status.
fn finished(vold: &Vold, volume: &str) -> Value {
    wait_for("the scrub ends", || {
        let status = status(vold, volume);
        (status["state"] == "idle").then_some(status)
    })
}

#[track_caller]
fn found(status: &Value, healed_blocks: u64, healed_areas: u64, lost_blocks: u64) {
    let counts = ["healed_blocks", "healed_areas", "lost_blocks"].map(|name| status[name].as_u64().unwrap());
    assert_eq!(counts, [healed_blocks, healed_areas, lost_blocks], "{status}");
}

#[test]
fn damage_in_either_store_is_repaired_without_any_read_and_counted_exactly() {
    for engine in Engine::ALL {
        let (mut vold, uri, id) = stopped(engine);
        damage(&vold, &id, &[0, 77, 1023, 1024, 3000], &[5, 6, 7, 2048, 5000]);
        let a = RawStore::open(&vold.store_path("a"));
        let physical = a.extents_of(a.slot(&id).unwrap().dataset)[&4];
        a.flip(a.sums_at(physical) + 512, 400);
        vold.check_finds_damage();
        vold.restart();
        let asked = vold.ctl("scrub start acme/vol");
        assert_eq!(asked["items"].as_array().unwrap().len(), 1, "{asked}");
        let status = finished(&vold, "acme/vol");
        found(&status, 10, 1, 0);
        assert_eq!(status["pass"], 1, "{status}");
        let stored = 2 * vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
        for bytes in ["bytes_done", "bytes_total", "verified_bytes"] {
            assert_eq!(status[bytes], stored, "{status}");
        }
        assert!(status["last_finished_unix_seconds"].as_u64() >= status["started_unix_seconds"].as_u64());
        let back = vold.path("back");
        run("nbdcopy", [&*uri, back.to_str().unwrap()]);
        assert!(same_bytes(&vold.path("plain"), &back));
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn a_volume_that_nobody_uses_is_opened_for_its_scrub_only_and_its_result_survives_a_restart() {
    let (mut vold, _, id) = stopped(Engine::Uring);
    vold.restart();
    vold.ctl("detach acme/vol --vm vm1");
    vold.ctl("volume create acme/empty --size 1G");
    vold.stop();
    // Two-sided damage of block 1500, one-sided of its neighbours.
    damage(&vold, &id, &[1499, 1500], &[1500, 1501]);
    vold.restart();
    assert_eq!(status(&vold, "acme/vol")["state"], "idle");
    assert_eq!(status(&vold, "acme/vol")["pass"], 0);
    assert_eq!(vold.ctl("scrub start")["items"].as_array().unwrap().len(), 2);
    let status_before = finished(&vold, "acme/vol");
    found(&status_before, 2, 0, 1);
    let empty = finished(&vold, "acme/empty");
    found(&empty, 0, 0, 0);
    assert_eq!((&empty["pass"], &empty["bytes_total"]), (&1.into(), &0.into()));
    assert_eq!(vold.volume("acme/vol")["state"], "available");
    let warnings = vold.ctl("status")["warnings"].to_string();
    assert!(
        warnings.contains("acme/vol") && warnings.contains("without a good copy"),
        "{warnings}"
    );
    vold.stop();
    vold.restart();
    assert_eq!(status(&vold, "acme/vol"), status_before, "as before the restart");
    // The whole block written anew is good again, and the next pass says so.
    let uri = vold.attach("acme/vol", "vm1");
    let mut client = Client::connect(&uri);
    assert_eq!(client.read(1500 * 4096, 4096), Err(EIO));
    client.write(1500 * 4096, &[9; 4096]).unwrap();
    client.disconnect();
    vold.ctl("scrub start acme/vol");
    let status_after = finished(&vold, "acme/vol");
    found(&status_after, 0, 0, 0);
    assert_eq!(status_after["pass"], 2);
    assert_eq!(vold.volume("acme/vol")["state"], "attached");
    // Its results go with the volume.
    vold.destroy("acme/vol");
    let left = vold.ctl("scrub status");
    assert_eq!(left["items"].as_array().unwrap().len(), 1, "{left}");
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_pass_goes_on_after_a_restart_where_it_was_and_takes_a_new_rate() {
    let (mut vold, _, _) = stopped(Engine::Uring);
    vold.restart();
    vold.ctl("detach acme/vol --vm vm1");
    // Slow enough not to reach the end by itself: hours.
    vold.ctl("scrub start acme/vol --rate 4K");
    let before = wait_for("a first chunk is verified", || {
        let status = status(&vold, "acme/vol");
        (status["bytes_done"].as_u64().unwrap() > 0).then_some(status)
    });
    assert_eq!(before["state"], "running");
    assert_eq!(before["bytes_per_second"], 4096);
    assert_eq!(before["bytes_total"], 2 * SIZE);
    vold.stop();
    vold.restart();
    let after = status(&vold, "acme/vol");
    assert_ne!(after["state"], "idle");
    assert_eq!(after["pass"], before["pass"]);
    assert!(after["bytes_done"].as_u64() >= before["bytes_done"].as_u64());
    assert_eq!(after["bytes_per_second"], 4096);
    // Attaching and detaching under it changes nothing.
    vold.attach("acme/vol", "vm1");
    vold.ctl("detach acme/vol --vm vm1");
    let asked = vold.ctl("scrub start acme/vol");
    assert_eq!(asked["items"][0]["bytes_per_second"], Value::Null);
    let status = finished(&vold, "acme/vol");
    assert_eq!(status["pass"], before["pass"]);
    assert_eq!(status["verified_bytes"], 2 * SIZE, "everything exactly once");
    // A slow one of another volume does not stand in the way of deletion.
    vold.ctl("scrub start acme/vol --rate 4K");
    vold.destroy("acme/vol");
    assert!(vold.ctl("scrub status")["items"].as_array().unwrap().is_empty());
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn scrubs_of_busy_and_of_idle_volumes_disturb_no_client_and_raise_no_false_alarm() {
    const BLOCKS: u64 = 6 << 20 >> 12;
    for engine in Engine::ALL {
        let mut vold = Vold::start_on(engine);
        let uri = vold.with_volume(2, "128M", "16M");
        vold.ctl("volume create acme/other --size 16M --replicas 2");
        let other = vold.attach("acme/other", "vm1");
        Client::connect(&other).write(0, &bytes(8, 8 << 20)).unwrap();
        vold.ctl("detach acme/other --vm vm1");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let load = scope.spawn(|| {
                let mut random = seeded("requests under a scrub");
                let mut client = Client::connect(&uri);
                let mut model = vec![None; BLOCKS as usize];
                while !stop.load(Ordering::Relaxed) {
                    let block = random.random_range(0..BLOCKS);
                    let (at, old) = (block * 4096, &mut model[block as usize]);
                    match random.random_range(0..8) {
                        0..=3 => {
                            let fresh = random.random::<u64>();
                            client.write(at, &bytes(fresh, 4096)).unwrap();
                            *old = Some(fresh);
                        }
                        4 => {
                            client.trim(at, 4096).unwrap();
                            *old = None;
                        }
                        5 => client.flush().unwrap(),
                        _ => {
                            let expected = old.map_or(vec![0; 4096], |seed| bytes(seed, 4096));
                            assert!(client.read(at, 4096).unwrap() == expected, "block {block}");
                        }
                    }
                }
            });
            for pass in 1..=5 {
                assert!(!load.is_finished(), "the client has failed");
                vold.ctl("scrub start");
                for volume in ["acme/vol", "acme/other"] {
                    let status = finished(&vold, volume);
                    found(&status, 0, 0, 0);
                    assert_eq!(status["pass"], pass);
                }
            }
            stop.store(true, Ordering::Relaxed);
            load.join().unwrap();
        });
        let volume = vold.volume("acme/vol");
        assert_eq!(
            (&volume["healed_blocks"], &volume["healed_areas"]),
            (&0.into(), &0.into())
        );
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn what_cannot_be_scrubbed_is_refused_or_says_why_it_waits() {
    let (mut vold, _, _) = stopped(Engine::Uring);
    vold.restart();
    vold.ctl("detach acme/vol --vm vm1");
    assert_eq!(vold.refused("scrub start acme/none").code, "not_found");
    let refusal = vold.refused("scrub start acme/vol --rate 1000");
    assert_eq!(refusal.code, "invalid");
    assert!(refusal.message.contains("4096"), "{refusal:?}");
    vold.stop();
    let (away, here) = (vold.path("away"), vold.store_path("b"));
    std::fs::rename(&here, &away).unwrap();
    vold.restart();
    vold.ctl("scrub start");
    let waiting = wait_for("the reason is told", || {
        let status = status(&vold, "acme/vol");
        status["reason"].is_string().then_some(status)
    });
    assert_eq!(waiting["state"], "queued");
    assert!(waiting["reason"].as_str().unwrap().contains("\"b\""), "{waiting}");
    vold.stop();
    std::fs::rename(&away, &here).unwrap();
    vold.restart();
    found(&finished(&vold, "acme/vol"), 0, 0, 0);
    vold.stop();
    vold.check_is_clean();
}
