//! Sealing and opening: encryption and block sums in one pass over the data, and the types that tell plaintext from
//! ciphertext (I1). A store's data writes take [`SealedBuf`] only, so plaintext cannot get there.
//!
//! One pass means block by block: each 4 KiB block is encrypted and summed, or verified and decrypted, while it is in
//! the first-level cache.
//!
//! Invariants:
//! - nothing is handed out as plaintext before its block matched its sum ([`Sealer::open_unverified`] says what it is);
//! - a failed [`Sealer::open`] gives back the very bytes it was given.
//!
//! Holes: a block whose sum is [`HOLE`] must be all zeros and reads as zeros. In other blocks each 512-byte sector of
//! zero ciphertext reads as zeros, since a torn first write into a hole leaves such sectors (real ciphertext is all zero
//! with probability 2^-4096).

use std::rc::Rc;

use zeroize::Zeroize;

use super::sum::{SumSeed, all_zero};
use super::xts::Xts;
use crate::buf::Buf;
use crate::error::Result;
use crate::ids::{BlockIndex, DatasetId};
use crate::limits::{BLOCK_SIZE, SECTOR_SIZE};
use crate::secret::Secret;

pub use super::sum::{HOLE, block_sum, verify_block};

/// Whole blocks of plaintext.
#[derive(Debug)]
pub struct PlainBuf(pub Buf);

/// Whole blocks of ciphertext (or the zeros of holes), shared by the writes to every replica.
#[derive(Clone, Debug)]
pub struct SealedBuf(Rc<Buf>);

/// Cipher and sum of one dataset under one version of its key. Used by one thread at a time; may move between threads.
pub struct Sealer {
    xts: Xts,
    seed: SumSeed,
}

impl Sealer {
    /// Key1 ‖ key2, 32 bytes each; equal halves are refused (IEEE 1619).
    ///
    /// # Errors
    /// `Invalid` when the halves are equal; `NoSpace` when memory for the key schedules cannot be locked.
    pub fn new(dataset: DatasetId, key: &Secret<64>) -> Result<Self> {
        Ok(Self {
            xts: Xts::new(key)?,
            seed: SumSeed::new(dataset),
        })
    }

    /// Encrypts whole blocks in place from block `first` on and writes each block's sum to `sums`.
    ///
    /// # Panics
    /// When `plain` is not whole blocks, or `sums` has not one place a block.
    pub fn seal(&self, first: BlockIndex, plain: PlainBuf, sums: &mut [u32]) -> SealedBuf {
        let mut buf = plain.0;
        for ((block, data), sum) in numbered(first, blocks_mut(&mut buf, sums.len())).zip(sums) {
            self.xts.encrypt(block, data);
            *sum = self.seed.sum(block, data);
        }
        SealedBuf(Rc::new(buf))
    }

    /// Verifies every block against `sums` and decrypts in place; holes and sectors of zero ciphertext decode as zeros.
    ///
    /// # Errors
    /// The untouched ciphertext and the positions (within the buffer) of the blocks that do not match.
    ///
    /// # Panics
    /// When `sealed` is not whole blocks, or `sums` has not one sum a block.
    pub fn open(&self, first: BlockIndex, sealed: Buf, sums: &[u32]) -> Result<PlainBuf, Mismatch> {
        let mut buf = sealed;
        let mut torn = Torn::default();
        let mut failed = None;
        let blocks = numbered(first, blocks_mut(&mut buf, sums.len()));
        for (position, ((block, data), sum)) in blocks.zip(sums).enumerate() {
            if !self.matches(block, data, *sum) {
                failed = Some(position);
                break;
            }
            // A hole is zeros already, which is what it reads as.
            if *sum != HOLE {
                let zero_sectors = self.decode(block, data);
                if zero_sectors != 0 {
                    torn.0.push((position, zero_sectors));
                }
            }
        }
        if let Some(position) = failed {
            return Err(self.mismatch(first, buf, sums, position, torn));
        }
        Ok(PlainBuf(buf))
    }

    /// Decrypts without sums (a block accepted by recovery). Same decoding of zero sectors.
    ///
    /// # Panics
    /// When `sealed` is not whole blocks.
    pub fn open_unverified(&self, first: BlockIndex, sealed: Buf) -> PlainBuf {
        let mut buf = sealed;
        let count = buf.len() / BLOCK_SIZE;
        for (block, data) in numbered(first, blocks_mut(&mut buf, count)) {
            self.decode(block, data);
        }
        PlainBuf(buf)
    }

