//! The data plane: shards. A shard is one OS thread with one I/O engine and one single-threaded runtime; a volume, with
//! all its connections, lives on exactly one, so the data path takes no locks.
//!
//! The control plane reaches a shard with [`Shard::call`]: a closure goes there, gets the shard's [`Registry`], and its
//! result comes back. A shard that panics takes the process with it: half a data plane must not go on serving.
//!
//! It deliberately knows no catalog and no keys service; it gets an unwrapped key with each volume it opens.

mod door;
mod gate;
mod registry;
mod switchboard;
pub(crate) mod tls;

pub(crate) use door::{AskTakeover, DoorSpec};
pub(crate) use gate::{Bound, Gate};
pub(crate) use registry::{Load, Mended, OpenReplica, OpenSpec, Registry, Report};
pub(crate) use switchboard::Switchboard;
pub(crate) use tls::{TlsFiles, Versions};

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use libvol::disk::{Engine, make_driver};
use libvol::ids::{StoreId, VolumeId};
use libvol::runtime::{Remote, Runtime};
use libvol::{Error, Kind, Result};
use tokio::sync::oneshot;

thread_local! {
    /// The registry of the shard that runs on this thread.
    static REGISTRY: RefCell<Option<Rc<Registry>>> = const { RefCell::new(None) };
}

/// All shards of the daemon.
pub(crate) struct Shards {
    shards: Vec<Shard>,
    engine: &'static str,
    switchboard: Arc<Switchboard>,
}

/// One shard, as seen from other threads.
pub(crate) struct Shard {
    remote: Remote,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Shards {
    /// Starts `count` shards on the engine.
    ///
    /// # Errors
    /// `Unsupported` when a forced engine does not work here; `Io` when threads or descriptors run out.
    pub(crate) fn start(count: usize, engine: Engine) -> Result<Self> {
        let mut shards = Vec::with_capacity(count);
        let mut first = "";
        for index in 0..count {
            let (shard, name, line) = Shard::start(index, engine)?;
            if index == 0 {
                tracing::info!("{line}; {count} shard{}", if count == 1 { "" } else { "s" });
                first = name;
            } else if name != first {
                // With `auto`, a limit (locked memory, descriptors) can hit a later ring first.
                tracing::warn!("shard {index}: {line}");
            }
            shards.push(shard);
        }
        let switchboard = Arc::new(Switchboard::default());
        switchboard.connect(shards.iter().map(|shard| shard.remote.clone()).collect());
        Ok(Self {
            shards,
            engine: first,
            switchboard,
        })
    }

    /// Where VMs that come over TLS find their volumes.
    pub(crate) fn switchboard(&self) -> Arc<Switchboard> {
        self.switchboard.clone()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.shards.len()
    }

    /// The first shard's engine: `io_uring` or `threads`.
    pub(crate) fn engine(&self) -> &'static str {
        self.engine
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter()
    }

    /// Where a store's keeper runs.
    pub(crate) fn of_store(&self, store: StoreId) -> &Shard {
        self.pick(store.as_bytes())
    }

    /// Where a volume lives.
    pub(crate) fn of_volume(&self, volume: VolumeId) -> &Shard {
        self.pick(volume.as_bytes())
    }

    /// Ids are random, so their low bytes spread evenly.
    fn pick(&self, id: &[u8; 16]) -> &Shard {
        &self.shards[index_of(id, self.shards.len())]
    }

    /// Ends all threads; volumes and stores are closed before.
    pub(crate) fn stop(&mut self) {
        for shard in &mut self.shards {
            drop(shard.stop.take());
        }
        for shard in &mut self.shards {
            shard.end();
        }
    }
}

fn index_of(id: &[u8; 16], shards: usize) -> usize {
    let low = u64::from_le_bytes(id[8..].try_into().expect("8 bytes"));
    (low % shards.max(1) as u64) as usize
}

/// The registry of the shard that runs on this thread.
fn registry_here() -> Option<Rc<Registry>> {
    REGISTRY.with_borrow(Clone::clone)
}

impl Drop for Shards {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shard {
    fn start(index: usize, engine: Engine) -> Result<(Self, &'static str, String)> {
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name(format!("shard-{index}"))
            .spawn(move || {
                let _guard = AbortOnPanic;
                let (driver, line) = match make_driver(engine) {
                    Ok(driver) => driver,
                    Err(e) => {
                        let _ = ready.send(Err(e));
                        return;
                    }
                };
                let name = driver.name();
                let runtime = Runtime::new(driver);
                REGISTRY.set(Some(Rc::new(Registry::default())));
                if ready.send(Ok((runtime.remote(), name, line))).is_ok() {
                    // Ends when the sender is dropped.
                    let _ = runtime.block_on(stopped);
                }
                REGISTRY.set(None);
            })
            .map_err(|e| Error::with_source(Kind::Io, "a shard's thread cannot be started", e))?;
        let (remote, name, line) = started
            .recv()
            .map_err(|_| Error::internal("a shard ended while it started"))??;
        let shard = Self {
            remote,
            stop: Some(stop),
            thread: Some(thread),
        };
        Ok((shard, name, line))
    }

    /// What it carries.
    ///
    /// # Errors
    /// `Unavailable` when it has ended.
    pub(crate) fn load(&self) -> impl Future<Output = Result<Load>> + use<> {
        let remote = self.remote.clone();
        async move {
            remote
                .call(|| async { registry_here().map_or_else(Load::default, |registry| registry.load()) })
                .await
        }
    }

    /// Ends its thread.
    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panicking shard has aborted the process; there is no other way for join to fail.
            let _ = thread.join();
        }
    }

    /// Runs `work` on the shard as a task and waits for its result. A caller that stops waiting does not stop the work.
    ///
    /// # Errors
    /// `Unavailable` when the shard has ended; else what `work` returns.
    pub(crate) async fn call<T, F, Fut>(&self, work: F) -> Result<T>
    where
        F: FnOnce(Rc<Registry>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
        T: Send + 'static,
    {
        self.remote
            .call(move || {
                let registry = REGISTRY
                    .with_borrow(Clone::clone)
                    .expect("a shard's thread has its registry while its runtime runs");
                work(registry)
            })
            .await
            .and_then(|result| result)
    }
}

/// Aborts the process when its thread unwinds.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("vold: a data-plane thread panicked; stopping at once");
            std::process::abort();
        }
    }
}
