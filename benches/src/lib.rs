//! Benchmarks; each is a binary in `src/bin`. What they share: the load ([`load`], [`vhost`]), the servers under it ([`server`])
//! and the numbers ([`figures`]).
//!
//! A comparison is only worth something when all candidates meet the same disk, the same client and the same machine in
//! one run, in alternating order; `src/bin/compare.rs` does that. It deliberately keeps no history and judges nothing.

pub mod figures;
pub mod load;
pub mod server;
pub mod vhost;