    #[inline]
    fn matches(&self, block: BlockIndex, data: &[u8; BLOCK_SIZE], sum: u32) -> bool {
        if sum == HOLE {
            all_zero(data)
        } else {
            self.seed.sum(block, data) == sum
        }
    }

    /// Decrypts one block; sectors of zero ciphertext become zeros. Returns which they were, a bit each.
    #[inline]
    fn decode(&self, block: BlockIndex, data: &mut [u8; BLOCK_SIZE]) -> u8 {
        let zero_sectors = zero_sectors(data);
        if zero_sectors != u8::MAX {
            self.xts.decrypt(block, data);
            clear_sectors(data, zero_sectors);
        }
        zero_sectors
    }

    /// Undoes the blocks before `failed` and looks for further blocks that do not match. The rare path: XTS maps each
    /// plaintext block back to the one ciphertext it came from, so what was opened is simply encrypted again.
    #[cold]
    fn mismatch(&self, first: BlockIndex, mut buf: Buf, sums: &[u32], failed: usize, torn: Torn) -> Mismatch {
        let mut blocks = Vec::new();
        for (position, ((block, data), sum)) in numbered(first, blocks_mut(&mut buf, sums.len()))
            .zip(sums)
            .enumerate()
        {
            if position < failed {
                let zero_sectors = torn.of(position);
                if *sum != HOLE && zero_sectors != u8::MAX {
                    // Cleared sectors cannot be encrypted back; their ciphertext is known to be zeros.
                    self.xts.encrypt(block, data);
                    clear_sectors(data, zero_sectors);
                }
            } else if !self.matches(block, data, *sum) {
                blocks.push(position);
            }
        }
        Mismatch { sealed: buf, blocks }
    }
}

/// Opened blocks that had sectors of zero ciphertext, by position. Empty but for torn first writes; a vector allocates
/// only then.
#[derive(Default)]
struct Torn(Vec<(usize, u8)>);

impl Torn {
    fn of(&self, position: usize) -> u8 {
        self.0
            .iter()
            .find(|(at, _)| *at == position)
            .map_or(0, |(_, sectors)| *sectors)
    }
}

/// The buffer as `count` blocks.
fn blocks_mut(buf: &mut Buf, count: usize) -> &mut [[u8; BLOCK_SIZE]] {
    let (blocks, rest) = buf.as_chunks_mut::<BLOCK_SIZE>();
    assert!(rest.is_empty(), "the cipher takes whole blocks");
    assert_eq!(blocks.len(), count, "one sum a block");
    blocks
}

fn numbered(
    first: BlockIndex,
    blocks: &mut [[u8; BLOCK_SIZE]],
) -> impl Iterator<Item = (BlockIndex, &mut [u8; BLOCK_SIZE])> {
    blocks
        .iter_mut()
        .enumerate()
        .map(move |(i, data)| (BlockIndex(first.0 + i as u64), data))
}

/// Which of the block's eight sectors are all zero, a bit each. Nearly always none: their first 16 bytes tell.
#[inline]
fn zero_sectors(data: &[u8; BLOCK_SIZE]) -> u8 {
    let (sectors, _) = data.as_chunks::<SECTOR_SIZE>();
    let mut zero = 0;
    for (i, sector) in sectors.iter().enumerate() {
        let head = u128::from_ne_bytes(*sector.first_chunk().expect("512 bytes"));
        if head == 0 && all_zero(sector) {
            zero |= 1 << i;
        }
    }
    zero
}

fn clear_sectors(data: &mut [u8; BLOCK_SIZE], which: u8) {
    if which == 0 {
        return;
    }
    for (i, sector) in data.as_chunks_mut::<SECTOR_SIZE>().0.iter_mut().enumerate() {
        if which >> i & 1 == 1 {
            sector.zeroize();
        }
    }
}

impl SealedBuf {
    /// Zeros: the ciphertext of holes.
    pub fn zeros(len: usize) -> Self {
        Self(Rc::new(Buf::zeroed(len)))
    }

    /// Bytes read from a store (healing and resync move ciphertext without opening it).
    pub fn from_ciphertext(buf: Buf) -> Self {
        Self(Rc::new(buf))
    }

    /// The memory, for the device write.
    pub fn shared(&self) -> Rc<Buf> {
        self.0.clone()
    }

