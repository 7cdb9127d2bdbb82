//! A large, thin device in memory that is asked for nothing but what the script has coming: each request once, with its
//! range, its flags and its payload. Anything else is an effect that nobody asked for, and ends the run.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use libvol::buf::BufPool;
use libvol::crypto::seal::PlainBuf;
use libvol::error::{Error, Kind, Result};
use libvol::limits::{NBD_BYTES_IN_FLIGHT, NBD_REQUESTS_IN_FLIGHT};
use libvol::runtime::sleep;
use libvol::volume::{BlockKind, PlainPart};

use super::script::{BLOCK_STATUS, Expected, FLUSH, READ, Script, TRIM, WRITE, WRITE_ZEROES, failure};
use crate::device::Device;

/// Above 4 GiB, so that 64-bit lengths mean something, and no multiple of anything.
pub(super) const SIZE_BYTES: u64 = (5 << 30) + 1537;
const BLOCK: u64 = 4096;
/// Blocks that hold data at the beginning.
const FILLED: u64 = 16;

/// See the module's text.
pub(super) struct Fake {
    /// The bytes of filled blocks begin with this, over and over.
    tag: [u8; 8],
    /// Blocks that are not as they were.
    changed: RefCell<BTreeMap<u64, Block>>,
    pool: BufPool,
    manner: Cell<Manner>,
    ledger: RefCell<Ledger>,
    running: Cell<usize>,
    running_bytes: Cell<usize>,
}

/// How it works.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Manner {
    /// Each request takes a second.
    pub(super) slow: bool,
    /// It fails where [`failure`] says.
    pub(super) failing: bool,
}

enum Block {
    Data(Box<[u8]>),
    /// Zeros that keep their space.
    Zeros,
    Hole,
}

#[derive(Default)]
struct Ledger {
    script: Rc<Script>,
    /// Of each request: it has come, up to this byte of it.
    begun: Vec<Option<u64>>,
    /// What was read, and not yet seen in a reply: request's range, then places and bytes that are not zeros.
    reads: Vec<(u64, u64, Pieces)>,
    statuses: Vec<(u64, u64, Runs)>,
}

/// Lengths and kinds.
type Runs = Vec<(u64, BlockKind)>;

/// Bytes at their offsets.
pub(super) type Pieces = Vec<(u64, Vec<u8>)>;

impl Fake {
    pub(super) fn new(tag: [u8; 8]) -> Rc<Self> {
        Rc::new(Self {
            tag,
            changed: RefCell::default(),
            pool: BufPool::new(64 << 20),
            manner: Cell::default(),
            ledger: RefCell::default(),
            running: Cell::new(0),
            running_bytes: Cell::new(0),
        })
    }

    /// What is going to be asked.
    pub(super) fn expect(&self, script: &Rc<Script>, manner: Manner) {
        self.manner.set(manner);
        *self.ledger.borrow_mut() = Ledger {
            begun: vec![None; script.requests.len()],
            script: script.clone(),
            ..Ledger::default()
        };
    }

    /// Whether that request has come as a whole, as far as it has not failed. Of those that are carried out in pieces only
    /// [`Fake::all_done`] can tell: pieces of two that overlap may look alike.
    pub(super) fn has_done(&self, index: usize) -> bool {
        let ledger = self.ledger.borrow();
        let request = &ledger.script.requests[index];
        let may_be_mistaken = matches!(request.command, TRIM | WRITE_ZEROES);
        request.error != 0 || may_be_mistaken || ledger.begun[index] == Some(request.len)
    }

