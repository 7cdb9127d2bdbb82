//! A vhost-user device outlives its daemon: what was in flight when the daemon died is done when the next one comes, once, and the
//! driver sees no error. The front-end holds the note of what was in flight, as QEMU does.

use std::collections::HashMap;
use std::path::Path;

use rand::RngExt;
use rand::rngs::SmallRng;
use vold_tests::content::{bytes, seeded};
use vold_tests::nbd::Client;
use vold_tests::vhost::*;
use vold_tests::vold::STORE;
use vold_tests::{Vold, scale, wait_for};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 2048;
const QUEUES: u16 = 2;

/// A driver that writes and reads blocks without end, never two requests for one block, and knows what each block holds.
struct Load {
    front_end: FrontEnd,
    rng: SmallRng,
    /// Seed of each block's content; what was never written is zeros.
    blocks: Vec<Option<u64>>,
    /// By queue and head: the block, and what is being written to it.
    running: HashMap<(usize, u16), (u64, Option<u64>)>,
    answered: usize,
}

impl Load {
    fn new(front_end: FrontEnd, rng: SmallRng) -> Self {
        Self {
            front_end,
            rng,
            blocks: vec![None; BLOCKS as usize],
            running: HashMap::new(),
            answered: 0,
        }
    }

    /// Fills all queues.
    fn push(&mut self) {
        for queue in 0..usize::from(QUEUES) {
            while self.front_end.queues[queue].free() >= 3 {
                let block = self.rng.random_range(0..BLOCKS);
                if self.running.values().any(|(other, _)| *other == block) {
                    continue;
                }
                let sector = block * BLOCK as u64 / SECTOR;
                let (head, seed) = match self.rng.random_range(0..10) {
                    0..6 => {
                        let seed = self.rng.random();
                        let data = bytes(seed, BLOCK);
                        (self.front_end.submit(queue, T_OUT, sector, &data, 0), Some(seed))
                    }
                    _ => (self.front_end.submit(queue, T_IN, sector, &[], BLOCK), None),
                };
                self.running.insert((queue, head), (block, seed));
            }
            self.front_end.notify(queue);
        }
    }

