//! The bytes of the keystore's pages, as docs/KEYSTORE.md draws them: pure encoding and decoding, no I/O.
//!
//! A page is 4 KiB, little endian, and ends in a CRC32C of everything before it. Decoding takes any bytes and never
//! panics (I11): a page is blank (all zero), good, or bad for a reason that is named.

use crate::crypto::wrap::WRAP_OVERHEAD_BYTES;
use crate::ids::{CmkId, CustomerId};
use crate::limits::KEYSTORE_CMKS_MAX;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;
/// A page's bytes.
pub(crate) type Page = [u8; PAGE_BYTES];

/// Format version this build reads and writes.
pub(crate) const VERSION: u32 = 1;
/// A 32-byte key, wrapped: 12 + 32 + 16.
pub(crate) const WRAPPED_CMK_BYTES: usize = 32 + WRAP_OVERHEAD_BYTES;
/// Slots the file grows by: 64 x 2 copies x 4 KiB = 512 KiB.
pub(crate) const SLOTS_PER_CHUNK: u32 = 64;
/// Chunks of the largest file.
pub(crate) const CHUNKS_MAX: u32 = KEYSTORE_CMKS_MAX / SLOTS_PER_CHUNK;

const HEADER_MAGIC: &[u8; 8] = b"VOLDKEYS";
const SLOT_MAGIC: &[u8; 8] = b"VOLDCMK\0";
const CRC_AT: usize = PAGE_BYTES - 4;

/// The file's first page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Rises with every write of the header; the higher copy wins.
    pub(crate) sequence: u64,
    /// Chunks of slots that are valid.
    pub(crate) chunks: u32,
    /// This keystore, bound into every wrapped CMK.
    pub(crate) keystore: [u8; 16],
    /// 32 zero bytes wrapped under the root key: tells a wrong root key from a damaged slot.
    pub(crate) root_check: [u8; WRAPPED_CMK_BYTES],
}

/// Whether a CMK may be used. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CmkState {
    Enabled = 1,
    Disabled = 2,
    /// Its keys are gone from this copy; the other is being overwritten. Wins at open, and is then finished.
    Destroying = 3,
}

/// One wrapped version of a CMK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CmkVersion {
    pub(crate) version: u32,
    pub(crate) wrapped: [u8; WRAPPED_CMK_BYTES],
}

/// One CMK's page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Which slot of the file; a page found elsewhere is bad.
    pub(crate) index: u32,
    /// Rises with every write of the slot; the higher copy wins.
    pub(crate) sequence: u64,
    pub(crate) cmk: CmkId,
    pub(crate) customer: CustomerId,
    pub(crate) state: CmkState,
    /// Oldest first; empty when destroying, else at least one.
    pub(crate) versions: Vec<CmkVersion>,
}

/// Key versions of one CMK: (4092 - 64) / 64 = 62.9 places, of which 48 are used.
pub(crate) const VERSIONS_MAX: usize = 48;
const VERSIONS_AT: usize = 64;
const VERSION_BYTES: usize = 4 + WRAPPED_CMK_BYTES;
const _: () = assert!(VERSION_BYTES == 64 && VERSIONS_AT + VERSIONS_MAX * VERSION_BYTES <= CRC_AT);

/// What a page turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decoded<T> {
    /// All zero.
    Blank,
    /// Valid.
    Good(T),
    /// A valid page of a format this build does not know.
    Newer(u32),
    /// Neither; why.
    Bad(String),
}

impl Header {
    pub(crate) fn encode(&self) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(HEADER_MAGIC);
        put_u32(&mut page, 8, VERSION);
        put_u32(&mut page, 12, self.chunks);
        put_u64(&mut page, 16, self.sequence);
        page[24..40].copy_from_slice(&self.keystore);
        page[40..100].copy_from_slice(&self.root_check);
        finish(page)
    }

    pub(crate) fn decode(page: &Page) -> Decoded<Self> {
        match check(page, HEADER_MAGIC) {
            Decoded::Good(()) => {}
            Decoded::Blank => return Decoded::Blank,
            Decoded::Newer(version) => return Decoded::Newer(version),
            Decoded::Bad(why) => return Decoded::Bad(why),
        }
        let chunks = get_u32(page, 12);
        if chunks > CHUNKS_MAX {
            return Decoded::Bad(format!("{chunks} chunks, {CHUNKS_MAX} is the most"));
        }
        Decoded::Good(Self {
            sequence: get_u64(page, 16),
            chunks,
            keystore: take(page, 24),
            root_check: take(page, 40),
        })
    }
}

