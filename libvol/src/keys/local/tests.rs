//! The keystore through its public face, on real files; crash states are put together from pages of real files.

use super::*;
use crate::ids::VolumeId;
use crate::keys::file::power_cut;
use crate::keys::page::PAGE_BYTES;
use proptest::prelude::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use tempfile::TempDir;

/// The keystore never really waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    match future
        .as_mut()
        .poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("the local keystore waits for nothing"),
    }
}

fn open(dir: &TempDir) -> LocalKeystore {
    LocalKeystore::open_or_create(dir.path()).unwrap()
}

fn open_error(dir: &TempDir) -> Error {
    LocalKeystore::open_or_create(dir.path()).err().expect("refused")
}

fn image(dir: &TempDir) -> Vec<u8> {
    std::fs::read(dir.path().join("keystore")).unwrap()
}

fn put_image(dir: &TempDir, bytes: &[u8]) {
    std::fs::write(dir.path().join("keystore"), bytes).unwrap();
}

fn context(customer: CustomerId) -> KeyContext {
    KeyContext {
        volume: VolumeId::random(),
        customer,
    }
}

/// A keystore with one CMK and one data key under it.
struct Fixture {
    dir: TempDir,
    customer: CustomerId,
    cmk: CmkId,
    context: KeyContext,
    key: [u8; 64],
    wrapped: WrappedKey,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let keystore = open(&dir);
    let customer = CustomerId::random();
    let cmk = now(keystore.create_cmk(customer)).unwrap();
    let context = context(customer);
    let (key, wrapped) = now(keystore.create_data_key(cmk, context)).unwrap();
    Fixture {
        customer,
        cmk,
        context,
        key: *key.expose(),
        wrapped,
        dir,
    }
}

impl Fixture {
    /// Whether the data key opens, and to the right bytes.
    fn opens_in(&self, keystore: &LocalKeystore) -> Result<()> {
        let key = now(keystore.unwrap_data_key(&self.wrapped, self.context))?;
        assert_eq!(key.expose(), &self.key, "opened to another key");
        Ok(())
    }
}

/// Pages of slot 0's copies.
const COPY_1: usize = 2;
const COPY_2: usize = 66;

fn page(image: &[u8], number: usize) -> Vec<u8> {
    image[number * PAGE_BYTES..][..PAGE_BYTES].to_vec()
}

fn with_page(mut image: Vec<u8>, number: usize, page: &[u8]) -> Vec<u8> {
    image[number * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
    image
}

/// A write of `new` over `old` that stopped after `sectors` sectors.
fn torn(old: &[u8], new: &[u8], sectors: usize) -> Vec<u8> {
    [&new[..sectors * 512], &old[sectors * 512..]].concat()
}

#[test]
fn a_data_key_opens_after_a_restart_and_only_where_it_belongs() {
    let f = fixture();
    let keystore = open(&f.dir);
    f.opens_in(&keystore).unwrap();

    let other_volume = KeyContext {
        volume: VolumeId::random(),
        ..f.context
    };
    assert_eq!(
        now(keystore.unwrap_data_key(&f.wrapped, other_volume))
            .unwrap_err()
            .kind(),
        Kind::Damaged
    );
    let other_customer = KeyContext {
        customer: CustomerId::random(),
        ..f.context
    };
    assert_eq!(
        now(keystore.unwrap_data_key(&f.wrapped, other_customer))
            .unwrap_err()
            .kind(),
        Kind::Refused
    );
    assert_eq!(
        now(keystore.create_data_key(f.cmk, other_customer))
            .err()
            .unwrap()
            .kind(),
        Kind::Refused
    );

    // Another CMK of the same customer does not open it.
    let cmk = now(keystore.create_cmk(f.customer)).unwrap();
    let moved = WrappedKey {
        cmk,
        bytes: f.wrapped.bytes.clone(),
    };
    assert_eq!(
        now(keystore.unwrap_data_key(&moved, f.context))
            .unwrap_err()
            .kind(),
        Kind::Damaged
    );
}

#[test]
fn data_keys_are_random_have_different_halves_and_fit_a_volume_slot() {
    let f = fixture();
    let keystore = open(&f.dir);
    let (a, wrapped) = now(keystore.create_data_key(f.cmk, f.context)).unwrap();
    assert_ne!(a.expose(), &f.key);
    assert_ne!(a.expose()[..32], a.expose()[32..]);
    assert_eq!(wrapped.bytes.len(), 96);
}

#[test]
fn no_unwrapped_key_is_in_the_keystore_file() {
    let f = fixture();
    let root = std::fs::read(f.dir.path().join("root.key")).unwrap();
    let (_, cmk) = open(&f.dir).open_cmk(f.cmk, f.customer, None).unwrap();
    let image = image(&f.dir);
    for (what, key) in [
        ("root key", &root[..]),
        ("CMK", cmk.expose()),
        ("data key", &f.key),
    ] {
        assert!(
            !image.windows(16).any(|w| key.chunks(16).any(|k| k == w)),
            "{what} in the file"
        );
    }
}

#[test]
fn files_are_for_their_owner_only() {
    let f = fixture();
    for name in ["root.key", "keystore", "keystore.lock"] {
        let meta = std::fs::metadata(f.dir.path().join(name)).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o600, "{name}");
    }
}

