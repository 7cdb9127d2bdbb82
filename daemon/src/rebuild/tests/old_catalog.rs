//! The old catalog: what becomes of it, and the new one on disk.

use super::*;
use libvol::catalog::{VmRecord, VolumeRecord};

fn path(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("catalog.redb")
}

#[test]
fn a_sound_one_is_never_replaced_and_an_absent_or_damaged_one_is() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!check_old(&path(&dir)).unwrap());
    drop(Catalog::create(&path(&dir), InstallationId::random()).unwrap());
    let error = check_old(&path(&dir)).unwrap_err();
    assert_eq!(error.kind(), Kind::Exists);
    assert!(error.message().contains("mv "), "{error}");
    for garbage in [&b""[..], &[0x5a; 1 << 16], b"redb"] {
        std::fs::write(path(&dir), garbage).unwrap();
        assert!(check_old(&path(&dir)).unwrap(), "{} bytes", garbage.len());
    }
}

#[test]
fn whatever_byte_of_it_is_wrong_it_is_sound_or_damaged_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::create(&path(&dir), InstallationId::random()).unwrap();
    let vm = |n: u32| VmRecord {
        id: libvol::ids::VmId::random(),
        name: format!("vm-{n}").parse().unwrap(),
        customer: CustomerId::random(),
        uid: n,
        created_unix_seconds: 1,
    };
    for n in 0..50 {
        catalog.write(|tx| tx.insert(&vm(n))).unwrap();
    }
    drop(catalog);
    let sound = std::fs::read(path(&dir)).unwrap();
    let mut damaged = 0;
    // Every byte of the header, and a sample of all others.
    for at in (0..512).chain((512..sound.len()).step_by(sound.len() / 200 + 1)) {
        let mut bytes = sound.clone();
        bytes[at] ^= 0xff;
        std::fs::write(path(&dir), &bytes).unwrap();
        match check_old(&path(&dir)) {
            Ok(true) => damaged += 1,
            Err(e) => assert!(matches!(e.kind(), Kind::Exists | Kind::Unsupported), "{at}: {e}"),
            Ok(false) => panic!("{at}: it is there"),
        }
    }
    assert!(damaged > 0);
    for len in [1, 4095, 4096, sound.len() / 2, sound.len() - 1] {
        std::fs::write(path(&dir), &sound[..len]).unwrap();
        assert!(check_old(&path(&dir)).unwrap(), "cut to {len}");
    }
}

#[test]
fn the_damaged_one_is_kept_under_the_next_free_number() {
    let dir = tempfile::tempdir().unwrap();
    for round in ["first", "second"] {
        std::fs::write(path(&dir), round).unwrap();
        let new = dir.path().join("new");
        std::fs::write(&new, "new").unwrap();
        put_in_place(&new, &path(&dir), true).unwrap();
        assert_eq!(std::fs::read(path(&dir)).unwrap(), b"new");
    }
    for (n, round) in [(1, "first"), (2, "second")] {
        let kept = dir.path().join(format!("catalog.redb.damaged-{n}"));
        assert_eq!(std::fs::read(kept).unwrap(), round.as_bytes());
    }
}

#[test]
fn a_plan_becomes_a_catalog_of_the_stores_installation_and_an_earlier_attempt_is_no_hindrance() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let plan = world.plan();
    std::fs::write(path(&dir), "half a catalog").unwrap();
    write(&plan, &path(&dir)).unwrap();
    let catalog = Catalog::open(&path(&dir)).unwrap();
    assert_eq!(catalog.installation(), world.stores[0].info.installation);
    let volumes = catalog.read(|view| view.all::<VolumeRecord>()).unwrap();
    assert_eq!(volumes, plan.volumes);
}
