//! Stores are emptied: drained while their volumes serve, or given up as lost. Nothing acknowledged is missing afterwards, and
//! nothing of a volume is left on a store that was drained.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::RawStore;
use vold_tests::tools::{succeed, tool};
use vold_tests::{Engine, Vold, wait_for};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 32 * MIB;

fn add_store(vold: &Vold, name: &str) {
    let path = vold.store_path(name);
    vold.ctl(&format!("store add {name} --path {} --size 128M", path.display()));
}

/// Stores `a` and `b`, `acme/vol` on both, attached, and full of `seed`'s bytes; then an empty store `c`.
fn two_and_one_empty(engine: Engine) -> (Vold, String) {
    let vold = Vold::start_on(engine);
    let uri = vold.with_volume(2, "128M", "32M");
    let mut client = Client::connect(&uri);
    write_all(&mut client, 100);
    add_store(&vold, "c");
    (vold, uri)
}

fn write_all(client: &mut Client, seed: u64) {
    for i in 0..VOLUME / MIB {
        client.write(i * MIB, &bytes(seed + i, MIB as usize)).unwrap();
    }
    client.flush().unwrap();
}

fn reads_back(client: &mut Client, seed: u64) {
    for i in 0..VOLUME / MIB {
        assert!(client.read(i * MIB, MIB as usize).unwrap() == bytes(seed + i, MIB as usize));
    }
}

/// Store and state of each replica, by store.
fn replicas(vold: &Vold) -> Vec<(String, String)> {
    let volume = vold.volume("acme/vol");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let replicas = volume["replicas"].as_array().unwrap().iter();
    let mut replicas: Vec<_> = replicas.map(|r| (text(&r["store"]), text(&r["state"]))).collect();
    replicas.sort();
    replicas
}

fn wait_until_on(vold: &Vold, stores: &[&str]) {
    let wanted: Vec<_> = stores
        .iter()
        .map(|s| ((*s).to_owned(), "in_sync".to_owned()))
        .collect();
    wait_for("the replicas are where they should be", || {
        (replicas(vold) == wanted).then_some(())
    });
}