#[test]
fn a_disabled_cmk_opens_nothing_until_it_is_enabled_again_across_restarts() {
    let f = fixture();
    open(&f.dir).set_enabled(f.cmk, false).unwrap();
    let keystore = open(&f.dir);
    assert_eq!(f.opens_in(&keystore).unwrap_err().kind(), Kind::Refused);
    assert_eq!(
        now(keystore.create_data_key(f.cmk, f.context))
            .err()
            .unwrap()
            .kind(),
        Kind::Refused
    );
    assert!(!keystore.cmks()[0].enabled);
    keystore.set_enabled(f.cmk, true).unwrap();
    f.opens_in(&keystore).unwrap();
    drop(keystore);
    f.opens_in(&open(&f.dir)).unwrap();
}

#[test]
fn a_destroyed_cmk_leaves_only_zeros_and_stays_gone() {
    let f = fixture();
    let keystore = open(&f.dir);
    let stays = now(keystore.create_cmk(f.customer)).unwrap();
    let before = page(&image(&f.dir), COPY_1);
    now(keystore.destroy_cmk(f.cmk)).unwrap();

    let after = image(&f.dir);
    for copy in [COPY_1, COPY_2] {
        assert!(page(&after, copy).iter().all(|b| *b == 0));
    }
    let wrapped_cmk = &before[68..128];
    assert!(!after.windows(60).any(|w| w == wrapped_cmk));
    for keystore in [keystore, {
        let dir = &f.dir;
        open_after_drop(dir)
    }] {
        assert_eq!(f.opens_in(&keystore).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(
            now(keystore.destroy_cmk(f.cmk)).unwrap_err().kind(),
            Kind::NotFound
        );
        assert_eq!(keystore.cmks().iter().map(|c| c.id).collect::<Vec<_>>(), [stays]);
    }
}

/// A second keystore over a copy of the directory, since the first still holds the lock.
fn open_after_drop(dir: &TempDir) -> LocalKeystore {
    let copy = tempfile::tempdir().unwrap().keep();
    for name in ["root.key", "keystore"] {
        std::fs::copy(dir.path().join(name), copy.join(name)).unwrap();
    }
    let keystore = LocalKeystore::open_or_create(&copy).unwrap();
    std::fs::remove_dir_all(copy).unwrap();
    keystore
}

#[test]
fn freed_slots_are_used_again_and_the_file_grows_by_chunks_when_full() {
    let f = fixture();
    let keystore = open(&f.dir);
    let one_chunk = (2 + 128) * PAGE_BYTES;
    for _ in 1..64 {
        now(keystore.create_cmk(f.customer)).unwrap();
    }
    assert_eq!(image(&f.dir).len(), one_chunk);
    now(keystore.destroy_cmk(f.cmk)).unwrap();
    now(keystore.create_cmk(f.customer)).unwrap();
    assert_eq!(image(&f.dir).len(), one_chunk);
    let last = now(keystore.create_cmk(f.customer)).unwrap();
    assert_eq!(image(&f.dir).len(), one_chunk + 128 * PAGE_BYTES);
    drop(keystore);
    let keystore = open(&f.dir);
    assert_eq!(keystore.cmks().len(), 65);
    now(keystore.create_data_key(last, f.context)).unwrap();
    assert!(keystore.findings().is_empty());
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let f = fixture();
    let first = open(&f.dir);
    assert_eq!(open_error(&f.dir).kind(), Kind::Busy);
    drop(first);
    open(&f.dir);
}

#[test]
fn a_wrong_root_key_is_told_apart_from_damage_and_names_the_file() {
    let f = fixture();
    let root = f.dir.path().join("root.key");
    std::fs::write(&root, [1; 32]).unwrap();
    let before = image(&f.dir);
    let error = open_error(&f.dir);
    assert!(
        error
            .to_string()
            .contains(&format!("root key {} is not the one", root.display())),
        "{error}"
    );
    assert_eq!(image(&f.dir), before);
}

#[test]
fn a_lost_root_key_or_keystore_is_refused_and_nothing_new_is_made() {
    for lost in ["root.key", "keystore"] {
        let f = fixture();
        std::fs::remove_file(f.dir.path().join(lost)).unwrap();
        let error = open_error(&f.dir);
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
        assert!(!f.dir.path().join(lost).exists());
    }
}

#[test]
fn a_root_key_that_others_can_read_stops_the_keystore() {
    let f = fixture();
    let root = f.dir.path().join("root.key");
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(open_error(&f.dir).kind(), Kind::Refused);
}

#[test]
fn a_first_start_interrupted_anywhere_is_completed_by_the_next() {
    let whole = fixture();
    let file = |name: &str| std::fs::read(whole.dir.path().join(name)).unwrap();
    let (root, keystore) = (file("root.key"), file("keystore"));
    // Files present after a crash at each step, in the order of `initialise`.
    let states: [&[(&str, &[u8])]; 5] = [
        &[("root.key.new", &[])],
        &[("root.key.new", &root[..7])],
        &[("root.key.new", &root), ("keystore.new", &keystore[..100])],
        &[("root.key.new", &root), ("keystore.new", &keystore)],
        &[("root.key.new", &root), ("keystore", &keystore)],
    ];
    for (step, files) in states.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in *files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let keystore = open(&dir);
        now(keystore.create_cmk(CustomerId::random())).unwrap();
        for leftover in ["root.key.new", "keystore.new"] {
            assert!(!dir.path().join(leftover).exists(), "step {step}");
        }
    }
}

