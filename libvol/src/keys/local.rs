//! The local keystore: CMKs in in-place slots of one file, wrapped under a root key file (docs/KEYSTORE.md).
//!
//! A directory holds `root.key`, `keystore` and `keystore.lock`. Only the root key stays in memory; a CMK is unwrapped
//! for the length of one call. Every change is durable and read back before it is reported.
//!
//! A write that fails leaves a page whose contents nobody knows, so from then on changes are refused until a restart has
//! settled the copies; keys can still be opened. Damage is confined to its slot.
//!
//! Blocking: this is the control plane; calls take milliseconds and hold one lock, never across an await.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use rustix::fs::FlockOperation;

use super::file::{KeystoreFile, Settled};
use super::page::{CmkState, CmkVersion, Header, Slot, WRAPPED_CMK_BYTES};
use super::{KeyContext, KeyService, WrappedKey, root};
use crate::crypto::wrap::{unwrap, wrap};
use crate::crypto::xts::halves_equal;
use crate::error::{Error, Kind, Result};
use crate::ids::{CmkId, CustomerId};
use crate::secret::{Secret, fill_random};

/// The key service of a data directory of its own.
pub struct LocalKeystore {
    path: PathBuf,
    findings: Vec<String>,
    inner: Mutex<Inner>,
    /// Held as long as the keystore is open; released by the kernel when the process ends, however it ends.
    _lock: File,
}

struct Inner {
    file: KeystoreFile,
    root: Secret<32>,
    slots: Vec<Settled>,
    by_id: HashMap<CmkId, u32>,
    /// Why changes are refused, once a write has failed.
    fault: Option<String>,
}

/// A CMK as an operator may see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmkInfo {
    /// Its id.
    pub id: CmkId,
    /// Whose it is.
    pub customer: CustomerId,
    /// Whether its volumes may be opened.
    pub enabled: bool,
}

impl LocalKeystore {
    /// Opens the keystore in `dir`; a directory without one gets a new root key and an empty keystore.
    ///
    /// # Errors
    /// `Busy` when another process has it open; `NotFound` when one of root key and keystore is there and the other is
    /// not; `Refused` for a root key that others may read; `Damaged` for a wrong root key or an unusable file;
    /// `Unsupported` for a newer format; `Io`; `NoSpace`.
    pub fn open_or_create(dir: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| {
                Error::with_source(
                    Kind::Io,
                    format!("cannot make key directory {}", dir.display()),
                    e,
                )
            })?;
        let lock = take_lock(dir)?;
        let root_path = dir.join("root.key");
        let path = dir.join("keystore");
        initialise(dir, &root_path, &path)?;

        let root = root::load(&root_path)?;
        let opened = KeystoreFile::open(&path)?;
        check_root(&root, opened.file.header(), &root_path, &path)?;

