//! A lost or damaged catalog is made anew from the stores and the keystore: the data is there, what was destroyed stays
//! destroyed, and nothing is given up without the operator's word.

use std::fs;
use std::path::{Path, PathBuf};

use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::RawStore;
use vold_tests::{Vold, wait_for};

fn catalog(vold: &Vold) -> PathBuf {
    vold.data_dir().join("catalog.redb")
}

fn paths(vold: &Vold, stores: &[&str]) -> Vec<PathBuf> {
    stores.iter().map(|name| vold.store_path(name)).collect()
}

/// Writes the first `mebibytes` of a volume, each with its own bytes.
fn fill(uri: &str, seed: u64, mebibytes: u64) {
    let mut client = Client::connect(uri);
    for i in 0..mebibytes {
        client.write(i << 20, &bytes(seed + i, 1 << 20)).unwrap();
    }
    client.flush().unwrap();
}

#[track_caller]
fn reads_back(uri: &str, seed: u64, mebibytes: u64) {
    let mut client = Client::connect(uri);
    for i in 0..mebibytes {
        assert!(
            client.read(i << 20, 1 << 20).unwrap() == bytes(seed + i, 1 << 20),
            "MiB {i} of {uri}"
        );
    }
}

/// Two customers' volumes on three stores, one of them on b and c alone, all with data; stopped.
fn furnished() -> Vold {
    let mut vold = Vold::start();
    let uri = vold.with_volume(3, "128M", "32M");
    fill(&uri, 100, 12);
    vold.ctl("customer create globex");
    vold.ctl("vm create vm2 --customer globex");
    vold.ctl("volume create globex/db --size 16M --replicas 2");
    fill(&vold.attach("globex/db", "vm2"), 200, 9);
    vold.stop();
    vold
}

/// Makes the VMs again and finds all data through them.
fn is_furnished(vold: &Vold) {
    for (vm, customer, volume, seed, mebibytes) in [
        ("vm1", "acme", "acme/vol", 100, 12),
        ("vm2", "globex", "globex/db", 200, 9),
    ] {
        vold.ctl(&format!("vm create {vm} --customer {customer}"));
        reads_back(&vold.attach(volume, vm), seed, mebibytes);
    }
}

