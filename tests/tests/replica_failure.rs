//! A replica's store fails or is away: clients see nothing of it, everybody is told, and it catches up when it is back.
//!
//! How a store fails here: one is on a block device, the other in a file, and a limit on file sizes (`prlimit --fsize`)
//! makes the kernel refuse every write to the file beyond its first MiBs, as long as it stands.

use std::collections::BTreeSet;
use std::fs::File;

use rand::RngExt;
use vold_tests::content::{bytes, seeded};
use vold_tests::devices::LoopDevice;
use vold_tests::nbd::Client;
use vold_tests::tools::run;
use vold_tests::{Engine, Vold, wait_for};

const MIB: u64 = 1 << 20;

/// Store `a` on a device, store `b` in a file; `acme/vol` of 32 MiB on both, attached.
fn device_and_file(engine: Engine, file_size: &str) -> (Vold, LoopDevice, String) {
    let vold = Vold::start_on(engine);
    let image = vold.path("image");
    File::create(&image).unwrap().set_len(128 << 20).unwrap();
    let device = LoopDevice::over(&image);
    vold.ctl(&format!("store add a --path {}", device.path().display()));
    vold.ctl(&format!(
        "store add b --path {} --size {file_size}",
        vold.store_path("b").display()
    ));
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme");
    vold.ctl("volume create acme/vol --size 32M --replicas 2");
    let uri = vold.attach("acme/vol", "vm1");
    vold.wait_until_scrubbed(&["a", "b"]);
    (vold, device, uri)
}

fn limit_files(vold: &Vold, limit: &str) {
    run(
        "prlimit",
        [
            format!("--pid={}", vold.pid()),
            format!("--fsize={limit}:unlimited"),
        ],
    );
}

fn replica(vold: &Vold, store: &str) -> serde_json::Value {
    let volume = vold.volume("acme/vol");
    let mut replicas = volume["replicas"].as_array().unwrap().iter();
    replicas
        .find(|replica| replica["store"] == store)
        .unwrap()
        .clone()
}

fn wait_until_in_sync(vold: &Vold, store: &str) {
    wait_for("the replica is in sync again", || {
        (replica(vold, store)["state"] == "in_sync").then_some(())
    });
}

fn write_all(client: &mut Client, seed: u64) {
    for i in 0..32 {
        client.write(i * MIB, &bytes(seed + i, MIB as usize)).unwrap();
    }
    client.flush().unwrap();
}

fn reads_back(client: &mut Client, seed: u64) {
    for i in 0..32 {
        assert!(client.read(i * MIB, MIB as usize).unwrap() == bytes(seed + i, MIB as usize));
    }
}

