//! kill -9 in the middle of writes: after the restart every acknowledged byte is right, every other byte is one that was
//! written, the replicas are identical and `vold check` is clean.
//!
//! A killed process loses no page of the device, so what is asked for here is more than flushed data: an acknowledged
//! write is on every replica's device (invariant I4). Power cuts, which may take everything that was not flushed, are
//! simulated in libvol's own tests.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;
use vold_tests::content::seeded;
use vold_tests::nbd::{CMD_FLUSH, CMD_WRITE, CMD_WRITE_ZEROES, Client, FUA};
use vold_tests::raw::RawStore;
use vold_tests::tools::tool;
use vold_tests::{Engine, Vold, scale};

const SECTOR: u64 = 512;
const VOLUME: u64 = 48 << 20;

/// Runs a property with an engine, a number of replicas and a number of rounds, as one test for each set-up: five rounds in
/// all, or with `VOLD_TEST_FULL` twenty for each.
macro_rules! in_rounds {
    ($property:ident) => {
        mod $property {
            use super::{Engine, scale};

            #[test]
            fn with_two_replicas_on_io_uring() {
                super::$property(Engine::Uring, 2, scale(2, 25));
            }
            #[test]
            fn with_two_replicas_on_threads() {
                super::$property(Engine::Threads, 2, scale(1, 25));
            }
            #[test]
            fn with_three_replicas_on_io_uring() {
                super::$property(Engine::Uring, 3, scale(1, 25));
            }
            #[test]
            fn with_one_replica_on_io_uring() {
                super::$property(Engine::Uring, 1, scale(1, 25));
            }
        }
    };
}

in_rounds!(acknowledged_writes_survive_kill_9_and_replicas_become_identical);
in_rounds!(fio_finds_every_write_that_came_back_before_kill_9);

/// What may be in each sector: the tag of the last acknowledged write (0 for zeros), then those of later ones without a
/// reply.
struct Model {
    sectors: Vec<Vec<u64>>,
}

enum Request {
    Write(Range<u64>),
    Flush,
}

impl Model {
    fn new() -> Self {
        Self {
            sectors: vec![vec![0]; (VOLUME / SECTOR) as usize],
        }
    }

    /// Writes until `replies` have come, then goes away with requests in flight.
    fn write_until(&mut self, client: &mut Client, random: &mut SmallRng, replies: usize, tag: &mut u64) {
        let mut pending: HashMap<u64, Request> = HashMap::new();
        let mut busy = vec![false; self.sectors.len()];
        for _ in 0..replies {
            while pending.len() < 24 {
                self.submit(client, random, &mut pending, &mut busy, tag);
            }
            let done = client.reply().expect("the daemon lives");
            assert_eq!(done.error, 0);
            if let Request::Write(range) = pending.remove(&done.cookie).expect("ours") {
                for sector in range {
                    busy[sector as usize] = false;
                    let tags = &mut self.sectors[sector as usize];
                    tags.drain(..tags.len() - 1);
                }
            }
        }
    }

    /// One random request. Those in flight never overlap, so that the order of replies is the order of effects.
    fn submit(
        &mut self,
        client: &mut Client,
        random: &mut SmallRng,
        pending: &mut HashMap<u64, Request>,
        busy: &mut [bool],
        tag: &mut u64,
    ) {
        if random.random_range(0..40) == 0 {
            let cookie = client.submit(CMD_FLUSH, 0, 0, 0, &[]).expect("the daemon lives");
            pending.insert(cookie, Request::Flush);
            return;
        }
        let sectors = match random.random_range(0..10) {
            0..4 => 8,
            4..8 => random.random_range(1..32),
            _ => random.random_range(32..512),
        };
        // Half of the writes go to a small part, so that sectors are written again and again.
        let room = if random.random_range(0..2) == 0 {
            4096
        } else {
            VOLUME / SECTOR
        };
        let first = random.random_range(0..room - sectors);
        let range = first..first + sectors;
        if range.clone().any(|sector| busy[sector as usize]) {
            return;
        }
        let zeroes = random.random_range(0..12) == 0;
        *tag += 1;
        let number = if zeroes { 0 } else { *tag };
        for sector in range.clone() {
            busy[sector as usize] = true;
            self.sectors[sector as usize].push(number);
        }
        let (at, len) = (first * SECTOR, (sectors * SECTOR) as u32);
        let fua = random.random_range(0..16) == 0;
        let flags = if fua { FUA } else { 0 };
        let cookie = if zeroes {
            client.submit(CMD_WRITE_ZEROES, flags, at, len, &[])
        } else {
            let data: Vec<u8> = range
                .clone()
                .flat_map(|sector| contents(number, sector))
                .collect();
            client.submit(CMD_WRITE, flags, at, len, &data)
        };
        pending.insert(cookie.expect("the daemon lives"), Request::Write(range));
    }

