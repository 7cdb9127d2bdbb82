//! A driver under load that knows what its volume has to hold.

use std::collections::HashMap;
use std::path::Path;

use rand::RngExt;
use rand::rngs::SmallRng;

use super::{Done, FrontEnd, S_OK, SECTOR, Shape, T_IN, T_OUT};
use crate::content::{bytes, seeded};
use crate::nbd::Client;
use crate::wait_for;

/// A driver that writes and reads blocks without end, never two requests for one block, and knows what each block holds.
pub struct Load {
    /// The device.
    pub front_end: FrontEnd,
    rng: SmallRng,
    /// Seed of each block's content; what was never written is zeros.
    blocks: Vec<Option<u64>>,
    /// By queue and head: the block, and what is being written to it.
    pub running: HashMap<(usize, u16), (u64, Option<u64>)>,
    /// Requests answered.
    pub answered: usize,
}

impl Load {
    /// Bytes of a block, the only length of its requests.
    pub const BLOCK: usize = 4096;
    /// Blocks that it uses.
    pub const BLOCKS: u64 = 2048;
    const QUEUES: u16 = 2;
    /// How its device is.
    pub fn shape() -> Shape {
        Shape {
            queues: Self::QUEUES,
            size: 128,
            ..Shape::default()
        }
    }

    /// Nothing written yet. The content depends on `what`.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn start(socket: &Path, what: &str) -> Self {
        Self::start_as(socket, Self::shape(), what)
    }

    /// The same in another shape, which has as many queues.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn start_as(socket: &Path, shape: Shape, what: &str) -> Self {
        Self {
            front_end: FrontEnd::connect_as(socket, shape),
            rng: seeded(what),
            blocks: vec![None; Self::BLOCKS as usize],
            running: HashMap::new(),
            answered: 0,
        }
    }

    /// Fills all queues.
    pub fn push(&mut self) {
        for queue in 0..usize::from(Self::QUEUES) {
            while self.front_end.queues[queue].free() >= 3 {
                let block = self.rng.random_range(0..Self::BLOCKS);
                if self.running.values().any(|(other, _)| *other == block) {
                    continue;
                }
                let sector = block * Self::BLOCK as u64 / SECTOR;
                let (head, seed) = match self.rng.random_range(0..10) {
                    0..6 => {
                        let seed = self.rng.random();
                        let data = bytes(seed, Self::BLOCK);
                        (self.front_end.submit(queue, T_OUT, sector, &data, 0), Some(seed))
                    }
                    _ => (self.front_end.submit(queue, T_IN, sector, &[], Self::BLOCK), None),
                };
                self.running.insert((queue, head), (block, seed));
            }
            self.front_end.notify(queue);
        }
    }

    /// Takes all answers that are there; each is that of a request in flight (`finished` sees to that), and right.
    ///
    /// # Panics
    /// When one is wrong.
    pub fn take(&mut self) -> usize {
        let mut taken = 0;
        for queue in 0..usize::from(Self::QUEUES) {
            while let Some(done) = self.front_end.finished(queue) {
                self.judge(queue, done);
                taken += 1;
            }
        }
        self.answered += taken;
        taken
    }

    fn judge(&mut self, queue: usize, done: Done) {
        let (block, written) = self
            .running
            .remove(&(queue, done.head))
            .expect("a request in flight");
        assert_eq!(done.status, S_OK, "block {block}: the driver sees no error");
        match written {
            Some(seed) => self.blocks[block as usize] = Some(seed),
            None => assert!(done.data == self.content(block), "block {block}: its data"),
        }
    }

    /// What a block was acknowledged to hold.
    pub fn content(&self, block: u64) -> Vec<u8> {
        match self.blocks[block as usize] {
            Some(seed) => bytes(seed, Self::BLOCK),
            None => vec![0; Self::BLOCK],
        }
    }

    /// Goes on until so many more were answered.
    ///
    /// # Panics
    /// When one is wrong, or none comes.
    pub fn run(&mut self, answers: usize) {
        let enough = self.answered + answers;
        wait_for("requests are answered", || {
            self.push();
            self.take();
            (self.answered >= enough).then_some(())
        });
    }

    /// Answers for all that is in flight, by calls alone.
    ///
    /// # Panics
    /// When one is wrong, or does not come.
    pub fn drain(&mut self) {
        for queue in 0..usize::from(Self::QUEUES) {
            while self.running.keys().any(|(of, _)| *of == queue) {
                let done = self.front_end.complete(queue);
                self.judge(queue, done);
                self.answered += 1;
            }
        }
        assert!(self.front_end.pending.is_empty());
    }

    /// Every block holds what was acknowledged last.
    ///
    /// # Panics
    /// When one does not.
    pub fn is_right(&self, uri: &str) {
        let mut client = Client::connect(uri);
        for block in 0..Self::BLOCKS {
            let read = client.read(block * Self::BLOCK as u64, Self::BLOCK).unwrap();
            assert!(read == self.content(block), "block {block} at the end");
        }
    }

    /// Whether a block may hold that: what was acknowledged last, or what was being written.
    pub fn may_hold(&self, block: u64, data: &[u8]) -> bool {
        let being_written = self
            .running
            .values()
            .find_map(|(running, seed)| (*running == block).then_some(*seed).flatten());
        data == self.content(block) || being_written.is_some_and(|seed| data == bytes(seed, Self::BLOCK))
    }
}
