//! Reads a raw store as docs/FORMAT.md draws it, and shares no code with vold's own reader: other parsing, another XTS
//! (the `xts-mode` crate), another CRC. If both agree, the page is true. Only the unwrapping of data keys is libvol's.
//!
//! For stopped daemons: it takes the table's newest pages and replays the redo log over them in memory. It writes nothing,
//! except through [`RawStore::flip`], which damages.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use aes::Aes256;
use cipher::KeyInit;
use libvol::ids::{CmkId, CustomerId, VolumeId};
use libvol::keys::{KeyContext, KeyService, LocalKeystore, WrappedKey};
use xts_mode::Xts128;

/// Checksum and cipher unit.
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const PAGE: usize = 4096;
const PAGE_HEADER: usize = 64;
const RECORD: usize = 64;
const RECORDS_PER_PAGE: usize = 63;
const LOG_UNIT: usize = 4096;

/// State of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Free and zero.
    Free,
    /// Holds data of a dataset.
    Allocated,
    /// Waits to be overwritten.
    PendingScrub,
}

/// An extent's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number on this store.
    pub physical: u32,
    /// Its state.
    pub state: State,
    /// Marked: may differ from the other replicas after a crash.
    pub dirty: bool,
    /// Scope of the key.
    pub dataset: [u8; 16],
    /// Number within the volume.
    pub logical: u32,
}

/// A volume's slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The volume.
    pub volume: [u8; 16],
    /// Whose.
    pub customer: [u8; 16],
    /// Scope of the key.
    pub dataset: [u8; 16],
    /// CMK and wrapped bytes of the newest key.
    pub key: ([u8; 16], Vec<u8>),
}

/// A store file or device, read raw.
pub struct RawStore {
    file: File,
    path: PathBuf,
    superblock: Vec<u8>,
    records: BTreeMap<u32, [u8; RECORD]>,
}