    /// Reads everything and compares; afterwards what was found is what is there.
    fn verify(&mut self, client: &mut Client) {
        const STEP: u64 = 1 << 20;
        for at in (0..VOLUME).step_by(STEP as usize) {
            let data = client.read(at, STEP as usize).unwrap();
            for (i, found) in data.chunks(SECTOR as usize).enumerate() {
                let sector = at / SECTOR + i as u64;
                let tags = &mut self.sectors[sector as usize];
                let tag = u64::from_le_bytes(found[..8].try_into().expect("8 bytes"));
                assert!(
                    tags.contains(&tag),
                    "sector {sector} holds write {tag}; it may hold {tags:?} (the first was acknowledged)"
                );
                assert!(found == contents(tag, sector), "sector {sector} holds a mixture");
                *tags = vec![tag];
            }
        }
    }
}

/// A sector's bytes: its write's number and its place, again and again; zeros for number 0.
fn contents(tag: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if tag != 0 {
        for pair in bytes.chunks_mut(16) {
            pair[..8].copy_from_slice(&tag.to_le_bytes());
            pair[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

/// All replicas of the stopped daemon's volume hold the same bytes and no mark is left.
fn replicas_are_identical(vold: &Vold, id: &str, replicas: usize) {
    let stores = ["a", "b", "c"][..replicas]
        .iter()
        .map(|name| RawStore::open(&vold.store_path(name)))
        .collect::<Vec<_>>();
    let dataset = stores[0].slot(id).expect("the slot").dataset;
    let first = stores[0].extents_of(dataset);
    assert!(!first.is_empty());
    for store in &stores {
        let marked = store.extents().into_iter().find(|extent| extent.dirty);
        assert!(marked.is_none(), "a mark is left: {marked:?}");
        let extents = store.extents_of(dataset);
        assert!(extents.keys().eq(first.keys()), "{extents:?} {first:?}");
        for (logical, physical) in &extents {
            let len = store.extent_bytes() as usize;
            let own = store.bytes(store.data_at(*physical), len);
            let other = stores[0].bytes(stores[0].data_at(first[logical]), len);
            assert!(own == other, "extent {logical} differs between replicas");
        }
    }
}

fn acknowledged_writes_survive_kill_9_and_replicas_become_identical(
    engine: Engine,
    replicas: usize,
    rounds: usize,
) {
    let mut random = seeded(&format!("crash, {engine:?}, {replicas} replicas"));
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(replicas, "128M", &VOLUME.to_string());
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    let mut model = Model::new();
    let mut tag = 0;
    for round in 0..rounds {
        let mut client = Client::connect(&uri);
        let replies = random.random_range(50..2500);
        model.write_until(&mut client, &mut random, replies, &mut tag);
        vold.kill();
        // The attachment outlives the daemon; recovery is online.
        vold.restart();
        println!("{engine:?}, {replicas} replicas, round {round}: {replies} replies before the kill");
        model.verify(&mut Client::connect(&uri));
        vold.stop();
        replicas_are_identical(&vold, &id, replicas);
        vold.check_is_clean();
        vold.restart();
        model.verify(&mut Client::connect(&uri));
    }
}

#[test]
fn a_second_kill_during_recovery_loses_nothing() {
    let mut random = seeded("crash in recovery");
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", &VOLUME.to_string());
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    let mut model = Model::new();
    let mut tag = 0;
    for _ in 0..scale(2, 10) {
        let mut client = Client::connect(&uri);
        model.write_until(&mut client, &mut random, 800, &mut tag);
        for _ in 0..3 {
            vold.kill();
            vold.restart();
            // Some reads ask for recovery on demand just before the next kill.
            let mut client = Client::connect(&uri);
            for _ in 0..random.random_range(0..20) {
                client.read(random.random_range(0..VOLUME - 4096), 4096).unwrap();
            }
        }
        model.verify(&mut Client::connect(&uri));
    }
    vold.stop();
    replicas_are_identical(&vold, &id, 2);
    vold.check_is_clean();
}

/// fio writes with a flush every 32 writes and is cut off by kill -9; it has logged each write that came back. After the
/// restart each of those is there, with fio's header and checksum.
///
/// (What fio saves for its own verification is not exact enough: its `verify_state` counts writes that were sent, and a run
/// cut off reads a few blocks too many now and then, of whatever server.)
fn fio_finds_every_write_that_came_back_before_kill_9(engine: Engine, replicas: usize, rounds: usize) {
    let mut random = seeded(&format!("fio and kill -9, {engine:?}, {replicas} replicas"));
    let mut vold = Vold::start_on(engine);
    let uri = vold.with_volume(replicas, "160M", "96M");
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    for round in 0..rounds {
        // What an earlier round wrote is not this round's.
        Client::connect(&uri).trim(0, 96 << 20).unwrap();
        let directory = vold.path(&format!("fio-{round}"));
        std::fs::create_dir(&directory).unwrap();
        let mut fio = tool("fio")
            .current_dir(&directory)
            .args(["--name=crash", "--ioengine=nbd", "--rw=randwrite", "--iodepth=16"])
            .args(["--bssplit=4k/70:16k/20:64k/10", "--fsync=32", "--size=96M"])
            .args(["--verify=crc32c", "--do_verify=0", "--verify_state_save=0"])
            .args([
                "--write_lat_log=crash",
                "--log_offset=1",
                "--disable_clat=1",
                "--disable_slat=1",
            ])
            .arg(format!("--randseed={}", round + 1))
            .arg(format!("--uri={uri}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        vold_tests::wait_for("fio writes", || {
            (vold.volume("acme/vol")["allocated_bytes"].as_u64() > Some(0)).then_some(())
        });
        // Anywhere in the load.
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
        vold.kill();
        // A fast disk may have taken everything by then.
        let cut_off = !fio.wait().unwrap().success();
        vold.restart();
        let mut client = Client::connect(&uri);
        let acknowledged = acknowledged_by_fio(&directory.join("crash_lat.1.log"));
        println!(
            "round {round}: {} writes came back before the kill; cut off: {cut_off}",
            acknowledged.len()
        );
        for (offset, len) in acknowledged {
            // A header every 4 KiB, the smallest of the block sizes.
            for (block, place) in client
                .read(offset, len)
                .unwrap()
                .chunks(4096)
                .zip((offset..).step_by(4096))
            {
                assert!(fio_wrote(block, place), "at {place}: {:02x?}", &block[..64]);
            }
        }
        // What has been read is reconciled; what has not may keep its mark when the daemon stops in the midst of recovery.
        for at in (0..96 << 20).step_by(1 << 20) {
            client.read(at, 1 << 20).unwrap();
        }
        drop(client);
        vold.stop();
        replicas_are_identical(&vold, &id, replicas);
        vold.check_is_clean();
        vold.restart();
    }
}

/// Offset and length of each write in fio's latency log (a line each: time, latency, direction, length, offset, …).
fn acknowledged_by_fio(log: &Path) -> Vec<(u64, usize)> {
    let number = |field: &str| field.trim().parse::<u64>().unwrap();
    let text = std::fs::read_to_string(log).unwrap();
    let fields = text
        .lines()
        .map(|line| line.split(',').map(number).collect::<Vec<_>>());
    let writes = fields.filter(|fields| fields[2] == 1);
    writes.map(|fields| (fields[4], fields[3] as usize)).collect()
}

/// Whether a block is one that fio 3 wrote with `verify=crc32c` at this offset: a header (magic 0xacca, its length at byte
/// 4, its offset at byte 16), and from byte 44 on contents whose CRC32C is at byte 40.
fn fio_wrote(block: &[u8], offset: u64) -> bool {
    let number = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
    let place = u64::from_le_bytes(block[16..24].try_into().unwrap());
    let magic = u16::from_le_bytes([block[0], block[1]]);
    let crc = !crc32c::crc32c(&block[44..]);
    magic == 0xacca && number(4) as usize == block.len() && place == offset && number(40) == crc
}
