//! Fields at fixed places of a structure on disk: the only way bytes are read and written in this room.
//!
//! Every structure is one [`structure!`]: its fields with offset and size, in the order of `docs/FORMAT.md`. A test
//! holds that page to these lists, so the drawing cannot drift from the code.

/// One field of a structure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    /// As FORMAT.md names it.
    pub(super) name: &'static str,
    /// Byte offset in the structure.
    pub(super) at: usize,
    /// Bytes.
    pub(super) len: usize,
}

impl Field {
    pub(super) const fn new(name: &'static str, at: usize, len: usize) -> Self {
        Self { name, at, len }
    }

    /// The field's bytes.
    pub(super) fn of<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.at..self.at + self.len]
    }

    fn array<const N: usize>(&self, bytes: &[u8]) -> [u8; N] {
        assert_eq!(self.len, N, "field {} has another size", self.name);
        self.of(bytes).try_into().expect("just checked")
    }

    pub(super) fn u8(&self, bytes: &[u8]) -> u8 {
        self.array::<1>(bytes)[0]
    }

    pub(super) fn u16(&self, bytes: &[u8]) -> u16 {
        u16::from_le_bytes(self.array(bytes))
    }

    pub(super) fn u32(&self, bytes: &[u8]) -> u32 {
        u32::from_le_bytes(self.array(bytes))
    }

    pub(super) fn u64(&self, bytes: &[u8]) -> u64 {
        u64::from_le_bytes(self.array(bytes))
    }

    pub(super) fn id(&self, bytes: &[u8]) -> [u8; 16] {
        self.array(bytes)
    }

    /// Stores `value`, which must fill the field exactly.
    pub(super) fn put(&self, bytes: &mut [u8], value: &[u8]) {
        assert_eq!(self.len, value.len(), "field {} has another size", self.name);
        bytes[self.at..self.at + self.len].copy_from_slice(value);
    }

    pub(super) fn put_u8(&self, bytes: &mut [u8], value: u8) {
        self.put(bytes, &[value]);
    }

    pub(super) fn put_u16(&self, bytes: &mut [u8], value: u16) {
        self.put(bytes, &value.to_le_bytes());
    }

    pub(super) fn put_u32(&self, bytes: &mut [u8], value: u32) {
        self.put(bytes, &value.to_le_bytes());
    }

    pub(super) fn put_u64(&self, bytes: &mut [u8], value: u64) {
        self.put(bytes, &value.to_le_bytes());
    }

    /// A name as length byte, text, zeros.
    pub(super) fn put_name(&self, bytes: &mut [u8], name: &crate::ids::Name) {
        let text = name.as_str().as_bytes();
        assert!(text.len() < self.len, "names are at most 63 bytes");
        let field = &mut bytes[self.at..self.at + self.len];
        field.fill(0);
        field[0] = text.len() as u8;
        field[1..=text.len()].copy_from_slice(text);
    }

    /// The name, if the bytes hold a valid one.
    pub(super) fn name(&self, bytes: &[u8]) -> Option<crate::ids::Name> {
        let field = self.of(bytes);
        let text = field.get(1..=usize::from(field[0]))?;
        std::str::from_utf8(text).ok()?.parse().ok()
    }
}

/// Declares a structure: `mod name { SIZE; FIELDS; one constant a field }`.
macro_rules! structure {
    ($(#[$doc:meta])* $module:ident, $size:expr, $($constant:ident $name:literal $at:literal $len:literal),* $(,)?) => {
        $(#[$doc])*
        pub(super) mod $module {
            #![allow(dead_code, reason = "reserved fields are drawn, not used")]
            use crate::store::wire::Field;

            pub(in crate::store) const SIZE: usize = $size;
            $(pub(in crate::store) const $constant: Field = Field::new($name, $at, $len);)*
            /// In order of their offsets.
            pub(in crate::store) const FIELDS: &[Field] = &[$($constant),*];
        }
    };
}
pub(super) use structure;

/// CRC32C (Castagnoli, RFC 3720 appendix B.4) of `bytes`.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of `bytes` with the field `skip` taken as zeros.
pub(super) fn crc32c_without(bytes: &[u8], skip: &Field) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..skip.at]);
    digest.update(&[0; 16][..skip.len]);
    digest.update(&bytes[skip.at + skip.len..]);
    digest.finalize() as u32
}

/// Whether every byte is zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Runs without an early exit vectorise: this goes over whole extents when the scrubber reads back.
    let (runs, rest) = bytes.as_chunks::<64>();
    let or = |run: &[u8]| run.iter().fold(0, |all, byte| all | byte);
    runs.iter().all(|run| or(run) == 0) && or(rest) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_check_value_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let field = Field::new("crc", 2, 4);
        assert_eq!(
            crc32c_without(b"12abcd789", &field),
            crc32c(b"12\x00\x00\x00\x00789")
        );
    }

    #[test]
    fn zero_means_every_byte() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes));
        for at in [0, 1, 15, 16, 500, 998, 999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
        assert!(is_zero(&[]));
    }
}
