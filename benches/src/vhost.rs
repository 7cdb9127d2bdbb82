//! The loads over vhost-user-blk: libblkio's driver on one queue, in this process, one thread that sleeps until the device
//! has something. It stands where the guest's driver would; fio has no engine for it.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration as Time, Instant};

use anyhow::{Context, Result, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use crate::figures::Sample;
use crate::load::{Duration, Load};
use crate::server::CpuClock;

/// A request that takes longer has been lost.
const PATIENCE: Time = Time::from_secs(60);

/// Runs a load over the socket of a vhost-user-blk device; `clock` is that of the server's process.
///
/// # Errors
/// When the device refuses, loses or fails a request.
pub fn run(
    load: Load,
    socket: &Path,
    size_bytes: u64,
    duration: Duration,
    clock: Option<&CpuClock>,
) -> Result<Sample> {
    let mut device = Device::open(socket, load)?;
    let mut requests = Requests::of(load, size_bytes);
    let deadline = match duration {
        Duration::Seconds(seconds) => Some(Time::from_secs(seconds.into())),
        Duration::Once => None,
    };
    let limit = match duration {
        Duration::Seconds(_) => u64::MAX,
        Duration::Once => size_bytes / load.block_bytes,
    };
    let mut latencies_ns: Vec<u64> = Vec::new();
    let mut begun_at = vec![Instant::now(); load.depth as usize];
    let before = clock.map(CpuClock::seconds).transpose()?;
    let start = Instant::now();
    let (mut begun, mut ended) = (0_u64, 0_u64);
    for (slot, at) in begun_at.iter_mut().enumerate() {
        if begun < limit {
            device.submit(slot, requests.next());
            *at = Instant::now();
            begun += 1;
        }
    }
    while ended < begun {
        for slot in device.wait()? {
            let now = Instant::now();
            ended += 1;
            latencies_ns.push((now - begun_at[slot]).as_nanos() as u64);
            if begun < limit && deadline.is_none_or(|deadline| now - start < deadline) {
                device.submit(slot, requests.next());
                begun_at[slot] = now;
                begun += 1;
            }
        }
    }
    if matches!(duration, Duration::Once) {
        device.flush()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let after = clock.map(CpuClock::seconds).transpose()?;
    latencies_ns.sort_unstable();
    let percentile = |part: f64| {
        let at = ((latencies_ns.len() as f64 * part) as usize).min(latencies_ns.len() - 1);
        latencies_ns[at] as f64 / 1000.0
    };
    let count = latencies_ns.len() as f64;
    Ok(Sample {
        iops: count / seconds,
        mb_per_s: count * load.block_bytes as f64 / seconds / 1e6,
        p50_us: percentile(0.5),
        p99_us: percentile(0.99),
        cpu_us: before
            .zip(after)
            .map(|(before, after)| (after - before) * 1e6 / count),
    })
}

/// Offsets one after the other, or anywhere.
struct Requests {
    blocks: u64,
    block_bytes: u64,
    next: u64,
    random: Option<u64>,
}

impl Requests {
    fn of(load: Load, size_bytes: u64) -> Self {
        Self {
            blocks: size_bytes / load.block_bytes,
            block_bytes: load.block_bytes,
            next: 0,
            random: load.rw.starts_with("rand").then_some(0x9e37_79b9_7f4a_7c15),
        }
    }

    fn next(&mut self) -> u64 {
        let block = match &mut self.random {
            Some(state) => {
                // xorshift64 (Marsaglia, 2003).
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                *state % self.blocks
            }
            None => {
                let block = self.next;
                self.next = (block + 1) % self.blocks;
                block
            }
        };
        block * self.block_bytes
    }
}

/// A started device with a buffer for each request in flight. The queue goes before the device, the memory with it.
struct Device {
    queue: Blkioq,
    memory: MemoryRegion,
    block_bytes: usize,
    is_read: bool,
    written: u64,
    completions: Vec<MaybeUninit<Completion>>,
    _blkio: Blkio,
}

impl Device {
    fn open(socket: &Path, load: Load) -> Result<Self> {
        let socket = socket.to_str().context("the socket's path is not UTF-8")?;
        let failed = |what: &'static str| move |e: blkio::Error| anyhow::anyhow!("{what}: {}", e.message());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(failed("libblkio"))?;
        blkio.set_str("path", socket).map_err(failed("path"))?;
        blkio.connect().map_err(failed("connecting"))?;
        let mut started = blkio.start().map_err(failed("starting the device"))?;
        let block_bytes = load.block_bytes as usize;
        let memory = blkio
            .alloc_mem_region(block_bytes * load.depth as usize)
            .map_err(failed("memory"))?;
        blkio.map_mem_region(&memory).map_err(failed("mapping memory"))?;
        let mut device = Self {
            queue: started.queues.pop().context("the device has no queue")?,
            memory,
            block_bytes,
            is_read: load.rw.ends_with("read"),
            written: 0,
            completions: (0..load.depth).map(|_| MaybeUninit::uninit()).collect(),
            _blkio: blkio,
        };
        for slot in 0..load.depth as usize {
            let mut state = slot as u64 + 1;
            for word in device.buffer(slot).as_chunks_mut::<8>().0 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *word = state.to_le_bytes();
            }
        }
        Ok(device)
    }

    fn at(&self, slot: usize) -> *mut u8 {
        (self.memory.addr + slot * self.block_bytes) as *mut u8
    }

    /// The memory of a request that is not in flight.
    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        // SAFETY: the region is mapped for as long as `self`, holds a buffer for each slot, and no request uses this one.
        unsafe { std::slice::from_raw_parts_mut(self.at(slot), self.block_bytes) }
    }

    fn submit(&mut self, slot: usize, offset: u64) {
        let (at, len) = (self.at(slot), self.block_bytes);
        if self.is_read {
            self.queue.read(offset, at, len, slot, ReqFlags::empty());
        } else {
            self.written += 1;
            // No two writes carry the same bytes.
            let stamp = self.written;
            self.buffer(slot)[..8].copy_from_slice(&stamp.to_le_bytes());
            self.queue.write(offset, at, len, slot, ReqFlags::empty());
        }
    }

    /// The slots of at least one request that has ended.
    fn wait(&mut self) -> Result<Vec<usize>> {
        let mut patience = PATIENCE;
        let count = self
            .queue
            .do_io(&mut self.completions, 1, Some(&mut patience), None)
            .map_err(|e| anyhow::anyhow!("waiting for the device: {}", e.message()))?;
        let mut slots = Vec::with_capacity(count);
        for completion in &self.completions[..count] {
            // SAFETY: `do_io` has filled the first `count`.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(completion.ret == 0, "a request failed: error {}", -completion.ret);
            slots.push(completion.user_data);
        }
        Ok(slots)
    }

    fn flush(&mut self) -> Result<()> {
        self.queue.flush(0, ReqFlags::empty());
        self.wait().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::LOADS;

    #[test]
    fn offsets_are_whole_blocks_inside_and_streams_touch_each_once() {
        for load in LOADS {
            let size = 64 << 20;
            let mut requests = Requests::of(load, size);
            let blocks = size / load.block_bytes;
            let offsets: Vec<u64> = (0..blocks).map(|_| requests.next()).collect();
            assert!(
                offsets
                    .iter()
                    .all(|at| at % load.block_bytes == 0 && at + load.block_bytes <= size)
            );
            let mut distinct = offsets.clone();
            distinct.sort_unstable();
            distinct.dedup();
            if load.rw.starts_with("rand") {
                assert!(distinct.len() as u64 > blocks / 2, "spread: {}", distinct.len());
            } else {
                assert_eq!(distinct.len() as u64, blocks);
                assert!(offsets.is_sorted());
            }
        }
    }
}
