//! A set of extent numbers: one bit each, so that a store of millions of extents keeps its free list in a few megabytes.

/// A set of numbers below a fixed length.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    words: Box<[u64]>,
    count: u32,
}

impl Bitmap {
    /// An empty set of numbers below `len`.
    pub(super) fn new(len: u32) -> Self {
        Self {
            words: vec![0; len.div_ceil(64) as usize].into(),
            count: 0,
        }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn contains(&self, number: u32) -> bool {
        self.words[(number / 64) as usize] & bit(number) != 0
    }

    /// Whether it was not in the set before.
    pub(super) fn insert(&mut self, number: u32) -> bool {
        let word = &mut self.words[(number / 64) as usize];
        let new = *word & bit(number) == 0;
        *word |= bit(number);
        self.count += u32::from(new);
        new
    }

    /// Whether it was in the set.
    pub(super) fn remove(&mut self, number: u32) -> bool {
        let word = &mut self.words[(number / 64) as usize];
        let present = *word & bit(number) != 0;
        *word &= !bit(number);
        self.count -= u32::from(present);
        present
    }

    /// The first member at or after `from`, going round at the end.
    pub(super) fn next(&self, from: u32) -> Option<u32> {
        if self.count == 0 {
            return None;
        }
        let words = self.words.len() as u32;
        let start = (from / 64) % words;
        let first = self.words[start as usize] & (u64::MAX << (from % 64));
        if first != 0 {
            return Some(start * 64 + first.trailing_zeros());
        }
        (1..=words).find_map(|step| {
            let index = (start + step) % words;
            let word = self.words[index as usize];
            (word != 0).then(|| index * 64 + word.trailing_zeros())
        })
    }
}

fn bit(number: u32) -> u64 {
    1 << (number % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_goes_round_and_finds_every_member() {
        let mut set = Bitmap::new(200);
        assert_eq!(set.next(0), None);
        for number in [3, 64, 199] {
            assert!(set.insert(number));
            assert!(!set.insert(number));
        }
        assert_eq!(set.count(), 3);
        let found = [0, 3, 4, 64, 65, 199, 200].map(|from| set.next(from).unwrap());
        assert_eq!(found, [3, 3, 64, 64, 199, 199, 3]);
        assert!(set.remove(3) && !set.remove(3));
        assert_eq!(set.next(0), Some(64));
        assert_eq!((set.next(250), set.count()), (Some(64), 2));
    }
}