        let mut findings = opened.findings;
        let mut slots = opened.slots;
        let mut by_id = HashMap::new();
        for (index, settled) in slots.iter_mut().enumerate() {
            if let Settled::Used(slot) = settled {
                let id = slot.cmk;
                if let Some(other) = by_id.get(&id) {
                    findings.push(format!(
                        "keystore {}: slot {index} repeats the CMK of slot {other}",
                        path.display()
                    ));
                    *settled = Settled::Damaged;
                } else {
                    by_id.insert(id, index as u32);
                }
            }
        }
        for finding in &findings {
            tracing::warn!("{finding}");
        }
        Ok(Self {
            path,
            findings,
            inner: Mutex::new(Inner {
                file: opened.file,
                root,
                slots,
                by_id,
                fault: None,
            }),
            _lock: lock,
        })
    }

    /// What was wrong with the file when it was opened, a line each; empty when all was well.
    pub fn findings(&self) -> &[String] {
        &self.findings
    }

    /// All CMKs, by id.
    pub fn cmks(&self) -> Vec<CmkInfo> {
        let inner = self.lock();
        let mut cmks: Vec<CmkInfo> = inner
            .by_id
            .values()
            .map(|index| inner.slot(*index))
            .map(|slot| CmkInfo {
                id: slot.cmk,
                customer: slot.customer,
                enabled: slot.state == CmkState::Enabled,
            })
            .collect();
        cmks.sort_unstable_by_key(|cmk| cmk.id);
        cmks
    }

    /// Enables or disables a CMK. Disabling stops new uses only: keys already opened are the caller's to close.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Unavailable`, `Damaged` as [`KeyService::destroy_cmk`].
    pub fn set_enabled(&self, cmk: CmkId, enabled: bool) -> Result<()> {
        let mut inner = self.lock();
        self.check_writable(&inner)?;
        let index = self.find(&inner, cmk)?;
        let state = if enabled {
            CmkState::Enabled
        } else {
            CmkState::Disabled
        };
        let before = inner.slot(index).clone();
        if before.state == state {
            return Ok(());
        }
        let slot = Slot {
            sequence: before.sequence + 1,
            state,
            ..before
        };
        let written = inner.file.write_slot(&slot);
        inner.latch(written)?;
        inner.slots[index as usize] = Settled::Used(slot);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics half-way through a change of Inner; a poisoned lock still guards whole state.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_writable(&self, inner: &Inner) -> Result<()> {
        match &inner.fault {
            None => Ok(()),
            Some(fault) => Err(Error::unavailable(format!(
                "keystore {} takes no changes since a write failed ({fault}); mend the device and restart vold",
                self.path.display()
            ))),
        }
    }

    fn find(&self, inner: &Inner, cmk: CmkId) -> Result<u32> {
        if let Some(index) = inner.by_id.get(&cmk) {
            return Ok(*index);
        }
        let damaged = inner
            .slots
            .iter()
            .filter(|slot| **slot == Settled::Damaged)
            .count();
        if damaged > 0 {
            return Err(Error::damaged(format!(
                "CMK {cmk} is not readable in keystore {}: {damaged} of its slots are damaged in both copies and may \
                 have held it; restore the keystore from a backup",
                self.path.display()
            )));
        }
        Err(Error::not_found(format!(
            "there is no CMK {cmk} in keystore {}",
            self.path.display()
        )))
    }

    /// The newest key of a CMK (`version` none), or a given version.
    fn open_cmk(&self, cmk: CmkId, customer: CustomerId, version: Option<u32>) -> Result<(u32, Secret<32>)> {
        let inner = self.lock();
        let slot = inner.slot(self.find(&inner, cmk)?);
        if slot.customer != customer {
            return Err(Error::refused(format!(
                "CMK {cmk} is not a key of customer {customer}"
            )));
        }
        if slot.state != CmkState::Enabled {
            return Err(Error::refused(format!(
                "CMK {cmk} is disabled; enable it to use its volumes"
            )));
        }
        let entry = match version {
            None => slot.versions.last(),
            Some(wanted) => slot.versions.iter().find(|entry| entry.version == wanted),
        };
        let Some(entry) = entry else {
            return Err(Error::damaged(format!(
                "CMK {cmk} has no version {} any more",
                version.unwrap_or(0)
            )));
        };
        let context = cmk_context(inner.file.header(), cmk, customer, entry.version);
        let key = unwrap(&inner.root, &context, &entry.wrapped)
            .map_err(|e| e.context(format!("CMK {cmk} in keystore {}", self.path.display())))?;
        Ok((entry.version, key))
    }
}

#[async_trait]
impl KeyService for LocalKeystore {
    async fn create_cmk(&self, customer: CustomerId) -> Result<CmkId> {
        let mut inner = self.lock();
        self.check_writable(&inner)?;
        let cmk = CmkId::random();
        let version = 1;
        let key = Secret::<32>::random()?;
        let context = cmk_context(inner.file.header(), cmk, customer, version);
        let wrapped = wrap(&inner.root, &context, &key)?
            .try_into()
            .expect("a wrapped 32-byte key");
        let index = inner.free_slot()?;
        let slot = Slot {
            index,
            sequence: 1,
            cmk,
            customer,
            state: CmkState::Enabled,
            versions: vec![CmkVersion { version, wrapped }],
        };
        let written = inner.file.write_slot(&slot);
        inner.latch(written)?;
        inner.slots[index as usize] = Settled::Used(slot);
        inner.by_id.insert(cmk, index);
        Ok(cmk)
    }

