//! `vold check --repair` puts right what has a good copy somewhere, says what it did and what is left, and leaves a store
//! that a check finds clean.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vold_tests::content::bytes;
use vold_tests::nbd::{Client, EIO};
use vold_tests::raw::{RawStore, State};
use vold_tests::tools::texts;
use vold_tests::{Vold, wait_for};

const MEBIBYTES: u64 = 12;

/// `acme/vol` with data on that many stores, stopped and clean; its id and URI.
fn stopped(replicas: usize) -> (Vold, String, String) {
    let mut vold = Vold::start();
    let uri = vold.with_volume(replicas, "128M", "24M");
    let mut client = Client::connect(&uri);
    for i in 0..MEBIBYTES {
        client.write(i << 20, &bytes(i, 1 << 20)).unwrap();
    }
    client.flush().unwrap();
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    vold.check_is_clean();
    (vold, id, uri)
}

#[track_caller]
fn reads_as_written(uri: &str) {
    let mut client = Client::connect(uri);
    for i in 0..MEBIBYTES {
        assert!(
            client.read(i << 20, 1 << 20).unwrap() == bytes(i, 1 << 20),
            "MiB {i}"
        );
    }
}

/// Physical extent of a logical one.
fn physical(raw: &RawStore, id: &str, logical: u32) -> u32 {
    raw.extents_of(raw.slot(id).unwrap().dataset)[&logical]
}

/// The first free extent at or after `from`.
fn free(raw: &RawStore, from: u32) -> u32 {
    let mut extents = raw.extents().into_iter();
    let free = extents.find(|e| e.state == State::Free && e.physical >= from);
    free.expect("a free extent").physical
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
    file.sync_all().unwrap();
}

fn repair(vold: &Vold, status: i32) -> String {
    let output = vold.check_command().arg("--repair").output().unwrap();
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(status), "{out}{err}");
    assert!(!err.contains("panicked"), "{err}");
    out
}

#[test]
fn a_sound_installation_stays_as_it_is() {
    let (mut vold, _, uri) = stopped(2);
    let before = ["a", "b"].map(|name| RawStore::open(&vold.store_path(name)).extents());
    let report = repair(&vold, 0);
    assert!(
        report.contains("clean: no damage") && !report.contains("repaired"),
        "{report}"
    );
    assert!(report.contains("acme/vol: 3 extents verified"), "{report}");
    assert!(before == ["a", "b"].map(|name| RawStore::open(&vold.store_path(name)).extents()));
    vold.restart();
    reads_as_written(&uri);
}

#[test]
fn everything_that_has_a_good_copy_is_repaired_at_once_and_named() {
    let (mut vold, id, uri) = stopped(2);
    let [a, b] = ["a", "b"].map(|name| RawStore::open(&vold.store_path(name)));
    // Superblock copy B of a, one copy of a table page and of the volume's slot on b.
    put(&vold.store_path("a"), 65536 + 40, b"damaged");
    b.flip(b.table_region().0 + 2000, 8);
    b.flip(b.slot_region().0 + 700, 8);
    // Blocks and a checksum area, of either store, never both copies of the same.
    for (raw, logical, byte) in [(&a, 0, 4096 * 7), (&a, 1, 0), (&b, 2, 4096 * 100 + 5)] {
        raw.flip(raw.data_at(physical(raw, &id, logical)) + byte, 600);
    }
    b.flip(b.sums_at(physical(&b, &id, 1)) + 512, 400);
    // A free extent with something left in it, and a free one's checksum area.
    let first = free(&a, 0);
    put(
        &vold.store_path("a"),
        a.data_at(first) + (1 << 20),
        b"left behind",
    );
    put(
        &vold.store_path("a"),
        a.sums_at(free(&a, first + 1)),
        b"left behind",
    );
    let damage = vold.check_finds_damage();

    let report = repair(&vold, 0);
    for words in [
        "repaired: store \"a\": superblock copy B",
        "repaired: store \"b\": table page 0, copy 1",
        "slot 0, copy 1",
        "2 free extents overwritten",
        "3 blocks and 1 checksum areas healed, 0 blocks have no good copy",
        "clean: no damage found",
    ] {
        assert!(
            report.contains(words),
            "{words:?} is missing in:\n{report}\nbefore:\n{damage}"
        );
    }
    assert!(!report.contains("not repaired"), "{report}");
    vold.check_is_clean();
    let a = RawStore::open(&vold.store_path("a"));
    assert!(
        a.bytes(a.data_at(first), a.extent_bytes() as usize)
            .iter()
            .all(|byte| *byte == 0)
    );
    vold.restart();
    reads_as_written(&uri);
    assert_eq!(
        vold.volume("acme/vol")["healed_blocks"],
        0,
        "nothing was left to heal"
    );
}