impl Slot {
    pub(crate) fn encode(&self) -> Page {
        assert!(self.versions.len() <= VERSIONS_MAX);
        assert_eq!(self.versions.is_empty(), self.state == CmkState::Destroying);
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(SLOT_MAGIC);
        put_u32(&mut page, 8, VERSION);
        put_u32(&mut page, 12, self.index);
        put_u64(&mut page, 16, self.sequence);
        page[24..40].copy_from_slice(self.cmk.as_bytes());
        page[40..56].copy_from_slice(self.customer.as_bytes());
        put_u32(&mut page, 56, self.state as u32);
        put_u32(&mut page, 60, self.versions.len() as u32);
        for (i, version) in self.versions.iter().enumerate() {
            let at = VERSIONS_AT + i * VERSION_BYTES;
            put_u32(&mut page, at, version.version);
            page[at + 4..at + VERSION_BYTES].copy_from_slice(&version.wrapped);
        }
        finish(page)
    }

    pub(crate) fn decode(page: &Page, index: u32) -> Decoded<Self> {
        match check(page, SLOT_MAGIC) {
            Decoded::Good(()) => {}
            Decoded::Blank => return Decoded::Blank,
            Decoded::Newer(version) => return Decoded::Newer(version),
            Decoded::Bad(why) => return Decoded::Bad(why),
        }
        let stored_index = get_u32(page, 12);
        if stored_index != index {
            return Decoded::Bad(format!("it belongs to slot {stored_index}"));
        }
        let state = match get_u32(page, 56) {
            1 => CmkState::Enabled,
            2 => CmkState::Disabled,
            3 => CmkState::Destroying,
            other => return Decoded::Bad(format!("unknown state {other}")),
        };
        let count = get_u32(page, 60) as usize;
        if count > VERSIONS_MAX || (count == 0) != (state == CmkState::Destroying) {
            return Decoded::Bad(format!("{count} key versions"));
        }
        let versions = (0..count)
            .map(|i| VERSIONS_AT + i * VERSION_BYTES)
            .map(|at| CmkVersion {
                version: get_u32(page, at),
                wrapped: take(page, at + 4),
            })
            .collect();
        Decoded::Good(Self {
            index,
            sequence: get_u64(page, 16),
            cmk: CmkId::from_bytes(take(page, 24)),
            customer: CustomerId::from_bytes(take(page, 40)),
            state,
            versions,
        })
    }
}

/// Blank, CRC, magic and version, in that order.
fn check(page: &Page, magic: &[u8; 8]) -> Decoded<()> {
    if page.iter().all(|b| *b == 0) {
        return Decoded::Blank;
    }
    if page[..8] != *magic {
        return Decoded::Bad("it begins with other bytes".into());
    }
    if get_u32(page, CRC_AT) != crc_fast::crc32_iscsi(&page[..CRC_AT]) {
        return Decoded::Bad("its checksum does not match".into());
    }
    match get_u32(page, 8) {
        VERSION => Decoded::Good(()),
        0 => Decoded::Bad("format version 0".into()),
        newer => Decoded::Newer(newer),
    }
}

fn finish(mut page: Page) -> Page {
    let crc = crc_fast::crc32_iscsi(&page[..CRC_AT]);
    put_u32(&mut page, CRC_AT, crc);
    page
}

