//! `vold check`: whatever is damaged on a stopped daemon's stores is found, named and answered with status 1, and a running
//! daemon's directory is left alone.

use vold_tests::Vold;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::{RawStore, State};
use vold_tests::tools::{output, texts};

/// A stopped daemon with a volume of two replicas that holds something; the volume's id.
fn stopped() -> (Vold, String) {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "16M");
    let mut client = Client::connect(&uri);
    client.write(0, &bytes(1, 9 << 20)).unwrap();
    client.flush().unwrap();
    drop(client);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    vold.check_is_clean();
    (vold, id)
}

#[track_caller]
fn finds(vold: &Vold, words: &[&str]) {
    let report = vold.check_finds_damage();
    for word in words {
        assert!(report.contains(word), "{word:?} is missing in: {report}");
    }
    let last = report.lines().last().unwrap();
    assert!(last.starts_with("DAMAGED: "), "{report}");
}

#[test]
fn one_bad_copy_of_a_slot_is_found_and_repaired_by_the_next_start() {
    let (mut vold, id) = stopped();
    let raw = RawStore::open(&vold.store_path("a"));
    raw.flip(raw.slot_places(&id).unwrap()[1] + 200, 8);
    finds(&vold, &["store \"a\"", &id, "slot", "copy 2"]);
    // Finding it changed nothing.
    finds(&vold, &["store \"a\"", &id, "slot", "copy 2"]);
    vold.restart();
    assert_eq!(vold.volume("acme/vol")["state"], "attached");
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn two_bad_copies_of_a_slot_are_lost_keys_of_that_replica() {
    let (vold, id) = stopped();
    let raw = RawStore::open(&vold.store_path("b"));
    for place in raw.slot_places(&id).unwrap() {
        raw.flip(place + 200, 8);
    }
    finds(
        &vold,
        &["store \"b\"", &id, "both copies", "its keys are lost here"],
    );
}

#[test]
fn a_bad_page_of_the_table_is_found_in_one_copy_and_in_both() {
    let (vold, _) = stopped();
    let raw = RawStore::open(&vold.store_path("a"));
    let [first, second] = raw.last_page_places();
    raw.flip(first + 500, 4);
    finds(&vold, &["store \"a\"", "page"]);
    raw.flip(second + 500, 4);
    finds(&vold, &["store \"a\"", "page"]);
}

#[test]
fn bad_superblocks_are_found_in_one_copy_and_in_both() {
    let (mut vold, _) = stopped();
    let raw = RawStore::open(&vold.store_path("b"));
    raw.flip(300, 16);
    finds(&vold, &["store \"b\"", "superblock copy A"]);
    raw.flip((64 << 10) + 300, 16);
    finds(
        &vold,
        &[
            "store \"b\": cannot be checked",
            "both superblock copies are unusable",
            "volctl store remove --lost",
        ],
    );
    // Put back, all is well: nothing was written.
    raw.flip(300, 16);
    raw.flip((64 << 10) + 300, 16);
    vold.check_is_clean();
    vold.restart();
    assert_eq!(vold.store("b")["state"], "online");
}

#[test]
fn a_free_extent_that_is_not_zero_is_found_unless_the_check_is_quick() {
    let (vold, _) = stopped();
    let raw = RawStore::open(&vold.store_path("a"));
    let extents = raw.extents();
    let free = extents.iter().find(|extent| extent.state == State::Free).unwrap();
    raw.flip(raw.data_at(free.physical) + 123_456, 1);
    finds(
        &vold,
        &[
            &format!("store \"a\": extent {}", free.physical),
            "free, and not zero",
        ],
    );
    let quick = || output(vold.check_command().arg("--quick"));
    let clean = quick();
    assert_eq!(clean.status.code(), Some(0), "{:?}", texts(&clean));
    // What is in use is checked all the same.
    let used = extents.iter().find(|extent| extent.state != State::Free).unwrap();
    raw.flip(raw.data_at(used.physical) + 5000, 1);
    let damaged = quick();
    assert_eq!(damaged.status.code(), Some(1), "{:?}", texts(&damaged));
    assert!(texts(&damaged).0.contains("acme/vol"), "{:?}", texts(&damaged));
}

#[test]
fn a_missing_store_is_damage_and_the_others_are_checked() {
    let (vold, _) = stopped();
    let path = vold.store_path("b");
    std::fs::rename(&path, vold.path("away")).unwrap();
    finds(
        &vold,
        &[
            "store \"a\": 1 volumes, clean",
            "store \"b\": cannot be checked",
            path.to_str().unwrap(),
            "no such file",
        ],
    );
    std::fs::rename(vold.path("away"), &path).unwrap();
    vold.check_is_clean();
}

#[test]
fn a_running_daemons_directory_and_one_that_is_none_are_refused() {
    let (mut vold, _) = stopped();
    vold.restart();
    let line = vold.refuses_to_start(&mut vold.check_command());
    for word in [
        vold.data_dir().to_str().unwrap(),
        "in use",
        &format!("pid {}", vold.pid()),
        "stop it first",
    ] {
        assert!(line.contains(word), "{word:?} is missing in: {line}");
    }
    assert!(vold.alive());
    let other = Vold::not_started(None);
    let line = other.refuses_to_start(&mut other.check_command());
    assert!(line.contains("not a vold data directory"), "{line}");
    assert!(!other.data_dir().exists(), "a check makes nothing");
}
