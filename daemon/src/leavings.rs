//! What peers on Unix sockets leave behind: descriptors that must not be closed on a shard's thread.
//!
//! Whoever holds the last reference to a file pays for its end, and a front-end decides when that is and what it costs: the
//! memory of a whole guest is given back page by page, a file of a user's own file system asks that user, a socket may linger,
//! also one in a message that nobody has read. So descriptors whose kind is not known to be harmless, the front-end's own
//! socket among them, are closed on a thread that the attachment has for it, and that ends when it has nothing to do. When that
//! hangs, its own attachment waits: who has left [`UNCLOSED_MAX`] is not listened to before some are closed. Where no thread can
//! be had they stay open, and that is logged.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use libvol::runtime::net::Stream;
use libvol::runtime::yield_now;
use tokio::sync::Notify;

/// Descriptors of one attachment that are not closed yet.
const UNCLOSED_MAX: usize = 256;
/// A thread that has had nothing to close for so long ends.
const IDLE: Duration = Duration::from_secs(1);

/// See the module's text.
#[derive(Default)]
pub(crate) struct Leavings {
    closer: RefCell<Option<Sender<Left>>>,
    unclosed: Arc<Unclosed>,
}

#[derive(Default)]
struct Unclosed {
    count: AtomicUsize,
    fewer: Notify,
}

/// One of them. Dropping it closes it, which only the thread does.
struct Left {
    descriptor: Option<OwnedFd>,
    unclosed: Arc<Unclosed>,
}

impl Drop for Left {
    fn drop(&mut self) {
        drop(self.descriptor.take());
        self.unclosed.count.fetch_sub(1, Ordering::AcqRel);
        self.unclosed.fewer.notify_waiters();
    }
}

impl Leavings {
    /// One more.
    pub(crate) fn put(&self, descriptor: OwnedFd) {
        self.unclosed.count.fetch_add(1, Ordering::AcqRel);
        let mut left = Left {
            descriptor: Some(descriptor),
            unclosed: self.unclosed.clone(),
        };
        let mut closer = self.closer.borrow_mut();
        if let Some(sender) = &*closer {
            match sender.send(left) {
                Ok(()) => return,
                // The thread has ended meanwhile.
                Err(back) => left = back.0,
            }
        }
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new().name("closer".into());
        match thread.spawn(move || close_all(&receiver)) {
            Ok(_) => {
                // It waits for one at least a second.
                if let Err(back) = sender.send(left) {
                    keep_open(back.0);
                }
                *closer = Some(sender);
            }
            Err(e) => {
                tracing::error!("a descriptor stays open, there is no thread to close it: {e}");
                keep_open(left);
            }
        }
    }

    /// Some more.
    pub(crate) fn put_all(&self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        descriptors
            .into_iter()
            .for_each(|descriptor| self.put(descriptor));
    }

    /// Waits until there are not too many.
    pub(crate) async fn room(&self) {
        self.at_most(UNCLOSED_MAX).await;
    }

    /// Waits until all are closed.
    pub(crate) async fn all_closed(&self) {
        self.at_most(0).await;
    }

    async fn at_most(&self, count: usize) {
        loop {
            let fewer = self.unclosed.fewer.notified();
            let mut fewer = std::pin::pin!(fewer);
            // From here on it is told.
            fewer.as_mut().enable();
            if self.len() <= count {
                return;
            }
            fewer.await;
        }
    }

    /// Descriptors that are not closed yet.
    pub(crate) fn len(&self) -> usize {
        self.unclosed.count.load(Ordering::Acquire)
    }
}

/// The thread.
fn close_all(descriptors: &Receiver<Left>) {
    loop {
        match descriptors.recv_timeout(IDLE) {
            Ok(left) => drop(left),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Not counted any more, and never closed.
fn keep_open(mut left: Left) {
    std::mem::forget(left.descriptor.take());
}

/// Whether the kernel takes descriptors that a peer passes (SO_PASSRIGHTS, Linux 6.16); gives whether it can be told. A connection has
/// it from its listener when it is made, so those that wait for an accept are told for themselves.
pub(crate) fn pass_descriptors(socket: &impl AsRawFd, pass: bool) -> bool {
    /// asm-generic/socket.h
    const SO_PASSRIGHTS: libc::c_int = 83;
    let pass = libc::c_int::from(pass);
    // SAFETY: the value is an int of that size, and lives over the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const pass).cast(),
            size_of_val(&pass) as libc::socklen_t,
        )
    };
    set == 0
}

/// A front-end's socket, from its coming on. However it goes, the last reference is closed with what it leaves.
pub(crate) struct Incoming {
    stream: Option<Stream>,
    last: Option<OwnedFd>,
    leavings: Rc<Leavings>,
}

impl Incoming {
    pub(crate) fn new(stream: Stream, leavings: Rc<Leavings>) -> Self {
        let last = stream.socket().try_clone();
        if last.is_err() {
            // Out of descriptors. A reference that is never given up keeps it from being closed here.
            tracing::error!("a socket stays open, there is no descriptor to close it by");
            std::mem::forget(stream.clone());
            stream.shutdown();
        }
        Self {
            stream: Some(stream),
            last: last.ok(),
            leavings,
        }
    }

    /// The socket.
    pub(crate) fn stream(&self) -> &Stream {
        self.stream.as_ref().expect("there until it is dropped")
    }

    /// Waits until nobody else uses it: operations that were given up let go of it some turns later.
    pub(crate) async fn alone(&self) {
        while self.last.is_some() && self.stream().is_shared() {
            yield_now().await;
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        drop(self.stream.take());
        self.leavings.put_all(self.last.take());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use libvol::disk::{EngineChoice, make_driver};
    use libvol::runtime::Runtime;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::net::sockopt::set_socket_linger;

    use super::*;

    /// A socket whose close takes minutes, or until its peer goes: there is something in it that nobody receives.
    pub(crate) fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        set_socket_linger(&socket, Some(Duration::from_secs(300))).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        (socket.into(), peer)
    }

    #[test]
    fn a_close_that_takes_long_holds_up_nobody_but_its_own_attachment() {
        for engine in [EngineChoice::Threads, EngineChoice::Uring] {
            let (driver, _) = make_driver(engine).expect("both engines run where the tests run");
            Runtime::new(driver).block_on(async {
                let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                let (hung, other) = (Leavings::default(), Leavings::default());
                let (socket, peer) = lingering();
                hung.put(socket);
                assert_eq!(hung.len(), 1, "it was not closed here");
                hung.put(event());
                other.put(event());
                other.all_closed().await;
                assert_eq!(hung.len(), 2);
                drop(peer);
                hung.all_closed().await;
            });
        }
    }
}