fn put_u32(page: &mut Page, at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(page: &mut Page, at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get_u32(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes(take(page, at))
}

fn get_u64(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(take(page, at))
}

fn take<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    page[at..at + N].try_into().expect("N bytes inside the page")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> Slot {
        Slot {
            index: 0x0102_0304,
            sequence: 0x1122_3344_5566_7788,
            cmk: CmkId::from_bytes([0xc1; 16]),
            customer: CustomerId::from_bytes([0xc2; 16]),
            state: CmkState::Disabled,
            versions: vec![
                CmkVersion {
                    version: 1,
                    wrapped: [0xa1; 60],
                },
                CmkVersion {
                    version: 7,
                    wrapped: [0xa7; 60],
                },
            ],
        }
    }

    fn header() -> Header {
        Header {
            sequence: 0x0a0b,
            chunks: 3,
            keystore: [0x1d; 16],
            root_check: [0x0c; 60],
        }
    }

    /// Holds the table below `heading` in docs/KEYSTORE.md to a page: every row at its place with the given bytes, no row
    /// more or less, and zeros everywhere else.
    fn expect_rows(page: &Page, heading: &str, rows: &[(usize, Vec<u8>, &str)]) {
        let (_, section) = DOCUMENT.split_once(heading).expect("the heading");
        let drawn: Vec<&str> = section
            .lines()
            .skip_while(|line| !line.starts_with('|'))
            .take_while(|line| line.starts_with('|'))
            .skip(2)
            .collect();
        assert_eq!(drawn.len(), rows.len());
        let mut covered = [false; PAGE_BYTES];
        for (line, (at, bytes, field)) in drawn.iter().zip(rows) {
            assert!(
                line.starts_with(&format!("| {at} | {} | {field}", bytes.len())),
                "{line} is not {field} at {at}"
            );
            assert_eq!(&page[*at..at + bytes.len()], &bytes[..], "{field} at {at}");
            covered[*at..at + bytes.len()].fill(true);
        }
        for (at, byte) in page.iter().enumerate() {
            assert!(covered[at] || *byte == 0, "byte {at} is not drawn and not zero");
        }
    }

    const DOCUMENT: &str = include_str!("../../../docs/KEYSTORE.md");

    #[test]
    fn the_drawing_of_the_header_is_what_is_written() {
        let page = header().encode();
        let crc = crc_fast::crc32_iscsi(&page[..4092]).to_le_bytes().to_vec();
        expect_rows(
            &page,
            "\nThe header:\n",
            &[
                (0, b"VOLDKEYS".to_vec(), "magic `VOLDKEYS`"),
                (8, vec![1, 0, 0, 0], "format version"),
                (12, vec![3, 0, 0, 0], "chunks"),
                (16, vec![0x0b, 0x0a, 0, 0, 0, 0, 0, 0], "sequence"),
                (24, vec![0x1d; 16], "keystore id"),
                (40, vec![0x0c; 60], "root check"),
                (4092, crc, "CRC32C"),
            ],
        );
    }

    #[test]
    fn the_drawing_of_a_slot_is_what_is_written() {
        let page = slot().encode();
        let crc = crc_fast::crc32_iscsi(&page[..4092]).to_le_bytes().to_vec();
        let mut versions = vec![1, 0, 0, 0];
        versions.extend([0xa1; 60]);
        versions.extend([7, 0, 0, 0]);
        versions.extend([0xa7; 60]);
        versions.resize(48 * 64, 0);
        expect_rows(
            &page,
            "\nA slot;",
            &[
                (0, b"VOLDCMK\0".to_vec(), "magic `VOLDCMK`, a zero byte"),
                (8, vec![1, 0, 0, 0], "format version"),
                (12, vec![4, 3, 2, 1], "slot number"),
                (
                    16,
                    vec![0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11],
                    "sequence",
                ),
                (24, vec![0xc1; 16], "CMK id"),
                (40, vec![0xc2; 16], "customer id"),
                (56, vec![2, 0, 0, 0], "state"),
                (60, vec![2, 0, 0, 0], "number of key versions"),
                (64, versions, "key versions"),
                (4092, crc, "CRC32C"),
            ],
        );
    }

    #[test]
    fn pages_decode_to_what_was_encoded() {
        assert_eq!(Header::decode(&header().encode()), Decoded::Good(header()));
        assert_eq!(Slot::decode(&slot().encode(), 0x0102_0304), Decoded::Good(slot()));
        let destroying = Slot {
            state: CmkState::Destroying,
            versions: vec![],
            ..slot()
        };
        assert_eq!(
            Slot::decode(&destroying.encode(), 0x0102_0304),
            Decoded::Good(destroying)
        );
    }

    #[test]
    fn a_page_in_another_slots_place_is_bad() {
        assert!(
            matches!(Slot::decode(&slot().encode(), 5), Decoded::Bad(why) if why.contains("slot 16909060"))
        );
    }

    #[test]
    fn a_valid_page_of_a_higher_version_is_newer_and_not_damaged() {
        let mut page = header().encode();
        put_u32(&mut page, 8, 2);
        assert_eq!(Header::decode(&finish(page)), Decoded::Newer(2));
    }

    proptest! {
        #[test]
        fn any_change_of_a_page_makes_it_bad_and_nothing_panics(
            changes in prop::collection::vec((0..PAGE_BYTES, 1..=255u8), 1..4),
            recrc in any::<bool>(),
        ) {
            let (mut h, mut s) = (header().encode(), slot().encode());
            for (at, xor) in &changes {
                h[*at] ^= xor;
                s[*at] ^= xor;
            }
            let changed = (h != header().encode(), s != slot().encode());
            if recrc {
                // Even behind a right checksum any field value must be taken without a panic.
                let _ = (Header::decode(&finish(h)), Slot::decode(&finish(s), 0x0102_0304));
            } else {
                prop_assert!(!changed.0 || matches!(Header::decode(&h), Decoded::Bad(_)));
                prop_assert!(!changed.1 || matches!(Slot::decode(&s, 0x0102_0304), Decoded::Bad(_)));
            }
        }
    }
}