    /// Length in bytes, a multiple of the block size.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Blocks that do not match their sums.
#[derive(Debug)]
pub struct Mismatch {
    /// The ciphertext as read.
    pub sealed: Buf,
    /// Block positions within the buffer.
    pub blocks: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::sum::tests::sum_by_definition;
    use crate::crypto::xts::tests::{Oracle, secret};
    use proptest::prelude::*;

    const KEY: [u8; 64] = {
        let mut key = [0; 64];
        let mut i = 0;
        while i < 64 {
            key[i] = i as u8 * 3 + 1;
            i += 1;
        }
        key
    };
    const DATASET: DatasetId = DatasetId::NIL;

    fn sealer() -> Sealer {
        Sealer::new(DATASET, &secret(&KEY)).unwrap()
    }

    /// Plaintext of `blocks` blocks that differs everywhere.
    fn plaintext(blocks: usize, seed: u8) -> Vec<u8> {
        (0..blocks * BLOCK_SIZE)
            .map(|i| (i / 7) as u8 ^ (i >> 9) as u8 ^ seed)
            .collect()
    }

    fn sealed(first: u64, plain: &[u8]) -> (Vec<u8>, Vec<u32>) {
        let mut sums = vec![0; plain.len() / BLOCK_SIZE];
        let buf = sealer().seal(BlockIndex(first), PlainBuf(Buf::copy_of(plain)), &mut sums);
        (buf.shared().to_vec(), sums)
    }

    fn open(first: u64, ciphertext: &[u8], sums: &[u32]) -> Result<Vec<u8>, (Vec<u8>, Vec<usize>)> {
        match sealer().open(BlockIndex(first), Buf::copy_of(ciphertext), sums) {
            Ok(plain) => Ok(plain.0.to_vec()),
            Err(mismatch) => Err((mismatch.sealed.to_vec(), mismatch.blocks)),
        }
    }

    /// What a stored block reads as, from the rules alone: the oracle's decryption, zero sectors as zeros.
    fn reads_as(block: u64, ciphertext: &[u8]) -> Vec<u8> {
        let mut plain = ciphertext.to_vec();
        Oracle::new(&KEY).decrypt(block * 8, &mut plain);
        for (sector, stored) in plain.chunks_mut(SECTOR_SIZE).zip(ciphertext.chunks(SECTOR_SIZE)) {
            if stored.iter().all(|b| *b == 0) {
                sector.fill(0);
            }
        }
        plain
    }

    /// How a stored block of the random buffers comes about.
    #[derive(Clone, Copy, Debug)]
    enum Stored {
        Data,
        Hole,
        /// A torn first write: these sectors still hold the hole's zeros. Its sum is that of what is stored.
        TornIntoHole(u8),
        /// One bit differs from what was summed.
        Flipped(usize),
        /// The sum says data, the device returns zeros: a lost write.
        Lost,
        /// The sum says hole, the device returns data: a lost trim.
        Undead,
    }

