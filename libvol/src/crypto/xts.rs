//! AES-256-XTS (IEEE 1619-2025) over aws-lc, which picks the fastest code for the processor at run time.
//!
//! The data unit is one 4 KiB block; its tweak is the volume-relative 512-byte sector number of the block's first
//! sector, 64-bit little endian in a 16-byte field. `cryptsetup --type plain --cipher aes-xts-plain64 --sector-size
//! 4096` (without `iv_large_sectors`) computes the same.
//!
//! The expanded keys live in locked memory: aws-lc allocates a context's cipher data on the ordinary heap, so
//! [`Direction::new`] swaps in a run of [`LockedBytes`] before any key is set. That rests on two facts about the
//! aws-lc version in Cargo.lock, both checked: the context struct is public with a `cipher_data` field (bindgen's own
//! layout tests), and the XTS data fits [`CIPHER_DATA_BYTES`] (asserted after every key set-up, with a margin).
//!
//! Deliberately not here: sums, holes, buffers; see [`super::seal`].

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use aws_lc_sys as aws;

use crate::error::{Error, Result};
use crate::ids::BlockIndex;
use crate::limits::{BLOCK_SIZE, SECTOR_SIZE};
use crate::secret::{LockedBytes, Secret};

/// AES-256-XTS under one key, both directions. Not `Sync`: a unit's tweak is set in the context before its data goes
/// through.
pub struct Xts {
    encrypt: Direction,
    decrypt: Direction,
}

impl Xts {
    /// `key` is key1 ‖ key2, 32 bytes each; equal halves are refused (IEEE 1619-2025, and FIPS 140 IG C.I).
    ///
    /// # Errors
    /// `Invalid` when the halves are equal, `NoSpace` when memory cannot be locked, `Internal` when aws-lc fails.
    pub fn new(key: &Secret<64>) -> Result<Self> {
        if halves_equal(key) {
            return Err(Error::invalid(
                "the XTS key has two equal halves, which weakens it; make another",
            ));
        }
        Ok(Self {
            encrypt: Direction::new(key, true)?,
            decrypt: Direction::new(key, false)?,
        })
    }

    /// Encrypts one block in place.
    #[inline]
    pub fn encrypt(&self, block: BlockIndex, data: &mut [u8; BLOCK_SIZE]) {
        self.encrypt.run(first_sector(block), data);
    }

    /// Decrypts one block in place.
    #[inline]
    pub fn decrypt(&self, block: BlockIndex, data: &mut [u8; BLOCK_SIZE]) {
        self.decrypt.run(first_sector(block), data);
    }
}

/// Whether key1 equals key2, in constant time.
pub(crate) fn halves_equal(key: &Secret<64>) -> bool {
    let (key1, key2) = key.expose().split_at(32);
    aws_lc_rs::constant_time::verify_slices_are_equal(key1, key2).is_ok()
}

/// The tweak of a block: the number of its first 512-byte sector.
fn first_sector(block: BlockIndex) -> u64 {
    // A volume has at most 2^34 blocks; the multiplication is checked all the same.
    block.0 * (BLOCK_SIZE / SECTOR_SIZE) as u64
}

/// Room for aws-lc's XTS cipher data: two AES-256 key schedules of 244 bytes each (rounded to 248), four pointers, a flag:
/// 2 x 248 + 32 + 8 = 536 bytes; the rest must stay zero.
const CIPHER_DATA_BYTES: usize = 1024;
/// Where the margin begins that aws-lc must never touch.
const CIPHER_DATA_END: usize = 768;

/// A context that encrypts, or one that decrypts.
struct Direction {
    /// Ours until drop. Its `cipher_data` points into `schedule`.
    ctx: NonNull<aws::EVP_CIPHER_CTX>,
    schedule: LockedBytes,
    /// aws-lc's contexts may be used from one thread at a time.
    _not_sync: PhantomData<*mut ()>,
}

// SAFETY: a context has no tie to the thread that made it; it only must not be used from two at once, and a Direction
// is not Sync.
unsafe impl Send for Direction {}

