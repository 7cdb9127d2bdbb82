//! Keys: root key → customer master key (CMK) → data key. Context `volume id | customer id` is authenticated.
//!
//! | file | job |
//! |---|---|
//! | `local` | the local keystore as a [`KeyService`] |
//! | `root` | the root key file |
//! | `file` | the keystore file: two copies of every page, written, synced and read back |
//! | `page` | the bytes of a page (docs/KEYSTORE.md) |

mod file;
mod local;
mod page;
mod root;

pub use local::{CmkInfo, LocalKeystore};

use async_trait::async_trait;

use crate::error::Result;
use crate::ids::{CmkId, CustomerId, VolumeId};
use crate::secret::Secret;

/// What a data key is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyContext {
    /// The volume.
    pub volume: VolumeId,
    /// Whose it is.
    pub customer: CustomerId,
}

impl KeyContext {
    /// The associated data of a data key wrapped by `cmk`: `vold-data-key-v1` ‖ volume ‖ customer ‖ CMK, 16 bytes each.
    /// Fields of fixed length in a fixed order: no two contexts encode alike.
    pub fn encode(&self, cmk: CmkId) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..16].copy_from_slice(b"vold-data-key-v1");
        bytes[16..32].copy_from_slice(self.volume.as_bytes());
        bytes[32..48].copy_from_slice(self.customer.as_bytes());
        bytes[48..].copy_from_slice(cmk.as_bytes());
        bytes
    }
}

/// A data key as stored in volume slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    /// The CMK that wraps it.
    pub cmk: CmkId,
    /// Opaque bytes of the key service, at most [`WRAPPED_BYTES_MAX`].
    pub bytes: Vec<u8>,
}

/// Longest wrapped data key any key service may return.
pub const WRAPPED_BYTES_MAX: usize = 512;

/// A key service.
#[async_trait]
pub trait KeyService: Send + Sync {
    /// Makes a CMK for a customer.
    ///
    /// # Errors
    /// `NoSpace` when the keystore is full; `Io`; `Unavailable` after an earlier failed write.
    async fn create_cmk(&self, customer: CustomerId) -> Result<CmkId>;

    /// A fresh 64-byte XTS data key (halves different) and its wrapped form.
    ///
    /// # Errors
    /// `NotFound` for an unknown CMK, `Refused` when it belongs to another customer or is disabled, `Damaged` when its
    /// slot is.
    async fn create_data_key(&self, cmk: CmkId, context: KeyContext) -> Result<(Secret<64>, WrappedKey)>;

    /// Opens a wrapped data key.
    ///
    /// # Errors
    /// As `create_data_key`; `Damaged` when the bytes or the context are not the ones it was wrapped with.
    async fn unwrap_data_key(&self, wrapped: &WrappedKey, context: KeyContext) -> Result<Secret<64>>;

    /// Destroys a CMK: its slot is overwritten and read back. A destruction that a crash interrupts is finished when the
    /// keystore is next opened; repeating it then gives `NotFound`.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Unavailable` after an earlier failed write; `Damaged` when a slot that cannot be read may hold it.
    async fn destroy_cmk(&self, cmk: CmkId) -> Result<()>;
}
