//! What the device offers: feature bits, and the configuration space of a virtio block device.
//!
//! Sources: VIRTIO 1.2, 5.2.3 "Feature bits", 5.2.4 "Device configuration layout", 6 "Reserved Feature Bits"; vhost-user,
//! "Protocol features".

use libvol::limits::{BLOCK_SIZE, SECTOR_SIZE, VHOST_PIECE_BYTES_MAX, VHOST_QUEUES_MAX};

use super::message::CONFIG_BYTES_MAX;
use super::request::RangesMax;

/// Device features, by bit.
pub(super) mod feature {
    /// No segment is larger than the configuration says.
    pub(crate) const BLK_SIZE_MAX: u64 = 1 << 1;
    /// No request has more segments than the configuration says.
    pub(crate) const BLK_SEG_MAX: u64 = 1 << 2;
    /// Writes are refused.
    pub(crate) const BLK_RO: u64 = 1 << 5;
    /// The configuration has a block size.
    pub(crate) const BLK_BLK_SIZE: u64 = 1 << 6;
    /// There is a flush.
    pub(crate) const BLK_FLUSH: u64 = 1 << 9;
    /// The configuration has sizes that suit the device.
    pub(crate) const BLK_TOPOLOGY: u64 = 1 << 10;
    /// The guest may turn the cache to writing through, and back.
    pub(crate) const BLK_CONFIG_WCE: u64 = 1 << 11;
    /// There are several queues.
    pub(crate) const BLK_MQ: u64 = 1 << 12;
    /// There is discard.
    pub(crate) const BLK_DISCARD: u64 = 1 << 13;
    /// There is write-zeroes.
    pub(crate) const BLK_WRITE_ZEROES: u64 = 1 << 14;
    /// vhost: what is written to the guest's memory is logged.
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    /// Descriptors may be in tables of their own.
    pub(crate) const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Kicks and calls are asked for by index.
    pub(crate) const RING_EVENT_IDX: u64 = 1 << 29;
    /// vhost-user: there are protocol features.
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO 1.
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// Protocol features, by bit.
pub(super) mod protocol {
    /// More than one queue.
    pub(crate) const MQ: u64 = 1 << 0;
    /// The dirty log comes as a descriptor.
    pub(crate) const LOG_SHMFD: u64 = 1 << 1;
    /// Any message can ask for a reply.
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    /// The back-end has a channel for messages of its own.
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is the back-end's.
    pub(crate) const CONFIG: u64 = 1 << 9;
    /// What is in flight is kept where a crash leaves it.
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// The device can be reset by a message.
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    /// Memory regions come and go one by one.
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The device status is told.
    pub(crate) const STATUS: u64 = 1 << 16;
    /// A queue that is stopped may leave what is in flight, noted in the area for that. In QEMU 11.0 it may whenever this is agreed on;
    /// later only when it is asked to by a message of its own, and nothing tells one from the other. So without the next one,
    /// nothing is left.
    pub(crate) const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
    /// There is that message.
    pub(crate) const GET_VRING_BASE_SKIP_DRAIN: u64 = 1 << 23;
    /// All of them.
    pub(crate) const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS
        | GET_VRING_BASE_INFLIGHT
        | GET_VRING_BASE_SKIP_DRAIN;

    /// Whether these can be agreed on: all are offered, and what is left in flight has a place.
    pub(crate) fn agrees(features: u64) -> bool {
        let has = |bit| features & bit != 0;
        features & !OFFERED == 0
            && (!has(GET_VRING_BASE_INFLIGHT) || has(INFLIGHT_SHMFD))
            && (!has(GET_VRING_BASE_SKIP_DRAIN) || has(INFLIGHT_SHMFD))
    }
}

/// Device features that are offered.
pub(super) fn offered(read_only: bool) -> u64 {
    let either = feature::BLK_SIZE_MAX
        | feature::BLK_SEG_MAX
        | feature::BLK_BLK_SIZE
        | feature::BLK_FLUSH
        | feature::BLK_TOPOLOGY
        | feature::BLK_CONFIG_WCE
        | feature::BLK_MQ
        | feature::LOG_ALL
        | feature::RING_INDIRECT_DESC
        | feature::RING_EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1;
    match read_only {
        true => either | feature::BLK_RO,
        false => either | feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES,
    }
}

/// Segments of one request at most. Those of a queue of 128, which is the usual size, less two for header and status: a
/// guest may not use a longer table of descriptors than its queue.
pub(super) const SEGMENTS_MAX: u32 = 126;
/// Bytes of one segment at most: 126 × 256 KiB are 31.5 MiB, which is within what is carried out in one piece.
pub(super) const SEGMENT_BYTES_MAX: u32 = 256 << 10;
const _: () = assert!(
    SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64 <= VHOST_PIECE_BYTES_MAX,
    "who keeps to what is announced is served in one piece"
);
/// What one request may discard or zero: 64 ranges of 1 GiB. Each is carried out in one piece, and whoever cuts the session
/// waits for a piece.
pub(super) const RANGES_MAX: RangesMax = RangesMax {
    ranges: 64,
    sectors: (1 << 30) / SECTOR_SIZE as u32,
};
/// Where in the space the cache's mode is.
pub(super) const WRITEBACK_AT: u32 = 32;

/// The configuration space, as long as messages can speak of. Numbers in it are little-endian.
pub(super) fn space(size_bytes: u64, read_only: bool, writeback: bool) -> [u8; CONFIG_BYTES_MAX] {
    let mut space = [0; CONFIG_BYTES_MAX];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(size_bytes / SECTOR_SIZE as u64).to_le_bytes());
    put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    // 16..20 is a geometry, which is not offered.
    put(20, &(SECTOR_SIZE as u32).to_le_bytes());
    // Topology: a physical block of 2^3 sectors, aligned with the first; that is also the smallest good request.
    const SECTORS_PER_BLOCK: u16 = (BLOCK_SIZE / SECTOR_SIZE) as u16;
    put(24, &[SECTORS_PER_BLOCK.trailing_zeros() as u8, 0]);
    put(26, &SECTORS_PER_BLOCK.to_le_bytes());
    put(WRITEBACK_AT as usize, &[u8::from(writeback)]);
    put(34, &VHOST_QUEUES_MAX.to_le_bytes());
    if !read_only {
        let RangesMax { ranges, sectors } = RANGES_MAX;
        put(36, &sectors.to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &u32::from(SECTORS_PER_BLOCK).to_le_bytes());
        put(48, &sectors.to_le_bytes());
        put(52, &ranges.to_le_bytes());
        // Zeroing may make holes.
        put(56, &[1]);
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(space: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_space_is_laid_out_as_the_standard_has_it() {
        let space_of = |read_only| space((8 << 40) + 4096, read_only, true);
        let space = space_of(false);
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), (16 << 30) + 8);
        assert_eq!((u32_at(&space, 8), u32_at(&space, 12)), (256 << 10, 126));
        assert_eq!(u32_at(&space, 20), 512);
        assert_eq!(space[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(space[32..36], [1, 0, 128, 0], "writeback, 128 queues");
        assert_eq!(u32_at(&space, 36), 1 << 21);
        assert_eq!(space[56], 1);
        assert!(space[57..].iter().all(|byte| *byte == 0));
        assert!(
            space_of(true)[36..].iter().all(|byte| *byte == 0),
            "nothing to discard"
        );
    }

    #[test]
    fn only_what_may_be_written_offers_to_discard() {
        let writing = feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
        assert_eq!(offered(false) & (writing | feature::BLK_RO), writing);
        assert_eq!(offered(true) & (writing | feature::BLK_RO), feature::BLK_RO);
    }
}
