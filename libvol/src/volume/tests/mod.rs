//! Volumes over real stores on simulated disks, through the public interface.

mod crash;
mod damage;
mod hang;
mod integrity;
mod life;
mod marks;
mod membership;
mod model;
mod mutations;
mod places;
mod resync;

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::core::Tuning;
use super::*;
use crate::buf::Buf;
use crate::disk::Disk;
use crate::disk::sim::{Media, SimDriver};
use crate::ids::{CmkId, CustomerId, InstallationId, PhysicalExtent};
use crate::keys::WrappedKey;
use crate::limits::BLOCK;
use crate::runtime::{Runtime, sleep, timeout};
use crate::secret::Secret;
use crate::store::tests::format_small;
use crate::store::{self, Expect, ExtentEntry, FormatOptions, StoreHandle, VolumeRecord, VolumeSlot};

/// Small extents: everything crosses boundaries.
const EXTENT_BYTES: u64 = 4 * BLOCK;
const EXTENT_BLOCKS: u32 = 4;
/// Metadata and about 80 extents.
const STORE_BYTES: u64 = (4 << 20) + 80 * EXTENT_BYTES;
const DATASET: DatasetId = DatasetId::NIL;

/// The cleaner never gets to it by itself.
const IDLE: Tuning = Tuning {
    dirty_extents_max: 1000,
    sum_cache_bytes: 1 << 20,
    tick: Duration::from_secs(3600),
    idle_ticks: 1000,
    mark_patience: Duration::from_secs(60),
    deadline: Duration::from_secs(30),
    resync_bytes_per_second: u64::MAX,
};

/// The cleaner is always at work.
const EAGER: Tuning = Tuning {
    tick: Duration::from_millis(1),
    idle_ticks: 1,
    ..IDLE
};

/// Fresh stores of `extents` extents, one a replica.
fn fresh(replicas: usize, extents: u64) -> Vec<Media> {
    let size_bytes = (4 << 20) + extents * EXTENT_BYTES;
    let driver = SimDriver::new(1, vec![Media::zeroed(size_bytes); replicas]);
    let runtime = Runtime::new(driver.clone());
    let files: Vec<_> = (0..replicas).map(|slot| driver.file(slot)).collect();
    runtime.block_on(async move {
        for (slot, file) in files.iter().enumerate() {
            let options = FormatOptions {
                installation: InstallationId::NIL,
                name: format!("store-{slot}").parse().unwrap(),
                zone: format!("zone-{slot}").parse().unwrap(),
                size_bytes,
                extent_bytes: EXTENT_BYTES,
                zero_filled: true,
            };
            format_small(&Disk::attach(file).unwrap(), &options)
                .await
                .unwrap();
            let store = store::open(file, Expect::default()).await.unwrap();
            let (slot, record) = volume_facts(replicas);
            store.add_volume(slot, record).await.unwrap();
            store.close().await.unwrap();
        }
    });
    drop(runtime);
    driver.media()
}

/// The volume as its stores know it.
fn volume_facts(replicas: usize) -> (VolumeSlot, VolumeRecord) {
    let slot = VolumeSlot {
        volume: VolumeId::NIL,
        customer: CustomerId::NIL,
        customer_name: "acme".parse().unwrap(),
        volume_name: "web".parse().unwrap(),
        dataset: DATASET,
        stores: vec![StoreId::NIL; replicas],
        keys: vec![(
            KeyVersion(1),
            WrappedKey {
                cmk: CmkId::NIL,
                bytes: vec![7; 92],
            },
        )],
    };
    let record = VolumeRecord {
        volume: VolumeId::NIL,
        size_bytes: BLOCK,
        membership_epoch: Epoch(1),
        members: vec![Member::InSync; replicas],
    };
    (slot, record)
}

/// A register in memory, as durable as its owner.
#[derive(Debug)]
struct Memory(std::cell::RefCell<Membership>);

