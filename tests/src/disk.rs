//! A vhost-user-blk device through the crate `blkio`: a driver that nobody of this project wrote, with its own messages, its
//! own virtqueues and its own idea of when to kick.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};

use crate::PATIENCE;

/// A connected device with a buffer that it shares.
pub struct Disk {
    // (Before the device, which frees the buffer.)
    queues: Vec<Blkioq>,
    device: Blkio,
    region: MemoryRegion,
    buffer: File,
    segment_max: usize,
    // What the driver was given pointers to; kept until the end.
    vectors: Vec<Box<[iovec]>>,
}

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The number that it was given.
    pub tag: usize,
    /// 0, or a negative errno.
    pub result: i32,
}

/// What is asked of a device; places are offsets in the buffer and in the device.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// Read into the buffer.
    Read {
        /// Offset in the buffer.
        to: usize,
        /// Offset in the device.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// Write from the buffer.
    Write {
        /// Offset in the buffer.
        from: usize,
        /// Offset in the device.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// Make all that was acknowledged durable.
    Flush,
    /// Give room back.
    Discard {
        /// Offset in the device.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Make zeros.
    WriteZeroes {
        /// Offset in the device.
        at: u64,
        /// Bytes.
        len: u64,
        /// Whether the room may be given back.
        may_unmap: bool,
    },
}

impl Disk {
    /// Connects with so many queues of so many descriptors, and shares a buffer of so many bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn connect(socket: &Path, queues: usize, queue_size: usize, buffer: usize) -> blkio::Result<Self> {
        Self::open(socket, queues, queue_size, buffer, false)
    }

    /// The same for a device that is, or is taken for, read-only.
    ///
    /// # Errors
    /// The driver's.
    pub fn connect_read_only(socket: &Path) -> blkio::Result<Self> {
        Self::open(socket, 1, 64, 1 << 20, true)
    }

    fn open(
        socket: &Path,
        queues: usize,
        queue_size: usize,
        buffer: usize,
        read_only: bool,
    ) -> blkio::Result<Self> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", &socket.display().to_string())?;
        device.set_bool("read-only", read_only)?;
        device.connect()?;
        device.set_i32("num-queues", queues as i32)?;
        device.set_i32("queue-size", queue_size as i32)?;
        let segment_max = match device.get_i32("max-segment-len")? {
            0 => usize::MAX,
            most => most as usize,
        };
        let started = device.start()?;
        let region = device.alloc_mem_region(buffer)?;
        device.map_mem_region(&region)?;
        // The buffer is a memfd of the driver's; through it no pointer is needed.
        let buffer = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", region.fd))
            .expect("the buffer's memfd");
        Ok(Self {
            queues: started.queues,
            device,
            region,
            buffer,
            segment_max,
            vectors: Vec::new(),
        })
    }

    /// Size in bytes, as the device says at this moment.
    ///
    /// # Errors
    /// The driver's.
    pub fn capacity(&self) -> blkio::Result<u64> {
        self.device.get_u64("capacity")
    }

    /// A number that the driver knows of the device.
    ///
    /// # Panics
    /// When it knows none.
    pub fn property(&self, name: &str) -> u64 {
        self.device
            .get_u64(name)
            .or_else(|_| self.device.get_i32(name).map(|number| number as u64))
            .expect(name)
    }

    /// Puts bytes into the buffer.
    ///
    /// # Panics
    /// When they go beyond it.
    pub fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.region.len);
        self.buffer.write_all_at(bytes, at as u64).expect("the buffer");
    }

    /// Bytes of the buffer.
    ///
    /// # Panics
    /// When they go beyond it.
    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.buffer
            .read_exact_at(&mut bytes, at as u64)
            .expect("the buffer");
        bytes
    }

    /// Queues a request under a number.
    ///
    /// # Panics
    /// When it goes beyond the buffer.
    pub fn push(&mut self, queue: usize, ask: Ask, tag: usize) {
        let none = ReqFlags::empty();
        match ask {
            Ask::Read { to, at, len } => {
                let (parts, count) = self.parts(to, len);
                self.queues[queue].readv(at, parts, count, tag, none);
            }
            Ask::Write { from, at, len } => {
                let (parts, count) = self.parts(from, len);
                self.queues[queue].writev(at, parts, count, tag, none);
            }
            Ask::Flush => self.queues[queue].flush(tag, none),
            Ask::Discard { at, len } => self.queues[queue].discard(at, len, tag, none),
            Ask::WriteZeroes { at, len, may_unmap } => {
                let flags = if may_unmap { none } else { ReqFlags::NO_UNMAP };
                self.queues[queue].write_zeroes(at, len, tag, flags);
            }
        }
    }

    /// A piece of the buffer in parts as long as the device takes them, which stay where they are.
    fn parts(&mut self, at: usize, len: usize) -> (*const iovec, u32) {
        assert!(at + len <= self.region.len, "within the buffer");
        let most = self.segment_max;
        let parts: Vec<iovec> = (at..at + len)
            .step_by(most)
            .map(|start| iovec {
                iov_base: (self.region.addr + start) as *mut _,
                iov_len: most.min(at + len - start),
            })
            .collect();
        self.vectors.push(parts.into_boxed_slice());
        let kept = self.vectors.last().expect("just pushed");
        (kept.as_ptr(), kept.len() as u32)
    }

    /// Sends what is queued and waits for at least `min` answers.
    ///
    /// # Errors
    /// The driver's; none come.
    pub fn wait(&mut self, queue: usize, min: usize) -> blkio::Result<Vec<Completed>> {
        let mut room: Vec<MaybeUninit<Completion>> = (0..256).map(|_| MaybeUninit::uninit()).collect();
        let mut patience = PATIENCE;
        let count = self.queues[queue].do_io(&mut room, min, Some(&mut patience), None)?;
        Ok(room
            .into_iter()
            .take(count)
            .map(|completion| {
                // SAFETY: do_io has initialised as many as it returned, and they are taken from the front.
                let completion = unsafe { completion.assume_init() };
                Completed {
                    tag: completion.user_data,
                    result: completion.ret,
                }
            })
            .collect())
    }

    /// One request, alone; gives its result.
    ///
    /// # Panics
    /// When no answer comes.
    pub fn call(&mut self, ask: Ask) -> i32 {
        self.push(0, ask, 0);
        let done = self.wait(0, 1).expect("the device answers");
        assert_eq!((done.len(), done[0].tag), (1, 0), "{done:?}");
        done[0].result
    }

    /// Writes.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.fill(0, bytes);
        let len = bytes.len();
        assert_eq!(self.call(Ask::Write { from: 0, at, len }), 0, "write at {at}");
    }

    /// Reads.
    ///
    /// # Panics
    /// When that fails.
    pub fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.call(Ask::Read { to: 0, at, len }), 0, "read at {at}");
        self.bytes(0, len)
    }
}
