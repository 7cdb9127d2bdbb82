//! What happened, readable: for the person who looks at a failing seed, and as a hash for the test that a seed replays.

use std::fmt;
use std::time::Duration;

use super::Call;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// As asked.
    Done,
    /// With this error number.
    Failed(i32),
    /// Acknowledged; it never landed.
    Lost,
    /// Acknowledged; it landed at this byte offset.
    Misdirected(u64),
    /// Never.
    Hung,
}

/// One line of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A call on a disk.
    Call {
        /// Which disk.
        disk: u32,
        /// Which call.
        call: Call,
        /// How it ended.
        outcome: Outcome,
    },
    /// A bit of a disk flipped.
    Flip {
        /// Which disk.
        disk: u32,
        /// Byte offset.
        at: u64,
    },
    /// A disk went away.
    Vanished(u32),
    /// It is back; `true` with older contents.
    Returned(u32, bool),
    /// The power went.
    Cut,
    /// What the world has to say.
    Note(String),
}

/// A line with its virtual time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Since the start.
    pub at: Duration,
    /// What happened.
    pub what: What,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} us  ", self.at.as_micros())?;
        match &self.what {
            What::Call { disk, call, outcome } => {
                write!(f, "disk {disk}  ")?;
                match call {
                    Call::Read { at, len } => write!(f, "read  {at}+{len}")?,
                    Call::Write { at, len } => write!(f, "write {at}+{len}")?,
                    Call::Sync => f.write_str("sync")?,
                }
                match outcome {
                    Outcome::Done => Ok(()),
                    Outcome::Failed(errno) => write!(f, "  FAILED (errno {errno})"),
                    Outcome::Lost => f.write_str("  LOST"),
                    Outcome::Misdirected(to) => write!(f, "  MISDIRECTED to {to}"),
                    Outcome::Hung => f.write_str("  HANGS"),
                }
            }
            What::Flip { disk, at } => write!(f, "disk {disk}  BIT FLIP at {at}"),
            What::Vanished(disk) => write!(f, "disk {disk}  VANISHES"),
            What::Returned(disk, old) => {
                write!(f, "disk {disk}  RETURNS{}", if *old { ", OLD" } else { "" })
            }
            What::Cut => f.write_str("POWER CUT"),
            What::Note(text) => f.write_str(text),
        }
    }
}

/// The events, if they are kept, and the hash of all of them.
#[derive(Default)]
pub(super) struct Trace {
    kept: Option<Vec<Event>>,
    hash: u64,
}

impl Trace {
    pub(super) fn keep(&mut self) {
        self.kept.get_or_insert_default();
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    pub(super) fn take(&mut self) -> Vec<Event> {
        self.kept.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// Notes are for people and leave the hash alone, so that keeping a trace changes nothing.
    pub(super) fn add(&mut self, at: Duration, what: What) {
        let numbers = match &what {
            What::Call { disk, call, outcome } => {
                let (kind, from, len) = match *call {
                    Call::Read { at, len } => (1, at, len as u64),
                    Call::Write { at, len } => (2, at, len as u64),
                    Call::Sync => (3, 0, 0),
                };
                let (how, more) = match *outcome {
                    Outcome::Done => (0, 0),
                    Outcome::Failed(errno) => (1, errno as u64),
                    Outcome::Lost => (2, 0),
                    Outcome::Misdirected(to) => (3, to),
                    Outcome::Hung => (4, 0),
                };
                [kind << 8 | how, u64::from(*disk), from, len, more]
            }
            What::Flip { disk, at } => [4, u64::from(*disk), *at, 0, 0],
            What::Vanished(disk) => [5, u64::from(*disk), 0, 0, 0],
            What::Returned(disk, old) => [6, u64::from(*disk), u64::from(*old), 0, 0],
            What::Cut => [7, 0, 0, 0, 0],
            What::Note(_) => [0; 5],
        };
        if numbers[0] != 0 {
            for number in numbers.into_iter().chain([at.as_nanos() as u64]) {
                // FNV-1a's prime, a word at a time, and a fold so that high bits count.
                let mixed = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3);
                self.hash = mixed ^ (mixed >> 29);
            }
        }
        if let Some(kept) = &mut self.kept {
            kept.push(Event { at, what });
        }
    }
}
