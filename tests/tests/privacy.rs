//! What a stolen disk shows: nothing of the plaintext, to nobody without the keystore; and exactly the plaintext to an
//! independent implementation that has the key. After deletion not even that.

use std::path::PathBuf;

use vold_tests::Vold;
use vold_tests::content::{bytes, occurrences, text};
use vold_tests::nbd::Client;
use vold_tests::raw::{RawStore, data_key};

const SIZE: usize = 20 << 20;

/// Two replicas with readable text in the first half, random bytes in the last MiB and a hole between; stopped.
struct Stolen {
    vold: Vold,
    plain: Vec<u8>,
    id: String,
}

impl Stolen {
    fn disk() -> Self {
        let mut vold = Vold::start();
        let uri = vold.with_volume(2, "96M", &SIZE.to_string());
        let mut plain = text("acme-confidential", SIZE / 2);
        plain.resize(SIZE - (1 << 20), 0);
        plain.extend(bytes(17, 1 << 20));
        let mut client = Client::connect(&uri);
        for (i, piece) in plain.chunks(1 << 20).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                client.write((i as u64) << 20, piece).unwrap();
            }
        }
        client.flush().unwrap();
        let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
        vold.stop();
        Self { vold, plain, id }
    }

    fn stores(&self) -> [RawStore; 2] {
        ["a", "b"].map(|name| RawStore::open(&self.vold.store_path(name)))
    }

    /// Everything that the daemon wrote: stores, catalog, keystore, log.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![
            self.vold.store_path("a"),
            self.vold.store_path("b"),
            self.vold.path("log"),
        ];
        let mut directories = vec![self.vold.data_dir()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    directories.push(entry.path());
                } else if kind.is_file() {
                    files.push(entry.path());
                }
            }
        }
        assert!(files.len() >= 5, "catalog and keys are files: {files:?}");
        files
    }

    #[track_caller]
    fn nowhere(&self, what: &str, needle: &[u8]) {
        for file in self.files() {
            let found = occurrences(&file, needle);
            assert_eq!(found, 0, "{what} found in {}", file.display());
        }
    }
}

#[test]
fn another_xts_implementation_reads_the_plaintext_from_either_raw_store() {
    let stolen = Stolen::disk();
    for store in stolen.stores() {
        let slot = store.slot(&stolen.id).expect("the volume's slot");
        let key = data_key(&stolen.vold.data_dir(), &slot);
        assert!(
            store.plaintext(&slot, &key, SIZE as u64) == stolen.plain,
            "the decryption differs"
        );
        let mut wrong = key;
        wrong[5] ^= 1;
        assert!(store.plaintext(&slot, &wrong, 1 << 20) != stolen.plain[..1 << 20]);
    }
}

#[test]
fn replicas_hold_the_same_ciphertext_and_no_piece_of_the_plaintext_is_in_any_file() {
    let stolen = Stolen::disk();
    // The search finds what is there.
    let sample = stolen.vold.path("sample");
    std::fs::write(&sample, &stolen.plain).unwrap();
    let needle = b"acme-confidential: the quick brown";
    assert!(occurrences(&sample, needle) > 1000);
    stolen.nowhere("the text", needle);
    stolen.nowhere("a word of the text", b"customer record");
    let random = &stolen.plain[SIZE - 5000..SIZE - 5000 + 32];
    assert_eq!(occurrences(&sample, random), 1);
    stolen.nowhere("random plaintext", random);

    let [a, b] = stolen.stores();
    let dataset = a.slot(&stolen.id).unwrap().dataset;
    let (on_a, on_b) = (a.extents_of(dataset), b.extents_of(dataset));
    assert!(
        on_a.keys().eq(on_b.keys()) && on_a.len() >= 3,
        "{on_a:?} {on_b:?}"
    );
    let len = a.extent_bytes() as usize;
    for (logical, physical) in on_a {
        let (a, b) = (
            a.bytes(a.data_at(physical), len),
            b.bytes(b.data_at(on_b[&logical]), len),
        );
        assert!(a == b, "extent {logical} differs between the replicas");
    }
}

#[test]
fn no_unwrapped_key_is_in_any_file_and_the_same_plaintext_encrypts_differently_for_another_volume() {
    let stolen = Stolen::disk();
    let [a, _] = stolen.stores();
    let slot = a.slot(&stolen.id).unwrap();
    let key = data_key(&stolen.vold.data_dir(), &slot);
    for half in key.chunks(32) {
        stolen.nowhere("half of a data key", half);
        stolen.nowhere("a quarter of a data key", &half[..16]);
    }
    let physical = a.extents_of(slot.dataset)[&0];
    let ciphertext = a.bytes(a.data_at(physical), 64);

    let mut vold = stolen.vold;
    vold.restart();
    vold.ctl("volume create acme/twin --size 20M --replicas 1");
    let uri = vold.attach("acme/twin", "vm1");
    let mut client = Client::connect(&uri);
    client.write(0, &stolen.plain[..1 << 20]).unwrap();
    client.flush().unwrap();
    vold.stop();
    let copies: usize = ["a", "b"]
        .iter()
        .map(|name| occurrences(&vold.store_path(name), &ciphertext))
        .sum();
    assert_eq!(copies, 2, "the original's two replicas, and nothing of the twin");
}

#[test]
fn after_deletion_neither_the_wrapped_key_nor_the_old_ciphertext_is_in_any_file() {
    let mut stolen = Stolen::disk();
    let [a, b] = stolen.stores();
    let slot = a.slot(&stolen.id).unwrap();
    let wrapped = slot.key.1.clone();
    let mut ciphertext = Vec::new();
    for (_, physical) in a.extents_of(slot.dataset) {
        for at in [0, 4096 * 7 + 100, a.extent_bytes() - 64] {
            let piece = a.bytes(a.data_at(physical) + at, 48);
            if piece.iter().any(|byte| *byte != 0) {
                ciphertext.push(piece);
            }
        }
    }
    assert!(ciphertext.len() >= 6);
    // Both searches find what is there before.
    for store in ["a", "b"] {
        let path = stolen.vold.store_path(store);
        assert!(
            occurrences(&path, &wrapped) >= 2,
            "two copies of the slot hold the wrapped key"
        );
        assert_eq!(occurrences(&path, &ciphertext[0]), 1);
    }
    drop((a, b));

    stolen.vold.restart();
    let id = stolen.vold.destroy("acme/vol");
    assert_eq!(id, stolen.id);
    stolen.vold.stop();
    stolen.nowhere("the wrapped key", &wrapped);
    stolen.nowhere("the first half of the wrapped key", &wrapped[..wrapped.len() / 2]);
    for piece in &ciphertext {
        stolen.nowhere("old ciphertext", piece);
    }
    for store in stolen.stores() {
        assert!(store.slot(&stolen.id).is_none(), "the slot is gone");
        assert_eq!(store.tombstone_count(), 1, "its tombstone stays");
    }
    stolen.vold.check_is_clean();
}
