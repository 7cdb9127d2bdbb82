//! Kicks and calls: the eventfds by which guest and device tell each other to look at a queue, or that it is broken.
//!
//! Both belong to the front-end, which may change their flags, fill their counters and read them at any time. Nothing here
//! waits for that: a kick is awaited by the runtime and then cleared by a read that is told not to wait (RWF_NOWAIT), whatever
//! the descriptor's own flags say. For a write there is no such flag, and a full counter would make it wait. So a call is
//! left to the kernel: asynchronous I/O (io_submit(2)) can be asked to signal an eventfd when a transfer has ended, and that
//! only ever adds to the counter, or leaves a full one full. The transfer is one of no bytes from an empty file in memory,
//! so it has ended when the system call returns. What is not an eventfd is refused by it.
//!
//! Measured on a host of two cores: 0.6 µs a call, where write(2) takes 0.27 µs. It is the same with both I/O engines.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::{Rc, Weak};

use libvol::runtime::{Driver, Op, runtime, spawn, submit, yield_now};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{ReadWriteFlags, preadv2};

use super::meter::Meter;
use crate::leavings::Leavings;

/// The descriptor by which a guest says that there is something in its queue.
pub(super) struct Kick {
    driver: Rc<dyn Driver>,
    /// There until it is dropped.
    descriptor: Option<Rc<OwnedFd>>,
    leavings: Rc<Leavings>,
}

impl Kick {
    /// Takes a descriptor over. It is kicked by that: what is there already is looked at.
    ///
    /// # Errors
    /// What is no eventfd comes back.
    pub(super) fn new(
        descriptor: OwnedFd,
        signals: &Signals,
        leavings: &Rc<Leavings>,
    ) -> Result<Self, OwnedFd> {
        match signals.signal(&descriptor) {
            Err(_) => Err(descriptor),
            Ok(()) => Ok(Self {
                driver: runtime(),
                descriptor: Some(Rc::new(descriptor)),
                leavings: leavings.clone(),
            }),
        }
    }

    /// Waits for a kick, and takes it with all before it.
    pub(super) async fn wait(&self, meter: &Meter) {
        let Some(fd) = self.descriptor.clone() else { return };
        let descriptor = fd.clone();
        // A wait that fails is followed by a look at the queue, as any other.
        let _ = submit(&self.driver, Op::Readable { fd }).await;
        let mut count = [0; 8];
        // There is nothing when somebody else has read it; an eventfd has no place to read at, which -1 stands for.
        let _ = meter.spend(|| {
            preadv2(
                &*descriptor,
                &mut [IoSliceMut::new(&mut count)],
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            )
        });
    }
}

/// Whoever watches it keeps its last reference busy.
impl Drop for Kick {
    fn drop(&mut self) {
        let Some(descriptor) = self.descriptor.take() else {
            return;
        };
        let leavings = self.leavings.clone();
        // A wait that was given up lets go of it some turns later.
        spawn(async move {
            while Rc::strong_count(&descriptor) > 1 {
                yield_now().await;
            }
            leavings.put_all(Rc::into_inner(descriptor));
        })
        .detach();
    }
}

/// The descriptor by which a guest is told that a queue has news.
pub(super) struct Call {
    /// There until it is dropped.
    descriptor: Option<OwnedFd>,
    signals: Rc<Signals>,
    leavings: Rc<Leavings>,
}

impl Call {
    /// Takes a descriptor over, and calls: a call of before may have gone to another one.
    ///
    /// # Errors
    /// What is no eventfd comes back.
    pub(super) fn new(
        descriptor: OwnedFd,
        signals: &Rc<Signals>,
        leavings: &Rc<Leavings>,
    ) -> Result<Self, OwnedFd> {
        match signals.signal(&descriptor) {
            Err(_) => Err(descriptor),
            Ok(()) => Ok(Self {
                descriptor: Some(descriptor),
                signals: signals.clone(),
                leavings: leavings.clone(),
            }),
        }
    }

