//! What a front-end leaves behind: descriptors that must not be closed on a shard's thread.
//!
//! Whoever holds the last reference to a file pays for its end, and a front-end decides when that is and what it costs: the
//! memory of a whole guest is given back page by page, a file of a user's own file system asks that user, a socket may linger.
//! So descriptors whose kind is not known to be harmless are closed on a thread of their own. Who waits for that is the next
//! front-end of the same attachment, and nobody else, so that there are few such threads at a time.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use tokio::sync::oneshot;

/// So many are closed together while the front-end is there. Memory that is plugged and unplugged leaves a few now and then.
const TOGETHER: usize = 32;

/// See the module's text. Dropped without [`Leavings::close`], it closes all the same, and nobody waits.
#[derive(Default)]
pub(super) struct Leavings {
    descriptors: RefCell<Vec<OwnedFd>>,
    closing: RefCell<Vec<oneshot::Receiver<()>>>,
}

impl Leavings {
    /// One more.
    pub(super) fn put(&self, descriptor: OwnedFd) {
        let mut descriptors = self.descriptors.borrow_mut();
        descriptors.push(descriptor);
        if descriptors.len() >= TOGETHER {
            let all = std::mem::take(&mut *descriptors);
            drop(descriptors);
            self.begin(all);
        }
    }

    /// Some more.
    pub(super) fn put_all(&self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        descriptors
            .into_iter()
            .for_each(|descriptor| self.put(descriptor));
    }

    /// Closes all, and returns when they are.
    pub(super) async fn close(&self) {
        self.begin(self.descriptors.take());
        for closed in self.closing.take() {
            // It is dropped with the thread, whatever becomes of that.
            let _ = closed.await;
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.descriptors.borrow().len()
    }

    fn begin(&self, descriptors: Vec<OwnedFd>) {
        if descriptors.is_empty() {
            return;
        }
        let (done, closed) = oneshot::channel();
        let thread = std::thread::Builder::new().name("vhost-close".into());
        let begun = thread.spawn(move || {
            drop(descriptors);
            let _ = done.send(());
        });
        match begun {
            Ok(_) => {
                let mut closing = self.closing.borrow_mut();
                closing.retain_mut(|closed| {
                    matches!(closed.try_recv(), Err(oneshot::error::TryRecvError::Empty))
                });
                closing.push(closed);
            }
            // They went with the closure: a process without a thread to spare has worse worries.
            Err(e) => tracing::error!("vhost-user: no thread to close descriptors: {e}"),
        }
    }
}

impl Drop for Leavings {
    fn drop(&mut self) {
        self.begin(self.descriptors.take());
    }
}