#[test]
fn a_crash_anywhere_in_a_creation_leaves_a_whole_cmk_or_none_and_never_harms_another() {
    let f = fixture();
    let before = image(&f.dir);
    let made = now(open(&f.dir).create_cmk(f.customer)).unwrap();
    let after = image(&f.dir);
    let (copy_1, copy_2) = (COPY_1 + 1, COPY_2 + 1);
    for sectors in 0..=8 {
        let half = with_page(
            before.clone(),
            copy_1,
            &torn(&page(&before, copy_1), &page(&after, copy_1), sectors),
        );
        let full = with_page(
            after.clone(),
            copy_2,
            &torn(&page(&before, copy_2), &page(&after, copy_2), sectors),
        );
        for (state, complete) in [(half, sectors == 8), (full, true)] {
            put_image(&f.dir, &state);
            let keystore = open(&f.dir);
            f.opens_in(&keystore).unwrap();
            assert_eq!(
                keystore.cmks().iter().any(|c| c.id == made),
                complete,
                "{sectors} sectors"
            );
            drop(keystore);
            let settled = image(&f.dir);
            assert_eq!(
                page(&settled, copy_1),
                page(&settled, copy_2),
                "copies were not brought together"
            );
        }
    }
}

#[test]
fn a_crash_anywhere_in_an_update_leaves_the_old_or_the_new_state() {
    let f = fixture();
    let before = image(&f.dir);
    open(&f.dir).set_enabled(f.cmk, false).unwrap();
    let after = image(&f.dir);
    for sectors in 0..=8 {
        let half = with_page(
            before.clone(),
            COPY_1,
            &torn(&page(&before, COPY_1), &page(&after, COPY_1), sectors),
        );
        let full = with_page(
            after.clone(),
            COPY_2,
            &torn(&page(&before, COPY_2), &page(&after, COPY_2), sectors),
        );
        for (step, state) in [half, full].iter().enumerate() {
            put_image(&f.dir, state);
            let keystore = open(&f.dir);
            let settled = image(&f.dir);
            assert_eq!(page(&settled, COPY_1), page(&settled, COPY_2));
            if step == 1 {
                assert!(
                    !keystore.cmks()[0].enabled,
                    "an update durable in copy 1 was lost"
                );
            }
            keystore.set_enabled(f.cmk, true).unwrap();
            f.opens_in(&keystore).unwrap();
        }
    }
}

