//! An old copy of a store, put back in its place, is told at the start: nothing of it is served, and nothing that was
//! destroyed since comes back.

use std::fs::{File, copy, rename};
use std::os::unix::net::UnixStream;

use libvol::catalog::{Catalog, StoreFault, StoreRecord};
use serde_json::Value;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::RawStore;
use vold_tests::tools::{succeed, texts, workspace_binary};
use vold_tests::vold::parse_uri;
use vold_tests::{Engine, Vold, wait_for};

const LEN: usize = 6 << 20;

/// Puts a copy of the store's file aside.
fn keep(vold: &Vold, store: &str, name: &str) {
    copy(vold.store_path(store), vold.path(name)).expect("a copy");
}

/// Puts what was kept in the store's place.
fn put_back(vold: &Vold, store: &str, name: &str) {
    copy(vold.path(name), vold.store_path(store)).expect("a copy");
}

fn write(uri: &str, seed: u64) {
    let mut client = Client::connect(uri);
    client.write(0, &bytes(seed, LEN)).unwrap();
    client.flush().unwrap();
}

/// Nobody gets anything over this URI but what was written with `newest`.
fn never_serves_but(uri: &str, newest: u64) {
    if UnixStream::connect(parse_uri(uri).0).is_ok() {
        assert!(Client::connect(uri).read(0, LEN).unwrap() == bytes(newest, LEN));
    }
}

fn replica<'a>(volume: &'a Value, store: &str) -> &'a Value {
    let mut replicas = volume["replicas"].as_array().expect("replicas").iter();
    replicas.find(|r| r["store"] == store).expect("the replica")
}

/// A stopped daemon whose volume was written twice, and a copy of store a from between, kept as `old`.
fn written_twice(engine: Engine, replicas: usize) -> (Vold, String) {
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(replicas, "128M", "32M");
    write(&uri, 1);
    vold.stop();
    keep(&vold, "a", "old");
    vold.restart();
    assert!(!vold.log().contains("OLD COPY"), "a restart is no rollback");
    write(&uri, 2);
    vold.stop();
    (vold, uri)
}

#[test]
fn an_old_copy_put_back_is_stale_and_never_served() {
    for engine in Engine::ALL {
        let (mut vold, uri) = written_twice(engine, 2);
        put_back(&vold, "a", "old");
        vold.restart();
        never_serves_but(&uri, 2);
        let volume = vold.volume("acme/vol");
        assert_eq!(replica(&volume, "b")["state"], "in_sync", "{volume}");
        assert_eq!(vold.store("a")["state"], "online", "the store itself is used on");
        let log = vold.log();
        assert!(
            log.contains("OLD COPY") && log.contains("needs a full copy"),
            "{log}"
        );
        wait_until_in_sync(&vold, "a", &uri);
        // It is told once.
        vold.stop();
        vold.check_is_clean();
        vold.restart();
        assert_eq!(vold.log().matches("OLD COPY").count(), 1);
        vold.stop();
        has_all_alone(&mut vold, "b", &uri);
    }
}

/// Waits until a replica has caught up; nothing old is served meanwhile.
fn wait_until_in_sync(vold: &Vold, store: &str, uri: &str) {
    wait_for("the replica is in sync again", || {
        never_serves_but(uri, 2);
        (replica(&vold.volume("acme/vol"), store)["state"] == "in_sync").then_some(())
    });
}

/// Without `other` (its file is emptied) the volume has what was written last.
fn has_all_alone(vold: &mut Vold, other: &str, uri: &str) {
    let file = File::options().write(true).open(vold.store_path(other)).unwrap();
    file.set_len(0).unwrap();
    vold.restart();
    assert!(Client::connect(uri).read(0, LEN).unwrap() == bytes(2, LEN));
}

#[test]
fn an_old_copy_that_comes_while_its_volumes_are_served_is_told_and_copied_to_in_full() {
    let (mut vold, uri) = written_twice(Engine::Uring, 2);
    // Away when the daemon starts: dropped with nothing missed but what is written from now on.
    rename(vold.store_path("a"), vold.path("right")).unwrap();
    vold.restart();
    let mut client = Client::connect(&uri);
    client.write(0, &bytes(2, LEN)[..4096]).unwrap();
    client.flush().unwrap();
    copy(vold.path("old"), vold.path("coming")).unwrap();
    rename(vold.path("coming"), vold.store_path("a")).unwrap();
    wait_until_in_sync(&vold, "a", &uri);
    assert!(vold.log().contains("OLD COPY"));
    drop(client);
    vold.stop();
    vold.check_is_clean();
    has_all_alone(&mut vold, "b", &uri);
}