    /// Whether everything has come that had to. Of requests in pieces, and of those that look like one of their pieces, only the
    /// bytes of all together are known: whose piece a call was may be taken wrongly.
    pub(super) fn all_done(&self) -> bool {
        let ledger = self.ledger.borrow();
        let all = || ledger.script.requests.iter().zip(&ledger.begun);
        [TRIM, WRITE_ZEROES].into_iter().all(|command| {
            let those = || all().filter(|(request, _)| request.at_device && request.command == command);
            let asked = those().filter(|(request, _)| request.error == 0);
            let asked: u64 = asked.map(|(request, _)| request.len).sum();
            let come: u64 = those().map(|(_, begun)| begun.unwrap_or(0)).sum();
            come >= asked
        })
    }

    /// Takes the record of a read whose bytes are these; `false` when there is none.
    pub(super) fn take_read(&self, offset: u64, len: u64, same: impl Fn(&Pieces) -> bool) -> bool {
        let mut ledger = self.ledger.borrow_mut();
        let found = ledger
            .reads
            .iter()
            .position(|(at, bytes, pieces)| (*at, *bytes) == (offset, len) && same(pieces));
        found.map(|found| ledger.reads.swap_remove(found)).is_some()
    }

    /// Takes the record of a status that said the same.
    pub(super) fn take_status(
        &self,
        offset: u64,
        len: u64,
        same: impl Fn(&[(u64, BlockKind)]) -> bool,
    ) -> bool {
        let mut ledger = self.ledger.borrow_mut();
        let found = ledger
            .statuses
            .iter()
            .position(|(at, bytes, runs)| (*at, *bytes) == (offset, len) && same(runs));
        found.map(|found| ledger.statuses.swap_remove(found)).is_some()
    }

    /// Every request comes in here, judged against the script, and ends when the guard drops.
    async fn enter(&self, call: Call<'_>, cost_bytes: usize) -> Result<Running<'_>> {
        self.ledger.borrow_mut().enter(&call);
        self.running.set(self.running.get() + 1);
        self.running_bytes.set(self.running_bytes.get() + cost_bytes);
        assert!(self.running.get() <= NBD_REQUESTS_IN_FLIGHT, "requests at once");
        assert!(
            self.running.get() == 1 || self.running_bytes.get() <= NBD_BYTES_IN_FLIGHT,
            "{} bytes in {} requests at once",
            self.running_bytes.get(),
            self.running.get()
        );
        let running = Running(self, cost_bytes);
        let manner = self.manner.get();
        if manner.slow {
            sleep(Duration::from_secs(1)).await;
        }
        if !manner.failing || call.command == FLUSH {
            return Ok(running);
        }
        match failure(call.offset) {
            0 => Ok(running),
            5 => Err(Error::new(Kind::Damaged, SECRET)),
            _ => Err(Error::new(Kind::NoSpace, SECRET)),
        }
    }

    fn kind(&self, block: u64) -> BlockKind {
        match self.changed.borrow().get(&block) {
            Some(Block::Data(_)) => BlockKind::Data,
            Some(Block::Zeros) => BlockKind::AllocatedZero,
            Some(Block::Hole) => BlockKind::Hole,
            None if block < FILLED => BlockKind::Data,
            None => BlockKind::Hole,
        }
    }

    /// Where the run that begins at byte `at` may end: at the next block, or before the next one that is changed.
    fn run_end(&self, at: u64, end: u64) -> u64 {
        let block = at / BLOCK;
        let changed = self.changed.borrow();
        let next = match block < FILLED || changed.contains_key(&block) {
            true => block + 1,
            false => changed
                .range(block..)
                .next()
                .map_or(u64::MAX / BLOCK, |(next, _)| *next),
        };
        end.min(next * BLOCK)
    }

    fn bytes(&self, block: u64) -> Box<[u8]> {
        match self.changed.borrow().get(&block) {
            Some(Block::Data(bytes)) => bytes.clone(),
            None if block < FILLED => {
                let mut bytes = self.tag.repeat(BLOCK as usize / 8);
                bytes[7] = block as u8;
                bytes.into()
            }
            _ => vec![0; BLOCK as usize].into(),
        }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let (mut at, end) = (offset, offset + bytes.len() as u64);
        while at < end {
            let next = end.min((at / BLOCK + 1) * BLOCK);
            let mut block = self.bytes(at / BLOCK);
            let within = (at % BLOCK) as usize;
            let piece = &bytes[(at - offset) as usize..(next - offset) as usize];
            block[within..within + piece.len()].copy_from_slice(piece);
            self.changed.borrow_mut().insert(at / BLOCK, Block::Data(block));
            at = next;
        }
    }

    fn zero(&self, offset: u64, len: u64, hole: bool) {
        let end = offset + len;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first >= last {
            return self.zero_part(offset, end);
        }
        self.zero_part(offset, first * BLOCK);
        self.zero_part(last * BLOCK, end);
        let mut changed = self.changed.borrow_mut();
        changed.retain(|block, _| !(first..last).contains(block));
        let zeros = || if hole { Block::Hole } else { Block::Zeros };
        // Where nothing was, nothing is; a few blocks tell the two kinds of zeros apart.
        let told = if hole {
            last.min(FILLED)
        } else {
            last.min(first + FILLED)
        };
        changed.extend((first..told).map(|block| (block, zeros())));
    }

    /// Less than a block, or parts of two.
    fn zero_part(&self, at: u64, end: u64) {
        let (mut at, end) = (at, end);
        while at < end {
            let next = end.min((at / BLOCK + 1) * BLOCK);
            if self.kind(at / BLOCK) == BlockKind::Data {
                self.put(at, &vec![0; (next - at) as usize]);
            }
            at = next;
        }
    }
}

/// What no client may hear.
pub(super) const SECRET: &str = "store \"secret-store\": made to fail";

struct Running<'a>(&'a Fake, usize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        self.0.running_bytes.set(self.0.running_bytes.get() - self.1);
    }
}