    async fn create_data_key(&self, cmk: CmkId, context: KeyContext) -> Result<(Secret<64>, WrappedKey)> {
        let (version, kek) = self.open_cmk(cmk, context.customer, None)?;
        let mut key = Secret::<64>::random()?;
        while halves_equal(&key) {
            key = Secret::random()?;
        }
        let mut bytes = version.to_le_bytes().to_vec();
        bytes.extend(wrap(&kek, &context.encode(cmk), &key)?);
        Ok((key, WrappedKey { cmk, bytes }))
    }

    async fn unwrap_data_key(&self, wrapped: &WrappedKey, context: KeyContext) -> Result<Secret<64>> {
        let of_volume = |e: Error| e.context(format!("data key of volume {}", context.volume));
        let Some((version, bytes)) = wrapped.bytes.split_first_chunk() else {
            return Err(of_volume(Error::damaged("its wrapped form is cut off")));
        };
        let version = u32::from_le_bytes(*version);
        let (_, kek) = self
            .open_cmk(wrapped.cmk, context.customer, Some(version))
            .map_err(of_volume)?;
        let key = unwrap(&kek, &context.encode(wrapped.cmk), bytes).map_err(of_volume)?;
        if halves_equal(&key) {
            return Err(of_volume(Error::damaged(
                "its two halves are equal, which XTS forbids",
            )));
        }
        Ok(key)
    }

    async fn destroy_cmk(&self, cmk: CmkId) -> Result<()> {
        let mut inner = self.lock();
        self.check_writable(&inner)?;
        let index = self.find(&inner, cmk)?;
        let slot = inner.slot(index).clone();
        // Whatever comes of the writes, the key is not used any more.
        inner.by_id.remove(&cmk);
        let destroyed = inner.file.destroy_slot(&slot);
        if destroyed.is_err() {
            inner.slots[index as usize] = Settled::Damaged;
        }
        inner.latch(destroyed)?;
        inner.slots[index as usize] = Settled::Free;
        Ok(())
    }
}

impl Inner {
    /// The slot of an index out of `by_id`.
    fn slot(&self, index: u32) -> &Slot {
        match &self.slots[index as usize] {
            Settled::Used(slot) => slot,
            other => unreachable!("by_id names used slots, slot {index} is {other:?}"),
        }
    }

    fn free_slot(&mut self) -> Result<u32> {
        if let Some(index) = self.slots.iter().position(|slot| *slot == Settled::Free) {
            return Ok(index as u32);
        }
        let grown = self.file.grow();
        let first = match grown {
            // Nothing of the old file was touched: being full is no fault.
            Err(e) if e.kind() == Kind::NoSpace => return Err(e),
            other => self.latch(other)?,
        };
        assert_eq!(first as usize, self.slots.len());
        self.slots.resize(
            self.slots.len() + super::page::SLOTS_PER_CHUNK as usize,
            Settled::Free,
        );
        Ok(first)
    }

    /// Remembers the first failed write.
    fn latch<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            tracing::error!("{error}");
            self.fault.get_or_insert_with(|| error.to_string());
        }
        result
    }
}

/// One process a keystore.
fn take_lock(dir: &Path) -> Result<File> {
    let path = dir.join("keystore.lock");
    let failed =
        |e: std::io::Error| Error::with_source(Kind::Io, format!("cannot lock {}", path.display()), e);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::busy(format!(
            "the keystore in {} is in use by another vold; stop that one first",
            dir.display()
        ))),
        Err(e) => Err(failed(e.into())),
    }
}