impl Memory {
    fn new(replicas: usize) -> Rc<Self> {
        let standing = Standing {
            store: StoreId::NIL,
            state: Member::InSync,
            reason: None,
            full_copy: false,
        };
        Rc::new(Self(std::cell::RefCell::new(Membership {
            epoch: Epoch(1),
            members: vec![standing; replicas],
        })))
    }

    fn state(&self, replica: usize) -> Member {
        self.0.borrow().members[replica].state
    }
}

#[async_trait::async_trait(?Send)]
impl Register for Memory {
    async fn swap(&self, _volume: VolumeId, from: Epoch, to: &Membership) -> Result<()> {
        // Durable at some point between call and return.
        sleep(Duration::from_micros(50)).await;
        {
            let mut now = self.0.borrow_mut();
            assert_eq!(now.epoch, from, "one owner");
            assert!(to.epoch > from);
            assert!(to.members.iter().any(|standing| standing.state == Member::InSync));
            *now = to.clone();
        }
        sleep(Duration::from_micros(50)).await;
        Ok(())
    }
}

/// Open stores.
#[derive(Clone)]
struct Stores {
    driver: Rc<SimDriver>,
    ios: Vec<Rc<StoreIo>>,
    register: Rc<Memory>,
}

impl Stores {
    fn handle(&self, replica: usize) -> &StoreHandle {
        self.ios[replica].handle()
    }

    fn spec(&self, size_bytes: u64) -> VolumeSpec {
        let mut key = Secret::<64>::zeroed().unwrap();
        key.expose_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(i, byte)| *byte = i as u8);
        VolumeSpec {
            id: VolumeId::NIL,
            label: "acme/web".into(),
            dataset: DATASET,
            size_bytes,
            sealer: Sealer::new(DATASET, &key).unwrap(),
            key_version: KeyVersion(1),
            replicas: (0..self.register.0.borrow().members.len())
                .map(|place| self.replica(place))
                .collect(),
            membership_epoch: self.register.0.borrow().epoch,
            register: self.register.clone(),
        }
    }

    fn replica(&self, replica: usize) -> ReplicaSpec {
        let standing = self.register.0.borrow().members[replica].clone();
        ReplicaSpec {
            store: StoreId::NIL,
            name: self.handle(replica).info().name.to_string(),
            io: Some(self.ios[replica].clone()),
            state: standing.state,
            full_copy: standing.full_copy,
            reason: standing.reason,
        }
    }

    async fn volume(&self, size_bytes: u64, tuning: Tuning) -> Rc<Volume> {
        Volume::open_tuned(self.spec(size_bytes), tuning).await.unwrap()
    }

    async fn extents(&self, replica: usize) -> Vec<ExtentEntry> {
        self.handle(replica).extents_of(DATASET).await.unwrap()
    }

    /// The ciphertext of an extent.
    async fn raw(&self, replica: usize, extent: PhysicalExtent) -> Buf {
        let len = EXTENT_BYTES as usize;
        let (result, buf) = self.ios[replica].read(extent, 0, Buf::zeroed(len), len).await;
        result.unwrap();
        buf
    }

    /// Where a block of an extent lies on its disk: found by its contents, which only damage tests need.
    async fn disk_offset(&self, replica: usize, logical: u32, block: u32) -> u64 {
        let entry = self
            .extents(replica)
            .await
            .into_iter()
            .find(|entry| entry.logical.0 == logical)
            .unwrap();
        let raw = self.raw(replica, entry.physical).await;
        let wanted = &raw[block as usize * BLOCK as usize..][..BLOCK as usize];
        assert!(
            wanted.iter().any(|byte| *byte != 0),
            "a hole cannot be found by its contents"
        );
        let size = self.driver.with_disk(replica, |disk| disk.size_bytes());
        let mut found = (0..size / BLOCK).map(|i| i * BLOCK).filter(|at| {
            let mut bytes = vec![0; BLOCK as usize];
            self.driver.with_disk(replica, |disk| disk.read(*at, &mut bytes));
            bytes == wanted
        });
        let at = found.next().unwrap();
        assert_eq!(found.next(), None);
        at
    }

    /// Replicas hold the same extents with the same ciphertext; nothing is marked if `clean`.
    async fn check_equal(&self, clean: bool) {
        let first = self.extents(0).await;
        for replica in 0..self.ios.len() {
            let other = self.extents(replica).await;
            let logical =
                |entries: &[ExtentEntry]| entries.iter().map(|entry| entry.logical).collect::<Vec<_>>();
            assert_eq!(logical(&first), logical(&other));
            for (a, b) in first.iter().zip(&other) {
                assert!(
                    !clean || !b.dirty,
                    "extent {} is marked on replica {replica}",
                    b.logical
                );
                let (x, y) = (self.raw(0, a.physical).await, self.raw(replica, b.physical).await);
                assert!(
                    x[..] == y[..],
                    "extent {} differs on replica {replica}",
                    a.logical
                );
                if clean {
                    let area =
                        async |replica: usize, at| self.ios[replica].read_sums(at, DATASET, a.logical).await;
                    assert_eq!(
                        area(0, a.physical).await.unwrap(),
                        area(replica, b.physical).await.unwrap()
                    );
                }
            }
        }
    }
}

