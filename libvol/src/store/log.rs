//! The redo log: a ring of frames. One frame is one group commit: one write, one sync, all or nothing by its CRC.
//!
//! Invariants: one append in flight, so that after a power cut only the newest frame can be torn; a frame later than the
//! recorded checkpoint is never overwritten; after every frame at least one unit is left, so that the checkpoint that makes
//! room can always be recorded. It deliberately does no I/O: it makes frames, finds them, and places them.

use std::collections::{BTreeMap, VecDeque};

use super::layout::{LOG_UNIT, RECORD_BYTES};
use super::record::Image;
use super::wire::{crc32c_without, structure};
use crate::buf::Buf;
use crate::ids::{DatasetId, StoreId};

structure! {
    /// Header of a frame.
    fields, 64,
    MAGIC "magic" 0 8,
    STORE "store id" 8 16,
    LSN "lsn" 24 8,
    CHECKPOINT "checkpoint lsn" 32 8,
    LEN "frame length" 40 4,
    COUNT "record count" 44 4,
    CRC "crc" 48 4,
    RESERVED "reserved" 52 12,
}

structure! {
    /// One record of a frame.
    record_fields, 72,
    KIND "kind" 0 1,
    RESERVED "reserved" 1 3,
    INDEX "table index" 4 4,
    BODY "body" 8 64,
}

pub(super) const MAGIC: [u8; 8] = *b"VOLDFRAM";
const KIND_IMAGE: u8 = 1;
const KIND_RELEASE_DATASET: u8 = 2;

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// The new bytes of a record of the table.
    Image(u32, Image),
    /// Every extent that is allocated to the dataset becomes PendingScrub.
    ReleaseDataset(DatasetId),
}

/// A frame in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) lsn: u64,
    /// Everything up to here is durable in the table.
    pub(super) checkpoint: u64,
    pub(super) entries: Vec<Entry>,
}

/// Records that fit a frame of `bytes`.
pub(super) fn records_in(bytes: usize) -> usize {
    (bytes - fields::SIZE) / record_fields::SIZE
}

/// Units that `records` records take.
pub(super) fn units_for(records: usize) -> u32 {
    (fields::SIZE + records * record_fields::SIZE).div_ceil(LOG_UNIT) as u32
}

impl Frame {
    pub(super) fn encode(&self, store: StoreId) -> Buf {
        use fields as f;
        let len = units_for(self.entries.len()) as usize * LOG_UNIT;
        let mut bytes = Buf::zeroed(len);
        let out = &mut bytes[..];
        f::MAGIC.put(out, &MAGIC);
        f::STORE.put(out, store.as_bytes());
        f::LSN.put_u64(out, self.lsn);
        f::CHECKPOINT.put_u64(out, self.checkpoint);
        f::LEN.put_u32(out, len as u32);
        f::COUNT.put_u32(out, self.entries.len() as u32);
        let rooms = out[f::SIZE..].chunks_exact_mut(record_fields::SIZE);
        for (room, entry) in rooms.zip(&self.entries) {
            match entry {
                Entry::Image(index, image) => {
                    record_fields::KIND.put_u8(room, KIND_IMAGE);
                    record_fields::INDEX.put_u32(room, *index);
                    record_fields::BODY.put(room, image);
                }
                Entry::ReleaseDataset(dataset) => {
                    record_fields::KIND.put_u8(room, KIND_RELEASE_DATASET);
                    room[record_fields::BODY.at..][..16].copy_from_slice(dataset.as_bytes());
                }
            }
        }
        let crc = crc32c_without(out, &f::CRC);
        f::CRC.put_u32(out, crc);
        bytes
    }

    /// The frame that begins at the front of `bytes`, and its length in units; `None` when none does.
    fn decode(store: StoreId, bytes: &[u8]) -> Option<(Self, u32)> {
        use fields as f;
        if f::MAGIC.of(bytes) != MAGIC || f::STORE.of(bytes) != store.as_bytes() {
            return None;
        }
        let len = f::LEN.u32(bytes) as usize;
        let count = f::COUNT.u32(bytes) as usize;
        if len == 0 || !len.is_multiple_of(LOG_UNIT) || count > records_in(len) {
            return None;
        }
        let bytes = bytes.get(..len)?;
        if crc32c_without(bytes, &f::CRC) != f::CRC.u32(bytes) {
            return None;
        }
        let rooms = bytes[f::SIZE..].chunks_exact(record_fields::SIZE).take(count);
        let entries = rooms.map(|room| match record_fields::KIND.u8(room) {
            KIND_IMAGE => {
                let image = record_fields::BODY.of(room).try_into().expect("64 bytes");
                Some(Entry::Image(record_fields::INDEX.u32(room), image))
            }
            KIND_RELEASE_DATASET => {
                let id = record_fields::BODY.of(room)[..16].try_into().expect("16 bytes");
                Some(Entry::ReleaseDataset(DatasetId::from_bytes(id)))
            }
            _ => None,
        });
        let frame = Self {
            lsn: f::LSN.u64(bytes),
            checkpoint: f::CHECKPOINT.u64(bytes),
            entries: entries.collect::<Option<_>>()?,
        };
        // No store lives long enough for 2^62 commits; what claims so would overflow later sums.
        (frame.checkpoint < frame.lsn && frame.lsn < 1 << 62).then_some((frame, (len / LOG_UNIT) as u32))
    }
}

