//! Rules that can be broken on purpose, one at a time, to show that the simulated world notices.
//!
//! Only with the feature `sabotage`, which nothing but the test of that name and the soak asks for; without it [`broken`] is
//! `false` at compile time, and the daemon refuses to be built with it. Each switch stands at the one place where its rule is
//! kept.

/// Whether this build can break rules.
pub const BUILT_IN: bool = cfg!(feature = "sabotage");

macro_rules! rules {
    ($($name:ident: $text:literal,)*) => {
        /// A rule, and what happens instead when it is broken.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Rule {
            $(#[doc = $text] $name,)*
        }

        impl Rule {
            /// All of them.
            pub const ALL: &[Rule] = &[$(Rule::$name,)*];

            /// What happens when it is broken.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Rule::$name => $text,)*
                }
            }
        }
    };
}

rules! {
    Mark: "a clean extent is written without a mark",
    SyncBeforeClear: "the cleaner clears marks without a sync of data and areas",
    AreaBeforeClear: "the cleaner clears marks without writing checksum areas",
    ClearUntouched: "a mark is cleared although a write came meanwhile",
    DurableFirst: "a write goes out before its allocation and mark are durable",
    StaleBeforeAnswer: "a write is acknowledged before the failed replica is stale durably",
    StaleIsOut: "a stale replica whose store is at hand counts as in sync at the opening",
    TellTheStores: "a change of the membership is written to the register only",
    KeepTheLast: "a replica is dropped although no other one has completed the request",
    HungStoreIsOut: "a store with a call that hangs takes writes again",
    RangeLock: "overlapping writes share the range lock",
    WriteAll: "a write goes to one replica in sync only",
    FlushSyncs: "a flush returns without a sync",
    FlushAll: "a flush syncs one replica only",
    JoinNoRunningSync: "a flush joins a sync that was submitted before",
    FailedSync: "a failed sync is taken for a success",
    CommitSyncs: "a metadata commit is not synced",
    CheckpointSyncs: "a checkpoint is not synced before the log is used again",
    AlternatePages: "a checkpoint writes over the good copy of a page",
    RecoverMarked: "recovery takes marked extents for clean",
    RecoverRewrites: "recovery does not rewrite the copy that lost",
    RecoverSyncs: "what recovery rewrote is not synced before the extent serves",
    MissMarked: "what was marked when a replica was dropped is not compared when it comes back",
    MissedBits: "what a replica lacked is not taken from the tables at the opening",
    ResyncMarks: "an extent is copied to a replica that catches up without a mark there",
    ResyncWaits: "a replica counts as in sync while an allocation without it is under way",
    ResyncSyncs: "a replica counts as in sync before what it got is synced",
    UnmapMarked: "an extent is given back without a mark",
    ReleaseLocks: "an extent is given back while I/O to it is under way",
    ScrubOverwrites: "extents are called free without being overwritten",
    ScrubSums: "the checksum area of a freed extent is not overwritten",
    ScrubSyncs: "extents are called free before the overwriting is synced",
    ScrubReadsBack: "extents are called free without the overwriting being read back",
    KeyCopies: "one of the two copies of a destroyed volume's keys is forgotten",
    TombstonedSlots: "a slot is restored at the opening although its tombstone is committed",
    StaleSlots: "a slot of no live volume is left as it is at the opening",
    HealLocks: "a damaged block is healed without its lock",
    OldCopies: "an old copy of a store is taken for the store itself",
    DestroyAgain: "what was destroyed and is on an old copy is left there",
    CatalogDurable: "a change of the catalog returns before it is durable",
}

#[cfg(feature = "sabotage")]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Whether this thread breaks that rule now.
#[cfg(feature = "sabotage")]
#[inline]
pub(crate) fn broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Never, in this build.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub(crate) const fn broken(_rule: Rule) -> bool {
    false
}

/// From now on this thread breaks that rule, or none.
#[cfg(feature = "sabotage")]
pub fn break_rule(rule: Option<Rule>) {
    BROKEN.set(rule);
}