    /// Takes a descriptor over without calling: one for faults, of which there are none yet.
    ///
    /// # Errors
    /// What is no eventfd comes back. Kept, the peer's own end of a socket would never be seen to hang up.
    pub(super) fn silent(
        descriptor: OwnedFd,
        signals: &Rc<Signals>,
        leavings: &Rc<Leavings>,
    ) -> Result<Self, OwnedFd> {
        match is_eventfd(&descriptor) {
            false => Err(descriptor),
            true => Ok(Self {
                descriptor: Some(descriptor),
                signals: signals.clone(),
                leavings: leavings.clone(),
            }),
        }
    }

    /// Calls.
    pub(super) fn call(&self) {
        if let Err(e) = self.try_call() {
            // The kernel was out of memory for it. The guest's own timeout is what is left.
            tracing::error!("vhost-user: a guest cannot be called: {e}");
        }
    }

    /// Calls, if that can be done.
    ///
    /// # Errors
    /// It is no eventfd, or the kernel is out of memory.
    pub(super) fn try_call(&self) -> io::Result<()> {
        match &self.descriptor {
            Some(descriptor) => self.signals.signal(descriptor),
            None => Ok(()),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.leavings.put_all(self.descriptor.take());
    }
}

/// Whether it is one, by the name that the kernel gives it (proc_pid_fd(5)): those of files in file systems begin with a slash, and no file
/// system is asked. One that cannot be told is none.
fn is_eventfd(descriptor: &OwnedFd) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    name.is_ok_and(|name| name.as_os_str() == "anon_inode:[eventfd]")
}

/// A thread's way to signal eventfds. One serves all its queues.
pub(super) struct Signals {
    context: libc::c_ulong,
    /// The file of no bytes that transfers are from.
    empty: OwnedFd,
    /// Signals whose completions have not been collected.
    uncollected: Cell<usize>,
}

/// Completions that the kernel keeps place for.
const COMPLETIONS: usize = 128;
/// So many are collected together.
const TOGETHER: usize = 64;

/// As the kernel's `struct iocb` (linux/aio_abi.h) is on machines of the byte order below; 64 bytes.
#[repr(C)]
#[derive(Default)]
struct Transfer {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    rw_flags: u32,
    #[cfg(target_endian = "big")]
    key: u32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    signalled: u32,
}

/// As the kernel's `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion {
    data: u64,
    object: u64,
    result: i64,
    result_more: i64,
}

const _: () = assert!(size_of::<Transfer>() == 64 && size_of::<Completion>() == 32);

const OPCODE_READ: u16 = 0;
const FLAG_SIGNAL: u32 = 1;

impl Signals {
    /// That of this thread, made when it is first asked for.
    ///
    /// # Errors
    /// When the kernel has no asynchronous I/O, or all that it may have (fs.aio-max-nr) is taken.
    pub(super) fn of_thread() -> io::Result<Rc<Self>> {
        thread_local! {
            static SIGNALS: RefCell<Weak<Signals>> = const { RefCell::new(Weak::new()) };
        }
        SIGNALS.with_borrow_mut(|known| {
            if let Some(signals) = known.upgrade() {
                return Ok(signals);
            }
            let signals = Rc::new(Self::new()?);
            *known = Rc::downgrade(&signals);
            Ok(signals)
        })
    }

