//! The server spoken to over a socket pair on both engines: a device in memory behind it, a client written against
//! the protocol in front of it. Client and server share one runtime, so a test sees both sides.

mod client;
mod extended;
mod fencing;
mod handshake;
mod session;
mod transmission;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use libvol::disk::{EngineChoice, make_driver};
use libvol::runtime::{
    Done, Driver, FileSlot, Op, OpKey, Runtime, Task, Unpark, Wait, net::Stream, sleep, spawn, timeout,
    yield_now,
};

use super::{Export, Exports, Lookup, Sessions, serve_device};
use crate::device::memory::Memory;
use client::Client;

/// Long enough that only a hang reaches it.
const FAR: Duration = Duration::from_secs(120);

/// Runs a test on both engines.
fn on_both<F: Future<Output = ()> + 'static>(test: impl Fn() -> F) {
    for engine in [EngineChoice::Threads, EngineChoice::Uring] {
        let (driver, name) = make_driver(engine).expect("both engines run where the tests run");
        println!("{name}");
        let runtime = Runtime::new(driver);
        runtime.block_on(within(test()));
    }
}

/// Runs a test on both engines, which moves the clock on as it likes.
fn on_both_with_clock<F: Future<Output = ()> + 'static>(test: impl Fn(Rc<Bent>) -> F) {
    for engine in [EngineChoice::Threads, EngineChoice::Uring] {
        let clock = Rc::new(Bent::of(engine, false));
        Runtime::new(clock.clone()).block_on(test(clock));
    }
}

/// Runs a test on both engines, which tell of hang-ups so late that nobody waits for it any more.
fn on_both_deaf<F: Future<Output = ()> + 'static>(test: impl Fn() -> F) {
    for engine in [EngineChoice::Threads, EngineChoice::Uring] {
        let deaf = Bent::of(engine, true);
        Runtime::new(Rc::new(deaf)).block_on(within(test()));
    }
}

/// An engine whose clock is ahead of the real one, or that tells of no hang-up.
struct Bent {
    driver: Rc<dyn Driver>,
    ahead: Cell<Duration>,
    is_deaf: bool,
    /// Hang-ups that are not told.
    untold: RefCell<Vec<OpKey>>,
}

impl Bent {
    fn of(engine: EngineChoice, is_deaf: bool) -> Self {
        let (driver, name) = make_driver(engine).expect("both engines run where the tests run");
        println!("{name}");
        Self {
            driver,
            ahead: Cell::default(),
            is_deaf,
            untold: RefCell::default(),
        }
    }

    /// Moves it on.
    fn advance(&self, by: Duration) {
        self.ahead.set(self.ahead.get() + by);
    }
}

impl Driver for Bent {
    fn name(&self) -> &'static str {
        self.driver.name()
    }
    fn submit(&self, op: Op) -> OpKey {
        let is_untold = self.is_deaf && matches!(op, Op::HangUp { .. });
        let key = self.driver.submit(op);
        if is_untold {
            self.untold.borrow_mut().push(key);
        }
        key
    }
    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done> {
        match self.untold.borrow().contains(&key) {
            true => Poll::Pending,
            false => self.driver.poll(key, cx),
        }
    }
    fn forget(&self, key: OpKey) {
        self.untold.borrow_mut().retain(|other| *other != key);
        self.driver.forget(key);
    }
    fn turn(&self, wait: Wait) {
        self.driver.turn(wait);
    }
    fn attach(&self, file: Arc<OwnedFd>) -> io::Result<FileSlot> {
        self.driver.attach(file)
    }
    fn detach(&self, slot: FileSlot) {
        self.driver.detach(slot);
    }
    fn now(&self) -> Duration {
        self.driver.now() + self.ahead.get()
    }
    fn unparker(&self) -> Arc<dyn Unpark> {
        self.driver.unparker()
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(FAR, future).await.expect("hung")
}

/// Looks again until it is so.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let looking = async {
        while !is_so() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(FAR, looking)
        .await
        .unwrap_or_else(|| panic!("never: {what}"));
}

/// One attachment with one export on one device.
struct Server {
    device: Rc<Memory>,
    exports: Rc<Shelf>,
    sessions: Rc<Sessions>,
    handshake: Duration,
}

/// Exports by name; a foreign one is simply not here.
struct Shelf(Vec<(String, bool, Rc<Memory>)>);

impl Exports<Rc<Memory>> for Shelf {
    fn find(&self, name: &str) -> Lookup<Rc<Memory>> {
        let Some((name, read_only, device)) = self.0.iter().find(|(n, ..)| n == name) else {
            return Lookup::Missing;
        };
        Lookup::Here(Export {
            name: name.clone(),
            description: format!("{name} of the test"),
            read_only: *read_only,
            volume: device.clone(),
        })
    }
    fn list(&self) -> Vec<(String, String)> {
        let described =
            |(name, ..): &(String, bool, Rc<Memory>)| (name.clone(), format!("{name} of the test"));
        self.0.iter().map(described).collect()
    }
}

impl Server {
    /// `acme/web`, and the same read-only as `acme/web-ro`.
    fn new(size_bytes: usize) -> Self {
        let device = Memory::new(size_bytes);
        let shelf = vec![
            ("acme/web".to_owned(), false, device.clone()),
            ("acme/web-ro".to_owned(), true, device.clone()),
        ];
        Self {
            device,
            exports: Rc::new(Shelf(shelf)),
            sessions: Sessions::new(),
            handshake: FAR,
        }
    }

    /// A connection before its handshake, and the task that serves it.
    fn connect(&self) -> (Client, Task<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serving = serve_device::<Rc<Memory>>(
            Stream::new(OwnedFd::from(ours)),
            self.exports.clone(),
            self.sessions.clone(),
            self.handshake,
        );
        (Client::new(Stream::new(OwnedFd::from(theirs))), spawn(serving))
    }

    /// A connection that transmits: structured replies and `base:allocation` negotiated.
    async fn transmit(&self) -> (Client, Task<()>) {
        let (mut client, task) = self.connect();
        client.start("acme/web", true, true).await;
        (client, task)
    }
}

/// `len` bytes that differ by place and seed.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}
