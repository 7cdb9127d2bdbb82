//! An old copy of a store, put back in its place, is told at the start: nothing of it is served, and nothing that was
//! destroyed since comes back.

use std::fs::copy;
use std::os::unix::net::UnixStream;

use libvol::catalog::{Catalog, StoreRecord};
use serde_json::Value;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::RawStore;
use vold_tests::tools::{succeed, workspace_binary};
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
        let volume = vold.volume("acme/vol");
        assert_eq!(replica(&volume, "a")["state"], "stale", "{volume}");
        assert_eq!(replica(&volume, "b")["state"], "in_sync", "{volume}");
        assert_eq!(vold.store("a")["state"], "online", "the store itself is used on");
        let log = vold.log();
        assert!(
            log.contains("OLD COPY") && log.contains("needs a full copy"),
            "{log}"
        );
        never_serves_but(&uri, 2);
        // It is told once, and what follows from it stays.
        vold.stop();
        vold.restart();
        let volume = vold.volume("acme/vol");
        assert_eq!(replica(&volume, "a")["state"], "stale", "{volume}");
        assert_eq!(vold.log().matches("OLD COPY").count(), 1);
        never_serves_but(&uri, 2);
    }
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
    let volume = vold.volume("acme/vol");
    assert_eq!(replica(&volume, "a")["state"], "stale", "{volume}");
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
    vold.stop();
    copy(vold.path("catalog"), &catalog).unwrap();
    vold.restart();
    assert!(Client::connect(&uri).read(0, LEN).unwrap() == bytes(1, LEN));
}
