//! Damaged blocks are found by their sums, served from the other replica, repaired and counted; a block with no good copy
//! is EIO for exactly that block.

use vold_tests::content::bytes;
use vold_tests::nbd::{Client, EIO};
use vold_tests::raw::RawStore;
use vold_tests::tools::{run, same_bytes};
use vold_tests::{Engine, Vold};

const SIZE: usize = 24 << 20;

/// A filled volume on a stopped daemon, its plaintext beside it as a file.
fn stopped(engine: Engine, replicas: usize) -> (Vold, String, String) {
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(replicas, "128M", &SIZE.to_string());
    std::fs::write(vold.path("plain"), bytes(4, SIZE)).unwrap();
    run("nbdcopy", ["--flush", vold.path("plain").to_str().unwrap(), &uri]);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    vold.check_is_clean();
    (vold, uri, id)
}

/// Where block `block` of the volume lies in a store.
fn place(raw: &RawStore, id: &str, block: u64) -> u64 {
    let per_extent = raw.extent_bytes() / 4096;
    let physical = raw.extents_of(raw.slot(id).unwrap().dataset)[&((block / per_extent) as u32)];
    raw.data_at(physical) + block % per_extent * 4096
}

fn reads_as_written(vold: &Vold, uri: &str) {
    let back = vold.path("back");
    run("nbdcopy", ["--connections=2", uri, back.to_str().unwrap()]);
    assert!(same_bytes(&vold.path("plain"), &back));
}

#[test]
fn flipped_bytes_in_one_store_are_read_through_repaired_and_counted() {
    for engine in Engine::ALL {
        let (mut vold, uri, id) = stopped(engine, 2);
        // Damage in either store, never in both copies of a block: single bits, whole blocks, runs across an extent's end.
        let [a, b] = ["a", "b"].map(|name| RawStore::open(&vold.store_path(name)));
        for block in [0, 77, 1023, 1024, 3000] {
            a.flip(place(&a, &id, block) + 99, 1);
        }
        for block in [5, 6, 7, 2048, 5000] {
            b.flip(place(&b, &id, block), 4096);
        }
        let report = vold.check_finds_damage();
        for word in ["acme/vol", "\"a\"", "\"b\""] {
            assert!(report.contains(word), "{word} is missing in: {report}");
        }
        vold.restart();
        // Each read asks one replica; in the end all ten blocks have been met on the replica that lost them.
        vold_tests::wait_for("all ten blocks are repaired", || {
            reads_as_written(&vold, &uri);
            let healed = vold.volume("acme/vol")["healed_blocks"].as_u64().unwrap();
            assert!(healed <= 10, "{healed} blocks repaired, 10 were damaged");
            (healed == 10).then_some(())
        });
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn damage_to_a_checksum_area_is_damage_of_its_blocks_and_is_repaired() {
    let (mut vold, uri, id) = stopped(Engine::Uring, 2);
    let a = RawStore::open(&vold.store_path("a"));
    let physical = a.extents_of(a.slot(&id).unwrap().dataset)[&1];
    // A hundred sums after the header sector.
    a.flip(a.sums_at(physical) + 512, 400);
    vold.check_finds_damage();
    vold.restart();
    // Its data is good on both replicas: not one block is rewritten, only the area.
    reads_as_written(&vold, &uri);
    vold_tests::wait_for("the damaged area is repaired", || {
        (vold.volume("acme/vol")["healed_areas"] == 1).then_some(())
    });
    assert_eq!(vold.volume("acme/vol")["healed_blocks"], 0);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_block_without_a_good_copy_is_eio_for_exactly_that_block() {
    for replicas in [1, 2] {
        let (mut vold, uri, id) = stopped(Engine::Uring, replicas);
        for name in &["a", "b"][..replicas] {
            let raw = RawStore::open(&vold.store_path(name));
            raw.flip(place(&raw, &id, 1500) + 10, 3);
        }
        vold.restart();
        let plain = bytes(4, SIZE);
        let mut client = Client::connect(&uri);
        let at = 1500 * 4096;
        assert_eq!(client.read(at, 4096), Err(EIO));
        assert_eq!(client.read(at + 4000, 96), Err(EIO));
        assert!(client.read(at - 4096, 4096).unwrap() == plain[at as usize - 4096..at as usize]);
        assert!(client.read(at + 4096, 8192).unwrap() == plain[at as usize + 4096..at as usize + 12288]);
        assert_eq!(
            client.read(at - 4096, 3 * 4096),
            Err(EIO),
            "a read across it is not guessed"
        );
        // Part of it cannot be written, for the rest is unknown; the whole of it can, and is good again.
        assert_eq!(client.write(at + 100, b"patch"), Err(EIO));
        client.write(at, &[9; 4096]).unwrap();
        assert!(client.read(at, 4096).unwrap() == [9; 4096]);
        drop(client);
        vold.stop();
        vold.check_is_clean();
    }
}