#[test]
fn a_lost_catalog_is_rebuilt_and_every_volume_has_its_data_and_its_owner() {
    let mut vold = furnished();
    vold.restart();
    let before = vold.ctl("volume list");
    vold.stop();
    fs::remove_file(catalog(&vold)).unwrap();
    let line = vold.refuses_to_start(&mut vold.serve_command());
    assert!(
        line.contains("rebuild-catalog"),
        "a lost catalog is not silently begun anew: {line}"
    );
    let report = vold.rebuild(&paths(&vold, &["a", "b", "c"]), &[]);
    for word in [
        "acme/vol",
        "globex/db",
        "\"acme\"",
        "\"a\" in sync",
        "3 stores, 2 customers, 2 volumes",
        "create the VMs again",
    ] {
        assert!(report.contains(word), "{word} is missing in: {report}");
    }
    vold.check_is_clean();
    vold.restart();
    let after = vold.ctl("volume list");
    for (old, new) in before["items"]
        .as_array()
        .unwrap()
        .iter()
        .zip(after["items"].as_array().unwrap())
    {
        for field in [
            "id",
            "name",
            "customer",
            "size_bytes",
            "replicas",
            "allocated_bytes",
        ] {
            assert_eq!(old[field], new[field], "{field}");
        }
        assert_eq!(new["state"], "available");
        assert!(
            new["epoch"].as_u64().unwrap() > old["epoch"].as_u64().unwrap() + 1_000_000,
            "an attachment epoch that no old session can have: {new}"
        );
    }
    is_furnished(&vold);
    // Customers are whole: their keys wrap new volumes, and names are still their own.
    vold.ctl("volume create acme/new --size 8M --replicas 3");
    assert_eq!(vold.refused("volume create acme/vol --size 8M").code, "exists");
    assert_eq!(vold.refused("attach acme/vol --vm vm2").code, "refused");
    vold.destroy("acme/vol");
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn after_kill_9_the_stores_logs_and_marks_are_all_it_needs() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    fill(&uri, 1, 20);
    vold.kill();
    fs::remove_file(catalog(&vold)).unwrap();
    vold.rebuild(&paths(&vold, &["b", "a"]), &[]);
    vold.restart();
    vold.ctl("vm create vm1 --customer acme");
    reads_back(&vold.attach("acme/vol", "vm1"), 1, 20);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_sound_catalog_is_refused_a_damaged_one_is_kept_beside_the_new_one() {
    let mut vold = furnished();
    let stores = paths(&vold, &["a", "b", "c"]);
    let sound = fs::read(catalog(&vold)).unwrap();
    let line = vold.refuses_to_start(&mut vold.rebuild_command(&stores, &["--accept-loss"]));
    assert!(line.contains("is sound") && line.contains("mv "), "{line}");
    assert!(fs::read(catalog(&vold)).unwrap() == sound, "left as it was");

    let mut damaged = sound.clone();
    let len = damaged.len();
    damaged[..len / 2].fill(0x5a);
    fs::write(catalog(&vold), &damaged).unwrap();
    let report = vold.rebuild(&stores, &[]);
    assert!(report.contains("catalog.redb.damaged-1"), "{report}");
    let aside = vold.data_dir().join("catalog.redb.damaged-1");
    assert!(fs::read(aside).unwrap() == damaged, "never deleted");
    vold.restart();
    is_furnished(&vold);
}

#[test]
fn it_does_not_run_beside_a_daemon_or_without_the_keys() {
    let mut vold = Vold::start();
    vold.add_stores(&["a"], "128M");
    let stores = paths(&vold, &["a"]);
    let line = vold.refuses_to_start(&mut vold.rebuild_command(&stores, &[]));
    assert!(line.contains(&format!("pid {}", vold.pid())), "{line}");
    vold.stop();
    fs::remove_file(catalog(&vold)).unwrap();
    fs::rename(vold.data_dir().join("keys"), vold.path("keys")).unwrap();
    let line = vold.refuses_to_start(&mut vold.rebuild_command(&stores, &[]));
    assert!(line.contains("keystore") && line.contains("backup"), "{line}");
    assert!(
        !vold.data_dir().join("keys").exists(),
        "no new keystore is made in its place"
    );
    fs::rename(vold.path("keys"), vold.data_dir().join("keys")).unwrap();
    vold.rebuild(&stores, &[]);
    vold.restart();
}

#[test]
fn a_keystore_from_before_the_customer_is_an_error_that_names_the_customer() {
    let mut vold = Vold::start();
    let keys = vold.data_dir().join("keys");
    vold.stop();
    let early = vold.path("early-keys");
    copy_dir(&keys, &early);
    vold.restart();
    vold.with_volume(1, "128M", "8M");
    vold.stop();
    fs::remove_file(catalog(&vold)).unwrap();
    let whole = vold.path("whole-keys");
    fs::rename(&keys, &whole).unwrap();
    fs::rename(&early, &keys).unwrap();
    let stores = paths(&vold, &["a"]);
    let mut command = vold.rebuild_command(&stores, &[]);
    let report = vold_tests::tools::texts(&command.output().unwrap()).0;
    assert!(
        report.contains("\"acme\"") && report.contains("backup"),
        "{report}"
    );
    vold.refuses_to_start(&mut command);
    assert!(!catalog(&vold).exists());
    fs::remove_dir_all(&keys).unwrap();
    fs::rename(&whole, &keys).unwrap();
    vold.rebuild(&stores, &[]);
}

fn copy_dir(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp")
        .arg("-a")
        .args([from, to])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_replica_that_was_stale_is_stale_again_and_resynced_before_anything_is_read_from_it() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    fill(&uri, 100, 20);
    vold.stop();
    // b is away, and misses extents it has, a trim, and extents it never had.
    let (here, elsewhere) = (vold.store_path("b"), vold.path("elsewhere"));
    fs::rename(&here, &elsewhere).unwrap();
    vold.restart();
    fill(&uri, 500, 3);
    let mut client = Client::connect(&uri);
    client.trim(8 << 20, 4 << 20).unwrap();
    client.write(28 << 20, &bytes(900, 1 << 20)).unwrap();
    client.flush().unwrap();
    drop(client);
    // Without a clean stop: marks on a, an older membership on b, and the catalog, the only one to call b stale, is lost.
    vold.kill();
    fs::rename(&elsewhere, &here).unwrap();
    fs::remove_file(catalog(&vold)).unwrap();
    let report = vold.rebuild(&paths(&vold, &["b", "a"]), &[]);
    assert!(
        report.contains("\"a\" in sync") && report.contains("\"b\" STALE"),
        "{report}"
    );
    vold.restart();
    vold.ctl("vm create vm1 --customer acme");
    let uri = vold.attach("acme/vol", "vm1");
    let is_right = |uri: &str| {
        reads_back(uri, 500, 3);
        let mut client = Client::connect(uri);
        for i in (3..8).chain(12..20) {
            assert!(
                client.read(i << 20, 1 << 20).unwrap() == bytes(100 + i, 1 << 20),
                "MiB {i}"
            );
        }
        assert!(
            client
                .read(8 << 20, 4 << 20)
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        assert!(client.read(28 << 20, 1 << 20).unwrap() == bytes(900, 1 << 20));
    };
    is_right(&uri);
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
    // Alone, it has everything.
    fs::File::options()
        .write(true)
        .open(vold.store_path("a"))
        .unwrap()
        .set_len(0)
        .unwrap();
    vold.restart();
    is_right(&uri);
}

#[test]
fn a_missing_store_is_named_and_only_given_up_with_accept_loss() {
    let mut vold = furnished();
    vold.restart();
    let on_a = |volume: &str| {
        let shown = vold.volume(volume);
        shown["replicas"]
            .as_array()
            .unwrap()
            .iter()
            .any(|replica| replica["store"] == "a")
    };
    assert!(on_a("acme/vol"));
    let id = vold.ctl("store list")["items"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(vold.store("a")["id"], id.as_str());
    vold.stop();
    fs::remove_file(catalog(&vold)).unwrap();
    let kept = vold.path("kept");
    fs::rename(vold.store_path("a"), &kept).unwrap();
    let stores = paths(&vold, &["b", "c"]);
    let before: Vec<Vec<u8>> = stores.iter().map(|path| fs::read(path).unwrap()).collect();
    let report = vold_tests::tools::texts(&vold.rebuild_command(&stores, &[]).output().unwrap()).0;
    assert!(
        report.contains("LOSS") && report.contains(&id) && report.contains("acme/vol"),
        "{report}"
    );
    let line = vold.refuses_to_start(&mut vold.rebuild_command(&stores, &[]));
    assert!(line.contains("--accept-loss"), "{line}");
    assert!(!catalog(&vold).exists(), "refused is refused");
    for (path, before) in stores.iter().zip(&before) {
        assert!(fs::read(path).unwrap() == *before, "stores are only read");
    }

    vold.rebuild(&stores, &["--accept-loss"]);
    vold.check_is_clean();
    vold.restart();
    is_furnished(&vold);
    let acme = vold.volume("acme/vol");
    assert_eq!(acme["replicas"].as_array().unwrap().len(), 2, "{acme}");
    fill(&vold.attach("acme/vol", "vm1"), 300, 4);
    vold.stop();
    vold.check_is_clean();

    // The store turns up after all, when the catalog is lost once more: its old replica does not pass for in sync.
    fs::remove_file(catalog(&vold)).unwrap();
    fs::rename(&kept, vold.store_path("a")).unwrap();
    let report = vold.rebuild(&paths(&vold, &["a", "b", "c"]), &[]);
    assert!(report.contains("\"a\" STALE"), "{report}");
    let output = vold_tests::tools::texts(&vold.check());
    assert!(
        output.0.contains("out of sync") && output.0.contains("clean: no damage"),
        "a replica known to be stale is no damage: {output:?}"
    );
    vold.restart();
    vold.ctl("vm create vm1 --customer acme");
    reads_back(&vold.attach("acme/vol", "vm1"), 300, 4);
    vold_tests::wait_for("the old replica has caught up", || {
        let volume = vold.volume("acme/vol");
        let mut replicas = volume["replicas"].as_array().unwrap().iter();
        replicas
            .all(|replica| replica["state"] == "in_sync")
            .then_some(())
    });
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn what_is_no_store_of_this_installation_is_refused_by_its_path() {
    let vold = furnished();
    let mut other = Vold::start();
    other.add_stores(&["x"], "128M");
    other.stop();
    fs::remove_file(catalog(&vold)).unwrap();
    let [garbage, empty, cut, newer, copy] =
        ["garbage", "empty", "cut", "newer", "copy"].map(|name| vold.path(name));
    fs::write(&garbage, bytes(1, 4 << 20)).unwrap();
    fs::write(&empty, b"").unwrap();
    for path in [&cut, &newer, &copy] {
        fs::copy(vold.store_path("a"), path).unwrap();
    }
    fs::OpenOptions::new()
        .write(true)
        .open(&cut)
        .unwrap()
        .set_len(100 << 20)
        .unwrap();
    {
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().write(true).open(&newer).unwrap();
        for at in [8, 65536 + 8] {
            file.write_all_at(&9u32.to_le_bytes(), at).unwrap();
        }
    }
    for (path, word) in [
        (garbage, "not a vold store"),
        (empty, "not a vold store"),
        (cut, "truncated"),
        (newer, "version 9"),
        (copy, "the same store"),
        (other.store_path("x"), "installation"),
        (vold.path("absent"), "absent"),
        (vold.data_dir(), "is a directory"),
    ] {
        let mut stores = paths(&vold, &["a", "b", "c"]);
        stores.push(path.clone());
        // Whatever the order: nothing is taken from one that is not understood.
        for _ in 0..2 {
            let line = vold.refuses_to_start(&mut vold.rebuild_command(&stores, &["--accept-loss"]));
            assert!(
                line.contains(path.to_str().unwrap()) && line.contains(word),
                "{word} and {path:?} are due in: {line}"
            );
            stores.reverse();
        }
        assert!(!catalog(&vold).exists());
    }
}

#[test]
fn a_destroyed_volume_stays_destroyed_though_one_store_still_has_it() {
    let mut vold = furnished();
    // An older state of store b comes back after the destruction: the volume is live there, with its keys.
    let early = vold.path("early-b");
    fs::copy(vold.store_path("b"), &early).unwrap();
    vold.restart();
    let id = vold.destroy("acme/vol");
    vold.ctl("vm remove vm1");
    vold.stop();
    fs::rename(&early, vold.store_path("b")).unwrap();
    assert!(RawStore::open(&vold.store_path("b")).slot(&id).is_some());
    fs::remove_file(catalog(&vold)).unwrap();
    let report = vold.rebuild(&paths(&vold, &["a", "b", "c"]), &[]);
    assert!(
        report.contains("acme/vol") && report.contains("was destroyed"),
        "{report}"
    );
    vold.check_is_clean();
    vold.restart();
    assert_eq!(vold.refused("volume show acme/vol").code, "not_found");
    let done = vold.ctl(&format!("destroy wait {id} --timeout 110s"));
    assert_eq!(done["state"], "destroyed");
    wait_for("its slot is free again", || {
        vold.store("b")["pending_scrub_bytes"].eq(&0).then_some(())
    });
    vold.ctl("vm create vm2 --customer globex");
    reads_back(&vold.attach("globex/db", "vm2"), 200, 9);
    vold.stop();
    assert!(
        RawStore::open(&vold.store_path("b")).slot(&id).is_none(),
        "its keys are overwritten"
    );
    vold.check_is_clean();
    // The tombstone is for ever, in the rebuilt catalog as well.
    fs::remove_file(catalog(&vold)).unwrap();
    let report = vold.rebuild(&paths(&vold, &["a", "b", "c"]), &[]);
    assert!(
        report.contains("1 tombstones") && report.contains("1 volumes"),
        "{report}"
    );
}

#[test]
fn a_cut_rebuild_is_simply_repeated() {
    let mut vold = furnished();
    fs::remove_file(catalog(&vold)).unwrap();
    // What a cut leaves: the new catalog, or half of it, under its first name.
    fs::write(vold.data_dir().join("catalog.redb.new"), bytes(3, 10_000)).unwrap();
    let line = vold.refuses_to_start(&mut vold.serve_command());
    assert!(line.contains("catalog"), "half a catalog is none: {line}");
    vold.rebuild(&paths(&vold, &["a", "b", "c"]), &[]);
    assert!(!vold.data_dir().join("catalog.redb.new").exists());
    vold.restart();
    is_furnished(&vold);
}
