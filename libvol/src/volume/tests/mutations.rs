//! Bad stores, at random: whatever is done to one store's bytes, nothing panics, nothing wrong is served as good, and what
//! does not depend on that store alone is served whole.
//!
//! Two stores, three volumes: one on both, one on each alone. They are opened as the daemon opens them: what is refused or
//! an old copy of itself is judged by what is remembered, a replica that is out catches up. Where a store was not closed,
//! its data is left alone: of two copies that differ under a mark, nobody can tell which was damaged.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::*;
use crate::disk::DiskFile;
use crate::disk::sim::Rng;
use crate::error::{Error, Kind};
use crate::ids::Incarnation;
use crate::store::tests::regions_small;
use crate::store::{Lineage, Verdict, VolumeState};

const INSTALLATION: InstallationId = InstallationId::NIL;
/// Extents of each volume; the last is never written.
const EXTENTS: u64 = 6;
const SIZE: u64 = EXTENTS * EXTENT_BYTES;
/// Stores of each volume.
const ON: [&[usize]; 3] = [&[0, 1], &[0], &[1]];

/// What there is before anything goes wrong, and what is remembered of it.
#[derive(Clone)]
struct World {
    media: Vec<Media>,
    /// The stores as they were before the last writes.
    old: Vec<Media>,
    stranger: Media,
    ids: Vec<StoreId>,
    lineages: Vec<Lineage>,
    contents: Vec<Vec<u8>>,
    clean: bool,
}

fn volume_id(n: usize) -> VolumeId {
    VolumeId::from_bytes([n as u8 + 1; 16])
}

fn dataset(n: usize) -> DatasetId {
    DatasetId::from_bytes([n as u8 + 1; 16])
}

fn register(n: usize) -> Rc<Memory> {
    Memory::new(ON[n].len())
}

fn spec(n: usize, replicas: Vec<ReplicaSpec>, register: &Rc<Memory>) -> VolumeSpec {
    let mut key = Secret::<64>::zeroed().unwrap();
    let bytes = key.expose_mut().iter_mut().enumerate();
    bytes.for_each(|(i, byte)| *byte = i as u8 ^ n as u8);
    VolumeSpec {
        id: volume_id(n),
        label: format!("acme/volume-{n}"),
        dataset: dataset(n),
        size_bytes: SIZE,
        sealer: Sealer::new(dataset(n), &key).unwrap(),
        key_version: KeyVersion(1),
        replicas,
        membership_epoch: register.0.borrow().epoch,
        register: register.clone(),
    }
}

fn replica(store: usize, io: Option<Rc<StoreIo>>) -> ReplicaSpec {
    ReplicaSpec {
        store: StoreId::from_bytes([store as u8 + 1; 16]),
        name: format!("store-{store}"),
        io,
        state: Member::InSync,
        full_copy: false,
        reason: None,
    }
}

async fn make_store(file: &DiskFile, slot: usize, installation: InstallationId) -> StoreId {
    let options = FormatOptions {
        installation,
        name: format!("store-{slot}").parse().unwrap(),
        zone: format!("zone-{slot}").parse().unwrap(),
        size_bytes: STORE_BYTES,
        extent_bytes: EXTENT_BYTES,
        zero_filled: true,
    };
    format_small(&Disk::attach(file).unwrap(), &options)
        .await
        .unwrap()
}

impl World {
    fn new(clean: bool) -> Self {
        let driver = SimDriver::new(1, vec![Media::zeroed(STORE_BYTES); 3]);
        let runtime = Runtime::new(driver.clone());
        let world = driver.clone();
        let made = runtime.block_on(async move { Self::make(&world, clean).await });
        drop(runtime);
        let mut media = driver.media();
        let stranger = media.pop().unwrap();
        Self {
            media,
            stranger,
            ..made
        }
    }

