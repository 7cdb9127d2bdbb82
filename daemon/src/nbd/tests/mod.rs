//! The server spoken to over a socket pair on both engines: a device in memory behind it, a client written against
//! the protocol in front of it. Client and server share one runtime, so a test sees both sides.

mod client;
mod device;
mod handshake;
mod session;
mod transmission;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use libvol::disk::{EngineChoice, make_driver};
use libvol::runtime::{Runtime, Task, net::Stream, sleep, spawn, timeout, yield_now};

use super::{Export, Exports, Sessions, serve_device};
use client::Client;
use device::Memory;

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
    fn find(&self, name: &str) -> Option<Export<Rc<Memory>>> {
        let (name, read_only, device) = self.0.iter().find(|(n, ..)| n == name)?;
        Some(Export {
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
