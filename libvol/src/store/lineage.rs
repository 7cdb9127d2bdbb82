//! Lineage: how an old copy of a store (a restored backup, a file rolled back, a stale device put in its place) is told
//! from the store itself.
//!
//! Every opening gives the store a random *incarnation*, a sequence that rises, and the newest lsn as its floor, all in the
//! superblock. The installation remembers them ([`Lineage`]), and while the store is open goes on raising the floor to what
//! the store has committed. An opening, each step durable before the next:
//!
//! 1. The store is read, and what was read is made durable ([`super::begin_open`]).
//! 2. It is judged by what is remembered ([`Lineage::judge`]); the new incarnation is remembered as pending
//!    ([`Lineage::begin`]).
//! 3. The store gets it, one superblock copy after the other ([`super::Opening::finish`]).
//! 4. It is remembered as confirmed ([`Lineage::confirm`]). Only then is anything served.
//!
//! A crash leaves a store that has either the confirmed incarnation or the pending one, so it is never taken for an old copy.
//! Neither is a store that kept its old incarnation because a copy of its superblock cannot be written: the new one stays
//! pending.
//!
//! | remembered | incarnation found | lsn found | sequence found | it is |
//! |---|---|---|---|---|
//! | nothing | any | any | any | accepted |
//! | something | confirmed or pending | at least the floor | any | the store |
//! | something | confirmed or pending | below the floor | any | an old copy |
//! | something | another | any | at most the remembered | an old copy |
//! | something | another | any | higher | newer than what is remembered: *that* is the old copy |
//!
//! Not seen: a copy that was taken later than the last raise of the floor, and everything rolled back at once. This file
//! does no I/O.

use serde::{Deserialize, Serialize};

use crate::ids::Incarnation;

/// What a store says of itself when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Of its last opening; nil when it never was opened.
    pub incarnation: Incarnation,
    /// The superblock's: rises with every opening.
    pub sequence: u64,
    /// Its newest commit.
    pub lsn: u64,
}

/// What an opening writes to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The new incarnation.
    pub incarnation: Incarnation,
    /// The superblock's new sequence.
    pub sequence: u64,
}

/// What an installation remembers of a store. The default remembers nothing, and accepts any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The incarnation that the store is known to have.
    pub confirmed: Option<Incarnation>,
    /// Of an opening that was begun: the store may have it.
    pub pending: Option<Incarnation>,
    /// The highest superblock sequence ever meant for the store.
    pub sequence: u64,
    /// The store has durably committed up to here.
    pub floor_lsn: u64,
}

/// What a store turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The store itself.
    Continues,
    /// An old copy of it; why.
    OldCopy(String),
    /// It was opened again after what is remembered was written down: the memory is the old copy. Why.
    Ahead(String),
}

impl Lineage {
    /// Judges a store by what is remembered.
    pub fn judge(&self, found: &Found) -> Verdict {
        if self.confirmed.is_none() && self.pending.is_none() {
            return Verdict::Continues;
        }
        let expected = [self.confirmed, self.pending].contains(&Some(found.incarnation));
        match expected {
            true if found.lsn >= self.floor_lsn => Verdict::Continues,
            true => Verdict::OldCopy(format!(
                "its newest commit is {}, and it had committed {}",
                found.lsn, self.floor_lsn
            )),
            false if found.sequence <= self.sequence => Verdict::OldCopy(format!(
                "it was opened since (superblock sequence {}, the store has reached {})",
                found.sequence, self.sequence
            )),
            false => Verdict::Ahead(format!(
                "superblock sequence {}, {} is the last that is known",
                found.sequence, self.sequence
            )),
        }
    }

    /// An opening begins, whatever the verdict: what was found is accepted from now on, and `fresh`, which the store gets
    /// after this is durable.
    #[must_use]
    pub fn begin(&mut self, found: &Found, fresh: Incarnation) -> Renewal {
        self.confirmed = Some(found.incarnation);
        self.pending = Some(fresh);
        // Higher than any that another copy of this store may have got from us.
        self.sequence = self.sequence.max(found.sequence) + 1;
        self.floor_lsn = found.lsn;
        Renewal {
            incarnation: fresh,
            sequence: self.sequence,
        }
    }

    /// The opening has ended: the store has this incarnation, durably, and has committed up to `lsn`.
    pub fn confirm(&mut self, incarnation: Incarnation, lsn: u64) {
        if self.pending == Some(incarnation) {
            self.confirmed = self.pending.take();
        }
        self.raise(incarnation, lsn);
    }

    /// The store of that incarnation has durably committed up to `lsn`. Whether that is news. What an earlier opening had
    /// committed does not count for a copy that was taken up since.
    pub fn raise(&mut self, incarnation: Incarnation, lsn: u64) -> bool {
        let news = self.confirmed == Some(incarnation) && lsn > self.floor_lsn;
        if news {
            self.floor_lsn = lsn;
        }
        news
    }