    async fn make(driver: &Rc<SimDriver>, clean: bool) -> Self {
        make_store(&driver.file(2), 2, InstallationId::from_bytes([9; 16])).await;
        let (mut ids, mut ios, mut lineages) = (Vec::new(), Vec::new(), Vec::new());
        for slot in 0..2 {
            ids.push(make_store(&driver.file(slot), slot, INSTALLATION).await);
            let mut lineage = Lineage::default();
            let opening = store::begin_open(&driver.file(slot), Expect::default())
                .await
                .unwrap();
            let renewal = lineage.begin(&opening.found(), Incarnation::random());
            let handle = opening.finish(Some(renewal)).await.unwrap();
            lineage.confirm(handle.incarnation(), handle.committed_lsn());
            lineages.push(lineage);
            ios.push(StoreIo::attach(&handle).unwrap());
        }
        let mut volumes = Vec::new();
        for (n, on) in ON.iter().enumerate() {
            for store in *on {
                let (slot, record) = volume_facts(on.len());
                let slot = VolumeSlot {
                    volume: volume_id(n),
                    dataset: dataset(n),
                    stores: on.iter().map(|store| ids[*store]).collect(),
                    ..slot
                };
                let record = VolumeRecord {
                    volume: volume_id(n),
                    size_bytes: SIZE,
                    ..record
                };
                ios[*store].handle().add_volume(slot, record).await.unwrap();
            }
            let replicas = on.iter().map(|store| replica(*store, Some(ios[*store].clone())));
            let spec = spec(n, replicas.collect(), &register(n));
            volumes.push(Volume::open_tuned(spec, IDLE).await.unwrap());
        }
        let mut contents = vec![vec![0; SIZE as usize]; ON.len()];
        let written = (5 * EXTENT_BYTES) as usize;
        for (n, volume) in volumes.iter().enumerate() {
            contents[n][..written].copy_from_slice(&pattern(n as u8, written));
            write(volume, 0, &contents[n][..written]).await.unwrap();
            volume.flush().await.unwrap();
        }
        let old = driver.media()[..2].to_vec();
        for (n, volume) in volumes.iter().enumerate() {
            let rewritten = (2 * EXTENT_BYTES + BLOCK + 100) as usize;
            contents[n][..rewritten].copy_from_slice(&pattern(n as u8 + 100, rewritten));
            write(volume, 0, &contents[n][..rewritten]).await.unwrap();
            volume.trim(4 * EXTENT_BYTES, EXTENT_BYTES, false).await.unwrap();
            contents[n][4 * EXTENT_BYTES as usize..].fill(0);
            volume.flush().await.unwrap();
            if clean {
                volume.close().await.unwrap();
            }
        }
        for (io, lineage) in ios.iter().zip(&mut lineages) {
            let handle = io.handle();
            match clean {
                true => handle.close().await.unwrap(),
                false => handle.beat().await.unwrap(),
            }
            lineage.raise(handle.incarnation(), handle.committed_lsn());
        }
        Self {
            media: Vec::new(),
            stranger: Media::zeroed(0),
            old,
            ids,
            lineages,
            contents,
            clean,
        }
    }

    /// Does something to the stores; which of them may not be relied on any more.
    fn mutate(&mut self, rng: &mut Rng) -> Vec<usize> {
        let store = rng.below(2) as usize;
        let media = &mut self.media[store];
        let [superblocks, slots, log, table, sums, data] = regions_small(STORE_BYTES, EXTENT_BYTES);
        let copies = [(0, BLOCK), (64 << 10, BLOCK)];
        match rng.below(16) {
            0 => scribble(media, copies[rng.below(2) as usize], rng),
            1 => copies.into_iter().for_each(|copy| scribble(media, copy, rng)),
            2..=3 => some(media, slots, rng),
            4..=5 => some(media, log, rng),
            6..=7 => some(media, table, rng),
            8 => some(media, sums, rng),
            9 if self.clean => some(media, data, rng),
            9 => some(media, sums, rng),
            10 => {
                let everywhere = [superblocks, slots, log, table, sums, data];
                let parts = if self.clean { 6 } else { 5 };
                (0..1 + rng.below(6))
                    .for_each(|_| scribble(media, everywhere[rng.below(parts) as usize], rng));
            }
            11 => media.truncate(rng.below(STORE_BYTES)),
            12 => *media = self.old[store].clone(),
            13 => *media = self.stranger.clone(),
            14 => *media = Media::zeroed(STORE_BYTES),
            _ => {
                self.media.swap(0, 1);
                return vec![0, 1];
            }
        }
        vec![store]
    }
}