impl RawStore {
    /// Parses superblock, table and log.
    ///
    /// # Panics
    /// When something is not as the format page says.
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("a store");
        let read = |at: u64| {
            let mut bytes = vec![0; BLOCK];
            file.read_exact_at(&mut bytes, at).expect("superblock");
            (&bytes[..8] == b"VOLDSUPR" && crc32c::crc32c(&bytes[..4092]) == u32_at(&bytes, 4092))
                .then_some(bytes)
        };
        let superblock = [read(0), read(64 << 10)]
            .into_iter()
            .flatten()
            .max_by_key(|bytes| u64_at(bytes, 296))
            .expect("a valid superblock copy");
        assert_eq!(u32_at(&superblock, 8), 1, "format version");
        let mut store = Self {
            file,
            path: path.to_owned(),
            superblock,
            records: BTreeMap::new(),
        };
        store.load_table();
        store
    }

    fn id(&self) -> &[u8] {
        &self.superblock[16..32]
    }

    fn slots(&self) -> u32 {
        u32_at(&self.superblock, 188)
    }

    fn tombstones(&self) -> u32 {
        u32_at(&self.superblock, 192)
    }

    fn extent_count(&self) -> u32 {
        u32_at(&self.superblock, 184)
    }

    /// Extent size in bytes.
    pub fn extent_bytes(&self) -> u64 {
        u64_at(&self.superblock, 176)
    }

    /// Offset and length of one of the regions.
    fn region(&self, at: usize) -> (u64, u64) {
        (u64_at(&self.superblock, at), u64_at(&self.superblock, at + 8))
    }

    /// Offset of the volume slots and their length.
    pub fn slot_region(&self) -> (u64, u64) {
        self.region(208)
    }

    /// Offset of the redo log and its length.
    pub fn log_region(&self) -> (u64, u64) {
        self.region(224)
    }

    /// Offset of the table and its length.
    pub fn table_region(&self) -> (u64, u64) {
        self.region(240)
    }

    /// Offset of an extent's data in the file.
    pub fn data_at(&self, physical: u32) -> u64 {
        self.region(272).0 + u64::from(physical) * self.extent_bytes()
    }

    /// Offset of an extent's checksum area.
    pub fn sums_at(&self, physical: u32) -> u64 {
        self.region(256).0 + u64::from(physical) * self.sum_area_bytes()
    }

    /// Bytes of a checksum area: a header sector and 4 bytes a block, in whole blocks.
    pub fn sum_area_bytes(&self) -> u64 {
        (SECTOR as u64 + self.extent_bytes() / BLOCK as u64 * 4).next_multiple_of(BLOCK as u64)
    }

    /// Bytes of the raw file.
    ///
    /// # Panics
    /// When it is too short.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, at)
            .unwrap_or_else(|e| panic!("{} at {at}: {e}", self.path.display()));
        bytes
    }

    /// Damages: inverts bytes in place.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn flip(&self, at: u64, len: usize) {
        let mut bytes = self.bytes(at, len);
        for byte in &mut bytes {
            *byte ^= 0xff;
        }
        self.file.write_all_at(&bytes, at).expect("a writable store");
        self.file.sync_all().expect("a writable store");
    }

    /// The table's newest valid pages, and the log's frames that are newer than each.
    fn load_table(&mut self) {
        let (table_at, table_len) = self.region(240);
        let table = self.bytes(table_at, table_len as usize);
        let (copy_a, copy_b) = table.split_at(table.len() / 2);
        let mut page_lsn: HashMap<u32, u64> = HashMap::new();
        for (number, pages) in copy_a
            .chunks_exact(PAGE)
            .zip(copy_b.chunks_exact(PAGE))
            .enumerate()
        {
            let number = number as u32;
            let newest = [pages.0, pages.1]
                .into_iter()
                .filter(|page| self.is_page(page, number))
                .max_by_key(|page| u64_at(page, 32));
            let page = newest.unwrap_or_else(|| panic!("table page {number}: no valid copy"));
            page_lsn.insert(number, u64_at(page, 32));
            for (i, record) in page[PAGE_HEADER..].chunks_exact(RECORD).enumerate() {
                let index = number * RECORDS_PER_PAGE as u32 + i as u32;
                self.records.insert(index, record.try_into().expect("64 bytes"));
            }
        }
        for (lsn, entries) in self.log_frames() {
            for entry in entries {
                match entry {
                    Entry::Image(index, image) => {
                        let page = index / RECORDS_PER_PAGE as u32;
                        if page_lsn[&page] < lsn {
                            self.records.insert(index, image);
                        }
                    }
                    Entry::Release(dataset) => self.release(lsn, dataset, &page_lsn),
                }
            }
        }
    }

    fn is_page(&self, page: &[u8], number: u32) -> bool {
        &page[..8] == b"VOLDPAGE"
            && &page[8..24] == self.id()
            && u32_at(page, 24) == number
            && crc_without(page, 40) == u32_at(page, 40)
    }

    fn release(&mut self, lsn: u64, dataset: [u8; 16], page_lsn: &HashMap<u32, u64>) {
        let first = self.slots() + self.tombstones();
        for (index, record) in self.records.range_mut(first..) {
            let newer = page_lsn[&(index / RECORDS_PER_PAGE as u32)] < lsn;
            if newer && record[0] == 2 && record[8..24] == dataset {
                record[0] = 3;
            }
        }
    }

    /// Frames of the redo log by sequence number. Those that the pages already include do no harm.
    fn log_frames(&self) -> BTreeMap<u64, Vec<Entry>> {
        let (at, len) = self.log_region();
        let ring = self.bytes(at, len as usize);
        let mut frames = BTreeMap::new();
        for unit in (0..ring.len()).step_by(LOG_UNIT) {
            let head = &ring[unit..];
            if &head[..8] != b"VOLDFRAM" || &head[8..24] != self.id() {
                continue;
            }
            let Some(frame) = head.get(..u32_at(head, 40) as usize) else {
                continue;
            };
            if frame.len() < LOG_UNIT || crc_without(frame, 48) != u32_at(frame, 48) {
                continue;
            }
            let count = u32_at(frame, 44) as usize;
            let entries = frame[64..].chunks_exact(72).take(count).map(|room| {
                let body: [u8; RECORD] = room[8..72].try_into().expect("64 bytes");
                match room[0] {
                    1 => Entry::Image(u32_at(room, 4), body),
                    2 => Entry::Release(id_at(&body, 0)),
                    kind => panic!("redo log: record of kind {kind}"),
                }
            });
            frames.insert(u64_at(frame, 24), entries.collect());
        }
        frames
    }

    /// All extents.
    pub fn extents(&self) -> Vec<Extent> {
        let first = self.slots() + self.tombstones();
        (0..self.extent_count())
            .map(|physical| {
                let record = &self.records[&(first + physical)];
                Extent {
                    physical,
                    state: match record[0] {
                        1 => State::Free,
                        2 => State::Allocated,
                        3 => State::PendingScrub,
                        other => panic!("extent {physical}: state {other}"),
                    },
                    dirty: record[1] & 1 == 1,
                    dataset: id_at(record, 8),
                    logical: u32_at(record, 24),
                }
            })
            .collect()
    }

    /// Extents of a dataset by their number within the volume.
    pub fn extents_of(&self, dataset: [u8; 16]) -> BTreeMap<u32, u32> {
        self.extents()
            .into_iter()
            .filter(|extent| extent.state == State::Allocated && extent.dataset == dataset)
            .map(|extent| (extent.logical, extent.physical))
            .collect()
    }

    /// How many tombstones there are.
    pub fn tombstone_count(&self) -> usize {
        let slots = self.slots();
        self.records
            .range(slots..slots + self.tombstones())
            .filter(|(_, record)| record[0] == 1)
            .count()
    }

    /// The slot of the volume with this id.
    pub fn slot(&self, volume: &str) -> Option<Slot> {
        let slot = self.slot_places(volume)?.map(|at| self.bytes(at, BLOCK));
        slot.into_iter()
            .filter(|slot| is_slot_of(slot, volume))
            .max_by_key(|slot| u64_at(slot, 32))
            .map(|slot| Slot {
                volume: id_at(&slot, 40),
                customer: id_at(&slot, 56),
                dataset: id_at(&slot, 72),
                key: newest_key(&slot),
            })
    }

    /// Where the two copies of the slot of the volume with this id are in the file.
    pub fn slot_places(&self, volume: &str) -> Option<[u64; 2]> {
        let (at, len) = self.region(208);
        (0..u64::from(self.slots()))
            .map(|number| [0, 1].map(|copy| at + copy * (len / 2) + number * BLOCK as u64))
            .find(|places| {
                places
                    .iter()
                    .any(|place| is_slot_of(&self.bytes(*place, BLOCK), volume))
            })
    }

    /// Where the two copies of the last page of the table are in the file: it tells of extents.
    pub fn last_page_places(&self) -> [u64; 2] {
        let (at, len) = self.table_region();
        [at + len / 2, at + len].map(|end| end - PAGE as u64)
    }

    /// The volume's first `len` bytes, decrypted by another implementation; every block is checked against its sum.
    ///
    /// # Panics
    /// When a block does not match its sum.
    pub fn plaintext(&self, slot: &Slot, key: &[u8; 64], len: u64) -> Vec<u8> {
        let xts = Xts128::new(
            Aes256::new_from_slice(&key[..32]).expect("32 bytes"),
            Aes256::new_from_slice(&key[32..]).expect("32 bytes"),
        );
        let extents = self.extents_of(slot.dataset);
        let blocks_per_extent = self.extent_bytes() / BLOCK as u64;
        let mut plain = Vec::with_capacity(len as usize);
        for block in 0..len / BLOCK as u64 {
            let (logical, within) = ((block / blocks_per_extent) as u32, block % blocks_per_extent);
            let Some(physical) = extents.get(&logical) else {
                plain.extend([0; BLOCK]);
                continue;
            };
            let mut data = self.bytes(self.data_at(*physical) + within * BLOCK as u64, BLOCK);
            let sum = self.sum(*physical, logical, slot.dataset, within);
            assert_eq!(
                sum,
                block_sum(slot.dataset, block, &data),
                "block {block}: its sum does not match"
            );
            let holes: Vec<bool> = data
                .chunks(SECTOR)
                .map(|sector| sector.iter().all(|byte| *byte == 0))
                .collect();
            // One data unit of 4 KiB; its tweak is the number of its first 512-byte sector.
            let mut tweak = [0; 16];
            tweak[..8].copy_from_slice(&(block * 8).to_le_bytes());
            xts.decrypt_sector(&mut data, tweak.into());
            for (sector, hole) in data.chunks_mut(SECTOR).zip(holes) {
                if hole {
                    sector.fill(0);
                }
            }
            plain.extend(data);
        }
        plain
    }

    /// A block's stored sum.
    fn sum(&self, physical: u32, logical: u32, dataset: [u8; 16], block: u64) -> u32 {
        let area = self.bytes(self.sums_at(physical), self.sum_area_bytes() as usize);
        if area.iter().all(|byte| *byte == 0) {
            return 0;
        }
        assert_eq!(&area[..8], b"VOLDSUMS", "checksum area of extent {physical}");
        assert_eq!(
            crc32c::crc32c(&area[..508]),
            u32_at(&area, 508),
            "checksum area's header of extent {physical}"
        );
        assert_eq!(
            crc32c::crc32c(&area[SECTOR..SECTOR + 4 * u32_at(&area, 40) as usize]),
            u32_at(&area, 44),
            "sums of extent {physical}"
        );
        assert_eq!(
            (id_at(&area, 8), u32_at(&area, 24)),
            (dataset, logical),
            "owner of the checksum area of extent {physical}"
        );
        u32_at(&area, SECTOR + 4 * block as usize)
    }
}

