//! What lies where: runs of data, of allocated zeros and of holes, as NBD's base:allocation and backup tools ask for.
//!
//! The answer is a snapshot of the sums in memory, taken without locks: it covers every write and trim acknowledged before
//! the call, and may or may not cover those under way.

use std::rc::Rc;

use super::BlockKind;
use super::core::Core;
use super::extent::{Extent, ForRead};
use super::split::{Part, parts};
use crate::crypto::seal::HOLE;
use crate::error::Result;
use crate::limits::BLOCK;
use crate::runtime::yield_now;

/// Other requests of the thread wait for this many at most.
const EXTENTS_AT_A_TIME: usize = 64;

/// Runs being collected.
struct Runs {
    runs: Vec<(u64, BlockKind)>,
    runs_max: usize,
}

impl Runs {
    /// `false` once there is no room for another run.
    fn add(&mut self, bytes: u64, kind: BlockKind) -> bool {
        let full = self.runs.len() == self.runs_max;
        match self.runs.last_mut() {
            Some((len, last)) if *last == kind => *len += bytes,
            _ if full => return false,
            _ => self.runs.push((bytes, kind)),
        }
        true
    }
}

impl Core {
    pub(super) async fn block_status(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> Result<Vec<(u64, BlockKind)>> {
        let _in_flight = self.begin(offset, len)?;
        let mut runs = Runs {
            runs: Vec::new(),
            runs_max: max_runs.max(1),
        };
        for (seen, part) in parts(self.shape, offset, len).enumerate() {
            if seen % EXTENTS_AT_A_TIME == EXTENTS_AT_A_TIME - 1 {
                yield_now().await;
            }
            let more = match self.extent(part.extent) {
                None => runs.add(part.len as u64, BlockKind::Hole),
                Some(extent) => self.add_part(&extent, &part, &mut runs).await?,
            };
            if !more {
                break;
            }
        }
        Ok(runs.runs)
    }

    async fn add_part(self: &Rc<Self>, extent: &Rc<Extent>, part: &Part, runs: &mut Runs) -> Result<bool> {
        let _in_use = extent.in_use();
        let blocks = part.blocks();
        loop {
            if extent.state.get().for_read() == ForRead::Zeros {
                return Ok(runs.add(part.len as u64, BlockKind::Hole));
            }
            let more = extent.with_sums(blocks.clone(), |sums| {
                blocks.clone().zip(sums).all(|(block, sum)| {
                    let kind = match *sum {
                        HOLE => BlockKind::AllocatedZero,
                        _ => BlockKind::Data,
                    };
                    let start = part.start.max(u64::from(block) * BLOCK);
                    let end = (part.start + part.len as u64).min(u64::from(block + 1) * BLOCK);
                    runs.add(end - start, kind)
                })
            });
            match more {
                Some(more) => return Ok(more),
                None => Box::pin(self.become_readable(extent)).await?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_are_one_run_and_the_last_allowed_run_still_grows() {
        let mut runs = Runs {
            runs: Vec::new(),
            runs_max: 2,
        };
        let added: Vec<bool> = [
            BlockKind::Data,
            BlockKind::Data,
            BlockKind::Hole,
            BlockKind::Hole,
            BlockKind::Data,
        ]
        .into_iter()
        .map(|kind| runs.add(10, kind))
        .collect();
        assert_eq!(added, [true, true, true, true, false]);
        assert_eq!(runs.runs, [(20, BlockKind::Data), (20, BlockKind::Hole)]);
    }
}