/// Runs `work` over opened stores until it ends or the power goes. Returns its result and the driver.
fn with_stores<T: 'static, F>(seed: u64, media: Vec<Media>, work: F) -> (Option<T>, Rc<SimDriver>)
where
    F: AsyncFnOnce(Stores) -> T + 'static,
{
    let register = Memory::new(media.len());
    with_register(seed, media, register, work)
}

/// The same with a membership that outlives it.
fn with_register<T: 'static, F>(
    seed: u64,
    media: Vec<Media>,
    register: Rc<Memory>,
    work: F,
) -> (Option<T>, Rc<SimDriver>)
where
    F: AsyncFnOnce(Stores) -> T + 'static,
{
    let replicas = media.len();
    let driver = SimDriver::new(seed, media);
    let runtime = Runtime::new(driver.clone());
    let world = driver.clone();
    let result = runtime.block_on(async move {
        let cut = world.clone();
        let work = async move {
            let mut ios = Vec::new();
            for slot in 0..replicas {
                let handle = store::open(&world.file(slot), Expect::default()).await.unwrap();
                ios.push(StoreIo::attach(&handle).unwrap());
            }
            let stores = Stores {
                driver: world,
                ios,
                register,
            };
            let result = work(stores.clone()).await;
            for io in &stores.ios {
                // A faulty store has nothing to close, and one that hangs never ends; else no write is left under way.
                let _ = timeout(Duration::from_secs(1000), io.handle().close()).await;
            }
            result
        };
        match select(Box::pin(work), Box::pin(cut.until_cut())).await {
            Either::Left((result, _)) => Some(result),
            Either::Right(_) => None,
        }
    });
    drop(runtime);
    (result, driver)
}

/// The same where nothing is cut.
fn simulate<T: 'static, F>(replicas: usize, work: F) -> T
where
    F: AsyncFnOnce(Stores) -> T + 'static,
{
    with_stores(1, fresh(replicas, 80), work).0.unwrap()
}

async fn write(volume: &Rc<Volume>, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut payload = volume.pool().get(bytes.len());
    payload.copy_from_slice(bytes);
    volume
        .write(offset, PlainBuf(payload), bytes.len() as u32, false)
        .await
}

async fn read(volume: &Volume, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for part in volume.read(offset, len as u32).await? {
        match part {
            PlainPart::Data(plain, range) => out.extend_from_slice(&plain.0[range]),
            PlainPart::Zeros(zeros) => out.resize(out.len() + zeros, 0),
        }
    }
    assert_eq!(out.len(), len);
    Ok(out)
}

/// Bytes that differ everywhere, by seed.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 251) as u8 ^ (i as u8).wrapping_mul(7) ^ seed)
        .collect()
}
