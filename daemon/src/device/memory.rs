//! A device in memory that can hold its requests back, fail them, and tell what it did.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use libvol::buf::BufPool;
use libvol::crypto::seal::PlainBuf;
use libvol::error::{Error, Kind, Result};
use libvol::runtime::sync::Notify;
use libvol::volume::{BlockKind, PlainPart};

use super::Device;

const BLOCK: usize = 4096;

pub(crate) struct Memory {
    bytes: RefCell<Vec<u8>>,
    /// Which blocks are data.
    data: RefCell<Vec<bool>>,
    size_bytes: Cell<usize>,
    pool: BufPool,
    /// Requests wait at the door while this is set.
    held: Cell<bool>,
    opened: Notify,
    failing: Cell<Option<Kind>>,
    /// What it was asked, in the order of starting.
    pub(crate) log: RefCell<Vec<String>>,
    pub(crate) running: Cell<usize>,
    pub(crate) running_max: Cell<usize>,
    pub(crate) ended: Cell<usize>,
}

impl Memory {
    pub(crate) fn new(size_bytes: usize) -> Rc<Self> {
        Rc::new(Self {
            bytes: RefCell::new(vec![0; size_bytes]),
            data: RefCell::new(vec![false; size_bytes.div_ceil(BLOCK)]),
            size_bytes: Cell::new(size_bytes),
            pool: BufPool::new(64 << 20),
            held: Cell::new(false),
            opened: Notify::default(),
            failing: Cell::new(None),
            log: RefCell::default(),
            running: Cell::new(0),
            running_max: Cell::new(0),
            ended: Cell::new(0),
        })
    }

    /// Requests that start from now on wait for [`Memory::release`].
    pub(crate) fn hold(&self) {
        self.held.set(true);
    }

    pub(crate) fn release(&self) {
        self.held.set(false);
        self.opened.notify_all();
    }

    /// Requests fail like this from now on.
    pub(crate) fn fail(&self, kind: Option<Kind>) {
        self.failing.set(kind);
    }

    pub(crate) fn grow(&self, size_bytes: usize) {
        self.bytes.borrow_mut().resize(size_bytes, 0);
        self.data.borrow_mut().resize(size_bytes.div_ceil(BLOCK), false);
        self.size_bytes.set(size_bytes);
    }

    pub(crate) fn contents(&self, at: usize, len: usize) -> Vec<u8> {
        self.bytes.borrow()[at..at + len].to_vec()
    }

    pub(crate) fn fill(&self, at: usize, bytes: &[u8]) {
        self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        self.mark(at, bytes.len(), true);
    }

    fn mark(&self, at: usize, len: usize, data: bool) {
        let blocks = if data {
            at / BLOCK..(at + len).div_ceil(BLOCK)
        } else {
            at.div_ceil(BLOCK)..(at + len) / BLOCK
        };
        for block in blocks {
            self.data.borrow_mut()[block] = data;
        }
    }

    /// Every request comes in here and ends when the guard drops.
    async fn enter(&self, what: String) -> Result<Running<'_>> {
        self.log.borrow_mut().push(what);
        self.running.set(self.running.get() + 1);
        self.running_max
            .set(self.running_max.get().max(self.running.get()));
        let running = Running(self);
        self.opened.until(|| (!self.held.get()).then_some(())).await;
        match self.failing.get() {
            Some(kind) => Err(Error::new(kind, "store \"secret-store-name\": made to fail")),
            None => Ok(running),
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        let (at, len) = (offset as usize, len as usize);
        self.bytes.borrow_mut()[at..at + len].fill(0);
        self.mark(at, len, false);
    }
}

struct Running<'a>(&'a Memory);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        self.0.ended.set(self.0.ended.get() + 1);
    }
}

impl Device for Rc<Memory> {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.get() as u64
    }
    fn pool(&self) -> &BufPool {
        &self.pool
    }
    /// One part a block, so that joining is the server's work.
    async fn read(&self, offset: u64, len: u32) -> Result<Vec<PlainPart>> {
        let _running = self.enter(format!("read {offset}+{len}")).await?;
        let (mut at, end) = (offset as usize, offset as usize + len as usize);
        let mut parts = Vec::new();
        while at < end {
            let next = end.min((at / BLOCK + 1) * BLOCK);
            if self.data.borrow()[at / BLOCK] {
                let mut buf = self.pool.get(BLOCK);
                let within = at % BLOCK;
                buf[within..within + next - at].copy_from_slice(&self.bytes.borrow()[at..next]);
                parts.push(PlainPart::Data(PlainBuf(buf), within..within + next - at));
            } else {
                parts.push(PlainPart::Zeros(next - at));
            }
            at = next;
        }
        Ok(parts)
    }
    async fn write(&self, offset: u64, payload: PlainBuf, len: u32, fua: bool) -> Result<()> {
        let _running = self.enter(format!("write {offset}+{len} fua={fua}")).await?;
        assert!(payload.0.len().is_multiple_of(BLOCK), "whole blocks of memory");
        self.fill(offset as usize, &payload.0[..len as usize]);
        Ok(())
    }
    async fn flush(&self) -> Result<()> {
        let _running = self.enter("flush".into()).await?;
        Ok(())
    }
    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        let _running = self.enter(format!("trim {offset}+{len} fua={fua}")).await?;
        self.zero(offset, len);
        Ok(())
    }
    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool, no_hole: bool) -> Result<()> {
        let what = format!("zero {offset}+{len} fua={fua} no_hole={no_hole}");
        let _running = self.enter(what).await?;
        self.zero(offset, len);
        Ok(())
    }
    async fn block_status(&self, offset: u64, len: u64, max_runs: usize) -> Result<Vec<(u64, BlockKind)>> {
        let _running = self.enter(format!("status {offset}+{len}")).await?;
        let (mut at, end) = (offset, offset + len);
        let mut runs: Vec<(u64, BlockKind)> = Vec::new();
        while at < end {
            let next = end.min((at / BLOCK as u64 + 1) * BLOCK as u64);
            let kind = if self.data.borrow()[(at / BLOCK as u64) as usize] {
                BlockKind::Data
            } else {
                BlockKind::Hole
            };
            let full = runs.len() == max_runs;
            match runs.last_mut() {
                Some((run, same)) if *same == kind => *run += next - at,
                _ if full => break,
                _ => runs.push((next - at, kind)),
            }
            at = next;
        }
        Ok(runs)
    }
}