#[test]
fn what_has_no_good_copy_is_left_named_and_everything_else_is_repaired_all_the_same() {
    let (mut vold, id, uri) = stopped(2);
    for name in ["a", "b"] {
        let raw = RawStore::open(&vold.store_path(name));
        raw.flip(raw.data_at(physical(&raw, &id, 1)) + 5 * 4096, 10);
    }
    let a = RawStore::open(&vold.store_path("a"));
    a.flip(a.data_at(physical(&a, &id, 1)) + 6 * 4096, 10);
    let report = repair(&vold, 1);
    assert!(
        report.contains("1 blocks and 0 checksum areas healed, 1 blocks have no good copy"),
        "{report}"
    );
    let left: Vec<&str> = report
        .split("checking again")
        .nth(1)
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("damage: "))
        .collect();
    assert_eq!(left.len(), 2, "one block, on two stores: {report}");
    assert!(left.iter().all(|line| line.contains("block 1029")), "{left:?}");
    vold.restart();
    let mut client = Client::connect(&uri);
    assert_eq!(client.read((4 << 20) + 5 * 4096, 4096), Err(EIO));
    assert!(client.read((4 << 20) + 6 * 4096, 4096).unwrap() == bytes(4, 1 << 20)[6 * 4096..7 * 4096]);
}

#[test]
fn after_kill_9_recovery_comes_to_its_end_and_leaves_no_marks() {
    let (mut vold, _, uri) = stopped(2);
    vold.restart();
    let mut client = Client::connect(&uri);
    for i in 0..MEBIBYTES {
        client.write(i << 20, &bytes(i, 1 << 20)).unwrap();
    }
    vold.kill();
    drop(client);
    let dirty = |vold: &Vold| {
        let raw = ["a", "b"].map(|name| RawStore::open(&vold.store_path(name)));
        raw.iter().flat_map(RawStore::extents).filter(|e| e.dirty).count()
    };
    assert!(dirty(&vold) > 0);
    let report = repair(&vold, 0);
    assert!(!report.contains("not repaired"), "{report}");
    assert_eq!(dirty(&vold), 0);
    vold.restart();
    reads_as_written(&uri);
}

/// `acme/vol` on a and b; b was away while MiBs 2 to 7 were written anew, and is there again. Killed: a has marks.
fn with_a_stale_replica() -> (Vold, String, String) {
    let (mut vold, id, uri) = stopped(2);
    let (here, elsewhere) = (vold.store_path("b"), vold.path("elsewhere"));
    fs::rename(&here, &elsewhere).unwrap();
    vold.restart();
    let mut client = Client::connect(&uri);
    for i in 2..8 {
        client.write(i << 20, &bytes(100 + i, 1 << 20)).unwrap();
    }
    client.flush().unwrap();
    vold.kill();
    fs::rename(&elsewhere, &here).unwrap();
    (vold, id, uri)
}

#[track_caller]
fn reads_as_written_anew(uri: &str) {
    let mut client = Client::connect(uri);
    for i in 0..MEBIBYTES {
        let seed = if (2..8).contains(&i) { 100 + i } else { i };
        assert!(
            client.read(i << 20, 1 << 20).unwrap() == bytes(seed, 1 << 20),
            "MiB {i}"
        );
    }
}