    /// The memory of who has found a store and accepts it as it is.
    pub fn of(found: &Found) -> Self {
        Self {
            confirmed: Some(found.incarnation),
            pending: None,
            sequence: found.sequence,
            floor_lsn: found.lsn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lineage after one opening of a store that was new, and that store.
    fn opened() -> (Lineage, Found) {
        let mut lineage = Lineage::default();
        let renewal = lineage.begin(
            &Found {
                incarnation: Incarnation::NIL,
                sequence: 1,
                lsn: 1,
            },
            Incarnation::random(),
        );
        lineage.confirm(renewal.incarnation, 10);
        let found = Found {
            incarnation: renewal.incarnation,
            sequence: renewal.sequence,
            lsn: 10,
        };
        (lineage, found)
    }

    fn is_old(verdict: Verdict) -> bool {
        matches!(verdict, Verdict::OldCopy(_))
    }

    #[test]
    fn without_a_memory_any_store_is_accepted() {
        let (_, found) = opened();
        assert_eq!(Lineage::default().judge(&found), Verdict::Continues);
    }

    #[test]
    fn while_an_opening_is_under_way_both_incarnations_are_the_store() {
        let (mut lineage, found) = opened();
        let before = found;
        let renewal = lineage.begin(&found, Incarnation::random());
        let after = Found {
            incarnation: renewal.incarnation,
            sequence: renewal.sequence,
            lsn: 11,
        };
        assert_eq!(lineage.judge(&before), Verdict::Continues);
        assert_eq!(lineage.judge(&after), Verdict::Continues);
        lineage.confirm(renewal.incarnation, 11);
        assert!(is_old(lineage.judge(&before)));
        assert_eq!(lineage.judge(&after), Verdict::Continues);
    }

    #[test]
    fn a_store_that_cannot_be_given_its_incarnation_is_the_store_with_either() {
        let (mut lineage, found) = opened();
        let renewal = lineage.begin(&found, Incarnation::random());
        lineage.confirm(found.incarnation, 12);
        let kept = Found { lsn: 12, ..found };
        assert_eq!(lineage.judge(&kept), Verdict::Continues);
        let half_written = Found {
            incarnation: renewal.incarnation,
            sequence: renewal.sequence,
            lsn: 12,
        };
        assert_eq!(lineage.judge(&half_written), Verdict::Continues);
        assert!(is_old(lineage.judge(&found)));
    }

    #[test]
    fn who_accepts_a_store_as_it_is_knows_it_again_and_no_copy_from_before() {
        let (_, found) = opened();
        let lineage = Lineage::of(&found);
        assert_eq!(lineage.judge(&found), Verdict::Continues);
        assert!(is_old(lineage.judge(&Found { lsn: 9, ..found })));
    }

    #[test]
    fn a_store_below_its_floor_is_an_old_copy() {
        let (mut lineage, found) = opened();
        let now = found.incarnation;
        assert!(lineage.raise(now, 12));
        assert!(!lineage.raise(now, 12) && !lineage.raise(now, 3));
        assert!(!lineage.raise(Incarnation::random(), 13), "of another opening");
        assert!(is_old(lineage.judge(&found)));
        assert_eq!(lineage.judge(&Found { lsn: 12, ..found }), Verdict::Continues);
    }

    #[test]
    fn after_an_old_copy_was_taken_up_the_store_it_replaced_is_one_too() {
        let (mut lineage, first) = opened();
        let mut found = first;
        for lsn in [20, 30, 40] {
            let renewal = lineage.begin(&found, Incarnation::random());
            lineage.confirm(renewal.incarnation, lsn);
            found = Found {
                incarnation: renewal.incarnation,
                sequence: renewal.sequence,
                lsn,
            };
        }
        assert!(is_old(lineage.judge(&first)));
        let renewal = lineage.begin(&first, Incarnation::random());
        assert!(renewal.sequence > found.sequence);
        lineage.confirm(renewal.incarnation, 11);
        // It has committed more, and yet not what was committed since.
        assert!(is_old(lineage.judge(&found)));
    }

    #[test]
    fn a_memory_older_than_the_store_is_told_from_an_old_copy() {
        let (mut lineage, found) = opened();
        let old = lineage.clone();
        let renewal = lineage.begin(&found, Incarnation::random());
        let newer = Found {
            incarnation: renewal.incarnation,
            sequence: renewal.sequence,
            lsn: 11,
        };
        assert!(matches!(old.judge(&newer), Verdict::Ahead(_)));
    }

    #[test]
    fn a_catalog_without_lineage_reads_as_one_that_remembers_nothing() {
        #[derive(Deserialize)]
        struct Record {
            #[serde(default)]
            lineage: Lineage,
        }
        let record: Record = serde_json::from_str("{}").unwrap();
        assert_eq!(record.lineage, Lineage::default());
    }
}
