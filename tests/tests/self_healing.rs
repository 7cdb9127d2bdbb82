//! While fio verifies, one store's bytes rot at random: no client sees an error, and all of it is repaired.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libvol::buf::Buf;
use rand::RngExt;
use rand::rngs::SmallRng;
use rustix::fs::OFlags;
use vold_tests::content::seeded;
use vold_tests::raw::RawStore;
use vold_tests::tools::{succeed, tool};
use vold_tests::{Engine, Vold, scale, wait_for};

const BLOCK: u64 = 4096;

/// Inverts some bytes of a block on the device itself, under a running daemon.
fn rot(device: &File, block_at: u64, random: &mut SmallRng) {
    let mut buf = Buf::zeroed(BLOCK as usize);
    device.read_exact_at(&mut buf, block_at).unwrap();
    for _ in 0..random.random_range(1..16) {
        let at = random.random_range(0..BLOCK as usize);
        buf[at] ^= random.random_range(1..=255u8);
    }
    device.write_all_at(&buf, block_at).unwrap();
}

/// Damages blocks of the store's allocated extents and their checksum areas until told to stop. Returns how many.
fn rot_until(stop: &AtomicBool, store: &Path, volume_id: &str, mut random: SmallRng) -> u64 {
    let raw = RawStore::open(store);
    let extents = raw.extents_of(raw.slot(volume_id).unwrap().dataset);
    let mut regions: Vec<(u64, u64)> = Vec::new();
    for physical in extents.into_values() {
        regions.push((raw.data_at(physical), raw.extent_bytes()));
        regions.push((raw.sums_at(physical), raw.sum_area_bytes()));
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(store)
        .unwrap();
    let mut count = 0;
    while !stop.load(Ordering::Acquire) {
        // Checksum areas are few blocks and get their share.
        let (at, len) = regions[random.random_range(0..regions.len())];
        rot(
            &device,
            at + random.random_range(0..len / BLOCK) * BLOCK,
            &mut random,
        );
        count += 1;
        std::thread::sleep(Duration::from_millis(random.random_range(1..10)));
    }
    count
}

fn while_one_store_rots(engine: Engine, replicas: usize, seconds: u64) {
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(replicas, "160M", "64M");
    let fio = |options: &[&str]| {
        let mut fio = tool("fio");
        fio.current_dir(vold.path(""))
            .args(["--name=verify", "--ioengine=nbd", "--size=64M", "--verify=crc32c"])
            .args(["--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0"])
            .args(["--output-format=terse", "--iodepth=16", &format!("--uri={uri}")])
            .args(options);
        succeed(&mut fio);
    };
    fio(&["--rw=write", "--bs=1M"]);
    let stop = Arc::new(AtomicBool::new(false));
    let rotting = {
        let (stop, store) = (stop.clone(), vold.store_path("b"));
        let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
        let random = seeded(&format!("rot, {engine:?}, {replicas} replicas"));
        std::thread::spawn(move || rot_until(&stop, &store, &id, random))
    };
    let until = std::time::Instant::now() + Duration::from_secs(seconds);
    while std::time::Instant::now() < until {
        fio(&["--rw=randrw", "--bssplit=4k/60:64k/40", "--fsync=64"]);
    }
    stop.store(true, Ordering::Release);
    let damaged = rotting.join().unwrap();
    assert!(damaged > 100, "{damaged} blocks were damaged");
    // What nobody has read since is found by the scrub.
    vold.ctl("scrub start acme/vol");
    let scrub = wait_for("the scrub has ended", || {
        let scrub = vold.ctl("scrub status")["items"][0].clone();
        (scrub["state"] == "idle" && scrub["pass"] == 1).then_some(scrub)
    });
    assert_eq!(scrub["lost_blocks"], 0, "{scrub}");
    let volume = vold.volume("acme/vol");
    let healed = volume["healed_blocks"].as_u64().unwrap();
    println!("{engine:?}, {replicas} replicas: {damaged} damaged, {healed} healed: {scrub}");
    assert!(healed > 10, "{volume}");
    fio(&["--rw=randrw", "--bs=4k"]);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn while_one_of_two_stores_rots_no_client_sees_it_and_all_is_repaired_on_io_uring() {
    while_one_store_rots(Engine::Uring, 2, scale(10, 60));
}

#[test]
fn while_one_of_three_stores_rots_no_client_sees_it_and_all_is_repaired_on_threads() {
    while_one_store_rots(Engine::Threads, 3, scale(3, 30));
}
