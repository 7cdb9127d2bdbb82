//! Key wrap: AES-256-GCM with the context as associated data, so that a wrapped key opens only where it belongs.
//!
//! The nonce is random: 2^32 wraps under one key keep a collision below 2^-32 (NIST SP 800-38D, 8.3); a CMK wraps one
//! data key a volume and version, far fewer. The expanded AES key lives on aws-lc's heap for the length of one call and
//! is zeroed by it on release.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::error::{Error, Result};
use crate::secret::{LockedBytes, Secret, fill_random};

/// What wrapping adds: nonce and tag.
pub const WRAP_OVERHEAD_BYTES: usize = NONCE_LEN + TAG_LEN;
const TAG_LEN: usize = 16;

/// Wraps `secret` under `kek`, bound to `context`. Layout: 12-byte random nonce, ciphertext, 16-byte tag.
///
/// # Errors
/// `Internal` when the random source or the cipher fails; `NoSpace` when memory cannot be locked.
pub fn wrap<const N: usize>(kek: &Secret<32>, context: &[u8], secret: &Secret<N>) -> Result<Vec<u8>> {
    let mut nonce = [0u8; NONCE_LEN];
    fill_random(&mut nonce)?;
    // Encrypted in locked memory; only ciphertext reaches the vector.
    let mut bytes = LockedBytes::zeroed(N)?;
    bytes.bytes_mut().copy_from_slice(secret.expose());
    let tag = key(kek)?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(context),
            bytes.bytes_mut(),
        )
        .map_err(|_| Error::internal("aws-lc: AES-256-GCM refused to wrap a key"))?;
    Ok([&nonce, bytes.bytes(), tag.as_ref()].concat())
}

/// Opens what [`wrap`] made.
///
/// # Errors
/// `Damaged` when key, context or bytes are not the ones it was made with; `NoSpace` when memory cannot be locked.
pub fn unwrap<const N: usize>(kek: &Secret<32>, context: &[u8], wrapped: &[u8]) -> Result<Secret<N>> {
    if wrapped.len() != N + WRAP_OVERHEAD_BYTES {
        return Err(Error::damaged(format!(
            "a wrapped key has {} bytes where {} belong",
            wrapped.len(),
            N + WRAP_OVERHEAD_BYTES
        )));
    }
    let (nonce, sealed) = wrapped.split_at(NONCE_LEN);
    let nonce = Nonce::try_assume_unique_for_key(nonce).expect("twelve bytes");
    // Opened in locked memory, so that no plain key byte touches the heap.
    let mut bytes = LockedBytes::zeroed(sealed.len())?;
    bytes.bytes_mut().copy_from_slice(sealed);
    let plain = key(kek)?
        .open_in_place(nonce, Aad::from(context), bytes.bytes_mut())
        .map_err(|_| {
            Error::damaged("a wrapped key does not open: other key, other owner, or altered bytes")
        })?;
    let mut secret = Secret::zeroed()?;
    secret.expose_mut().copy_from_slice(plain);
    Ok(secret)
}

fn key(kek: &Secret<32>) -> Result<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, kek.expose())
        .map(LessSafeKey::new)
        .map_err(|_| Error::internal("aws-lc: AES-256-GCM refused a 32-byte key"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use proptest::prelude::*;

    #[test]
    fn a_wrapped_key_opens_with_its_key_and_context_only() {
        let (kek, other, secret) = (
            Secret::random().unwrap(),
            Secret::random().unwrap(),
            Secret::<64>::random().unwrap(),
        );
        let wrapped = wrap(&kek, b"volume|customer", &secret).unwrap();
        assert_eq!(wrapped.len(), 64 + WRAP_OVERHEAD_BYTES);
        assert_eq!(
            unwrap::<64>(&kek, b"volume|customer", &wrapped).unwrap().expose(),
            secret.expose()
        );
        for (kek, context) in [
            (&other, &b"volume|customer"[..]),
            (&kek, b"volume|customes"),
            (&kek, b""),
        ] {
            assert_eq!(
                unwrap::<64>(kek, context, &wrapped).unwrap_err().kind(),
                Kind::Damaged
            );
        }
    }

    #[test]
    fn wrapping_twice_gives_different_bytes_and_never_the_key_itself() {
        let (kek, secret) = (Secret::random().unwrap(), Secret::<64>::random().unwrap());
        let (a, b) = (
            wrap(&kek, b"c", &secret).unwrap(),
            wrap(&kek, b"c", &secret).unwrap(),
        );
        assert_ne!(a, b);
        assert!(!a.windows(16).any(|w| secret.expose().windows(16).any(|s| s == w)));
    }

    proptest! {
        #[test]
        fn altered_cut_or_foreign_bytes_are_damage_and_never_a_panic(
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            bit in 0..92usize * 8,
            cut in 0..92usize,
        ) {
            let (kek, secret) = (Secret::random().unwrap(), Secret::<64>::random().unwrap());
            let wrapped = wrap(&kek, b"c", &secret).unwrap();
            let mut flipped = wrapped.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            for bytes in [&garbage[..], &flipped, &wrapped[..cut]] {
                prop_assert_eq!(unwrap::<64>(&kek, b"c", bytes).unwrap_err().kind(), Kind::Damaged);
            }
        }
    }
}
