//! A front-end against the protocol, over a socket pair, on both engines: a device in memory behind the session, a guest's
//! memory that the test lays out in front of it. Both sides share one runtime, so a test sees both.

mod faults;
mod front_end;
mod leaving;
mod messages;
mod requests;
mod suspending;

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use libvol::disk::{EngineChoice, make_driver};
use libvol::runtime::net::Stream;
use libvol::runtime::{Runtime, Task, sleep, spawn, timeout, yield_now};

use super::{Export, Sessions, Writeback, serve};
use crate::device::memory::Memory;
use front_end::FrontEnd;

/// Long enough that only a hang reaches it.
const FAR: Duration = Duration::from_secs(120);
const SIZE: usize = 1 << 20;

/// Runs a test on both engines.
fn on_both<F: Future<Output = ()> + 'static>(test: impl Fn() -> F) {
    for engine in [EngineChoice::Threads, EngineChoice::Uring] {
        let (driver, name) = make_driver(engine).expect("both engines run where the tests run");
        println!("{name}");
        let test = test();
        Runtime::new(driver).block_on(async move { within(test).await });
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

/// Gives everything that is ready to run many turns, and what comes of it as well.
async fn many_turns() {
    for _ in 0..1000 {
        yield_now().await;
    }
}

/// One attachment on one device.
struct Attachment {
    device: Rc<Memory>,
    sessions: Rc<Sessions>,
    read_only: bool,
    writeback: Writeback,
    moved: bool,
}

impl Attachment {
    fn new() -> Self {
        Self {
            device: Memory::new(SIZE),
            sessions: Sessions::new(None),
            read_only: false,
            writeback: Writeback::default(),
            moved: false,
        }
    }

    /// A front-end that has said nothing yet, and the task that serves it.
    fn connect(&self) -> (FrontEnd, Task<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let export = Export {
            name: "acme/web".into(),
            serial: *b"0123456789abcdefghij",
            read_only: self.read_only,
            writeback: self.writeback.clone(),
            moved: self.moved,
            volume: self.device.clone(),
            broken: Rc::default(),
        };
        let incoming = self.sessions.incoming(Stream::new(ours.into()));
        let serving = serve(incoming, export, self.sessions.clone());
        (FrontEnd::new(Stream::new(theirs.into())), spawn(serving))
    }

    /// A front-end whose queue runs.
    async fn start(&self) -> (FrontEnd, Task<()>) {
        let (mut front_end, task) = self.connect();
        front_end.start().await;
        (front_end, task)
    }
}

/// `len` bytes that differ by place and seed.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}
