//! Membership: which replicas hold every acknowledged write, and where that is written down.
//!
//! It changes by compare-and-swap on its epoch, in the [`Register`] first, then in every store that stays in sync. A
//! volume has one owner at a time; the epoch fences off an earlier one.

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::ids::{Epoch, StoreId, VolumeId};
use crate::store::Member;

/// One state of a volume's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Rises with every change.
    pub epoch: Epoch,
    /// Each place, in the order of the slot's `stores`. A later membership may have more of them.
    pub members: Vec<Standing>,
}

/// One replica's part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its store; nil at a vacant place.
    pub store: StoreId,
    /// Its state.
    pub state: Member,
    /// Why it is not in sync, for people.
    pub reason: Option<String>,
    /// Nothing that it holds can be relied on.
    pub full_copy: bool,
}

/// Where memberships are durable: the catalog here, a consensus service where replicas are on several hosts.
#[async_trait(?Send)]
pub trait Register {
    /// Replaces the membership of epoch `from`; durable when it returns.
    ///
    /// # Errors
    /// `Busy` when the epoch there is another; `Io`, and then nobody knows which of the two is there.
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> Result<()>;
}

/// One that volumes on several threads share.
#[async_trait(?Send)]
impl Register for Arc<dyn Register + Send + Sync> {
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> Result<()> {
        (**self).swap(volume, from, to).await
    }
}