#[test]
fn a_crash_anywhere_in_a_destruction_leaves_the_whole_cmk_or_none_of_it() {
    let f = fixture();
    let live = image(&f.dir);
    let (live_1, live_2) = (page(&live, COPY_1), page(&live, COPY_2));
    let Settled::Used(slot) = open(&f.dir).lock().slots[0].clone() else {
        panic!("a used slot")
    };
    let marked = Slot {
        sequence: slot.sequence + 1,
        state: CmkState::Destroying,
        versions: vec![],
        ..slot
    }
    .encode();
    let blank = [0; PAGE_BYTES];
    let check = |copy_1: &[u8], copy_2: &[u8], must_be_gone: bool| {
        put_image(
            &f.dir,
            &with_page(with_page(live.clone(), COPY_1, copy_1), COPY_2, copy_2),
        );
        let keystore = open(&f.dir);
        match f.opens_in(&keystore) {
            Ok(()) => assert!(!must_be_gone, "a destroyed CMK came back"),
            Err(error) => {
                assert_eq!(error.kind(), Kind::NotFound, "{error}");
                let settled = image(&f.dir);
                assert!(
                    [COPY_1, COPY_2].iter().all(|copy| page(&settled, *copy) == blank),
                    "bytes left behind"
                );
            }
        }
    };
    for sectors in 0..=8 {
        check(&torn(&live_1, &marked, sectors), &live_2, sectors == 8);
        check(&marked, &torn(&live_2, &blank, sectors), true);
        check(&torn(&marked, &blank, sectors), &blank, true);
    }
}

/// Runs `change` on copies of `start`, cut off after every one of its page writes and at every tear, and hands each
/// surviving state to `check` with the number of whole writes. Returns how many writes the whole change makes.
fn cut_everywhere<T>(
    f: &Fixture,
    start: &[u8],
    change: impl Fn(&LocalKeystore) -> Result<T>,
    check: impl Fn(&LocalKeystore, usize),
) -> usize {
    for writes in 0.. {
        for sectors in 0..=8 {
            put_image(&f.dir, start);
            let keystore = open(&f.dir);
            if power_cut::after(writes, sectors, || change(&keystore)).is_ok() {
                return writes;
            }
            // What failed is not known to have happened, so nothing else may change until a restart.
            let refused = now(keystore.create_cmk(f.customer)).unwrap_err();
            assert_eq!(refused.kind(), Kind::Unavailable, "{refused}");
            drop(keystore);

            let keystore = open(&f.dir);
            let settled = image(&f.dir);
            for slot in 0..64.min((settled.len() / PAGE_BYTES).saturating_sub(66)) {
                assert_eq!(
                    page(&settled, 2 + slot),
                    page(&settled, 66 + slot),
                    "{writes} writes, {sectors} sectors"
                );
            }
            check(&keystore, writes + usize::from(sectors == 8));
            now(keystore.create_cmk(f.customer)).unwrap();
        }
    }
    unreachable!()
}

