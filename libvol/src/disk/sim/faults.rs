//! What may go wrong with a disk besides a power cut: a seeded plan with a budget.
//!
//! | fault | the caller sees | the medium afterwards |
//! |---|---|---|
//! | read error | EIO | as before |
//! | write error | EIO | each sector old or new |
//! | sync error | EIO | each unsynced write durable or gone for good |
//! | lost write | success | as before |
//! | misdirected write | success | the bytes lie elsewhere |
//! | bit flip | nothing | one bit of some block differs, durably |
//! | hang | nothing, ever | a write may have landed or not, as with any write under way |
//! | vanishing | ENODEV for everything, for a while; for ever through what was opened before | what was not synced is as after a power cut |
//!
//! The silent three (lost, misdirected, flipped) happen only where the world's [`AllowHook`] agrees: a promise to repair
//! is only worth something for blocks that can be repaired. A slow disk is no fault and costs no budget.

use std::time::Duration;

use super::media::Media;
use super::rng::Rng;
use crate::runtime::FileSlot;

/// Chances on one disk: each kind once in so many calls of its sort, 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultPlan {
    /// Reads that fail.
    pub read_errors: u64,
    /// Writes that fail.
    pub write_errors: u64,
    /// Syncs that fail.
    pub sync_errors: u64,
    /// Writes that are acknowledged and never land.
    pub lost_writes: u64,
    /// Writes that land at another place.
    pub misdirected_writes: u64,
    /// Bits that flip, by any call.
    pub bit_flips: u64,
    /// Calls that never end.
    pub hangs: u64,
    /// Times that the disk goes away, by any call.
    pub vanishings: u64,
    /// How long it then stays away.
    pub away: Duration,
    /// Factor on its latency; 0 and 1 change nothing.
    pub slowness: u32,
    /// Faults in all.
    pub budget: u32,
}

/// Silent damage that is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silent {
    /// A write of `len` bytes at `at` is to get lost.
    Lost {
        /// Byte offset.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// A write of `len` bytes at `at` is to land at `to`.
    Misdirected {
        /// Byte offset it was meant for.
        at: u64,
        /// Bytes.
        len: usize,
        /// Byte offset where it goes.
        to: u64,
    },
    /// A bit of the byte at `at` is to flip.
    Flip {
        /// Byte offset.
        at: u64,
    },
}

/// Whether silent damage may be done: where, to a disk that holds what, with which bytes (none for a flip). Without a hook
/// there is none.
pub type AllowHook = Box<dyn FnMut(FileSlot, Silent, &Media, &[u8]) -> bool>;

/// A plan at work on one disk, with a stream of chance of its own: a plan that does nothing leaves a history as it is.
pub(super) struct Faults {
    pub(super) plan: FaultPlan,
    pub(super) rng: Rng,
    left: u32,
}

impl Faults {
    pub(super) fn new(plan: FaultPlan, seed: u64) -> Self {
        Self {
            plan,
            rng: Rng::new(seed),
            left: plan.budget,
        }
    }

    /// Whether it happens this time: once in `n`, while the budget lasts. Costs nothing yet.
    pub(super) fn strikes(&mut self, n: u64) -> bool {
        n > 0 && self.left > 0 && self.rng.one_in(n)
    }

    /// It has happened.
    pub(super) fn spend(&mut self) {
        self.left -= 1;
    }
}