impl Direction {
    fn new(key: &Secret<64>, encrypt: bool) -> Result<Self> {
        let failed =
            |what: &str| Error::internal(format!("aws-lc: {what} failed while setting up AES-256-XTS"));
        let schedule = LockedBytes::zeroed(CIPHER_DATA_BYTES)?;
        // SAFETY: allocates, or returns null.
        let ctx =
            NonNull::new(unsafe { aws::EVP_CIPHER_CTX_new() }).ok_or_else(|| failed("EVP_CIPHER_CTX_new"))?;
        let this = Self {
            ctx,
            schedule,
            _not_sync: PhantomData,
        };
        // SAFETY: ctx is a fresh context, owned by `this`. The first call sets the cipher and allocates cipher data that
        // holds no key yet and, by EVP_CTRL_INIT, only nulls; it is freed and replaced by zeroed, larger, 64-byte-aligned
        // memory that outlives the context (see drop). The second call expands the key into that memory.
        unsafe {
            let raw = ctx.as_ptr();
            let cipher = aws::EVP_aes_256_xts();
            let direction = i32::from(encrypt);
            if aws::EVP_CipherInit_ex(raw, cipher, ptr::null_mut(), ptr::null(), ptr::null(), direction) != 1
            {
                return Err(failed("EVP_CipherInit_ex"));
            }
            aws::OPENSSL_free((*raw).cipher_data);
            (*raw).cipher_data = this.schedule.as_ptr().as_ptr().cast();
            let key = key.expose().as_ptr();
            if aws::EVP_CipherInit_ex(raw, ptr::null(), ptr::null_mut(), key, ptr::null(), direction) != 1 {
                return Err(failed("EVP_CipherInit_ex"));
            }
        }
        let (data, margin) = this.schedule.bytes().split_at(CIPHER_DATA_END);
        assert!(
            data[..2 * 240].iter().any(|b| *b != 0),
            "aws-lc keeps its key schedules elsewhere"
        );
        assert!(
            margin.iter().all(|b| *b == 0),
            "aws-lc's XTS data outgrew CIPHER_DATA_BYTES"
        );
        Ok(this)
    }

    /// One data unit of at least 16 bytes in place. Only the tweak is set; the key schedules stay.
    #[inline]
    fn run(&self, sector: u64, data: &mut [u8]) {
        let mut tweak = [0u8; 16];
        tweak[..8].copy_from_slice(&sector.to_le_bytes());
        let raw = self.ctx.as_ptr();
        // SAFETY: the context is ours, keyed, and used by this thread only (not Sync, and no call runs inside another);
        // tweak is the 16 bytes XTS reads; data is valid for reads and writes of its length, and in-place is allowed.
        let done = unsafe {
            aws::EVP_CipherInit_ex(raw, ptr::null(), ptr::null_mut(), ptr::null(), tweak.as_ptr(), -1) == 1
                && aws::EVP_Cipher(raw, data.as_mut_ptr(), data.as_ptr(), data.len()) == 1
        };
        assert!(done, "a keyed XTS context takes every unit of 16 bytes and more");
    }
}

