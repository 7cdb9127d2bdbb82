//! What the fuzz targets do with their bytes: conversations with the real server over a socket pair, in which the bytes are
//! the client's. Each is foreseen by a second reading of the protocol, and held to it: every reply is one that was due, to a
//! request that was made, once, with what the device has read; the device is asked for what the client asked for and
//! nothing else; memory in flight stays bounded; and when the client has gone, everything has.
//!
//! | file | job |
//! |---|---|
//! | [`engine`] | sockets without threads and waiting; finds hangs |
//! | [`options`] | the handshake foreseen |
//! | [`script`] | requests foreseen |
//! | [`device`] | takes what is foreseen and nothing else |
//! | [`replies`] | holds replies to both |
//! | [`client`] | the other end of the socket |
//! | [`tls`] | the same over TLS |

mod client;
mod device;
mod engine;
mod options;
mod replies;
mod script;
mod tls;

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use libvol::runtime::{Driver, Runtime, spawn, yield_now};

use super::handshake::{self, Negotiated};
use super::inbox::Inbox;
use super::proto::{Context, Contexts, Framing};
use super::{Export, Exports, Lookup, Sessions, serve_device, transmission as server};
use client::{ENOUGH_BYTES, Pace, pair};
use device::{Fake, Manner, SIZE_BYTES};
use engine::Engine;
use options::{Foreseen, Shown, Start, Tls};
use replies::Replies;
use script::{ALLOCATION, DEPTH, Ending, Script, Terms};
pub(crate) use tls::tls;

/// What acme's VM may see; with only one, the empty name means that.
const BOTH: Shown = &[("acme/ro", true), ("acme/web", false)];
const ONE: Shown = &[("acme/web", false)];
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// Deadline of a handshake, on a clock that moves when nothing else does.
const DEADLINE: Duration = Duration::from_secs(10);

/// The NBD server from the greeting on.
///
/// ```text
/// | 1 byte: bits 0-1 pace, bit 2 one export only | what the client says |
/// ```
pub(crate) fn handshake(input: &[u8]) {
    let Some((&[how], said)) = input.split_first_chunk::<1>() else {
        return;
    };
    let start = Start {
        tls: Tls::None,
        shown: if how & 4 == 0 { BOTH } else { ONE },
        flags: None,
        options_left: 64,
    };
    let talk = Talk::foresee(said, start);
    let wire = talk.wire(said);
    run(async move {
        let shelf = Shelf::new(start.shown);
        let sessions = Sessions::new();
        shelf.expect(&talk);
        let (client, socket) = pair();
        let serving = spawn(serve_device(
            socket,
            Rc::new(shelf.clone()),
            sessions.clone(),
            DEADLINE,
        ));
        let feeding = client.feed(wire, Pace::of(how), true);
        let heard = client.receive_all().await;
        feeding.await;
        serving.await;
        talk.check(heard.strip_prefix(GREETING).expect("a greeting"), &shelf);
        shelf.all_gone(&sessions).await;
    });
}

/// Requests and replies after a handshake.
///
/// ```text
/// | bits 0-1 framing, 2 read-only, 3 hang up at once, 4 slow device, 5 failing device, 6-7 pace |
/// | bits 0-1 contexts |
/// | what the client says |
/// ```
pub(crate) fn transmission(input: &[u8]) {
    let Some((&[how, contexts], said)) = input.split_first_chunk::<2>() else {
        return;
    };
    let terms = Terms {
        framing: [
            Framing::Simple,
            Framing::Structured,
            Framing::Extended,
            Framing::Extended,
        ][usize::from(how & 3)],
        read_only: how & 4 != 0,
        contexts: if how & 3 == 0 { 0 } else { contexts & 3 },
        size_bytes: SIZE_BYTES,
        failing: how & 32 != 0,
    };
    let manner = Manner {
        slow: how & 16 != 0,
        failing: terms.failing,
    };
    let (pace, at_once) = (Pace::of(how >> 6), how & 8 != 0);
    let script = Rc::new(Script::read(said, &terms));
    run(async move {
        let device = Fake::new(*b"acme-web");
        device.expect(&script, manner);
        let sessions = Sessions::new();
        let (client, socket) = pair();
        let seat = sessions.enter(&socket).expect("the only one");
        assert!(seat.claim(), "the only one");
        let negotiated = Negotiated {
            export: Export {
                name: "acme/web".into(),
                description: String::new(),
                read_only: terms.read_only,
                volume: device.clone(),
            },
            framing: terms.framing,
            contexts: contexts_of(terms.contexts),
        };
        let inbox = Inbox::new(socket, handshake::INBOX_BYTES);
        let serving = spawn(server::run(inbox, negotiated, seat));
        let mut replies = Replies::new(script.clone(), terms, device.clone());
        if at_once {
            let wire = [&script.wire[..], &script.tail].concat();
            let feeding = client.feed(wire, pace, true);
            replies.take(&client.receive_all().await);
            feeding.await;
        } else {
            converse(&client, &script, &mut replies, pace).await;
            let all = replies.all_here();
            assert!(!all || device.all_done(), "replied to before it was done");
        }
        serving.await;
        drop((client, replies));
        gone(&sessions, &device).await;
    });
}

/// A client that waits for its replies before it goes.
async fn converse(client: &Rc<client::Client>, script: &Script, replies: &mut Replies, pace: Pace) {
    let feeding = client.feed(script.wire.clone(), pace, false);
    let mut taken = 0;
    while !replies.all_here() {
        let more = client.receive().await;
        assert!(!more.is_empty(), "the server hung up and owes replies");
        replies.take(&more);
        taken += more.len();
        if taken > ENOUGH_BYTES {
            client.leave();
            feeding.await;
            return;
        }
    }
    feeding.await;
    client.send(&script.tail).await;
    if script.ending == Ending::Open {
        client.hang_up();
    }
    let rest = client.receive_all().await;
    assert!(
        rest.is_empty() && replies.ends_between(),
        "more than was asked for"
    );
}