#[test]
fn a_power_cut_anywhere_in_any_change_leaves_it_done_or_not_done() {
    let f = fixture();
    let one_cmk = image(&f.dir);
    let writes = cut_everywhere(
        &f,
        &one_cmk,
        |keystore| now(keystore.create_cmk(f.customer)),
        |keystore, durable| {
            f.opens_in(keystore).unwrap();
            assert_eq!(keystore.cmks().len(), if durable > 0 { 2 } else { 1 });
        },
    );
    assert_eq!(writes, 2);

    let writes = cut_everywhere(
        &f,
        &one_cmk,
        |keystore| keystore.set_enabled(f.cmk, false),
        |keystore, durable| assert_eq!(keystore.cmks()[0].enabled, durable == 0),
    );
    assert_eq!(writes, 2);

    let writes = cut_everywhere(
        &f,
        &one_cmk,
        |keystore| now(keystore.destroy_cmk(f.cmk)),
        |keystore, durable| {
            if durable == 0 && keystore.cmks().len() == 1 {
                return f.opens_in(keystore).unwrap();
            }
            assert_eq!(f.opens_in(keystore).unwrap_err().kind(), Kind::NotFound);
            assert!(
                [COPY_1, COPY_2]
                    .iter()
                    .all(|copy| page(&image(&f.dir), *copy).iter().all(|b| *b == 0))
            );
        },
    );
    assert_eq!(writes, 3);
}

#[test]
fn a_power_cut_while_the_file_grows_loses_nothing() {
    let f = fixture();
    let keystore = open(&f.dir);
    for _ in 1..64 {
        now(keystore.create_cmk(f.customer)).unwrap();
    }
    drop(keystore);
    let full = image(&f.dir);
    let writes = cut_everywhere(
        &f,
        &full,
        |keystore| now(keystore.create_cmk(f.customer)),
        |keystore, durable| {
            f.opens_in(keystore).unwrap();
            assert_eq!(keystore.cmks().len(), if durable > 2 { 65 } else { 64 });
        },
    );
    assert_eq!(writes, 4, "two copies of the header, two of the slot");
}

#[test]
fn one_damaged_copy_is_named_mended_and_costs_nothing() {
    for (copy, name) in [
        (0, "copy 1 of the header"),
        (1, "copy 2 of the header"),
        (COPY_1, "copy 1 of slot 0"),
        (COPY_2, "copy 2 of slot 0"),
    ] {
        let f = fixture();
        let good = image(&f.dir);
        let mut bad = page(&good, copy);
        bad[50] ^= 0x10;
        put_image(&f.dir, &with_page(good.clone(), copy, &bad));
        let keystore = open(&f.dir);
        f.opens_in(&keystore).unwrap();
        assert!(
            keystore.findings().iter().any(|line| line.contains(name)),
            "{:?}",
            keystore.findings()
        );
        assert_eq!(image(&f.dir), good, "{name} was not mended");
        drop(keystore);
        assert!(open(&f.dir).findings().is_empty());
    }
}

#[test]
fn two_damaged_copies_cost_that_cmk_only_and_are_kept_for_rescue() {
    let f = fixture();
    let keystore = open(&f.dir);
    let other = now(keystore.create_cmk(f.customer)).unwrap();
    let (_, wrapped) = now(keystore.create_data_key(other, f.context)).unwrap();
    drop(keystore);
    let mut damaged = image(&f.dir);
    damaged[COPY_1 * PAGE_BYTES + 100] ^= 1;
    damaged[COPY_2 * PAGE_BYTES + 2000] ^= 1;
    put_image(&f.dir, &damaged);

    let keystore = open(&f.dir);
    let error = f.opens_in(&keystore).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.to_string().contains("restore the keystore"), "{error}");
    now(keystore.unwrap_data_key(&wrapped, f.context)).unwrap();
    now(keystore.create_cmk(f.customer)).unwrap();
    let kept = image(&f.dir);
    for copy in [COPY_1, COPY_2] {
        assert_eq!(
            page(&kept, copy),
            page(&damaged, copy),
            "the damaged copy was overwritten"
        );
    }
}