#[test]
fn an_old_copy_that_an_operator_reopens_after_a_fault_is_told_and_copied_to_in_full() {
    let (mut vold, uri) = written_twice(Engine::Uring, 2);
    latch(&vold, "a");
    put_back(&vold, "a", "old");
    vold.restart();
    let mut client = Client::connect(&uri);
    client.write(0, &bytes(2, LEN)[..4096]).unwrap();
    assert_eq!(replica(&vold.volume("acme/vol"), "a")["state"], "away");
    assert!(!vold.log().contains("OLD COPY"), "nobody has opened it yet");
    assert_eq!(vold.ctl("store reopen a")["state"], "online");
    assert!(vold.log().contains("OLD COPY"));
    wait_until_in_sync(&vold, "a", &uri);
    drop(client);
    vold.stop();
    vold.check_is_clean();
    has_all_alone(&mut vold, "b", &uri);
}

/// As if the store's device had failed.
fn latch(vold: &Vold, store: &str) {
    let catalog = Catalog::open(&vold.data_dir().join("catalog.redb")).unwrap();
    catalog
        .write(|tx| {
            let mut record = tx.named::<StoreRecord>(store)?.expect("the store");
            record.fault = Some(StoreFault {
                reason: "sync: Input/output error".into(),
                since_unix_seconds: 1,
            });
            tx.update(&record)
        })
        .unwrap();
}

#[test]
fn a_check_names_an_old_copy_and_a_repair_takes_nothing_from_it() {
    let (mut vold, uri) = written_twice(Engine::Uring, 2);
    put_back(&vold, "a", "old");
    let report = vold.check_finds_damage();
    assert!(report.contains("store \"a\": is an old copy"), "{report}");
    let before = ["a", "b"].map(|name| std::fs::read(vold.store_path(name)).unwrap());
    let output = vold.check_command().arg("--repair").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = texts(&output).0;
    for words in [
        "not repaired: store \"a\": it is an old copy",
        "not repaired: volume acme/vol",
    ] {
        assert!(report.contains(words), "{words} is missing in: {report}");
    }
    let data = RawStore::open(&vold.store_path("b")).data_at(0) as usize;
    assert!(std::fs::read(vold.store_path("a")).unwrap() == before[0]);
    assert!(std::fs::read(vold.store_path("b")).unwrap()[data..] == before[1][data..]);
    vold.restart();
    wait_until_in_sync(&vold, "a", &uri);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_volume_with_nothing_but_an_old_copy_is_refused_until_the_operator_acts() {
    let (mut vold, uri) = written_twice(Engine::Uring, 1);
    keep(&vold, "a", "right");
    put_back(&vold, "a", "old");
    let is_refused = |vold: &Vold| {
        let volume = vold.volume("acme/vol");
        assert_eq!(volume["state"], "failed", "{volume}");
        assert_eq!(replica(&volume, "a")["state"], "in_sync", "{volume}");
        let reason = volume["reason"].as_str().unwrap();
        for word in ["old copy", "clear-fault", "\"a\""] {
            assert!(reason.contains(word), "{word} is missing in: {reason}");
        }
        assert_eq!(vold.refused("attach acme/vol --vm vm1").code, "unavailable");
        UnixStream::connect(parse_uri(&uri).0).expect_err("nothing is served");
        // Other volumes on the store are not concerned.
        let fresh = format!("acme/fresh-{}", vold.log().len());
        vold.ctl(&format!("volume create {fresh} --size 8M --replicas 1"));
    };
    vold.restart();
    is_refused(&vold);
    vold.stop();
    vold.restart();
    is_refused(&vold);
    vold.stop();
    // The right file is back. It is not the one that was opened last, so this takes a word, too.
    put_back(&vold, "a", "right");
    vold.restart();
    is_refused(&vold);
    vold.stop();
    let said = succeed(
        std::process::Command::new(workspace_binary("vold"))
            .args(["clear-fault", "--store", "a", "--data-dir"])
            .arg(vold.data_dir()),
    );
    assert!(said.contains("acme/vol"), "{said}");
    vold.restart();
    assert!(Client::connect(&uri).read(0, LEN).unwrap() == bytes(2, LEN));
}

#[test]
fn what_was_destroyed_does_not_come_back_with_an_old_copy() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    write(&uri, 1);
    vold.stop();
    for name in ["a", "b"] {
        keep(&vold, name, &format!("old-{name}"));
    }
    let id = {
        vold.restart();
        vold.destroy("acme/vol")
    };
    vold.stop();
    for name in ["a", "b"] {
        put_back(&vold, name, &format!("old-{name}"));
        assert!(RawStore::open(&vold.store_path(name)).slot(&id).is_some());
    }
    vold.restart();
    vold.wait_until_scrubbed(&["a", "b"]);
    assert!(vold.log().contains("was destroyed and is there again"));
    vold.stop();
    for name in ["a", "b"] {
        let raw = RawStore::open(&vold.store_path(name));
        assert!(raw.slot(&id).is_none(), "its keys are back");
        assert_eq!(raw.tombstone_count(), 1);
        assert!(
            raw.extents()
                .iter()
                .all(|e| e.state == vold_tests::raw::State::Free)
        );
    }
    vold.check_is_clean();
}

