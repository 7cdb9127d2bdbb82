//! What a replica lacks: extents to compare whole, and single blocks of others.
//!
//! In memory only. Durable is less exact: an extent's mark, and once that is cleared its `missed by` bits; after a restart
//! those extents are compared, and only blocks that differ are written.

use std::collections::BTreeMap;
use std::ops::Range;

/// Extents whose blocks are told apart, at most; those beyond are compared whole. 128 bytes each at 4 MiB: 8 MiB.
const EXACT_EXTENTS_MAX: usize = 65_536;

/// What is missed of one extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// Anything may differ: compare it.
    All,
    /// These blocks, a bit each, and no others.
    Blocks(Box<[u64]>),
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Missed {
    extents: BTreeMap<u32, (u64, Lack)>,
    /// By age.
    queue: BTreeMap<u64, u32>,
    next: u64,
    exact: usize,
}

impl Missed {
    fn insert(&mut self, extent: u32, lack: Lack) {
        let age = match self.extents.get(&extent) {
            Some((age, _)) => *age,
            None => {
                let age = self.next;
                self.next += 1;
                self.queue.insert(age, extent);
                age
            }
        };
        self.exact += usize::from(matches!(lack, Lack::Blocks(_)));
        if let Some((_, Lack::Blocks(_))) = self.extents.insert(extent, (age, lack)) {
            self.exact -= 1;
        }
    }

    /// The whole extent may differ.
    pub(super) fn all_of(&mut self, extent: u32) {
        if !matches!(self.extents.get(&extent), Some((_, Lack::All))) {
            self.insert(extent, Lack::All);
        }
    }

    /// Blocks of an extent of `len` blocks are being written.
    pub(super) fn blocks(&mut self, extent: u32, blocks: Range<u32>, len: u32) {
        match self.extents.get_mut(&extent) {
            Some((_, Lack::All)) => {}
            Some((_, Lack::Blocks(bits))) => set(bits, blocks),
            None if self.exact >= EXACT_EXTENTS_MAX => self.insert(extent, Lack::All),
            None => {
                let mut bits = vec![0; (len as usize).div_ceil(64)].into_boxed_slice();
                set(&mut bits, blocks);
                self.insert(extent, Lack::Blocks(bits));
            }
        }
    }

    /// It has caught up with an extent.
    pub(super) fn caught_up(&mut self, extent: u32) {
        if let Some((age, lack)) = self.extents.remove(&extent) {
            self.queue.remove(&age);
            self.exact -= usize::from(matches!(lack, Lack::Blocks(_)));
        }
    }

    pub(super) fn of(&self, extent: u32) -> Option<&Lack> {
        self.extents.get(&extent).map(|(_, lack)| lack)
    }

    /// The extents missed for longest.
    pub(super) fn oldest(&self, count: usize) -> Vec<u32> {
        self.queue.values().take(count).copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.extents.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }
}

fn set(bits: &mut [u64], blocks: Range<u32>) {
    for block in blocks {
        bits[block as usize / 64] |= 1 << (block % 64);
    }
}

impl Lack {
    /// Runs of blocks to look at, of an extent of `len` blocks.
    pub(super) fn runs(&self, len: u32) -> Vec<Range<u32>> {
        match self {
            Lack::All => std::iter::once(0..len).collect(),
            Lack::Blocks(bits) => {
                let mut runs: Vec<Range<u32>> = Vec::new();
                for block in (0..len).filter(|block| bits[*block as usize / 64] >> (block % 64) & 1 == 1) {
                    match runs.last_mut() {
                        Some(run) if run.end == block => run.end += 1,
                        _ => runs.push(block..block + 1),
                    }
                }
                runs
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_blocks_are_told_apart_until_the_whole_extent_is_missed() {
        let mut missed = Missed::default();
        missed.blocks(7, 3..5, 100);
        missed.blocks(7, 64..66, 100);
        missed.blocks(7, 5..6, 100);
        assert_eq!(missed.of(7).unwrap().runs(100), [3..6, 64..66]);
        missed.all_of(7);
        missed.blocks(7, 1..2, 100);
        assert_eq!(missed.of(7), Some(&Lack::All));
        assert_eq!(missed.of(7).unwrap().runs(100).first(), Some(&(0..100)));
    }

    #[test]
    fn the_oldest_come_first_and_what_was_caught_up_with_is_gone() {
        let mut missed = Missed::default();
        for extent in [9, 1, 5] {
            missed.all_of(extent);
        }
        missed.blocks(1, 0..1, 4);
        assert_eq!(missed.oldest(2), [9, 1]);
        missed.caught_up(9);
        missed.caught_up(9);
        assert_eq!((missed.oldest(5), missed.len()), (vec![1, 5], 2));
        missed.all_of(9);
        assert_eq!(missed.oldest(5), [1, 5, 9], "it is young again");
    }

    #[test]
    fn beyond_the_limit_extents_are_compared_whole() {
        let mut missed = Missed::default();
        (0..EXACT_EXTENTS_MAX as u32 + 1).for_each(|extent| missed.blocks(extent, 0..1, 4));
        assert_eq!(missed.of(EXACT_EXTENTS_MAX as u32), Some(&Lack::All));
        missed.caught_up(0);
        missed.blocks(1 << 20, 0..1, 4);
        assert!(matches!(missed.of(1 << 20), Some(Lack::Blocks(_))));
    }
}
