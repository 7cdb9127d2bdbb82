//! Why a guest's memory, rings or chains cannot be used. A [`Fault`] ends the session that meets it, and nothing else. A
//! [`BadMemory`] refuses what a front-end passes; whether that ends its session is for who asked.

use std::fmt;
use std::io;

/// The guest or its front-end has broken its device: nothing more can be done for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Addresses that no region has, or none in the form that was asked for.
    Outside {
        /// The first address.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// A page of the memory is gone: its file was made shorter.
    Gone,
    /// The ring's state makes no sense.
    Ring(&'static str),
    /// A chain of descriptors cannot be followed.
    Chain(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { at, len } => write!(f, "{len} bytes at {at:#x} are not the guest's memory"),
            Self::Gone => write!(f, "a page of the guest's memory is gone"),
            Self::Ring(what) | Self::Chain(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Fault {}

/// Memory that a front-end passes and that is not taken.
#[derive(Debug)]
pub(super) enum BadMemory {
    /// It breaks a rule.
    Refused(&'static str),
    /// The system refuses.
    Os(&'static str, io::Error),
}

impl fmt::Display for BadMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(what) => f.write_str(what),
            Self::Os(what, e) => write!(f, "{what}: {e}"),
        }
    }
}

impl std::error::Error for BadMemory {}

impl From<Fault> for BadMemory {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Ring(what) | Fault::Chain(what) => Self::Refused(what),
            Fault::Outside { .. } => Self::Refused("the memory is smaller than what belongs into it"),
            Fault::Gone => Self::Refused("a page of the memory is gone"),
        }
    }
}