    fn new() -> io::Result<Self> {
        let empty = memfd_create("vhost-signals", MemfdFlags::CLOEXEC)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes a context's number to where it is told, which is a number of that type.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, COMPLETIONS, &raw mut context) };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            context,
            empty,
            uncollected: Cell::new(0),
        })
    }

    /// Adds one to an eventfd's counter, unless it is full.
    fn signal(&self, descriptor: &OwnedFd) -> io::Result<()> {
        if self.uncollected.get() >= TOGETHER {
            self.collect();
        }
        let mut transfer = Transfer {
            opcode: OPCODE_READ,
            descriptor: self.empty.as_raw_fd() as u32,
            flags: FLAG_SIGNAL,
            signalled: descriptor.as_raw_fd() as u32,
            ..Transfer::default()
        };
        let transfers = [&raw mut transfer];
        // SAFETY: io_submit(2) reads one address and the structure there, and writes its `key`. The transfer has no bytes,
        // so it uses no buffer, and it has ended on return. Both descriptors are open: they are borrowed.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, transfers.as_ptr()) };
        if submitted != 1 {
            return Err(io::Error::last_os_error());
        }
        self.uncollected.set(self.uncollected.get() + 1);
        Ok(())
    }

    fn collect(&self) {
        let mut completions = [Completion::default(); COMPLETIONS];
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: io_getevents(2) writes at most as many structures as it is told, which is what there is place for.
        let collected = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                COMPLETIONS,
                completions.as_mut_ptr(),
                &raw const at_once,
            )
        };
        // It fails for nothing that could happen here; those left are collected next time.
        let collected = usize::try_from(collected).unwrap_or(0);
        self.uncollected
            .set(self.uncollected.get().saturating_sub(collected));
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and no transfer is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use libvol::disk::{EngineChoice, make_driver};
    use libvol::runtime::{Runtime, timeout};
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use std::time::Duration;

    fn on_both<F: Future<Output = ()> + 'static>(test: impl Fn(Rc<Signals>) -> F) {
        for engine in [EngineChoice::Threads, EngineChoice::Uring] {
            let runtime = Runtime::new(
                make_driver(engine)
                    .expect("both engines run where the tests run")
                    .0,
            );
            runtime.block_on(test(Signals::of_thread().unwrap()));
        }
    }

    fn event(flags: EventfdFlags) -> (OwnedFd, OwnedFd) {
        let event = eventfd(0, EventfdFlags::CLOEXEC | flags).unwrap();
        (event.try_clone().unwrap(), event)
    }

    fn count(event: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::read(event, &mut bytes), Ok(8));
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn every_call_counts_however_many_there_are() {
        on_both(|signals| async move {
            let (ours, theirs) = event(EventfdFlags::NONBLOCK);
            let call = Call::new(ours, &signals, &Rc::default()).ok().unwrap();
            assert_eq!(count(&theirs), 1);
            for _ in 0..1000 {
                call.call();
            }
            assert_eq!(count(&theirs), 1000);
        });
    }

    #[test]
    fn a_counter_that_is_full_blocks_nobody() {
        on_both(|signals| async move {
            // Blocking: a write to it would wait for ever.
            let (ours, theirs) = event(EventfdFlags::empty());
            let call = Call::new(ours, &signals, &Rc::default()).ok().unwrap();
            assert_eq!(count(&theirs), 1);
            rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            for _ in 0..1000 {
                call.call();
            }
            assert_eq!(count(&theirs), u64::MAX);
        });
    }

    #[test]
    fn what_is_no_eventfd_is_given_back() {
        on_both(|signals| async move {
            let other = memfd_create("no-eventfd", MemfdFlags::CLOEXEC).unwrap();
            let other = Kick::new(other, &signals, &Rc::default())
                .err()
                .expect("no eventfd");
            assert!(Call::new(other, &signals, &Rc::default()).is_err());
        });
    }

    #[test]
    fn a_kick_is_taken_once_and_one_that_somebody_else_took_blocks_nobody() {
        on_both(|signals| async move {
            let (ours, theirs) = event(EventfdFlags::empty());
            let kick = Rc::new(Kick::new(ours, &signals, &Rc::default()).ok().unwrap());
            // The one that it begins with.
            kick.wait(&Meter::new()).await;
            let waiting = spawn({
                let kick = kick.clone();
                async move { kick.wait(&Meter::new()).await }
            });
            for _ in 0..100 {
                yield_now().await;
            }
            assert!(!waiting.is_finished());
            rustix::io::write(&theirs, &5u64.to_ne_bytes()).unwrap();
            waiting.await;
            assert!(
                timeout(Duration::from_millis(20), kick.wait(&Meter::new()))
                    .await
                    .is_none()
            );
            // Readable when it is looked at, and read by somebody else before it is cleared.
            let mut count = [0; 8];
            rustix::io::write(&theirs, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(rustix::io::read(&theirs, &mut count), Ok(8));
            let cleared = preadv2(
                kick.descriptor.as_deref().unwrap(),
                &mut [IoSliceMut::new(&mut count)],
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            );
            assert_eq!(cleared, Err(rustix::io::Errno::AGAIN));
        });
    }
}
