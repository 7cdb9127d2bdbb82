//! The destruction job: a deleted volume's keys and extents, gone from every replica, with proof, across any number of
//! interruptions (I9).
//!
//! Steps, each repeatable, each durable before the next:
//!
//! 1. The intent is in the catalog before the job is made (the caller's duty), and the volume's I/O has ended.
//! 2. On every store: tombstone, key slots overwritten and read back, extents to PendingScrub
//!    ([`StoreHandle::destroy_volume`]). All stores, before any extent is waited for: keys go first.
//! 3. On every store: wait until its scrubber has overwritten and read back every extent; then [`Ledger::store_done`].
//! 4. When every store is done: [`Ledger::finished`].
//!
//! A store that is away keeps the job unfinished: [`run`] does all it can on the others and says so; the next start,
//! with the store back, runs it again. What a store has reached is asked of the store itself, so the job keeps no
//! progress of its own and cannot contradict the medium.
//!
//! It deliberately knows no customers and no catalog (see [`Ledger`]), and moves no data: that is the stores' scrubber.

#[cfg(test)]
mod tests;

use async_trait::async_trait;

use crate::error::{Error, Kind, Result};
use crate::ids::{StoreId, VolumeId};
use crate::store::{StoreHandle, VolumeState};

/// One replica's part of a job.
#[derive(Clone)]
pub struct Part {
    /// On which store.
    pub store: StoreId,
    /// Finished in an earlier run, durably.
    pub done: bool,
    /// The store, unless it is away.
    pub handle: Option<StoreHandle>,
}

/// Where durable progress goes.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Every key copy and all `extents` extents of the volume on that store are overwritten, verified and free.
    ///
    /// # Errors
    /// When it cannot be made durable.
    async fn store_done(&self, volume: VolumeId, store: StoreId, extents: u32) -> Result<()>;

    /// Every store is done: the volume is destroyed.
    ///
    /// # Errors
    /// When it cannot be made durable.
    async fn finished(&self, volume: VolumeId) -> Result<()>;
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All stores are done, durably.
    Destroyed,
    /// These stores are still to be done: away, or failed with that reason. Run again when they are back.
    Unfinished(Vec<(StoreId, String)>),
}

/// Where one replica stands, as its store has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The volume is still live there.
    Nothing,
    /// Tombstoned; its key slots may not all be overwritten yet.
    Tombstone {
        /// Extents it held.
        extents: u32,
    },
    /// Its keys are gone; extents are being overwritten.
    Scrubbing {
        /// Extents it held.
        extents: u32,
        /// Of them verified and free.
        extents_done: u32,
    },
    /// All gone.
    Gone {
        /// Extents it held.
        extents: u32,
    },
}

/// Asks a store how far a volume's destruction is there.
///
/// # Errors
/// `Unavailable`, also when the store is faulty and does not know the volume; `Io`.
pub async fn reached(store: &StoreHandle, volume: VolumeId) -> Result<Reached> {
    match store.volume(volume).await {
        Ok(VolumeState::Live(..)) => Ok(Reached::Nothing),
        // Both slot copies are bad: there is something to overwrite all the same.
        Err(e) if e.kind() == Kind::Damaged => Ok(Reached::Nothing),
        Err(e) => Err(e),
        // Its slot or record may have become durable in the very commit that failed; the next opening tells.
        Ok(VolumeState::Unknown) if store.fault().is_some() => Err(Error::unavailable(format!(
            "store \"{}\" is faulty, and nobody can tell what it holds of volume {volume}; mend and reopen it",
            store.info().name
        ))),
        // Never was here (a creation that was interrupted before it reached this store): nothing to destroy.
        Ok(VolumeState::Unknown) => Ok(Reached::Gone { extents: 0 }),
        Ok(VolumeState::Tombstoned { extents_left }) => {
            let progress = store.scrub_progress(volume).await?;
            let extents = progress.extents;
            Ok(if !progress.keys_done {
                Reached::Tombstone { extents }
            } else if extents_left > 0 {
                Reached::Scrubbing {
                    extents,
                    extents_done: extents.saturating_sub(extents_left),
                }
            } else {
                Reached::Gone { extents }
            })
        }
    }
}

/// Runs the job as far as it goes now. Call on a runtime, at most once at a time a volume.
///
/// # Errors
/// Only the ledger's: a store's failure leaves the job unfinished, with its reason.
pub async fn run(volume: VolumeId, parts: Vec<Part>, ledger: &dyn Ledger) -> Result<Outcome> {
    let mut unfinished = Vec::new();
    let mut keyless = Vec::new();
    for part in parts.into_iter().filter(|part| !part.done) {
        let Some(handle) = part.handle else {
            unfinished.push((part.store, "the store is away".to_owned()));
            continue;
        };
        match destroy_keys(&handle, volume).await {
            Ok(()) => keyless.push((part.store, handle)),
            Err(e) => unfinished.push((part.store, e.to_string())),
        }
    }
    for (store, handle) in keyless {
        match await_scrub(&handle, volume).await {
            Ok(extents) => ledger.store_done(volume, store, extents).await?,
            Err(e) => unfinished.push((store, e.to_string())),
        }
    }
    if !unfinished.is_empty() {
        return Ok(Outcome::Unfinished(unfinished));
    }
    ledger.finished(volume).await?;
    Ok(Outcome::Destroyed)
}

/// Repeated whatever an interruption left, short of the end: the keys may be gone and the extents not yet released.
async fn destroy_keys(store: &StoreHandle, volume: VolumeId) -> Result<()> {
    match reached(store, volume).await? {
        Reached::Gone { .. } => Ok(()),
        Reached::Nothing | Reached::Tombstone { .. } | Reached::Scrubbing { .. } => {
            store.destroy_volume(volume).await
        }
    }
}

/// Waits for the scrubber; the number of extents the volume held there.
async fn await_scrub(store: &StoreHandle, volume: VolumeId) -> Result<u32> {
    if !matches!(reached(store, volume).await?, Reached::Gone { .. }) {
        store.scrubbed(volume).await?;
    }
    match reached(store, volume).await? {
        Reached::Gone { extents } => Ok(extents),
        other => Err(Error::internal(format!(
            "store {:?}: volume {volume} is not gone after its scrub ended ({other:?})",
            store.info().name.as_str()
        ))),
    }
}