    /// Takes all answers that are there; each is that of a request in flight (`finished` sees to that), and right.
    fn take(&mut self) -> usize {
        let mut taken = 0;
        for queue in 0..usize::from(QUEUES) {
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

    fn content(&self, block: u64) -> Vec<u8> {
        match self.blocks[block as usize] {
            Some(seed) => bytes(seed, BLOCK),
            None => vec![0; BLOCK],
        }
    }

    /// Goes on until so many more were answered.
    fn run(&mut self, answers: usize) {
        let enough = self.answered + answers;
        wait_for("requests are answered", || {
            self.push();
            self.take();
            (self.answered >= enough).then_some(())
        });
    }

    /// Answers for all that is in flight, by calls alone.
    fn drain(&mut self) {
        for queue in 0..usize::from(QUEUES) {
            while self.running.keys().any(|(of, _)| *of == queue) {
                let done = self.front_end.complete(queue);
                self.judge(queue, done);
                self.answered += 1;
            }
        }
        assert!(self.front_end.pending.is_empty());
    }

    /// Every block holds what was acknowledged last.
    fn is_right(&self, uri: &str) {
        let mut client = Client::connect(uri);
        for block in 0..BLOCKS {
            let read = client.read(block * BLOCK as u64, BLOCK).unwrap();
            assert!(read == self.content(block), "block {block} at the end");
        }
    }
}

fn loaded(socket: &Path, what: &str) -> Load {
    let shape = Shape {
        queues: QUEUES,
        size: 128,
        ..Shape::default()
    };
    Load::new(FrontEnd::connect_as(socket, shape), seeded(what))
}

fn is_right_over_nbd(vold: &Vold, load: &Load) {
    vold.ctl("detach acme/vol --vm vm1");
    load.is_right(&vold.attach("acme/vol", "vm1"));
}

#[test]
fn what_was_in_flight_at_kill_9_is_answered_once_by_the_next_daemon() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = loaded(&socket, "kill_9");
    let mut replayed = 0;
    for round in 0..scale(6, 40) {
        load.run(200 + 37 * round);
        load.push();
        vold.kill();
        // What it answered before its end is answered.
        load.take();
        replayed += load.running.len();
        vold.restart();
        load.front_end.reconnect(&socket);
        // Nobody kicks: that something is to be done stands in the area and in the ring.
        load.drain();
    }
    println!("{} answers, {replayed} of them by the next daemon", load.answered);
    assert!(replayed > 0, "something was in flight");
    load.run(100);
    load.drain();
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_planned_restart_is_no_more_than_a_pause() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = loaded(&socket, "planned");
    for _ in 0..scale(4, 20) {
        load.run(300);
        load.push();
        vold.stop();
        vold.restart();
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

/// Both the old daemon's requests and those that were put into the ring while there was none.
#[test]
fn requests_made_while_there_is_no_daemon_are_served_by_the_next() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let mut load = loaded(&socket, "no daemon");
    load.run(50);
    load.drain();
    for kill in [true, false] {
        if kill {
            vold.kill();
        } else {
            vold.stop();
        }
        load.push();
        vold.restart();
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
}

/// Killed over and over before it has come far: a replay that is cut short is replayed.
#[test]
fn daemons_killed_during_the_replay() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = loaded(&socket, "replay");
    for _ in 0..scale(3, 15) {
        load.run(100);
        load.push();
        for _ in 0..3 {
            vold.kill();
            load.take();
            vold.restart();
            load.front_end.reconnect(&socket);
        }
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

/// A front-end dies with requests in flight. The next one's write to the same place is the last.
#[test]
fn the_next_front_end_is_served_after_the_requests_of_the_last_have_ended() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let len = DATA_MAX as usize;
    for round in 0..scale(20, 200u64) {
        let mut first = FrontEnd::connect(&socket);
        for i in 0..16 {
            first.submit(0, T_OUT, 0, &bytes(round * 100 + i, len), 0);
        }
        first.notify(0);
        drop(first);
        let mut second = FrontEnd::connect(&socket);
        let new = bytes(round * 100 + 99, len);
        second.write(0, &new).unwrap();
        for _ in 0..5 {
            assert!(
                second.read(0, len).unwrap() == new,
                "a late write of a lost connection"
            );
        }
        drop(second);
        let mut third = FrontEnd::connect(&socket);
        assert!(third.read(0, len).unwrap() == new);
    }
}

/// The connection is cut, and the daemon lives: the same driver comes back with its area.
#[test]
fn a_driver_whose_connection_was_cut_comes_back_and_loses_nothing() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = loaded(&socket, "cut");
    for _ in 0..scale(10, 100) {
        load.run(100);
        load.push();
        // (reconnect drops the old connection after it has the new one, which is not served before that.)
        let stream = std::os::unix::net::UnixStream::from(
            std::os::fd::AsFd::as_fd(&load.front_end.wire)
                .try_clone_to_owned()
                .unwrap(),
        );
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        drop(stream);
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
}

/// A detach by the operator is no accident: the device ends, and the next attachment's device begins with an empty area.
#[test]
fn a_detach_ends_the_device_and_no_later_request_changes_anything() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = loaded(&socket, "detach");
    load.run(200);
    load.drain();
    load.push();
    vold.ctl("detach acme/vol --vm vm1");
    load.front_end.wire.ends();
    load.take();
    let uri = vold.attach("acme/vol", "vm1");
    // Each block is as it was, or as what was in flight made it; and stays so, whatever the ring is told.
    let seen = |uri: &str| {
        let mut client = Client::connect(uri);
        (0..BLOCKS)
            .map(|block| client.read(block * BLOCK as u64, BLOCK).unwrap())
            .collect::<Vec<_>>()
    };
    let first = seen(&uri);
    for (block, data) in first.iter().enumerate() {
        let writing = load
            .running
            .values()
            .find_map(|(running, seed)| (*running == block as u64).then_some(*seed).flatten());
        let is_old = *data == load.content(block as u64);
        let is_new = writing.is_some_and(|seed| *data == bytes(seed, BLOCK));
        assert!(is_old || is_new, "block {block}");
    }
    load.front_end.queues[0].kick();
    load.front_end.queues[1].kick();
    assert!(seen(&uri) == first, "a detached device changed something");
    assert_eq!(load.take(), 0, "a detached device answered something");
}