/// A frame found in the ring.
#[derive(Debug)]
struct Found {
    frame: Frame,
    place: Place,
}

/// Where a frame is, in units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    lsn: u64,
    at: u32,
    units: u32,
}

/// What recovery needs of the ring: the frames later than the checkpoint, in order.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) frames: Vec<Frame>,
    pub(super) ring: Ring,
}

/// Reads the whole ring.
///
/// # Errors
/// What is damaged, as text.
pub(super) fn scan(store: StoreId, ring_bytes: &[u8]) -> Result<Scan, String> {
    let mut found: BTreeMap<u64, Found> = BTreeMap::new();
    let mut unit = 0;
    while unit * LOG_UNIT < ring_bytes.len() {
        let Some((frame, units)) = Frame::decode(store, &ring_bytes[unit * LOG_UNIT..]) else {
            unit += 1;
            continue;
        };
        let place = Place {
            lsn: frame.lsn,
            at: unit as u32,
            units,
        };
        unit += units as usize;
        if let Some(other) = found.insert(frame.lsn, Found { frame, place }) {
            return Err(format!("redo log: two frames with lsn {}", other.place.lsn));
        }
    }
    let Some((&head, newest)) = found.last_key_value() else {
        return Err("redo log: no valid frame".into());
    };
    let checkpoint = newest.frame.checkpoint;
    let mut ring = Ring {
        units: (ring_bytes.len() / LOG_UNIT) as u32,
        head: newest.place.at + newest.place.units,
        lsn: head,
        checkpoint,
        live: VecDeque::new(),
    };
    let mut frames = Vec::new();
    for (lsn, found) in found.split_off(&(checkpoint + 1)) {
        let expected = ring.live.back().map_or(checkpoint, |place| place.lsn) + 1;
        if lsn != expected {
            return Err(format!(
                "redo log: frames {expected} to {} are missing or damaged (checkpoint {checkpoint}, newest {head})",
                lsn - 1
            ));
        }
        ring.live.push_back(found.place);
        frames.push(found.frame);
    }
    Ok(Scan { frames, ring })
}

/// Who occupies the ring.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    units: u32,
    /// Unit after the newest frame.
    head: u32,
    /// Newest frame's lsn.
    lsn: u64,
    /// As recorded in the newest frame.
    checkpoint: u64,
    /// Frames later than the checkpoint, oldest first.
    live: VecDeque<Place>,
}

impl Ring {
    /// An empty ring. The first frame gets lsn 1.
    #[cfg(test)]
    pub(super) fn empty(units: u32) -> Self {
        Self {
            units,
            head: 0,
            lsn: 0,
            checkpoint: 0,
            live: VecDeque::new(),
        }
    }

    pub(super) fn lsn(&self) -> u64 {
        self.lsn
    }

    pub(super) fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Units that hold what is not checkpointed (and what lies between).
    pub(super) fn used(&self) -> u32 {
        match self.live.front() {
            None => 0,
            Some(tail) if self.head > tail.at => self.head - tail.at,
            Some(tail) => self.units - tail.at + self.head,
        }
    }

    pub(super) fn half_full(&self) -> bool {
        self.used() > self.units / 2
    }

    /// Whether a frame of that many units fits and leaves room to record a checkpoint after it.
    pub(super) fn fits(&self, units: u32) -> bool {
        let Some(at) = self.place(self.head, units) else {
            return false;
        };
        // The frame itself may become the oldest live one.
        let tail = self.live.front().map_or(at, |tail| tail.at);
        place(self.units, Some(tail), at + units, 1).is_some()
    }

    /// Where the next frame of that many units goes; `None` when it would overwrite a live one.
    fn place(&self, head: u32, units: u32) -> Option<u32> {
        place(self.units, self.live.front().map(|tail| tail.at), head, units)
    }

