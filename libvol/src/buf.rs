//! I/O memory: 4 KiB-aligned owned buffers, and a pool of them.
//!
//! A [`Buf`] goes into an operation and comes back with its result, so nobody else can touch memory that the kernel
//! works on. A pool belongs to one volume: its memory may hold that volume's plaintext, so it is zeroed before it
//! goes back to the allocator and never serves another volume. It deliberately knows nothing of what the bytes mean;
//! [`crate::crypto::seal`] has the types that tell plaintext from ciphertext.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use zeroize::Zeroize;

use crate::limits::BLOCK_SIZE;

/// An owned, 4 KiB-aligned run of bytes. Its length never changes; contents start zeroed, or, from a pool, arbitrary.
pub struct Buf {
    memory: Option<Memory>,
    len: usize,
    pool: Weak<PoolInner>,
}

/// Whole blocks from the allocator, zeroed on the way out.
struct Memory {
    ptr: NonNull<u8>,
    capacity: usize,
}

impl Memory {
    fn zeroed(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout has non-zero size (capacity is at least one block).
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        Self { ptr, capacity }
    }

    fn layout(capacity: usize) -> Layout {
        assert!(capacity >= BLOCK_SIZE && capacity.is_multiple_of(BLOCK_SIZE));
        Layout::from_size_align(capacity, BLOCK_SIZE).expect("a block multiple below isize::MAX")
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: ptr is valid for capacity initialised bytes for as long as self lives, and self is borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.capacity) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.capacity) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: ptr came from alloc_zeroed with this very layout and is freed once.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl Buf {
    /// `len` zero bytes of memory of its own (rounded up to whole blocks).
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.next_multiple_of(BLOCK_SIZE).max(BLOCK_SIZE);
        Self {
            memory: Some(Memory::zeroed(capacity)),
            len,
            pool: Weak::new(),
        }
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Makes the buffer shorter; the memory stays.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("present until drop")
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory().bytes()[..self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.as_mut().expect("present until drop").bytes_mut()[..self.len]
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let (Some(memory), Some(pool)) = (self.memory.take(), self.pool.upgrade()) {
            pool.put(memory);
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// Size classes are powers of two from one block to 64 MiB: 2^12 ..= 2^26.
const CLASSES: usize = 15;

struct PoolInner {
    free: RefCell<[Vec<Memory>; CLASSES]>,
    free_bytes: Cell<usize>,
    keep_bytes: usize,
}

impl PoolInner {
    fn put(&self, memory: Memory) {
        let kept = self.free_bytes.get() + memory.capacity;
        if kept <= self.keep_bytes {
            self.free_bytes.set(kept);
            let class = class_of(memory.capacity);
            self.free.borrow_mut()[class].push(memory);
        }
    }
}

fn class_of(len: usize) -> usize {
    let capacity = len.max(BLOCK_SIZE).next_power_of_two();
    (capacity.trailing_zeros() - BLOCK_SIZE.trailing_zeros()) as usize
}

/// Buffers of one volume, reused without clearing while the volume lives.
#[derive(Clone)]
pub struct BufPool(Rc<PoolInner>);

impl BufPool {
    /// A pool that keeps at most `keep_bytes` of idle memory.
    pub fn new(keep_bytes: usize) -> Self {
        Self(Rc::new(PoolInner {
            free: RefCell::default(),
            free_bytes: Cell::new(0),
            keep_bytes,
        }))
    }

    /// A buffer of `len` bytes with arbitrary contents (this volume's own earlier bytes).
    ///
    /// # Panics
    /// If `len` exceeds 64 MiB: requests are limited far below.
    pub fn get(&self, len: usize) -> Buf {
        let class = class_of(len);
        assert!(class < CLASSES, "{len} bytes exceed the largest buffer class");
        let reused = self.0.free.borrow_mut()[class].pop();
        let memory = match reused {
            Some(memory) => {
                self.0.free_bytes.set(self.0.free_bytes.get() - memory.capacity);
                memory
            }
            None => Memory::zeroed(BLOCK_SIZE << class),
        };
        Buf {
            memory: Some(memory),
            len,
            pool: Rc::downgrade(&self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zero_and_keeps_its_length() {
        for len in [1, 512, 4096, 4097, 1 << 20] {
            let buf = Buf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % BLOCK_SIZE, 0);
            assert!(buf.iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn a_pool_reuses_memory_up_to_its_limit() {
        let pool = BufPool::new(8192);
        let (a, b, c) = (pool.get(4096), pool.get(100), pool.get(4096));
        let first = a.as_ptr();
        drop((a, b, c));
        assert_eq!(pool.0.free_bytes.get(), 8192);
        let again = [pool.get(1), pool.get(2)];
        assert!(again.iter().any(|buf| buf.as_ptr() == first));
        assert_eq!(pool.0.free_bytes.get(), 0);
    }

    #[test]
    fn a_buffer_outlives_its_pool() {
        let pool = BufPool::new(1 << 20);
        let mut buf = pool.get(4096);
        drop(pool);
        buf.fill(7);
        assert_eq!(buf[4095], 7);
    }
}
