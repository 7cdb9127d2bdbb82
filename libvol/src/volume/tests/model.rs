//! What a volume may answer, byte by byte: the model that the random tests hold it to.
//!
//! Every operation writes one *value* (1 to 63; 0 is zeros). A byte's history is two sets of values: what a read may
//! return now, and what it may return after a power cut. A request that is alone on a byte from its beginning to its end
//! leaves exactly its value; requests that overlap in time leave any of theirs. A flush takes out of the second set what
//! can no longer come back.

use std::ops::Range;

/// A set of values, a bit each.
type Values = u64;

#[derive(Clone, Copy)]
struct Byte {
    /// What a read may return.
    now: Values,
    /// What may be there after a cut.
    after_cut: Values,
    /// Requests under way.
    busy: u16,
    /// Some of them overlapped in time.
    contended: bool,
}

/// See the module's text.
pub(super) struct Model {
    bytes: Vec<Byte>,
    /// What flushes and reads under way have seen begin meanwhile.
    watchers: Vec<Option<Watcher>>,
}

struct Watcher {
    range: Range<usize>,
    seen: Vec<Values>,
}

/// A request under way.
pub(super) struct Started {
    range: Range<usize>,
    value: u8,
}

/// A flush or read under way.
pub(super) struct Watching(usize);

impl Model {
    pub(super) fn zeroed(size: usize) -> Self {
        let zero = Byte {
            now: 1,
            after_cut: 1,
            busy: 0,
            contended: false,
        };
        Self {
            bytes: vec![zero; size],
            watchers: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The bytes of a value at a place; they differ from place to place.
    pub(super) fn bytes_of(value: u8, range: Range<usize>) -> Vec<u8> {
        range.map(|at| byte_of(value, at)).collect()
    }

    /// A write of `value`, or with 0 a trim, begins.
    pub(super) fn start(&mut self, range: Range<usize>, value: u8) -> Started {
        for byte in &mut self.bytes[range.clone()] {
            byte.contended |= byte.busy > 0;
            byte.busy += 1;
            byte.now |= 1 << value;
            byte.after_cut |= 1 << value;
        }
        for watcher in self.watchers.iter_mut().flatten() {
            for at in range.start.max(watcher.range.start)..range.end.min(watcher.range.end) {
                watcher.seen[at - watcher.range.start] |= 1 << value;
            }
        }
        Started { range, value }
    }

    /// It was acknowledged; with `durable`, as FUA.
    pub(super) fn acknowledge(&mut self, started: Started, durable: bool) {
        for byte in &mut self.bytes[started.range] {
            if !byte.contended {
                byte.now = 1 << started.value;
                if durable {
                    byte.after_cut = byte.now;
                }
            }
            byte.leave();
        }
    }

    /// It failed: nobody knows how far it came.
    pub(super) fn fail(&mut self, started: Started) {
        self.bytes[started.range].iter_mut().for_each(Byte::leave);
    }

    pub(super) fn start_flush(&mut self) -> Watching {
        self.watch(0..self.len())
    }

    pub(super) fn flushed(&mut self, flush: Watching) {
        let watcher = self.watchers[flush.0].take().expect("once");
        for (byte, seen) in self.bytes.iter_mut().zip(watcher.seen) {
            byte.after_cut &= seen;
        }
    }

    pub(super) fn start_read(&mut self, range: Range<usize>) -> Watching {
        self.watch(range)
    }

    fn watch(&mut self, range: Range<usize>) -> Watching {
        let seen = self.bytes[range.clone()].iter().map(|byte| byte.now).collect();
        self.watchers.push(Some(Watcher { range, seen }));
        Watching(self.watchers.len() - 1)
    }

    /// # Panics
    /// When a byte is none that may be there.
    pub(super) fn check_read(&mut self, read: Watching, found: &[u8]) {
        let watcher = self.watchers[read.0].take().expect("once");
        for ((at, seen), found) in watcher.range.zip(watcher.seen).zip(found) {
            assert!(
                matching(seen, at, *found) != 0,
                "byte {at} reads as {found}, may be {}",
                describe(seen, at)
            );
        }
    }

    /// All requests have ended, the volume is closed: what may be read is what is durable.
    pub(super) fn closed(&mut self) {
        self.watchers.clear();
        for byte in &mut self.bytes {
            byte.after_cut = byte.now;
            (byte.busy, byte.contended) = (0, false);
        }
    }

    /// The power went, the volume is open again and reads like this: from now on exactly this may be read.
    ///
    /// # Panics
    /// When a byte is none that may be there after a cut.
    pub(super) fn check_after_cut(&mut self, found: &[u8]) {
        self.watchers.clear();
        for (at, (byte, found)) in self.bytes.iter_mut().zip(found).enumerate() {
            let may = byte.after_cut;
            let is = matching(may, at, *found);
            assert!(
                is != 0,
                "byte {at} is {found} after the cut, may be {}",
                describe(may, at)
            );
            *byte = Byte {
                now: is,
                after_cut: is,
                busy: 0,
                contended: false,
            };
        }
    }
}

impl Byte {
    fn leave(&mut self) {
        self.busy -= 1;
        if self.busy == 0 {
            self.contended = false;
        }
    }
}

fn byte_of(value: u8, at: usize) -> u8 {
    match value {
        0 => 0,
        value => 1 + ((usize::from(value) * 4 + at.wrapping_mul(7919) / 8) % 255) as u8,
    }
}

/// Those of `values` that `found` can be.
fn matching(values: Values, at: usize, found: u8) -> Values {
    let is = |value: &u8| values >> value & 1 == 1 && byte_of(*value, at) == found;
    (0..64).filter(is).fold(0, |set, value| set | 1 << value)
}

fn describe(values: Values, at: usize) -> String {
    let each = (0..64).filter(|value| values >> value & 1 == 1);
    each.map(|value| format!("{} (value {value}) ", byte_of(value, at)))
        .collect()
}