    /// Takes room for the next frame and returns its byte offset in the ring. `None` when there is none: a caller who has
    /// asked [`Ring::fits`] or is recording a checkpoint sees that only over a damaged ring.
    pub(super) fn append(&mut self, units: u32) -> Option<u64> {
        let at = self.place(self.head, units)?;
        self.lsn += 1;
        self.head = at + units;
        self.live.push_back(Place {
            lsn: self.lsn,
            at,
            units,
        });
        Some(u64::from(at) * LOG_UNIT as u64)
    }

    /// A durable frame says that everything up to `lsn` is in the table: older frames may be overwritten.
    pub(super) fn checkpointed(&mut self, lsn: u64) {
        assert!(
            lsn >= self.checkpoint && lsn < self.lsn,
            "recorded in a later frame"
        );
        self.checkpoint = lsn;
        while self.live.front().is_some_and(|place| place.lsn <= lsn) {
            self.live.pop_front();
        }
    }
}

/// First unit for a frame of `units` units when the oldest live frame begins at `tail` and the newest ends at `head`.
fn place(ring: u32, tail: Option<u32>, head: u32, units: u32) -> Option<u32> {
    match tail {
        None if head + units <= ring => Some(head),
        None => (units <= ring).then_some(0),
        // Live frames lie between tail and head; free are the end of the ring and the front up to the tail. Head never
        // comes to stand on the tail, so that a full ring is not taken for an empty one.
        Some(tail) if head > tail => {
            if head + units <= ring {
                Some(head)
            } else {
                (units < tail).then_some(0)
            }
        }
        Some(tail) => (head + units < tail).then_some(head),
    }
}

const _: () = assert!(record_fields::BODY.len == RECORD_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(lsn: u64, checkpoint: u64, records: usize) -> Frame {
        let entries = (0..records)
            .map(|i| Entry::Image(i as u32, [lsn as u8; 64]))
            .collect();
        Frame {
            lsn,
            checkpoint,
            entries,
        }
    }

    fn put(ring_bytes: &mut [u8], ring: &mut Ring, store: StoreId, checkpoint: u64, records: usize) {
        let frame = frame(ring.lsn() + 1, checkpoint, records);
        let bytes = frame.encode(store);
        let at = ring.append(units_for(records)).unwrap() as usize;
        ring_bytes[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    #[test]
    fn a_frame_is_read_as_written_and_any_flipped_byte_makes_it_none() {
        let store = StoreId::random();
        let mut frame = frame(9, 3, 70);
        frame.entries.push(Entry::ReleaseDataset(DatasetId::random()));
        let mut bytes = frame.encode(store).to_vec();
        assert_eq!(bytes.len(), 8192);
        assert_eq!(Frame::decode(store, &bytes), Some((frame, 2)));
        assert_eq!(Frame::decode(StoreId::random(), &bytes), None, "another store's");
        assert_eq!(Frame::decode(store, &bytes[..4096]), None, "cut short");
        for at in (0..8192).step_by(13) {
            bytes[at] ^= 0x40;
            assert_eq!(Frame::decode(store, &bytes), None, "byte {at}");
            bytes[at] ^= 0x40;
        }
    }

    #[test]
    fn a_ring_that_goes_round_many_times_is_always_scanned_back_whole() {
        let store = StoreId::random();
        let mut bytes = vec![0; 16 * LOG_UNIT];
        let mut ring = Ring::empty(16);
        let mut checkpoint = 0;
        for step in 0..500usize {
            let records = step * 37 % 130;
            if !ring.fits(units_for(records)) {
                checkpoint = ring.lsn();
                put(&mut bytes, &mut ring, store, checkpoint, 0);
                ring.checkpointed(checkpoint);
            }
            assert!(ring.fits(units_for(records)), "a checkpoint makes room");
            put(&mut bytes, &mut ring, store, checkpoint, records);
            let scan = scan(store, &bytes).unwrap();
            assert_eq!(scan.ring.lsn, ring.lsn);
            assert_eq!((scan.ring.head, &scan.ring.live), (ring.head, &ring.live));
            let lsns: Vec<_> = scan.frames.iter().map(|f| f.lsn).collect();
            assert_eq!(lsns, (checkpoint + 1..=ring.lsn).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_gap_is_damage_and_names_the_missing_frames() {
        let store = StoreId::random();
        let mut bytes = vec![0; 16 * LOG_UNIT];
        let mut ring = Ring::empty(16);
        for _ in 0..5 {
            put(&mut bytes, &mut ring, store, 0, 1);
        }
        bytes[2 * LOG_UNIT + 100] ^= 1;
        let error = scan(store, &bytes).unwrap_err();
        assert!(error.contains("frames 3 to 3"), "{error}");
        assert!(scan(store, &vec![0; 16 * LOG_UNIT]).is_err(), "no frame at all");
    }
}