#[test]
fn a_store_that_fails_writes_costs_its_replica_and_no_client_an_error_and_it_catches_up() {
    for engine in Engine::ALL {
        let (mut vold, _device, uri) = device_and_file(engine, "128M");
        let mut client = Client::connect(&uri);
        write_all(&mut client, 100);
        limit_files(&vold, &(8 * MIB).to_string());
        write_all(&mut client, 200);
        let out = replica(&vold, "b");
        assert!(out["state"] == "stale" || out["state"] == "resyncing", "{out}");
        assert!(!out["reason"].as_str().unwrap().is_empty(), "{out}");
        assert_eq!(replica(&vold, "a")["state"], "in_sync");
        assert_eq!(vold.volume("acme/vol")["state"], "attached");
        reads_back(&mut client, 200);
        // Marked, cleaned, and written again while it is out; and the daemon dies without a word.
        drop(client);
        vold.kill();
        vold.restart();
        let mut client = Client::connect(&uri);
        reads_back(&mut client, 200);
        write_all(&mut client, 300);
        wait_until_in_sync(&vold, "b");
        reads_back(&mut client, 300);
        drop(client);
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn a_store_that_is_away_at_the_start_is_served_without_and_catches_up_when_it_is_there_again() {
    let (mut vold, _device, uri) = device_and_file(Engine::Uring, "128M");
    let mut client = Client::connect(&uri);
    write_all(&mut client, 100);
    drop(client);
    vold.stop();
    let (here, elsewhere) = (vold.store_path("b"), vold.path("elsewhere"));
    std::fs::rename(&here, &elsewhere).unwrap();
    vold.restart();
    let mut client = Client::connect(&uri);
    reads_back(&mut client, 100);
    client.write(5 * MIB, &bytes(7, MIB as usize)).unwrap();
    client.flush().unwrap();
    let away = replica(&vold, "b");
    assert_eq!(away["state"], "away", "{away}");
    assert!(away["reason"].as_str().unwrap().contains("not in use"), "{away}");
    std::fs::rename(&elsewhere, &here).unwrap();
    wait_until_in_sync(&vold, "b");
    assert!(client.read(5 * MIB, MIB as usize).unwrap() == bytes(7, MIB as usize));
    drop(client);
    vold.stop();
    vold.check_is_clean();
    // Alone, the other one now has everything: it is in sync.
    let a = vold.path("image");
    File::options().write(true).open(&a).unwrap().set_len(0).unwrap();
    vold.restart();
    let mut client = Client::connect(&uri);
    assert!(client.read(5 * MIB, MIB as usize).unwrap() == bytes(7, MIB as usize));
}

#[test]
fn a_replica_is_written_no_more_than_it_missed_while_the_daemon_kept_running() {
    let (mut vold, _device, uri) = device_and_file(Engine::Uring, "128M");
    let mut client = Client::connect(&uri);
    write_all(&mut client, 100);
    limit_files(&vold, &(8 * MIB).to_string());
    // Blocks here and there, many of them more than once.
    let mut random = seeded("missed blocks");
    let mut missed = BTreeSet::new();
    for number in 0..3000u64 {
        let block = random.random_range(0..32 * MIB / 4096);
        client.write(block * 4096, &bytes(1000 + number, 4096)).unwrap();
        missed.insert(block);
    }
    client.flush().unwrap();
    assert_ne!(replica(&vold, "b")["state"], "in_sync");
    limit_files(&vold, "unlimited");
    wait_until_in_sync(&vold, "b");
    // The line comes a moment after the state. An attempt that met the limit again has copied some of it before.
    let attempts: Vec<u64> = wait_for("the log tells how much was copied", || {
        let log = vold.log();
        let told = log.lines().filter_map(|line| line.split("copied_bytes=").nth(1));
        let counts = told.map(|told| told.split_whitespace().next().unwrap().parse().unwrap());
        log.contains("in sync again").then(|| counts.collect())
    });
    let copied = *attempts.last().unwrap();
    let missed = missed.len() as u64 * 4096;
    println!(
        "missed {missed} bytes, copied {copied}: {:.3}",
        copied as f64 / missed as f64
    );
    assert!(copied * 10 <= missed * 11, "missed {missed}, copied {copied}");
    let in_all: u64 = attempts.iter().sum();
    assert!(in_all * 10 >= missed * 9, "missed {missed}, copied {attempts:?}");
    drop(client);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_faulty_store_is_out_of_use_until_an_operator_reopens_it_and_then_catches_up() {
    let (mut vold, _device, uri) = device_and_file(Engine::Uring, "16G");
    let mut client = Client::connect(&uri);
    write_all(&mut client, 100);
    let refused = vold.refused("store reopen b");
    assert!(refused.message.contains("not faulty"), "{refused:?}");
    // A store of that size has its log behind 32 MiB of slots: now it cannot write its metadata, and the catalog can.
    limit_files(&vold, &(20 * MIB).to_string());
    write_all(&mut client, 200);
    let show = |name: &str| vold.ctl(&format!("store show {name}"));
    wait_for("the store is faulty", || {
        let _ = vold
            .volctl("volume create acme/two --size 8M --replicas 2")
            .output();
        (show("b")["state"] == "faulty").then_some(())
    });
    let status = vold.ctl("status")["warnings"].to_string();
    assert!(status.contains("\\\"b\\\" is faulty"), "{status}");
    assert!(status.contains("acme/vol: its replica on store"), "{status}");
    // A resize does without it, too.
    vold.ctl("volume resize acme/vol --size 40M");
    // The device is well again; nobody uses the store before the operator says so.
    limit_files(&vold, "unlimited");
    write_all(&mut client, 300);
    assert_eq!(show("b")["state"], "faulty");
    assert_ne!(replica(&vold, "b")["state"], "in_sync");
    assert_eq!(vold.ctl("store reopen b")["state"], "online");
    wait_until_in_sync(&vold, "b");
    reads_back(&mut client, 300);
    drop(client);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn the_last_replica_in_sync_is_not_dropped_its_writes_fail_and_it_serves_again() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(1, "128M", "32M");
    let mut client = Client::connect(&uri);
    write_all(&mut client, 100);
    limit_files(&vold, &(8 * MIB).to_string());
    let failed = (0..32).filter(|i| client.write(i * MIB, &bytes(200 + i, MIB as usize)).is_err());
    assert!(failed.count() > 20, "writes beyond the limit fail");
    assert_eq!(replica(&vold, "a")["state"], "in_sync");
    limit_files(&vold, "unlimited");
    write_all(&mut client, 300);
    reads_back(&mut client, 300);
    drop(client);
    vold.stop();
    vold.check_is_clean();
}
