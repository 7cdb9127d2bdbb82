//! Cryptography, thin over aws-lc: AES-256-XTS on the data path, AES-256-GCM for key wrap, CRC32C block sums.

pub mod seal;
mod sum;
pub mod wrap;
pub mod xts;
