//! The data plane's runtime: a single-threaded executor over one [`Driver`].
//!
//! Everything that waits (disk, socket, clock, other threads) goes through the driver, so the same straight-line
//! `async` code runs on io_uring, on the thread-pool engine and in the crash simulator. One runtime is one OS thread;
//! its tasks share state without locks. It deliberately has no work stealing and no I/O of its own.

mod driver;
mod executor;
pub mod net;
mod op;
pub mod sync;

pub use driver::{Done, Driver, FileSlot, Op, OpKey, SendPart, Unpark, Wait};
pub use executor::{
    Remote, Runtime, live_tasks, now, runtime, sleep, spawn, timeout, turn_number, yield_now,
};
pub use op::{OpFuture, submit};

/// Handle of a spawned task: a future of its result. Dropping it cancels the task; `detach` lets it run.
pub type Task<T> = async_task::Task<T>;