/// First start. Both files are written under other names and made durable, then the keystore is renamed, then the root
/// key; so a crash leaves nothing, or a keystore whose root key is still under its first name.
///
/// | `keystore` | `root.key` | `root.key.new` | then |
/// |---|---|---|---|
/// | yes | yes | any | nothing to do |
/// | no | no | any | begin anew; nothing was ever wrapped |
/// | yes | no | yes | the crash was between the renames: rename the root key |
/// | yes | no | no | the root key is lost: refuse |
/// | no | yes | any | the keystore is lost: refuse |
fn initialise(dir: &Path, root_path: &Path, path: &Path) -> Result<()> {
    let new_root_path = dir.join("root.key.new");
    let new_path = dir.join("keystore.new");
    match (exists(path)?, exists(root_path)?, exists(&new_root_path)?) {
        (true, true, _) => Ok(()),
        (false, false, _) => {
            remove_leftover(&new_root_path)?;
            remove_leftover(&new_path)?;
            let root = root::create(&new_root_path)?;
            let mut keystore = [0; 16];
            fill_random(&mut keystore)?;
            let root_check = wrap(&root, &root_check_context(keystore), &Secret::<32>::zeroed()?)?;
            let header = Header {
                sequence: 1,
                chunks: 0,
                keystore,
                root_check: root_check.try_into().expect("a wrapped 32-byte key"),
            };
            KeystoreFile::create(&new_path, &header)?;
            rename(&new_path, path, dir)?;
            rename(&new_root_path, root_path, dir)
        }
        (true, false, true) => rename(&new_root_path, root_path, dir),
        (true, false, false) => Err(Error::not_found(format!(
            "keystore {} is there but its root key {} is not; put the root key file back",
            path.display(),
            root_path.display()
        ))),
        (false, true, _) => Err(Error::not_found(format!(
            "root key {} is there but its keystore {} is not; put the keystore back (without it, no volume under it can \
             be opened), or move the root key away to begin anew",
            root_path.display(),
            path.display()
        ))),
    }
}

fn exists(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::with_source(
            Kind::Io,
            format!("cannot examine {}", path.display()),
            e,
        )),
    }
}

fn remove_leftover(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::with_source(
            Kind::Io,
            format!("cannot remove {}", path.display()),
            e,
        )),
        _ => Ok(()),
    }
}

/// Renames, durably.
fn rename(from: &Path, to: &Path, dir: &Path) -> Result<()> {
    std::fs::rename(from, to)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|e| {
            Error::with_source(
                Kind::Io,
                format!("cannot rename {} into place", from.display()),
                e,
            )
        })
}

fn check_root(root: &Secret<32>, header: &Header, root_path: &Path, path: &Path) -> Result<()> {
    match unwrap::<32>(root, &root_check_context(header.keystore), &header.root_check) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == Kind::Damaged => Err(Error::damaged(format!(
            "root key {} is not the one that keystore {} was made with; put the right root key file there",
            root_path.display(),
            path.display()
        ))),
        Err(e) => Err(e),
    }
}

/// Associated data of the root check: `vold-root-key-v1` ‖ keystore id.
fn root_check_context(keystore: [u8; 16]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(b"vold-root-key-v1");
    bytes[16..].copy_from_slice(&keystore);
    bytes
}

/// Associated data of a wrapped CMK: `vold-cmk-key--v1` ‖ keystore id ‖ CMK id ‖ customer id ‖ version.
fn cmk_context(header: &Header, cmk: CmkId, customer: CustomerId, version: u32) -> [u8; 68] {
    let mut bytes = [0; 68];
    bytes[..16].copy_from_slice(b"vold-cmk-key--v1");
    bytes[16..32].copy_from_slice(&header.keystore);
    bytes[32..48].copy_from_slice(cmk.as_bytes());
    bytes[48..64].copy_from_slice(customer.as_bytes());
    bytes[64..].copy_from_slice(&version.to_le_bytes());
    bytes
}

const _: () = assert!(4 + 64 + crate::crypto::wrap::WRAP_OVERHEAD_BYTES <= super::WRAPPED_BYTES_MAX);
const _: () = assert!(WRAPPED_CMK_BYTES == 60);

#[cfg(test)]
mod tests;
