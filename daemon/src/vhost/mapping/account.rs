//! How much is mapped: by the front-ends of each attachment, and by the process.
//!
//! Addresses and mappings are the process's, and a front-end passes as much memory as it likes: none of it need be there. So
//! a mapping is counted from before it is made until it has been unmapped, whoever keeps it meanwhile: requests that began
//! with an earlier table, or the thread that unmaps.
//!
//! Invariants: an attachment has at most what two full tables, logs and inflight areas take; all together stay far below
//! what the system allows a process; and none gets more than an eighth of what it leaves, so that a few greedy ones do not
//! keep the next one out: with 64 TiB for all, and 16,384 mappings, it takes some fifty or a hundred.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use libvol::limits::{
    VHOST_ATTACHMENT_MAPPED_BYTES_MAX, VHOST_ATTACHMENT_MAPPINGS_MAX, VHOST_MAPPED_BYTES_MAX,
    VHOST_MAPPINGS_MAX,
};

use crate::vhost::fault::BadMemory;

/// So much is to be left to others for what an attachment gets.
const LEFT_PER_OWN: u64 = 8;

/// One attachment's. It only goes up on the thread that serves the attachment.
pub(in crate::vhost) struct Account {
    mappings: AtomicU64,
    bytes: AtomicU64,
    process: &'static Process,
}

/// All attachments'.
struct Process {
    mappings: AtomicU64,
    bytes: AtomicU64,
}

static PROCESS: Process = Process::nothing();

impl Process {
    const fn nothing() -> Self {
        Self {
            mappings: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }
}

impl Account {
    /// Of an attachment that has mapped nothing.
    pub(in crate::vhost) fn new() -> Arc<Self> {
        Self::with(&PROCESS)
    }

    fn with(process: &'static Process) -> Arc<Self> {
        Arc::new(Self {
            mappings: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            process,
        })
    }
}

/// One mapping's place in its attachment's account and in the process's, until drop.
pub(super) struct Charge {
    account: Arc<Account>,
    bytes: u64,
}

impl Charge {
    /// Counts a mapping of so many bytes.
    ///
    /// # Errors
    /// It would be one too many, or too large.
    pub(super) fn new(account: &Arc<Account>, bytes: usize) -> Result<Self, BadMemory> {
        let process = account.process;
        let bytes = bytes as u64;
        take(
            (&account.mappings, VHOST_ATTACHMENT_MAPPINGS_MAX),
            (&process.mappings, VHOST_MAPPINGS_MAX as u64),
            1,
        )?;
        if let Err(full) = take(
            (&account.bytes, VHOST_ATTACHMENT_MAPPED_BYTES_MAX),
            (&process.bytes, VHOST_MAPPED_BYTES_MAX),
            bytes,
        ) {
            give(&account.mappings, &process.mappings, 1);
            return Err(full);
        }
        Ok(Self {
            account: account.clone(),
            bytes,
        })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let process = self.account.process;
        give(&self.account.bytes, &process.bytes, self.bytes);
        give(&self.account.mappings, &process.mappings, 1);
    }
}

/// Adds to both counters what is within both bounds.
fn take(own: (&AtomicU64, u64), all: (&AtomicU64, u64), amount: u64) -> Result<(), BadMemory> {
    let ((own, own_max), (all, all_max)) = (own, all);
    let own_after = own.load(SeqCst).checked_add(amount);
    let Some(own_after) = own_after.filter(|after| *after <= own_max) else {
        return Err(BadMemory::Refused(
            "more memory at a time, old and new, than an attachment may have mapped",
        ));
    };
    let within = |before: u64| {
        let after = before.checked_add(amount)?;
        let left = all_max.checked_sub(after)?;
        (left / LEFT_PER_OWN >= own_after).then_some(after)
    };
    if all.fetch_update(SeqCst, SeqCst, within).is_err() {
        return Err(BadMemory::Refused(
            "too much memory of all guests together is mapped already",
        ));
    }
    own.fetch_add(amount, SeqCst);
    Ok(())
}

fn give(own: &AtomicU64, all: &AtomicU64, amount: u64) {
    own.fetch_sub(amount, SeqCst);
    all.fetch_sub(amount, SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: usize = 1 << 40;

    fn process() -> &'static Process {
        Box::leak(Box::new(Process::nothing()))
    }

    fn all(process: &Process) -> (u64, u64) {
        (process.mappings.load(SeqCst), process.bytes.load(SeqCst))
    }

    /// As many as there may be.
    fn fill(account: &Arc<Account>, bytes: usize) -> Vec<Charge> {
        std::iter::from_fn(|| Charge::new(account, bytes).ok()).collect()
    }

    #[test]
    fn an_attachment_has_two_tables_at_a_time_and_what_it_gives_back_it_may_have_again() {
        let process = process();
        let account = Account::with(process);
        let mut charges = fill(&account, 4096);
        assert_eq!(charges.len() as u64, VHOST_ATTACHMENT_MAPPINGS_MAX);
        charges.pop();
        charges.push(Charge::new(&account, 4096).unwrap());
        assert!(Charge::new(&account, 4096).is_err());
        // Another is not concerned.
        drop(Charge::new(&Account::with(process), TIB).unwrap());
        drop(charges);
        assert_eq!(all(process), (0, 0));
        let charges = fill(&account, TIB);
        assert_eq!(charges.len(), 4);
        assert!(Charge::new(&account, usize::MAX).is_err());
        assert_eq!(all(process), (4, 4 << 40), "what is refused is not counted");
    }

    #[test]
    fn forty_greedy_attachments_do_not_keep_the_next_one_out() {
        let process = process();
        let newcomer = Account::with(process);
        let greedy = |bytes| (0..40).flat_map(move |_| fill(&Account::with(process), bytes));
        let kept: Vec<Charge> = greedy(64 << 30).collect();
        assert!(all(process).1 > VHOST_MAPPED_BYTES_MAX - (2 << 40), "nearly all");
        drop(Charge::new(&newcomer, 64 << 30).unwrap());
        drop(kept);
        let kept: Vec<Charge> = (0..3).flat_map(|_| greedy(4096)).collect();
        assert!(all(process).0 > VHOST_MAPPINGS_MAX as u64 - 1000, "nearly all");
        assert!(fill(&newcomer, 4096).len() >= 10);
        drop(kept);
        assert_eq!(all(process), (0, 0));
    }
}