fn state(vold: &Vold, store: &str) -> String {
    vold.ctl(&format!("store show {store}"))["state"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Every data extent reads as zeros, and neither slot of the volume is there.
fn holds_nothing(vold: &Vold, store: &str, volume_id: &str) {
    let raw = RawStore::open(&vold.store_path(store));
    assert!(raw.slot(volume_id).is_none());
    let extents = raw.extents();
    for physical in 0..extents.len() as u32 {
        let data = raw.bytes(raw.data_at(physical), raw.extent_bytes() as usize);
        assert!(
            data.iter().all(|byte| *byte == 0),
            "extent {physical} is not zero"
        );
    }
}

#[test]
fn a_drained_store_gives_its_replicas_up_while_fio_verifies_and_keeps_nothing() {
    for engine in Engine::ALL {
        let (mut vold, uri) = two_and_one_empty(engine);
        let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
        let drained = Arc::new(AtomicBool::new(false));
        let verifying = {
            let (uri, drained, directory) = (uri.clone(), drained.clone(), vold.path(""));
            std::thread::spawn(move || {
                let mut rounds = 0;
                while rounds < 2 || !drained.load(Ordering::Acquire) {
                    succeed(
                        tool("fio")
                            .current_dir(&directory)
                            .args(["--name=verify", "--ioengine=nbd", "--rw=randrw", "--iodepth=16"])
                            .args(["--bssplit=4k/60:64k/40", "--size=16M", "--verify=crc32c"])
                            .args(["--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0"])
                            .args(["--output-format=terse", "--fsync=64"])
                            .arg(format!("--uri={uri}")),
                    );
                    rounds += 1;
                }
            })
        };
        let shown = vold.ctl("store drain a --wait");
        assert_eq!(shown["state"], "drained", "{shown}");
        assert_eq!(shown["replicas"], 0);
        assert_eq!(shown["allocated_bytes"], 0);
        drained.store(true, Ordering::Release);
        verifying.join().unwrap();
        wait_until_on(&vold, &["b", "c"]);
        let mut client = Client::connect(&uri);
        write_all(&mut client, 200);
        // New volumes do not go there.
        vold.ctl("volume create acme/other --size 8M --replicas 2");
        assert_eq!(vold.ctl("store show a")["replicas"], 0);
        drop(client);
        vold.stop();
        vold.check_is_clean();
        holds_nothing(&vold, "a", &id);
        vold.restart();
        reads_back(&mut Client::connect(&uri), 200);
        vold.ctl("store remove a");
        vold.stop();
        vold.check_is_clean();
        vold.restart();
        reads_back(&mut Client::connect(&uri), 200);
        // A volume that has moved is destroyed like any other.
        vold.ctl("detach acme/vol --vm vm1");
        vold.ctl("volume delete acme/vol --now");
        vold.ctl(&format!("destroy wait {id}"));
        vold.stop();
        for store in ["b", "c"] {
            assert!(RawStore::open(&vold.store_path(store)).slot(&id).is_none());
        }
    }
}

#[test]
fn a_single_replica_moves_too_and_one_without_a_place_to_go_says_so_and_stays() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(1, "128M", "32M");
    write_all(&mut Client::connect(&uri), 100);
    assert_eq!(vold.ctl("store drain a")["state"], "draining");
    let reason = wait_for("the reason is shown", || {
        let shown = vold.ctl("store show a");
        let reason = shown["reason"].as_str().unwrap_or_default().to_owned();
        reason.contains("acme/vol").then_some(reason)
    });
    assert!(
        reason.contains("1 replica still") && reason.contains("add one"),
        "{reason}"
    );
    let status = vold.ctl("status");
    assert!(
        status["warnings"].to_string().contains("being drained"),
        "{status}"
    );
    let refused = vold.refused("store remove a");
    assert!(refused.message.contains("store drain a"), "{refused:?}");
    // It is called off, asked for again, and goes on once there is a store.
    assert_eq!(vold.ctl("store drain a --cancel")["state"], "online");
    vold.ctl("store drain a");
    add_store(&vold, "b");
    wait_until_on(&vold, &["b"]);
    wait_for("nothing is left on the old one", || {
        (state(&vold, "a") == "drained").then_some(())
    });
    reads_back(&mut Client::connect(&uri), 100);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_move_goes_on_after_kill_9_whenever_it_comes() {
    let (mut vold, uri) = two_and_one_empty(Engine::Uring);
    vold.ctl("store drain a");
    for pause in [0, 100, 400, 700, 1000, 1300] {
        std::thread::sleep(std::time::Duration::from_millis(pause));
        let mut client = Client::connect(&uri);
        client.write(3 * MIB, &bytes(103, MIB as usize)).unwrap();
        vold.kill();
        vold.restart();
        reads_back(&mut Client::connect(&uri), 100);
    }
    wait_until_on(&vold, &["b", "c"]);
    wait_for("nothing is left on the old one", || {
        (state(&vold, "a") == "drained").then_some(())
    });
    reads_back(&mut Client::connect(&uri), 100);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    vold.check_is_clean();
    holds_nothing(&vold, "a", &id);
}

#[test]
fn a_lost_store_is_replaced_from_the_others_and_forgotten_and_not_used_when_it_returns() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    write_all(&mut Client::connect(&uri), 100);
    let single = vold.ctl("volume create acme/single --size 8M --replicas 1");
    let lost = single["replicas"][0]["store"].as_str().unwrap().to_owned();
    add_store(&vold, "c");
    let refused = vold.refused(&format!("store remove {lost} --lost"));
    assert!(refused.message.contains("in use, not lost"), "{refused:?}");
    vold.stop();
    let (here, elsewhere) = (vold.store_path(&lost), vold.path("elsewhere"));
    std::fs::rename(&here, &elsewhere).unwrap();
    vold.restart();
    let refused = vold.refused(&format!("store remove {lost} --lost"));
    assert!(refused.message.contains("acme/single"), "{refused:?}");
    vold.ctl("volume delete acme/single --now");
    vold.ctl(&format!("store remove {lost} --lost"));
    let mut left = vec!["a", "b", "c"];
    left.retain(|store| *store != lost);
    wait_until_on(&vold, &left);
    wait_for("it is forgotten", || {
        let stores = vold.ctl("store list");
        let mut names = stores["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|store| &store["name"]);
        names.all(|name| name != lost.as_str()).then_some(())
    });
    let jobs = vold.ctl("destroy list");
    assert_eq!(jobs["items"][0]["state"], "destroyed", "{jobs}");
    assert_eq!(jobs["items"][0]["stores"][0]["state"], "lost", "{jobs}");
    let mut client = Client::connect(&uri);
    reads_back(&mut client, 100);
    write_all(&mut client, 200);
    drop(client);
    // It is back: nobody looks at it.
    std::fs::rename(&elsewhere, &here).unwrap();
    vold.stop();
    vold.check_is_clean();
    vold.restart();
    reads_back(&mut Client::connect(&uri), 200);
    let refused = vold.refused(&format!("store add {lost} --path {} --size 128M", here.display()));
    assert!(refused.message.contains("exists already"), "{refused:?}");
    assert_eq!(vold.ctl("status")["warnings"].as_array().unwrap().len(), 0);
}

/// A daemon whose resync is slow enough to be met on its way.
fn restart_slowly(vold: &mut Vold) {
    let config = vold.path("vold.toml");
    std::fs::write(&config, "[resync]\nbytes_per_second = 4194304\n").unwrap();
    let mut command = vold.serve_command();
    command.arg("--config").arg(config);
    vold.restart_with(command);
}

#[test]
fn a_drain_that_is_called_off_half_way_leaves_nothing_on_the_store_that_was_to_take_over() {
    let (mut vold, uri) = two_and_one_empty(Engine::Uring);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    restart_slowly(&mut vold);
    vold.ctl("store drain a");
    wait_for("some of it is copied", || {
        (vold.ctl("store show c")["allocated_bytes"].as_u64().unwrap() >= 8 * MIB).then_some(())
    });
    vold.ctl("store drain a --cancel");
    // What was copied is given up, through two deaths of the daemon.
    for _ in 0..2 {
        vold.kill();
        restart_slowly(&mut vold);
    }
    wait_until_on(&vold, &["a", "b"]);
    wait_for("nothing is left on the third", || {
        let shown = vold.ctl("store show c");
        (shown["free_bytes"] == shown["total_bytes"]).then_some(())
    });
    reads_back(&mut Client::connect(&uri), 100);
    vold.stop();
    vold.check_is_clean();
    holds_nothing(&vold, "c", &id);
}

#[test]
fn two_volumes_on_the_move_are_not_promised_the_same_room() {
    let mut vold = Vold::start();
    let first = vold.with_volume(1, "256M", "64M");
    vold.ctl("volume create acme/two --size 64M --replicas 1");
    let second = vold.attach("acme/two", "vm1");
    for uri in [&first, &second] {
        let mut client = Client::connect(uri);
        for i in 0..64 {
            client.write(i * MIB, &bytes(i, MIB as usize)).unwrap();
        }
        client.flush().unwrap();
    }
    // Each has room for one of them.
    for name in ["b", "c"] {
        let path = vold.store_path(name);
        vold.ctl(&format!("store add {name} --path {} --size 100M", path.display()));
    }
    vold.stop();
    restart_slowly(&mut vold);
    vold.ctl("store drain a");
    wait_for("both are on their way, to a store each", || {
        let on = |store: &str| {
            vold.ctl(&format!("store show {store}"))["replicas"]
                .as_u64()
                .unwrap()
        };
        assert!(on("b") <= 1 && on("c") <= 1);
        (on("b") == 1 && on("c") == 1).then_some(())
    });
    vold.stop();
    vold.check_is_clean();
}