/// CRC32C over dataset, block number and ciphertext; a true 0 is stored as 1, and 0 stands for a hole.
pub fn block_sum(dataset: [u8; 16], block: u64, ciphertext: &[u8]) -> u32 {
    if ciphertext.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let mut message = dataset.to_vec();
    message.extend(block.to_le_bytes());
    message.extend(ciphertext);
    crc32c::crc32c(&message).max(1)
}

/// The volume's data key, from the keystore of a stopped daemon's data directory.
///
/// # Panics
/// When the keystore refuses.
pub fn data_key(data_dir: &Path, slot: &Slot) -> [u8; 64] {
    let keystore = LocalKeystore::open_or_create(&data_dir.join("keys")).expect("the keystore");
    let wrapped = WrappedKey {
        cmk: CmkId::from_bytes(slot.key.0),
        bytes: slot.key.1.clone(),
    };
    let context = KeyContext {
        volume: VolumeId::from_bytes(slot.volume),
        customer: CustomerId::from_bytes(slot.customer),
    };
    let secret = block_on(keystore.unwrap_data_key(&wrapped, context)).expect("the data key");
    *secret.expose()
}

enum Entry {
    Image(u32, [u8; RECORD]),
    Release([u8; 16]),
}

/// Whether this is a whole slot of the volume with this id.
fn is_slot_of(slot: &[u8], volume: &str) -> bool {
    let wanted = volume.parse::<VolumeId>().expect("a volume id");
    &slot[..8] == b"VOLDSLOT"
        && crc32c::crc32c(&slot[..4092]) == u32_at(slot, 4092)
        && slot[40..56] == wanted.as_bytes()[..]
}

/// Of the keys in a slot, the one with the highest version.
fn newest_key(slot: &[u8]) -> ([u8; 16], Vec<u8>) {
    let count = usize::from(u16::from_le_bytes([slot[30], slot[31]]));
    let key = slot[512..]
        .chunks_exact(544)
        .take(count)
        .max_by_key(|key| u32_at(key, 0))
        .expect("a volume has a key");
    let len = usize::from(u16::from_le_bytes([key[4], key[5]]));
    (id_at(key, 8), key[32..32 + len].to_vec())
}

fn crc_without(bytes: &[u8], crc_at: usize) -> u32 {
    let mut copy = bytes.to_vec();
    copy[crc_at..crc_at + 4].fill(0);
    crc32c::crc32c(&copy)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    bytes[at..at + 16].try_into().expect("16 bytes")
}

/// Runs a future that needs nothing but the processor.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}
