//! The block sum: CRC32C over (dataset ‖ block number, u64 LE ‖ ciphertext), a true 0 stored as 1, 0 meaning hole.
//!
//! The 24 bytes in front make a block that landed in the wrong place, or belongs to another dataset, fail its sum. They
//! are the same length for every block, so their part of the CRC is computed apart and carried over the block's 4096
//! bytes by a table (CRCs are linear): the block itself then runs through the widest instructions at once.
//!
//! CRC32C is for damage, not for tampering: who can write the store can forge a sum.

use crate::ids::{BlockIndex, DatasetId};
use crate::limits::BLOCK_SIZE;

/// Sum of a hole: a block that was never written, or trimmed.
pub const HOLE: u32 = 0;

/// What the sums of one dataset have in common.
#[derive(Clone, Copy)]
pub(crate) struct SumSeed {
    /// CRC register after the dataset's 16 bytes.
    register: u32,
}

impl SumSeed {
    pub(crate) fn new(dataset: DatasetId) -> Self {
        let register = dataset
            .as_bytes()
            .iter()
            .fold(!0, |register, byte| step(register, *byte));
        Self { register }
    }

    /// The sum of one block of ciphertext; never [`HOLE`].
    #[inline]
    pub(crate) fn sum(self, block: BlockIndex, ciphertext: &[u8; BLOCK_SIZE]) -> u32 {
        let register = step8(self.register, block.0);
        // The block alone starts from all ones; what the prefix changes about that travels through 4096 bytes.
        let crc = crc_fast::crc32_iscsi(ciphertext) ^ past_a_block(register ^ !0);
        if crc == HOLE { 1 } else { crc }
    }
}

/// The block sum of FORMAT.md. Never returns [`HOLE`].
///
/// # Panics
/// When `ciphertext` is not one block.
pub fn block_sum(dataset: DatasetId, block: BlockIndex, ciphertext: &[u8]) -> u32 {
    SumSeed::new(dataset).sum(block, one_block(ciphertext))
}

/// Whether `sum` vouches for `ciphertext`: [`HOLE`] wants all zeros, any other value the block's sum.
///
/// # Panics
/// When `ciphertext` is not one block.
pub fn verify_block(dataset: DatasetId, block: BlockIndex, ciphertext: &[u8], sum: u32) -> bool {
    let ciphertext = one_block(ciphertext);
    if sum == HOLE {
        all_zero(ciphertext)
    } else {
        SumSeed::new(dataset).sum(block, ciphertext) == sum
    }
}

/// Whether every byte is zero. Leaves at the first 64 bytes that are not.
#[inline]
pub(crate) fn all_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks
        .iter()
        .all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|b| *b == 0)
}

fn one_block(bytes: &[u8]) -> &[u8; BLOCK_SIZE] {
    bytes.try_into().expect("a sum covers one whole block")
}

/// CRC32C's polynomial (RFC 3720 appendix B.4), bit-reversed: the register shifts right.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The register after eight more zero bits.
const fn past_a_zero_byte(mut register: u32) -> u32 {
    let mut bit = 0;
    while bit < 8 {
        register = (register >> 1) ^ (POLYNOMIAL & (register & 1).wrapping_neg());
        bit += 1;
    }
    register
}

const BYTE_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = past_a_zero_byte(i as u32);
        i += 1;
    }
    table
};

#[inline]
fn step(register: u32, byte: u8) -> u32 {
    (register >> 8) ^ BYTE_TABLE[usize::from(register as u8 ^ byte)]
}

#[inline]
fn step8(register: u32, word: u64) -> u32 {
    word.to_le_bytes().into_iter().fold(register, step)
}

/// Registers after 4096 zero bytes, by each byte of the register before: 4 x 256 entries, 4 KiB.
static BLOCK_TABLE: [[u32; 256]; 4] = {
    // Where each single bit of the register ends after 4096 zero bytes; every other register is a sum of these.
    let mut bits = [0u32; 32];
    let mut bit = 0;
    while bit < 32 {
        let mut register = 1u32 << bit;
        let mut i = 0;
        while i < BLOCK_SIZE {
            register = (register >> 8) ^ BYTE_TABLE[(register & 0xff) as usize];
            i += 1;
        }
        bits[bit] = register;
        bit += 1;
    }
    let mut table = [[0; 256]; 4];
    let mut byte = 0;
    while byte < 4 {
        let mut value = 0;
        while value < 256 {
            let mut bit = 0;
            while bit < 8 {
                if value >> bit & 1 == 1 {
                    table[byte][value] ^= bits[byte * 8 + bit];
                }
                bit += 1;
            }
            value += 1;
        }
        byte += 1;
    }
    table
};