    fn any_stored() -> impl Strategy<Value = Stored> {
        prop_oneof![
            4 => Just(Stored::Data),
            2 => Just(Stored::Hole),
            2 => any::<u8>().prop_map(Stored::TornIntoHole),
            1 => (0..BLOCK_SIZE * 8).prop_map(Stored::Flipped),
            1 => Just(Stored::Lost),
            1 => Just(Stored::Undead),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn seal_gives_the_ciphertext_and_sums_of_the_independent_implementations(
            first in prop_oneof![0..3u64, 0..1u64 << 34],
            blocks in 1..6usize,
            seed in any::<u8>(),
        ) {
            let plain = plaintext(blocks, seed);
            let (ciphertext, sums) = sealed(first, &plain);
            let oracle = Oracle::new(&KEY);
            for (i, unit) in plain.chunks(BLOCK_SIZE).enumerate() {
                let (block, mut expected) = (first + i as u64, unit.to_vec());
                oracle.encrypt(block * 8, &mut expected);
                prop_assert_eq!(&ciphertext[i * BLOCK_SIZE..][..BLOCK_SIZE], &expected[..]);
                prop_assert_eq!(sums[i], sum_by_definition(DATASET, block, &expected));
            }
            prop_assert_eq!(open(first, &ciphertext, &sums).unwrap(), plain);
        }

        #[test]
        fn open_reads_good_blocks_by_the_rules_or_gives_back_every_byte_and_names_the_bad_blocks(
            first in 0..1u64 << 34,
            stored in prop::collection::vec(any_stored(), 1..8),
            seed in any::<u8>(),
        ) {
            let (mut ciphertext, mut sums) = sealed(first, &plaintext(stored.len(), seed));
            let mut bad = Vec::new();
            for (i, (kind, data)) in stored.iter().zip(ciphertext.chunks_mut(BLOCK_SIZE)).enumerate() {
                let block = first + i as u64;
                match *kind {
                    Stored::Data => {}
                    Stored::Hole => { data.fill(0); sums[i] = HOLE; }
                    Stored::TornIntoHole(mask) => {
                        for (s, sector) in data.chunks_mut(SECTOR_SIZE).enumerate() {
                            if mask >> s & 1 == 1 { sector.fill(0); }
                        }
                        sums[i] = sum_by_definition(DATASET, block, data);
                    }
                    Stored::Flipped(bit) => { data[bit / 8] ^= 1 << (bit % 8); bad.push(i); }
                    Stored::Lost => { data.fill(0); bad.push(i); }
                    Stored::Undead => { sums[i] = HOLE; bad.push(i); }
                }
            }
            match open(first, &ciphertext, &sums) {
                Err((given_back, blocks)) => {
                    prop_assert_eq!(blocks, bad);
                    prop_assert!(given_back == ciphertext, "the ciphertext came back changed");
                }
                Ok(plain) => {
                    prop_assert!(bad.is_empty(), "blocks {bad:?} were served though damaged");
                    for (i, unit) in ciphertext.chunks(BLOCK_SIZE).enumerate() {
                        prop_assert_eq!(&plain[i * BLOCK_SIZE..][..BLOCK_SIZE], &reads_as(first + i as u64, unit)[..]);
                    }
                }
            }
            let unverified = sealer().open_unverified(BlockIndex(first), Buf::copy_of(&ciphertext));
            for (i, unit) in ciphertext.chunks(BLOCK_SIZE).enumerate() {
                prop_assert_eq!(&unverified.0[i * BLOCK_SIZE..][..BLOCK_SIZE], &reads_as(first + i as u64, unit)[..]);
            }
        }
    }

    #[test]
    fn zeros_written_by_a_client_are_ciphertext_with_a_sum_and_no_hole() {
        let (ciphertext, sums) = sealed(3, &[0; 2 * BLOCK_SIZE]);
        assert!(ciphertext.chunks(SECTOR_SIZE).all(|s| s.iter().any(|b| *b != 0)));
        assert!(sums.iter().all(|sum| *sum != HOLE));
        assert_ne!(ciphertext[..BLOCK_SIZE], ciphertext[BLOCK_SIZE..]);
        assert_eq!(open(3, &ciphertext, &sums).unwrap(), vec![0; 2 * BLOCK_SIZE]);
    }

    #[test]
    fn a_sector_that_only_begins_with_zeros_is_data() {
        let mut ciphertext = sealed(0, &plaintext(1, 1)).0;
        ciphertext[SECTOR_SIZE..SECTOR_SIZE + 500].fill(0);
        let sum = sum_by_definition(DATASET, 0, &ciphertext);
        let plain = open(0, &ciphertext, &[sum]).unwrap();
        assert_eq!(plain, reads_as(0, &ciphertext));
        assert!(plain[SECTOR_SIZE..2 * SECTOR_SIZE].iter().any(|b| *b != 0));
    }

    #[test]
    fn the_same_plaintext_differs_by_block_and_by_key() {
        let plain = vec![0x55; BLOCK_SIZE];
        let mut other_key = KEY;
        other_key[40] ^= 1;
        let other = Sealer::new(DATASET, &secret(&other_key)).unwrap();
        let mut sums = [0];
        let by_key = other
            .seal(BlockIndex(0), PlainBuf(Buf::copy_of(&plain)), &mut sums)
            .shared()
            .to_vec();
        assert_ne!(sealed(0, &plain).0, by_key);
        assert_ne!(sealed(0, &plain).0, sealed(1, &plain).0);
    }

    #[test]
    fn no_blocks_are_sealed_and_opened_as_nothing() {
        assert_eq!(sealed(0, &[]), (Vec::new(), Vec::new()));
        assert_eq!(open(0, &[], &[]).unwrap(), Vec::<u8>::new());
        assert!(SealedBuf::zeros(0).is_empty());
    }

    #[test]
    fn a_sealer_moves_to_its_shard() {
        fn is_send<T: Send>(_: &T) {}
        is_send(&sealer());
    }
}