/// What the device is asked.
struct Call<'a> {
    command: u16,
    offset: u64,
    len: u64,
    fua: bool,
    no_hole: bool,
    payload: &'a [u8],
}

impl Call<'_> {
    fn of(command: u16, offset: u64, len: u64) -> Self {
        Self {
            command,
            offset,
            len,
            fua: false,
            no_hole: false,
            payload: &[],
        }
    }
}

impl Ledger {
    /// Finds the request that this is, or is the next piece of.
    fn enter(&mut self, call: &Call<'_>) {
        assert!(
            call.offset
                .checked_add(call.len)
                .is_some_and(|end| end <= SIZE_BYTES),
            "outside of the device: {} bytes at {}",
            call.len,
            call.offset
        );
        let script = self.script.clone();
        let fits = |index: &usize| {
            let (request, begun) = (&script.requests[*index], self.begun[*index]);
            begun.is_none_or(|done| done < request.len) && request.fits(call, begun.unwrap_or(0))
        };
        // One that this is the whole of, before one that it may be a piece of.
        let mut fitting = (0..script.requests.len()).filter(fits);
        let first = fitting.next();
        let whole = |index: &usize| self.begun[*index].is_none() && script.requests[*index].len == call.len;
        let found = first.filter(whole).or_else(|| fitting.find(whole)).or(first);
        // An earlier piece may have been taken for another request's that looks alike.
        let found =
            found.or_else(|| (0..script.requests.len()).find(|index| script.requests[*index].holds(call)));
        let Some(found) = found else {
            panic!(
                "nobody asked for command {} of {} bytes at {}, fua {}, no hole {}",
                call.command, call.len, call.offset, call.fua, call.no_hole
            );
        };
        let begun = &mut self.begun[found];
        *begun = Some(begun.unwrap_or(0) + call.len);
    }
}

impl Expected {
    /// Whether this call may be a piece of the request, wherever in it.
    fn holds(&self, call: &Call<'_>) -> bool {
        let end = self.offset.saturating_add(self.len);
        self.is_in_pieces()
            && self.command == call.command
            && (self.offset..end).contains(&call.offset)
            && call.offset.saturating_add(call.len) <= end
            && (!call.fua || self.fua)
            && (call.command != WRITE_ZEROES || call.no_hole == self.no_hole)
    }