fn some(media: &mut Media, region: (u64, u64), rng: &mut Rng) {
    (0..1 + rng.below(3)).for_each(|_| scribble(media, region, rng));
}

/// A flipped bit, zeroed sectors, noise, or a block of the same disk in another's place.
fn scribble(media: &mut Media, (at, len): (u64, u64), rng: &mut Rng) {
    let end = at + len;
    let at = at + rng.below(len);
    let mut put = |at: u64, mut bytes: Vec<u8>| {
        bytes.truncate((end - at) as usize);
        media.overwrite(at, &bytes);
    };
    match rng.below(8) {
        0..=2 => {
            let mut byte = vec![0];
            media.read(at, &mut byte);
            byte[0] ^= 1 << rng.below(8);
            media.overwrite(at, &byte);
        }
        3 => put(at / 512 * 512, vec![0; 512 * (1 + rng.below(40) as usize)]),
        4..=5 => put(
            at,
            (0..1 + rng.below(9000)).map(|_| rng.next_u64() as u8).collect(),
        ),
        _ => {
            let mut block = vec![0; BLOCK as usize];
            media.read(rng.below(STORE_BYTES / BLOCK) * BLOCK, &mut block);
            media.overwrite(at / BLOCK * BLOCK, &block);
        }
    }
}

/// A store as the daemon sees it at its start.
enum Seat {
    Away,
    Open(Rc<StoreIo>),
    /// Open, and an old copy of itself.
    Old(Rc<StoreIo>),
}

impl Seat {
    fn io(&self) -> Option<Rc<StoreIo>> {
        match self {
            Seat::Away => None,
            Seat::Open(io) | Seat::Old(io) => Some(io.clone()),
        }
    }
}

async fn seat(world: &World, file: &DiskFile, store: usize) -> Seat {
    let expect = Expect {
        installation: Some(INSTALLATION),
        store: Some(world.ids[store]),
    };
    let opening = match store::begin_open(file, expect).await {
        Ok(opening) => opening,
        Err(error) => return refused(&error),
    };
    let mut lineage = world.lineages[store].clone();
    let verdict = lineage.judge(&opening.found());
    if matches!(verdict, Verdict::Ahead(_)) {
        return Seat::Away;
    }
    let renewal = lineage.begin(&opening.found(), Incarnation::random());
    let handle = match opening.finish(Some(renewal)).await {
        Ok(handle) => handle,
        Err(error) => return refused(&error),
    };
    let io = StoreIo::attach(&handle).unwrap();
    match verdict {
        Verdict::Continues => Seat::Open(io),
        _ => Seat::Old(io),
    }
}

fn refused(error: &Error) -> Seat {
    let kinds = [Kind::Invalid, Kind::Unsupported, Kind::Refused, Kind::Damaged];
    assert!(kinds.contains(&error.kind()), "{error}");
    assert!(!error.message().is_empty());
    Seat::Away
}

/// What came of one volume.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    /// All of it, as it was written.
    Whole,
    /// What is not an error is as it was written.
    InPart,
    No,
}

/// Reads every block: as it was written, or an error.
async fn read_all(volume: &Volume, content: &[u8]) -> Served {
    let mut served = Served::Whole;
    for (block, expected) in content.chunks(BLOCK as usize).enumerate() {
        match read(volume, block as u64 * BLOCK, expected.len()).await {
            Ok(bytes) => assert!(bytes == expected, "block {block} is served wrong"),
            Err(error) => {
                assert_eq!(error.kind(), Kind::Io, "{error}");
                served = Served::InPart;
            }
        }
    }
    served
}

