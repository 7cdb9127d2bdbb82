//! vhost-user-blk: a virtio block device whose rings and data are in the guest's memory.
//!
//! | file | job |
//! |---|---|
//! | [`fault`] | why a guest's memory or ring cannot be used |
//! | [`mapping`] | one shared mapping of a passed descriptor |
//! | [`memory`] | the guest's regions as one address space; the log of pages written |
//! | [`chain`] | from a descriptor to the checked parts of its chain |
//! | [`ring`] | one split virtqueue |
//! | [`request`] | from a chain to one checked block request |
//! | [`inflight`] | which requests are in flight, where a crash leaves it |

#![allow(dead_code)]

mod chain;
mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
mod guest;
mod inflight;
mod mapping;
mod memory;
mod request;
mod ring;
