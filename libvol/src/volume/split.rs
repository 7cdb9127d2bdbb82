//! Byte ranges into parts: a request is worked on extent by extent, in ascending order, and within an extent by blocks.

use std::ops::Range;

use super::core::Shape;
use crate::ids::ExtentIndex;
use crate::limits::{BLOCK, BLOCK_SIZE};

/// The part of a request that lies in one extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Which extent.
    pub(super) extent: ExtentIndex,
    /// First byte within the extent.
    pub(super) start: u64,
    /// Bytes; at least one.
    pub(super) len: usize,
    /// First byte within the request.
    pub(super) at: u64,
}

impl Part {
    /// The blocks it touches.
    pub(super) fn blocks(&self) -> Range<u32> {
        let end = self.start + self.len as u64;
        (self.start / BLOCK) as u32..end.div_ceil(BLOCK) as u32
    }

    /// Bytes in front of it within its first block.
    pub(super) fn head(&self) -> usize {
        (self.start % BLOCK) as usize
    }

    /// The blocks it covers only in part: none, one or two.
    pub(super) fn edges(&self) -> [Option<u32>; 2] {
        let blocks = self.blocks();
        let end = (self.head() + self.len) % BLOCK_SIZE;
        let first = (self.head() != 0).then_some(blocks.start);
        let last = (end != 0 && !(first.is_some() && blocks.len() == 1)).then(|| blocks.end - 1);
        [first, last]
    }
}

/// The parts of a byte range, ascending.
pub(super) fn parts(shape: Shape, offset: u64, len: u64) -> impl Iterator<Item = Part> {
    let extent_bytes = shape.extent_bytes;
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at;
        let start = position % extent_bytes;
        let part = Part {
            extent: ExtentIndex((position / extent_bytes) as u32),
            start,
            len: (extent_bytes - start).min(len - at) as usize,
            at,
        };
        at += part.len as u64;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape {
        extent_bytes: 1 << 20,
        blocks: 256,
    };

    proptest! {
        #[test]
        fn parts_cover_the_range_once_in_order_and_none_crosses_an_extent(offset in 0u64..1 << 24, len in 0u64..1 << 23) {
            let mut next = offset;
            for part in parts(SHAPE, offset, len) {
                prop_assert_eq!(u64::from(part.extent.0) * SHAPE.extent_bytes + part.start, next);
                prop_assert_eq!(part.at, next - offset);
                prop_assert!(part.len > 0 && part.start + part.len as u64 <= SHAPE.extent_bytes);
                next += part.len as u64;
            }
            prop_assert_eq!(next, offset + len);
        }

        #[test]
        fn edges_are_the_blocks_covered_in_part(start in 0u64..3 * BLOCK, len in 1usize..3 * BLOCK_SIZE) {
            let part = Part { extent: ExtentIndex(0), start, len, at: 0 };
            let end = start + len as u64;
            let expected: Vec<u32> = part
                .blocks()
                .filter(|b| u64::from(*b) * BLOCK < start || u64::from(*b + 1) * BLOCK > end)
                .collect();
            prop_assert_eq!(part.edges().into_iter().flatten().collect::<Vec<_>>(), expected);
        }
    }
}