/// Serves a volume on what is there of its stores, and lets those that are out catch up.
async fn serve(world: &World, n: usize, seats: &[Seat]) -> Served {
    let is_old = |store: &usize| matches!(seats[*store], Seat::Old(_));
    let register = register(n);
    let mut replicas = Vec::new();
    for (place, store) in ON[n].iter().enumerate() {
        let mut spec = replica(*store, seats[*store].io());
        if is_old(store) {
            if ON[n].iter().all(is_old) {
                return Served::No;
            }
            (spec.state, spec.full_copy) = (Member::Stale, true);
            let standing = &mut register.0.borrow_mut().members[place];
            (standing.state, standing.full_copy) = (Member::Stale, true);
        }
        replicas.push(spec);
    }
    let volume = match Volume::open_tuned(spec(n, replicas, &register), IDLE).await {
        Ok(volume) => volume,
        Err(error) => {
            assert!(!error.message().is_empty());
            return Served::No;
        }
    };
    let first = read_all(&volume, &world.contents[n]).await;
    for (place, store) in ON[n].iter().enumerate() {
        let stale = volume.replicas()[place].state == Member::Stale;
        let Some(io) = seats[*store].io().filter(|_| stale) else {
            continue;
        };
        if matches!(io.handle().volume(volume_id(n)).await, Ok(VolumeState::Live(..))) {
            let full_copy = register.0.borrow().members[place].full_copy;
            if volume.rejoin(place, io, full_copy).await.is_ok() {
                sleep(Duration::from_secs(5)).await;
            }
        }
    }
    let then = read_all(&volume, &world.contents[n]).await;
    assert!(
        first == then || first == Served::InPart,
        "less is served than before"
    );
    let _ = volume.close().await;
    then
}

/// One history. Returns how many volumes were served whole.
fn run_one(world: &World, seed: u64) -> usize {
    let mut rng = Rng::new(seed);
    let mut world = world.clone();
    let hurt = world.mutate(&mut rng);
    let driver = SimDriver::new(seed, std::mem::take(&mut world.media));
    let runtime = Runtime::new(driver.clone());
    runtime.block_on(async move {
        let mut seats = Vec::new();
        for store in 0..2 {
            seats.push(seat(&world, &driver.file(store), store).await);
        }
        let mut whole = 0;
        for (n, on) in ON.iter().enumerate() {
            let served = serve(&world, n, &seats).await;
            let depends = on.iter().all(|store| hurt.contains(store));
            assert!(
                depends || served == Served::Whole,
                "volume {n} is not served whole"
            );
            whole += usize::from(served == Served::Whole);
        }
        for io in seats.iter().filter_map(Seat::io) {
            let _ = io.handle().close().await;
        }
        whole
    })
}

/// Mutations of a store, by seed.
fn mutations(clean: bool, seeds: std::ops::Range<u64>) {
    let world = World::new(clean);
    let (mut whole, count) = (0, seeds.clone().count());
    for seed in seeds {
        match catch_unwind(AssertUnwindSafe(|| run_one(&world, seed))) {
            Ok(served) => whole += served,
            Err(panic) => {
                eprintln!("failing seed: {seed} (mutations::run_one(&World::new({clean}), {seed}))");
                resume_unwind(panic);
            }
        }
    }
    // Of three volumes two do not depend on what was hurt; most small damage costs the third nothing either.
    assert!(whole > count * 2, "{whole} of {}", count * 3);
}

#[test]
fn nothing_that_is_done_to_a_store_makes_wrong_data_good_or_costs_what_others_hold_1() {
    mutations(true, 0..3000);
}

#[test]
fn nothing_that_is_done_to_a_store_makes_wrong_data_good_or_costs_what_others_hold_2() {
    mutations(true, 3000..6000);
}

#[test]
fn nothing_that_is_done_to_a_store_that_was_not_closed_makes_wrong_data_good_1() {
    mutations(false, 0..2000);
}

#[test]
fn nothing_that_is_done_to_a_store_that_was_not_closed_makes_wrong_data_good_2() {
    mutations(false, 2000..4000);
}