impl Drop for Direction {
    fn drop(&mut self) {
        // SAFETY: ctx is freed once. Its cipher data belongs to `schedule`, which zeroes it afterwards, so aws-lc must not
        // free it. (If the first EVP_CipherInit_ex failed, aws-lc has already cleared the field itself.)
        unsafe {
            (*self.ctx.as_ptr()).cipher_data = ptr::null_mut();
            aws::EVP_CIPHER_CTX_free(self.ctx.as_ptr());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use aes::Aes256;
    use cipher::KeyInit;
    use proptest::prelude::*;

    /// The independent implementation that every result here is compared with.
    pub(crate) struct Oracle(xts_mode::Xts128<Aes256>);

    impl Oracle {
        pub(crate) fn new(key: &[u8; 64]) -> Self {
            let half = |bytes: &[u8]| Aes256::new_from_slice(bytes).unwrap();
            Self(xts_mode::Xts128::new(half(&key[..32]), half(&key[32..])))
        }

        pub(crate) fn encrypt(&self, sector: u64, unit: &mut [u8]) {
            self.0
                .encrypt_sector(unit, xts_mode::get_tweak_default(sector.into()));
        }

        pub(crate) fn decrypt(&self, sector: u64, unit: &mut [u8]) {
            self.0
                .decrypt_sector(unit, xts_mode::get_tweak_default(sector.into()));
        }
    }

    pub(crate) fn secret(bytes: &[u8; 64]) -> Secret<64> {
        let mut secret = Secret::zeroed().unwrap();
        secret.expose_mut().copy_from_slice(bytes);
        secret
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    /// IEEE 1619-2007, annex B, vector 10: AES-256, data unit number 0xff, plaintext 00..ff twice (its first 64 bytes of
    /// ciphertext).
    #[test]
    fn the_published_vector_of_ieee_1619_holds_here_and_for_the_oracle() {
        let key: [u8; 64] = hex(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592"
        ))
        .try_into()
        .unwrap();
        let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let expected = hex(concat!(
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd"
        ));

        let xts = Xts::new(&secret(&key)).unwrap();
        let mut ours = plain.clone();
        xts.encrypt.run(0xff, &mut ours);
        assert_eq!(ours[..64], expected);

        let mut theirs = plain.clone();
        Oracle::new(&key).encrypt(0xff, &mut theirs);
        assert_eq!(ours, theirs);

        xts.decrypt.run(0xff, &mut ours);
        assert_eq!(ours, plain);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_block_encrypts_and_decrypts_as_the_independent_implementation_does(
            key in prop::array::uniform32(any::<u8>()),
            block in prop_oneof![0..4u64, 0..1u64 << 34, Just((1 << 34) - 1)],
            seed in any::<u8>(),
        ) {
            let mut both = [0u8; 64];
            both[..32].copy_from_slice(&key);
            for (i, b) in both[32..].iter_mut().enumerate() { *b = key[i] ^ 0x5a; }
            let xts = Xts::new(&secret(&both)).unwrap();
            let oracle = Oracle::new(&both);
            let plain: [u8; BLOCK_SIZE] = std::array::from_fn(|i| (i as u8).wrapping_mul(31).wrapping_add(seed));

            let (mut ours, mut theirs) = (plain, plain);
            xts.encrypt(BlockIndex(block), &mut ours);
            oracle.encrypt(block * 8, &mut theirs);
            prop_assert_eq!(ours, theirs);
            xts.decrypt(BlockIndex(block), &mut ours);
            prop_assert_eq!(ours, plain);
            oracle.decrypt(block * 8, &mut theirs);
            prop_assert_eq!(theirs, plain);
        }
    }

    #[test]
    fn a_key_with_equal_halves_is_refused() {
        let error = Xts::new(&secret(&[7; 64])).err().unwrap();
        assert_eq!(error.kind(), crate::error::Kind::Invalid);
    }

    #[test]
    fn the_key_schedules_are_in_locked_memory() {
        let key: [u8; 64] = std::array::from_fn(|i| i as u8 + 1);
        let xts = Xts::new(&secret(&key)).unwrap();
        let schedule = xts.encrypt.schedule.bytes();
        // The first round key of AES-256 is the key itself.
        assert!(
            schedule.windows(16).any(|w| w == &key[..16]),
            "the schedule is elsewhere"
        );
        // SAFETY: the context lives; reads a pointer field.
        let at = unsafe { (*xts.encrypt.ctx.as_ptr()).cipher_data };
        assert_eq!(at.addr(), schedule.as_ptr().addr());
    }

    #[test]
    fn a_cipher_may_move_to_another_thread() {
        let key: [u8; 64] = std::array::from_fn(|i| i as u8);
        let xts = Xts::new(&secret(&key)).unwrap();
        let mut here = [1u8; BLOCK_SIZE];
        xts.encrypt(BlockIndex(5), &mut here);
        let there = std::thread::spawn(move || {
            let mut data = [1u8; BLOCK_SIZE];
            xts.encrypt(BlockIndex(5), &mut data);
            data
        });
        assert_eq!(there.join().unwrap(), here);
    }
}