/// The register after 4096 zero bytes.
#[inline]
fn past_a_block(register: u32) -> u32 {
    let [a, b, c, d] = register.to_le_bytes().map(usize::from);
    BLOCK_TABLE[0][a] ^ BLOCK_TABLE[1][b] ^ BLOCK_TABLE[2][c] ^ BLOCK_TABLE[3][d]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, through another CRC implementation and one contiguous message.
    pub(crate) fn sum_by_definition(dataset: DatasetId, block: u64, ciphertext: &[u8]) -> u32 {
        let mut message = dataset.as_bytes().to_vec();
        message.extend(block.to_le_bytes());
        message.extend(ciphertext);
        match crc32c::crc32c(&message) {
            0 => 1,
            crc => crc,
        }
    }

    #[test]
    fn crc32c_of_the_published_check_message_is_e3069283() {
        let register = b"123456789"
            .iter()
            .fold(!0, |register, byte| step(register, *byte));
        assert_eq!(!register, 0xe306_9283);
        assert_eq!(crc_fast::crc32_iscsi(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn the_sum_is_the_crc_of_dataset_block_and_ciphertext(
            dataset in prop::array::uniform16(any::<u8>()),
            block in any::<u64>(),
            tail in prop::collection::vec(any::<u8>(), 0..200),
            fill in any::<u8>(),
        ) {
            let mut data = [fill; BLOCK_SIZE];
            data[..tail.len()].copy_from_slice(&tail);
            let dataset = DatasetId::from_bytes(dataset);
            prop_assert_eq!(block_sum(dataset, BlockIndex(block), &data), sum_by_definition(dataset, block, &data));
        }

        #[test]
        fn one_flipped_bit_anywhere_fails_the_block(bit in 0..BLOCK_SIZE * 8, fill in any::<u8>()) {
            let dataset = DatasetId::from_bytes([3; 16]);
            let mut data = [fill; BLOCK_SIZE];
            let sum = block_sum(dataset, BlockIndex(9), &data);
            data[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_block(dataset, BlockIndex(9), &data, sum));
        }
    }

    /// The last four bytes can steer a CRC to any value; here to 0.
    fn block_with_true_crc_zero(dataset: DatasetId, block: u64) -> [u8; BLOCK_SIZE] {
        let mut message = dataset.as_bytes().to_vec();
        message.extend(block.to_le_bytes());
        let mut data = [0x11; BLOCK_SIZE];
        message.extend(&data[..BLOCK_SIZE - 4]);
        let wanted = (0..4).rev().fold(!0u32, |register, _| {
            // Undo one byte of zeros in front of the wanted final register (a CRC of 0 is a register of all ones).
            let index = BYTE_TABLE
                .iter()
                .position(|entry| entry >> 24 == register >> 24)
                .unwrap();
            (register ^ BYTE_TABLE[index]) << 8 | index as u32
        });
        let register = message.iter().fold(!0, |register, byte| step(register, *byte));
        data[BLOCK_SIZE - 4..].copy_from_slice(&(register ^ wanted).to_le_bytes());
        data
    }

    #[test]
    fn a_true_crc_of_zero_is_stored_as_one_so_that_it_is_no_hole() {
        let dataset = DatasetId::from_bytes([0x42; 16]);
        let data = block_with_true_crc_zero(dataset, 77);
        let mut message = dataset.as_bytes().to_vec();
        message.extend(77u64.to_le_bytes());
        message.extend(data);
        assert_eq!(crc32c::crc32c(&message), 0);
        assert_eq!(block_sum(dataset, BlockIndex(77), &data), 1);
        assert!(verify_block(dataset, BlockIndex(77), &data, 1));
        assert!(!verify_block(dataset, BlockIndex(77), &data, HOLE));
    }

    #[test]
    fn a_block_in_the_wrong_place_or_of_another_dataset_fails() {
        let (a, b) = (DatasetId::from_bytes([1; 16]), DatasetId::from_bytes([2; 16]));
        let data = [9; BLOCK_SIZE];
        let sum = block_sum(a, BlockIndex(4), &data);
        assert!(verify_block(a, BlockIndex(4), &data, sum));
        assert!(!verify_block(a, BlockIndex(5), &data, sum));
        assert!(!verify_block(b, BlockIndex(4), &data, sum));
    }

    #[test]
    fn a_hole_is_all_zeros_and_zeros_have_a_sum_of_their_own() {
        let dataset = DatasetId::from_bytes([1; 16]);
        let mut data = [0; BLOCK_SIZE];
        assert!(verify_block(dataset, BlockIndex(0), &data, HOLE));
        assert_ne!(block_sum(dataset, BlockIndex(0), &data), HOLE);
        for position in [0, 63, 64, 511, 512, 2048, BLOCK_SIZE - 1] {
            data[position] = 1;
            assert!(!verify_block(dataset, BlockIndex(0), &data, HOLE));
            data[position] = 0;
        }
    }
}