#[test]
fn a_stale_replica_takes_no_part_and_what_recovery_settled_without_it_reaches_it_later() {
    let (mut vold, id, uri) = with_a_stale_replica();
    let b = RawStore::open(&vold.store_path("b"));
    let data = |raw: &RawStore| {
        let bytes = raw.extent_bytes() as usize;
        [0, 1, 2].map(|logical| raw.bytes(raw.data_at(physical(raw, &id, logical)), bytes))
    };
    let before = data(&b);
    let report = repair(&vold, 0);
    assert!(
        report.contains("its replica on store \"b\" is out of sync")
            && report.contains("0 blocks and 0 checksum areas"),
        "{report}"
    );
    assert!(
        data(&RawStore::open(&vold.store_path("b"))) == before,
        "nothing is written to b"
    );
    let marks = RawStore::open(&vold.store_path("a"));
    assert!(
        marks.extents().iter().all(|extent| !extent.dirty),
        "recovered, without b"
    );
    vold.restart();
    reads_as_written_anew(&uri);
    wait_for("b is in sync again", || {
        let volume = vold.volume("acme/vol");
        let in_sync = |replica: &serde_json::Value| replica["state"] == "in_sync";
        volume["replicas"]
            .as_array()
            .unwrap()
            .iter()
            .all(in_sync)
            .then_some(())
    });
    vold.stop();
    vold.check_is_clean();
    // Alone, b has everything.
    let a = fs::OpenOptions::new()
        .write(true)
        .open(vold.store_path("a"))
        .unwrap();
    a.set_len(0).unwrap();
    vold.restart();
    reads_as_written_anew(&uri);
}

#[test]
fn damage_is_not_healed_from_a_stale_replica_though_its_older_copy_matches_its_own_checksum() {
    let (mut vold, id, uri) = with_a_stale_replica();
    // Settled first, so that the checksums on a are those of the newer blocks.
    repair(&vold, 0);
    let a = RawStore::open(&vold.store_path("a"));
    // MiB 2 is newer on a, MiB 9 is the same on both.
    a.flip(a.data_at(physical(&a, &id, 0)) + (2 << 20), 10);
    a.flip(a.data_at(physical(&a, &id, 2)) + (1 << 20), 10);
    let report = repair(&vold, 1);
    assert!(
        report.contains("0 blocks and 0 checksum areas healed, 2 blocks have no good copy"),
        "{report}"
    );
    vold.restart();
    let mut client = Client::connect(&uri);
    for lost in [2 << 20, 9 << 20] {
        assert_eq!(client.read(lost, 4096), Err(EIO), "never the older one");
    }
    assert!(client.read((2 << 20) + 4096, 4096).unwrap() == bytes(102, 1 << 20)[4096..8192]);
}

#[test]
fn a_store_that_cannot_be_opened_is_left_and_so_are_its_volumes_but_no_others() {
    let (mut vold, id, _) = stopped(2);
    vold.restart();
    vold.ctl("detach acme/vol --vm vm1");
    vold.add_stores(&["c"], "256M");
    vold.ctl("volume create acme/single --size 8M --replicas 1");
    vold.stop();
    let a = RawStore::open(&vold.store_path("a"));
    a.flip(a.data_at(physical(&a, &id, 0)), 10);
    let aside = vold.path("aside");
    fs::rename(vold.store_path("b"), &aside).unwrap();
    let before = fs::read(vold.store_path("a")).unwrap();
    let report = repair(&vold, 1);
    assert!(report.contains("not repaired: store \"b\""), "{report}");
    assert!(report.contains("not repaired: volume acme/vol"), "{report}");
    assert!(
        report.contains("volume acme/single: 0 extents verified"),
        "{report}"
    );
    let after = fs::read(vold.store_path("a")).unwrap();
    let at = a.data_at(physical(&a, &id, 0)) as usize;
    assert!(
        before[at..] == after[at..],
        "no data is touched while a replica is away"
    );
    fs::rename(&aside, vold.store_path("b")).unwrap();
    repair(&vold, 0);
}

#[test]
fn a_tombstoned_slot_is_never_restored_and_a_destruction_goes_on_undisturbed() {
    let (mut vold, id, _) = stopped(2);
    let slot_at = RawStore::open(&vold.store_path("a")).slot_region().0;
    let slot = RawStore::open(&vold.store_path("a")).bytes(slot_at, 4096);
    vold.restart();
    assert_eq!(vold.destroy("acme/vol"), id);
    vold.stop();
    // The slot's old bytes, with its keys, come back from somewhere.
    put(&vold.store_path("a"), slot_at, &slot);
    repair(&vold, 0);
    let a = RawStore::open(&vold.store_path("a"));
    assert!(a.slot(&id).is_none(), "overwritten, not believed");
    vold.restart();
    assert_eq!(vold.refused("volume show acme/vol").code, "not_found");
}

#[test]
fn it_does_not_run_beside_a_daemon() {
    let vold = Vold::start();
    let line = vold.refuses_to_start(vold.check_command().arg("--repair"));
    assert!(line.contains(&format!("pid {}", vold.pid())), "{line}");
}