fn contexts_of(bits: u8) -> Contexts {
    let mut contexts = Contexts::default();
    if bits & ALLOCATION != 0 {
        contexts = contexts.with(Context::Allocation);
    }
    if bits & DEPTH != 0 {
        contexts = contexts.with(Context::Depth);
    }
    contexts
}

/// A conversation foreseen, from the first option to the last request.
struct Talk {
    foreseen: Foreseen,
    script: Rc<Script>,
}

impl Talk {
    fn foresee(said: &[u8], start: Start) -> Self {
        let foreseen = Foreseen::of(said, start);
        let script = match &foreseen.agreed {
            Some((_, terms)) => Script::read(&said[foreseen.used..], terms),
            None => Script::default(),
        };
        Self {
            foreseen,
            script: Rc::new(script),
        }
    }

    /// The client's bytes with our cookies in them.
    fn wire(&self, said: &[u8]) -> Vec<u8> {
        match self.foreseen.agreed {
            Some(_) => [&said[..self.foreseen.used], &self.script.wire, &self.script.tail].concat(),
            None => said.to_vec(),
        }
    }

    /// Holds what the server said after the greeting to it. The client has hung up at the end of its bytes, so that
    /// replies to its last requests may be missing.
    fn check(&self, heard: &[u8], shelf: &Shelf) {
        self.check_up_to(self.foreseen.answers.len(), heard, shelf);
    }

    /// The same, where answers to options after so many may be missing, too.
    fn check_up_to(&self, answers: usize, mut heard: &[u8], shelf: &Shelf) {
        for (number, answer) in self.foreseen.answers.iter().enumerate() {
            if number >= answers && heard.is_empty() {
                return;
            }
            heard = answer.check(heard);
        }
        match &self.foreseen.agreed {
            Some((name, terms)) => {
                let device = shelf.device(name).expect("agreed on");
                Replies::new(self.script.clone(), *terms, device).take(heard);
            }
            None => assert!(heard.is_empty(), "more than was asked for: {heard:02x?}"),
        }
    }
}

/// Exports by name, each on a device of its own.
#[derive(Clone)]
struct Shelf(Vec<(&'static str, bool, Rc<Fake>)>);

impl Shelf {
    fn new(shown: Shown) -> Self {
        let tag = |name: &str| *name.as_bytes().first_chunk().unwrap_or(b"acme--ro");
        Self(
            shown
                .iter()
                .map(|(name, read_only)| (*name, *read_only, Fake::new(tag(name))))
                .collect(),
        )
    }

    fn device(&self, name: &str) -> Option<Rc<Fake>> {
        self.0
            .iter()
            .find(|(known, ..)| *known == name)
            .map(|(.., device)| device.clone())
    }

    fn expect(&self, talk: &Talk) {
        if let Some((name, _)) = talk.foreseen.agreed {
            let device = self.device(name).expect("what is shown is there");
            device.expect(&talk.script, Manner::default());
        }
    }

    /// Which a client means by that name.
    fn index(&self, name: &str) -> Option<usize> {
        match &self.0[..] {
            [_] if name.is_empty() => Some(0),
            shelf => shelf.iter().position(|(known, ..)| *known == name),
        }
    }

    fn export(&self, name: &str) -> Option<Export<Rc<Fake>>> {
        let (name, read_only, device) = &self.0[self.index(name)?];
        Some(Export {
            name: (*name).to_owned(),
            description: format!("{name} of the test"),
            read_only: *read_only,
            volume: device.clone(),
        })
    }

    async fn all_gone(self, sessions: &Rc<Sessions>) {
        for (_, _, device) in &self.0 {
            gone(sessions, device).await;
        }
    }
}

impl Exports<Rc<Fake>> for Shelf {
    fn find(&self, name: &str) -> Lookup<Rc<Fake>> {
        self.export(name).map_or(Lookup::Missing, Lookup::Here)
    }

    fn list(&self) -> Vec<(String, String)> {
        let described =
            |(name, ..): &(&str, bool, Rc<Fake>)| ((*name).to_owned(), format!("{name} of the test"));
        self.0.iter().map(described).collect()
    }
}

/// Nothing of a connection is left: no task that has the device, no operation, no place taken.
async fn gone(sessions: &Rc<Sessions>, device: &Rc<Fake>) {
    for _ in 0..100 {
        if Rc::strong_count(device) == 1 {
            break;
        }
        yield_now().await;
    }
    assert_eq!(
        Rc::strong_count(device),
        1,
        "the connection has ended, and something still has its device"
    );
    assert_eq!(sessions.connections(), 0);
    HERE.with(|(_, engine)| assert_eq!(engine.in_flight(), 0, "operations after the end"));
}

thread_local! {
    /// Never taken down: at a thread's end its variables are gone in no order that a runtime could rely on.
    static HERE: (&'static Runtime, Rc<Engine>) = {
        let engine = Rc::new(Engine::default());
        let driver: Rc<dyn Driver> = engine.clone();
        (Box::leak(Box::new(Runtime::new(driver))), engine)
    };
}

/// Runs a conversation on this thread's runtime.
fn run(conversation: impl Future<Output = ()> + 'static) {
    HERE.with(|(runtime, _)| runtime.block_on(conversation));
}