/// What the catalog of a running daemon says store a has committed, once it can be read.
fn floor(vold: &Vold) -> Option<u64> {
    let catalog = Catalog::open_copy(&vold.data_dir().join("catalog.redb")).ok()?;
    let store = catalog.read(|view| view.named::<StoreRecord>("a")).ok()??;
    Some(store.lineage.floor_lsn)
}

#[test]
fn a_copy_taken_while_writes_go_in_place_is_told_after_a_kill() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    let mut client = Client::connect(&uri);
    client.write_fua(0, b"old").unwrap();
    keep(&vold, "a", "old");
    let before = wait_for("the catalog can be read", || floor(&vold));
    // One block again and again, so that its extent stays dirty: the store commits nothing of its own.
    wait_for("the floor has risen", || {
        client.write_fua(0, b"new").unwrap();
        (floor(&vold)? > before).then_some(())
    });
    drop(client);
    vold.kill();
    put_back(&vold, "a", "old");
    vold.restart();
    assert!(vold.log().contains("OLD COPY"));
    if UnixStream::connect(parse_uri(&uri).0).is_ok() {
        assert_eq!(Client::connect(&uri).read(0, 3).unwrap(), b"new");
    }
}

#[test]
fn kills_and_restarts_are_no_rollback() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    for round in 0..4 {
        write(&uri, round);
        vold.kill();
        vold.restart();
        assert!(Client::connect(&uri).read(0, LEN).unwrap() == bytes(round, LEN));
    }
    assert!(!vold.log().contains("OLD COPY"));
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn stores_in_each_others_place_are_refused_and_nothing_is_lost() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    write(&uri, 1);
    vold.stop();
    let swap = |vold: &Vold| {
        std::fs::rename(vold.store_path("a"), vold.path("aside")).unwrap();
        std::fs::rename(vold.store_path("b"), vold.store_path("a")).unwrap();
        std::fs::rename(vold.path("aside"), vold.store_path("b")).unwrap();
    };
    swap(&vold);
    vold.restart();
    for name in ["a", "b"] {
        let store = vold.store(name);
        assert_eq!(store["state"], "offline", "{store}");
        let reason = store["reason"].as_str().unwrap();
        assert!(
            reason.contains("not the expected") && reason.contains("correct the path"),
            "{reason}"
        );
    }
    vold.stop();
    swap(&vold);
    vold.restart();
    assert!(!vold.log().contains("OLD COPY"));
    assert!(Client::connect(&uri).read(0, LEN).unwrap() == bytes(1, LEN));
}

#[test]
fn a_catalog_older_than_the_stores_does_not_make_them_old_copies() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    write(&uri, 1);
    vold.stop();
    let catalog = vold.data_dir().join("catalog.redb");
    copy(&catalog, vold.path("old-catalog")).unwrap();
    vold.restart();
    vold.stop();
    copy(&catalog, vold.path("catalog")).unwrap();
    copy(vold.path("old-catalog"), &catalog).unwrap();
    vold.restart();
    let store = vold.store("a");
    assert_eq!(store["state"], "offline", "{store}");
    let reason = store["reason"].as_str().unwrap();
    assert!(reason.contains("the catalog is an old copy"), "{reason}");
    assert!(reason.contains("vold rebuild-catalog"), "{reason}");
    vold.stop();
    copy(vold.path("catalog"), &catalog).unwrap();
    vold.restart();
    assert!(Client::connect(&uri).read(0, LEN).unwrap() == bytes(1, LEN));
    vold.stop();
    // The newer one is gone for good: the stores tell a new one what they are, and are known by it.
    std::fs::remove_file(&catalog).unwrap();
    vold.rebuild(&[vold.store_path("a"), vold.store_path("b")], &[]);
    keep(&vold, "a", "rebuilt");
    vold.restart();
    vold.ctl("vm create vm1 --customer acme");
    let uri = vold.attach("acme/vol", "vm1");
    write(&uri, 2);
    vold.stop();
    assert!(!vold.log().contains("OLD COPY"));
    put_back(&vold, "a", "rebuilt");
    vold.restart();
    wait_until_in_sync(&vold, "a", &uri);
    assert!(vold.log().contains("OLD COPY"));
}
