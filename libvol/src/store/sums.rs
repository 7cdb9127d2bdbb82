//! Checksum areas: a header sector that says whose sums these are, and one sum a block.
//!
//! The header's CRC covers the header only: it changes atomically with its sector. So a torn write of an area leaves a valid
//! header and some old sums, which recovery can use. A sum vouches for itself against the data, but "hole" does not (a
//! sector of sums that is lost says so, too, and holes are not read), so the header has a CRC of the sums as well.

use super::layout::{Layout, SUM_HEADER_BYTES};
use super::wire::{crc32c, is_zero, structure};
use super::{SumArea, SumAreaRead};
use crate::ids::{DatasetId, ExtentIndex, KeyVersion};

structure! {
    /// Header sector of a checksum area.
    fields, 512,
    MAGIC "magic" 0 8,
    DATASET "dataset id" 8 16,
    LOGICAL "logical extent" 24 4,
    KEY_VERSION "key version" 28 4,
    SEQUENCE "sequence" 32 8,
    BLOCKS "block count" 40 4,
    SUMS_CRC "crc of the sums" 44 4,
    RESERVED "reserved" 48 460,
    CRC "crc" 508 4,
}

pub(super) const MAGIC: [u8; 8] = *b"VOLDSUMS";
const _: () = assert!(fields::SIZE == SUM_HEADER_BYTES);

/// The area into `out`, which has exactly its size.
pub(super) fn encode(layout: &Layout, area: &SumArea, out: &mut [u8]) {
    let blocks = layout.blocks_per_extent();
    assert_eq!(area.sums.len(), blocks as usize, "one sum a block");
    let (header, sums) = out.split_at_mut(SUM_HEADER_BYTES);
    header.fill(0);
    fields::MAGIC.put(header, &MAGIC);
    fields::DATASET.put(header, area.dataset.as_bytes());
    fields::LOGICAL.put_u32(header, area.logical.0);
    fields::KEY_VERSION.put_u32(header, area.key_version.0);
    fields::SEQUENCE.put_u64(header, area.sequence);
    fields::BLOCKS.put_u32(header, blocks);
    let (used, rest) = sums.split_at_mut(4 * blocks as usize);
    for (room, sum) in used.as_chunks_mut::<4>().0.iter_mut().zip(&area.sums) {
        *room = sum.to_le_bytes();
    }
    rest.fill(0);
    fields::SUMS_CRC.put_u32(header, crc32c(used));
    let crc = crc32c(&header[..fields::CRC.at]);
    fields::CRC.put_u32(header, crc);
}

/// Whose area it is, if the header is valid.
pub(super) fn owner(layout: &Layout, bytes: &[u8]) -> Result<(DatasetId, ExtentIndex), &'static str> {
    let header = &bytes[..SUM_HEADER_BYTES];
    if fields::MAGIC.of(header) != MAGIC {
        return Err("not a checksum area");
    }
    if crc32c(&header[..fields::CRC.at]) != fields::CRC.u32(header) {
        return Err("its header's checksum is wrong");
    }
    if fields::BLOCKS.u32(header) != layout.blocks_per_extent() {
        return Err("it is for another extent size");
    }
    Ok((
        DatasetId::from_bytes(fields::DATASET.id(header)),
        ExtentIndex(fields::LOGICAL.u32(header)),
    ))
}

/// Reads an area that should be of `dataset` and `logical`.
pub(super) fn decode(layout: &Layout, bytes: &[u8], dataset: DatasetId, logical: ExtentIndex) -> SumAreaRead {
    if is_zero(bytes) {
        return SumAreaRead::Blank;
    }
    match owner(layout, bytes) {
        Err(why) => return SumAreaRead::Damaged(why.into()),
        Ok(owner) if owner != (dataset, logical) => {
            return SumAreaRead::Damaged(format!("it is for extent {} of dataset {}", owner.1, owner.0));
        }
        Ok(_) => {}
    }
    let sums = &bytes[SUM_HEADER_BYTES..][..4 * layout.blocks_per_extent() as usize];
    let whole = crc32c(sums) == fields::SUMS_CRC.u32(bytes);
    let area = SumArea {
        dataset,
        logical,
        sequence: fields::SEQUENCE.u64(bytes),
        key_version: KeyVersion(fields::KEY_VERSION.u32(bytes)),
        sums: sums
            .as_chunks::<4>()
            .0
            .iter()
            .map(|sum| u32::from_le_bytes(*sum))
            .collect(),
    };
    match whole {
        true => SumAreaRead::Valid(area),
        false => SumAreaRead::Torn(area),
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Sizes;
    use super::*;

    #[test]
    fn an_area_is_read_as_written_and_only_for_its_own_extent() {
        let layout = Layout::plan(1 << 30, 4 << 20, Sizes::for_store(1 << 30, 4 << 20)).unwrap();
        let area = SumArea {
            dataset: DatasetId::random(),
            logical: ExtentIndex(4),
            sequence: 17,
            key_version: KeyVersion(2),
            sums: (0..1024).collect(),
        };
        let mut bytes = vec![0xff; layout.sum_area_bytes() as usize];
        encode(&layout, &area, &mut bytes);
        let read = |bytes: &[u8], dataset, logical| decode(&layout, bytes, dataset, logical);
        assert_eq!(
            read(&bytes, area.dataset, area.logical),
            SumAreaRead::Valid(area.clone())
        );
        assert!(matches!(
            read(&bytes, area.dataset, ExtentIndex(5)),
            SumAreaRead::Damaged(_)
        ));
        assert!(matches!(
            read(&bytes, DatasetId::random(), area.logical),
            SumAreaRead::Damaged(_)
        ));
        bytes[512..1024].fill(0);
        assert!(matches!(
            read(&bytes, area.dataset, area.logical),
            SumAreaRead::Torn(torn) if torn.sums[127..] == area.sums[127..] || torn.sums[128..] == area.sums[128..]
        ));
        bytes[30] ^= 1;
        assert!(matches!(
            read(&bytes, area.dataset, area.logical),
            SumAreaRead::Damaged(_)
        ));
        assert_eq!(
            read(&vec![0; bytes.len()], area.dataset, area.logical),
            SumAreaRead::Blank
        );
    }
}
