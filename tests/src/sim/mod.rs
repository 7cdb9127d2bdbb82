//! The simulated world: the real store, volume and destruction code over simulated disks, with time and chance from a seed.
//!
//! | file | job |
//! |---|---|
//! | [`plan`] | what a seed chooses: stores, volumes, rounds, cuts; and the sizes that shrinking reduces |
//! | [`world`] | rounds: power on, recover, hold to the oracle, work, power off; what is at rest between them |
//! | [`life`] | one round: what a daemon does from its start to its end, in short |
//! | [`stores`] | its stores: opened, watched for faults, brought back |
//! | [`volumes`] | its volumes: made, opened, destroyed; replicas brought back |
//! | [`verify`] | a volume that was opened, held to the oracle |
//! | [`work`] | one worker's requests on one volume |
//! | [`catalog`] | the daemon's catalog, on a simulated file |
//! | [`records`] | what is read out of it |
//! | [`model`] | what a volume may answer, sector by sector |
//! | [`watched`] | the register of memberships, with power cuts right after a change |
//! | [`lies`] | zeros that a disk acknowledges and forgets |
//! | [`rest`] | what the disks hold when nothing runs: the offline check, replicas, keys; and damage |
//! | [`shrink`] | a failing history made smaller |
//!
//! [`run_one`] replays a seed. docs/RELIABILITY.md says what is simulated and promised. It deliberately simulates no
//! sockets, no keystore and no threads: those have suites of their own.

pub mod catalog;
pub mod lies;
pub mod life;
pub mod model;
pub mod plan;
pub mod records;
pub mod rest;
#[cfg(feature = "sabotage")]
pub mod sabotage;
pub mod shrink;
pub mod stores;
pub mod verify;
pub mod volumes;
pub mod watched;
pub mod work;
pub mod world;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Once;

pub use plan::{Faults, Size};

use libvol::disk::sim::Event;
use world::{Log, World};

/// What one seed's history came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Power cuts that a full recovery and an oracle pass followed.
    pub crash_points: u64,
    /// Power cuts while the catalog was being changed.
    pub changes_cut: u64,
    /// Disks that returned as they had been some rounds before.
    pub old_copies: u64,
    /// Rounds.
    pub rounds: u64,
    /// Bits that flipped at rest.
    pub flips: u64,
    /// Volumes that were destroyed to the end.
    pub destroyed: u64,
    /// Requests that a volume acknowledged.
    pub acknowledged: u64,
    /// Equal for equal histories.
    pub trace_hash: u64,
}

/// A history that ended in a broken promise.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which seed.
    pub seed: u64,
    /// How large a history.
    pub size: Size,
    /// Which promise, and where it was looked at.
    pub violation: String,
    /// All that happened, if it was kept.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "seed {}: {}", self.seed, self.violation)?;
        write!(
            f,
            "size: {}; replay: soak --seed {}{}",
            self.size,
            self.seed,
            self.size.options()
        )
    }
}

thread_local! {
    /// Whether panics of this thread are caught, and what the last one said.
    static CAUGHT: (Cell<bool>, RefCell<String>) = const { (Cell::new(false), RefCell::new(String::new())) };
}

fn catch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            CAUGHT.with(|(catching, text)| match catching.get() {
                true if text.borrow().is_empty() => *text.borrow_mut() = info.to_string(),
                true => {}
                false => before(info),
            });
        }));
    });
}

/// Runs one seed's history.
///
/// # Errors
/// The promise it found broken; with `trace`, and all that happened.
pub fn run(seed: u64, size: Size, faults: Faults, trace: bool) -> Result<Report, Box<Failure>> {
    catch_panics();
    let log = Rc::new(Log::new(trace));
    CAUGHT.with(|(catching, text)| {
        catching.set(true);
        text.borrow_mut().clear();
    });
    let result = catch_unwind(AssertUnwindSafe(|| {
        World::new(seed, size, faults, log.clone()).run()
    }));
    let violation = CAUGHT.with(|(catching, text)| {
        catching.set(false);
        text.take()
    });
    result.map_err(|_| {
        let lines = log.lives().into_iter().enumerate();
        let trace = lines.flat_map(|(round, events)| {
            let head = std::iter::once(format!("--- round {round}"));
            head.chain(events.iter().map(Event::to_string).collect::<Vec<_>>())
        });
        Box::new(Failure {
            seed,
            size,
            violation,
            trace: trace.collect(),
        })
    })
}

/// Replays one seed as the suite runs it.
///
/// # Panics
/// When a promise is broken: with the smallest history that still breaks one, and its trace.
pub fn run_one(seed: u64) -> Report {
    match run(seed, Size::default(), Faults::default(), false) {
        Ok(report) => report,
        Err(failure) => {
            let smallest = shrink::shrink(*failure, Faults::default());
            panic!("{smallest}");
        }
    }
}