    /// Whether this call is the request, or the next piece of it after `done` bytes.
    fn fits(&self, call: &Call<'_>, done: u64) -> bool {
        let left = self.len - done;
        let last = call.len == left;
        let flushes = matches!(call.command, TRIM | WRITE_ZEROES | WRITE);
        self.at_device
            && self.command == call.command
            && self.offset + done == call.offset
            && (last || self.is_in_pieces() && call.len < left)
            && (!flushes || call.fua == (self.fua && last))
            && (call.command != WRITE_ZEROES || call.no_hole == self.no_hole)
            && (call.command != WRITE || call.payload == self.payload)
    }
}

impl Device for Rc<Fake> {
    fn size_bytes(&self) -> u64 {
        SIZE_BYTES
    }

    fn pool(&self) -> &BufPool {
        &self.pool
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Vec<PlainPart>> {
        let _running = self
            .enter(Call::of(READ, offset, len.into()), len as usize)
            .await?;
        let (mut at, end) = (offset, offset + u64::from(len));
        let (mut parts, mut pieces) = (Vec::new(), Pieces::new());
        while at < end {
            let next = self.run_end(at, end);
            let run = (next - at) as usize;
            if self.kind(at / BLOCK) == BlockKind::Data {
                let mut buf = self.pool.get(BLOCK as usize);
                buf.copy_from_slice(&self.bytes(at / BLOCK));
                let within = (at % BLOCK) as usize;
                pieces.push((at, buf[within..within + run].to_vec()));
                parts.push(PlainPart::Data(PlainBuf(buf), within..within + run));
            } else {
                parts.push(PlainPart::Zeros(run));
            }
            at = next;
        }
        self.ledger.borrow_mut().reads.push((offset, len.into(), pieces));
        Ok(parts)
    }

    async fn write(&self, offset: u64, payload: PlainBuf, len: u32, fua: bool) -> Result<()> {
        assert!(
            payload.0.len().is_multiple_of(BLOCK as usize),
            "whole blocks of memory"
        );
        let payload_bytes = &payload.0[..len as usize];
        let call = Call {
            fua,
            payload: payload_bytes,
            ..Call::of(WRITE, offset, len.into())
        };
        let _running = self.enter(call, len as usize).await?;
        self.put(offset, payload_bytes);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let _running = self.enter(Call::of(FLUSH, 0, 0), 0).await?;
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        let call = Call {
            fua,
            ..Call::of(TRIM, offset, len)
        };
        let _running = self.enter(call, 0).await?;
        self.zero(offset, len, true);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool, no_hole: bool) -> Result<()> {
        let call = Call {
            fua,
            no_hole,
            ..Call::of(WRITE_ZEROES, offset, len)
        };
        let _running = self.enter(call, 0).await?;
        self.zero(offset, len, !no_hole);
        Ok(())
    }

    async fn block_status(&self, offset: u64, len: u64, max_runs: usize) -> Result<Vec<(u64, BlockKind)>> {
        let _running = self.enter(Call::of(BLOCK_STATUS, offset, len), 0).await?;
        let (mut at, end) = (offset, offset + len);
        let mut runs: Vec<(u64, BlockKind)> = Vec::new();
        while at < end {
            let (next, kind) = (self.run_end(at, end), self.kind(at / BLOCK));
            let full = runs.len() == max_runs;
            match runs.last_mut() {
                Some((run, same)) if *same == kind => *run += next - at,
                _ if full => break,
                _ => runs.push((next - at, kind)),
            }
            at = next;
        }
        self.ledger
            .borrow_mut()
            .statuses
            .push((offset, len, runs.clone()));
        Ok(runs)
    }
}
