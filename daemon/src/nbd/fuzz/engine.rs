//! An engine for one thread and no disk: sockets are tried without waiting, and when nothing can happen the clock moves on
//! to the next timer. So a run is as fast as its system calls, its time is its own, and a conversation in which
//! everybody waits for somebody else ends the run with a message, and at once.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libvol::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use slab::Slab;

/// Slices of one message, as in the engines of production.
const SLICES_MAX: usize = 512;

/// See the module's text.
#[derive(Default)]
pub(super) struct Engine {
    slots: RefCell<Slab<Slot>>,
    clock: Cell<Duration>,
}

struct Slot {
    op: Op,
    waker: Option<Waker>,
    result: Option<io::Result<usize>>,
}

impl Engine {
    /// Operations that somebody waits for.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.borrow().len()
    }

    /// Tries everything once; whether something has ended.
    fn try_all(&self) -> bool {
        let mut woken = Vec::new();
        let mut ended = false;
        for (_, slot) in self.slots.borrow_mut().iter_mut() {
            if slot.result.is_none()
                && let Some(result) = attempt(&mut slot.op)
            {
                slot.result = Some(result);
                ended = true;
                woken.extend(slot.waker.take());
            }
        }
        woken.into_iter().for_each(Waker::wake);
        ended
    }
}

fn attempt(op: &mut Op) -> Option<io::Result<usize>> {
    let result = match op {
        Op::Recv { socket, buf, range } => {
            recv(&**socket, &mut buf[range.clone()], RecvFlags::DONTWAIT).map(|(taken, _)| taken)
        }
        Op::Send { socket, parts, skip } => {
            let mut slices = Vec::new();
            parts.iter().for_each(|part| part.slices(&mut slices));
            let mut skip = *skip;
            let mut left = Vec::new();
            for slice in slices {
                let skipped = skip.min(slice.len());
                skip -= skipped;
                if skipped < slice.len() && left.len() < SLICES_MAX {
                    left.push(IoSlice::new(&slice[skipped..]));
                }
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            sendmsg(&**socket, &left, &mut SendAncillaryBuffer::default(), flags)
        }
        Op::HangUp { socket } => match gone(socket) {
            true => Ok(0),
            false => Err(Errno::AGAIN),
        },
        other => panic!("not an operation of a connection: {other:?}"),
    };
    match result {
        Err(Errno::AGAIN | Errno::INTR) => None,
        result => Some(result.map_err(io::Error::from)),
    }
}

fn gone(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    retry_on_intr(|| poll(&mut fds, Some(&now))).expect("a poll of one socket") > 0
}

impl Driver for Engine {
    fn name(&self) -> &'static str {
        "fuzz"
    }

    fn submit(&self, op: Op) -> OpKey {
        OpKey(self.slots.borrow_mut().insert(Slot {
            op,
            waker: None,
            result: None,
        }))
    }

    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done> {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key.0];
        let Some(result) = slot.result.take() else {
            slot.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let Slot { op, .. } = slots.remove(key.0);
        Poll::Ready(Done { result, op })
    }

    fn forget(&self, key: OpKey) {
        let slot = self.slots.borrow_mut().remove(key.0);
        drop(slot);
    }

    fn turn(&self, wait: Wait) {
        if self.try_all() {
            return;
        }
        match wait {
            Wait::No => {}
            Wait::AtMost(left) => self.clock.set(self.clock.get() + left),
            Wait::Forever => panic!("everybody waits and nothing can happen: a hang"),
        }
    }

    fn attach(&self, _: Arc<OwnedFd>) -> io::Result<FileSlot> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&self, _: FileSlot) {}

    fn now(&self) -> Duration {
        self.clock.get()
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        struct Awake;
        impl Unpark for Awake {
            fn unpark(&self) {}
        }
        Arc::new(Awake)
    }
}