#[test]
fn a_truncated_keystore_keeps_what_is_left_and_says_what_is_cut_off() {
    let f = fixture();
    let whole = image(&f.dir);
    // Second copies are cut off: everything is still there and is mended.
    put_image(&f.dir, &whole[..COPY_2 * PAGE_BYTES]);
    let keystore = open(&f.dir);
    f.opens_in(&keystore).unwrap();
    assert!(
        keystore
            .findings()
            .iter()
            .any(|line| line.contains("the file ends before it"))
    );
    drop(keystore);
    // First copies too: the CMK is damaged, not merely unknown.
    put_image(&f.dir, &whole[..COPY_1 * PAGE_BYTES]);
    assert_eq!(f.opens_in(&open(&f.dir)).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn a_file_that_is_no_keystore_is_refused_and_left_alone() {
    for bytes in [
        Vec::new(),
        vec![0; 8192],
        vec![0xff; 100_000],
        b"#!/bin/sh\n".to_vec(),
    ] {
        let f = fixture();
        put_image(&f.dir, &bytes);
        let error = open_error(&f.dir);
        assert_eq!(error.kind(), Kind::Damaged);
        assert!(error.to_string().contains("is not a vold keystore"), "{error}");
        assert_eq!(image(&f.dir), bytes);
    }
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    for number in [0, COPY_1] {
        let f = fixture();
        let good = image(&f.dir);
        let mut newer = page(&good, number);
        newer[8] = 9;
        let crc = crc32c::crc32c(&newer[..4092]);
        newer[4092..].copy_from_slice(&crc.to_le_bytes());
        let newer = with_page(good, number, &newer);
        put_image(&f.dir, &newer);
        let error = open_error(&f.dir);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("version 9"), "{error}");
        assert_eq!(image(&f.dir), newer);
    }
}

#[test]
fn wrapped_bytes_of_any_shape_are_errors() {
    let f = fixture();
    let keystore = open(&f.dir);
    for bytes in [vec![], vec![1, 0], vec![1, 0, 0, 0], vec![0xff; 96], vec![0; 512]] {
        let wrapped = WrappedKey { cmk: f.cmk, bytes };
        assert_eq!(
            now(keystore.unwrap_data_key(&wrapped, f.context))
                .unwrap_err()
                .kind(),
            Kind::Damaged
        );
    }
}

#[test]
fn many_threads_use_one_keystore() {
    let f = fixture();
    let keystore = open(&f.dir);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let cmk = now(keystore.create_cmk(f.customer)).unwrap();
                    let (_, wrapped) = now(keystore.create_data_key(cmk, f.context)).unwrap();
                    now(keystore.unwrap_data_key(&wrapped, f.context)).unwrap();
                    f.opens_in(&keystore).unwrap();
                    now(keystore.destroy_cmk(cmk)).unwrap();
                }
            });
        }
    });
    assert_eq!(keystore.cmks().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn garbage_in_the_file_is_an_error_or_confined_and_never_a_panic_or_a_wrong_key(
        garbage in prop::collection::vec((0..70usize, 0..PAGE_BYTES, prop::collection::vec(any::<u8>(), 1..600)), 1..6),
        length in prop_oneof![3 => Just(None), 1 => (0..600_000usize).prop_map(Some)],
    ) {
        let f = fixture();
        let mut bytes = image(&f.dir);
        for (number, within, run) in garbage {
            let at = number * PAGE_BYTES + within;
            let end = (at + run.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&run[..end - at]);
        }
        if let Some(length) = length {
            bytes.resize(length, 0x77);
        }
        put_image(&f.dir, &bytes);
        match LocalKeystore::open_or_create(f.dir.path()) {
            Err(error) => prop_assert!(matches!(error.kind(), Kind::Damaged | Kind::Unsupported), "{error}"),
            Ok(keystore) => {
                // Damaged, or the very key: opens_in compares the bytes.
                if let Err(error) = f.opens_in(&keystore) {
                    prop_assert_eq!(error.kind(), Kind::Damaged);
                }
                now(keystore.create_cmk(f.customer)).unwrap();
            }
        }
    }
}
