//! A device that a test attacks, and a neighbour on the same shard whose volume must not notice anything of it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};

use crate::content::bytes;
use crate::nbd::Client;
use crate::vhost::{DATA_MAX, FrontEnd, Shape, T_IN, T_OUT};
use crate::{Vold, wait_for};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 8 * MIB;

/// Longest that a neighbour's read may take. One that waits for an attack to end would wait for ever.
const READ: Duration = Duration::from_secs(30);

/// Two customers of a daemon that has one shard: `evil/vol` is attached over vhost-user, `acme/vol` over NBD.
pub struct Street {
    /// The daemon.
    pub vold: Vold,
    socket: PathBuf,
    ends: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    neighbour: Option<JoinHandle<()>>,
}

impl Street {
    /// Both volumes hold data, and the neighbour reads on and on.
    ///
    /// # Panics
    /// When the daemon does not do what it should.
    #[expect(clippy::new_without_default, reason = "it starts processes")]
    pub fn new() -> Self {
        let mut vold = Vold::not_started(None);
        let mut serve = vold.serve_command();
        serve.args(["--shards", "1"]);
        vold.restart_with(serve);
        vold.add_stores(&["a"], "128M");
        for customer in ["acme", "evil"] {
            vold.ctl(&format!("customer create {customer}"));
            vold.ctl(&format!("vm create {customer}-vm --customer {customer}"));
            vold.ctl(&format!("volume create {customer}/vol --size 8M"));
        }
        let uri = vold.attach("acme/vol", "acme-vm");
        let socket = vold.attach_vhost("evil/vol", "evil-vm");
        let mut client = Client::connect(&uri);
        for i in 0..VOLUME / MIB {
            client.write(i * MIB, &neighbours(i)).expect("a write");
        }
        let ends = Arc::new(AtomicBool::new(false));
        let reads = Arc::new(AtomicU64::new(0));
        let (end, count) = (ends.clone(), reads.clone());
        let neighbour = std::thread::spawn(move || {
            let mut i = 0;
            while !end.load(Ordering::Relaxed) {
                let piece = i % (VOLUME / MIB);
                let started = Instant::now();
                let read = client
                    .read(piece * MIB + 4096, 64 << 10)
                    .expect("the neighbour reads");
                assert!(
                    read == neighbours(piece)[4096..4096 + (64 << 10)],
                    "the neighbour's data"
                );
                assert!(
                    started.elapsed() < READ,
                    "the neighbour waited {:?}",
                    started.elapsed()
                );
                count.fetch_add(1, Ordering::Relaxed);
                i += 1;
            }
        });
        let street = Self {
            vold,
            socket,
            ends,
            reads,
            neighbour: Some(neighbour),
        };
        let mut front_end = street.front_end();
        front_end.write(0, &own()).expect("a write");
        drop(front_end);
        street
    }

    /// The attacked device's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A front-end of the attacked device, all started.
    pub fn front_end(&self) -> FrontEnd {
        FrontEnd::connect(&self.socket)
    }

    /// One of another shape.
    pub fn front_end_as(&self, shape: Shape) -> FrontEnd {
        FrontEnd::connect_as(&self.socket, shape)
    }

    /// A front-end that has agreed on features, and nothing more.
    pub fn greeted(&self) -> FrontEnd {
        FrontEnd::greeted(&self.socket, Shape::default())
    }

    /// Descriptors of all sorts that are neither memory nor an eventfd.
    ///
    /// # Panics
    /// When there are none to be had.
    pub fn strange_descriptors(&self) -> Vec<(&'static str, OwnedFd)> {
        let file = self.vold.path("regular");
        std::fs::write(&file, vec![0; 64 << 10]).expect("a file");
        let open = |path: &Path| -> OwnedFd {
            let options = File::options().read(true).write(true).open(path);
            options.expect("a file").into()
        };
        let (read_end, write_end) = rustix::pipe::pipe().expect("a pipe");
        // (Both ends are kept, so that pipe and socket stay as they are.)
        let (socket, other) = UnixStream::pair().expect("a socket");
        let read_only = |path: &str| File::open(path).expect("a file").into();
        vec![
            ("a regular file", open(&file)),
            ("a pipe to read", read_end),
            ("a pipe to write", write_end),
            ("a socket", socket.into()),
            ("another socket", other.into()),
            ("/dev/null", open(Path::new("/dev/null"))),
            ("/dev/zero", open(Path::new("/dev/zero"))),
            ("a directory", read_only("/")),
            (
                "a path",
                rustix::fs::open(&file, OFlags::PATH, Mode::empty()).expect("a path"),
            ),
            (
                "an epoll",
                epoll::create(epoll::CreateFlags::empty()).expect("an epoll"),
            ),
            ("a file of /proc", read_only("/proc/self/status")),
        ]
    }

    /// Waits until the neighbour has read some more, and the daemon says how it is.
    ///
    /// # Panics
    /// When either does not happen.
    pub fn goes_on(&self) {
        let before = self.reads.load(Ordering::Relaxed);
        wait_for("the neighbour reads on", || {
            let neighbour = self.neighbour.as_ref().expect("until the end");
            assert!(!neighbour.is_finished(), "the neighbour has failed");
            (self.reads.load(Ordering::Relaxed) >= before + 5).then_some(())
        });
    }

    /// The same; and the attacked device serves the next front-end, with the data that it had.
    ///
    /// # Panics
    /// When something of it is not so.
    pub fn serves(&self) {
        self.goes_on();
        let mut front_end = self.front_end();
        assert!(
            front_end.read(0, own().len()) == Ok(own()),
            "the attacked volume's own data"
        );
    }

    /// At the end of all attacks: everything is as it was, and the stores are clean.
    ///
    /// # Panics
    /// When they are not.
    pub fn is_unharmed(mut self) {
        self.serves();
        self.vold.ctl("status");
        self.ends.store(true, Ordering::Relaxed);
        let neighbour = self.neighbour.take().expect("once");
        neighbour.join().expect("the neighbour noticed nothing");
        self.vold.stop();
        self.vold.check_is_clean();
    }
}

impl Drop for Street {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(neighbour) = self.neighbour.take() {
            let _ = neighbour.join();
        }
    }
}

/// Many requests, as large as they can be, none of them waited for; gives how many.
pub fn load(front_end: &mut FrontEnd) -> usize {
    let requests = 20;
    for i in 0..requests {
        let (kind, out, read) = if i % 2 == 0 {
            (T_IN, vec![], DATA_MAX as usize)
        } else {
            (T_OUT, vec![i as u8; DATA_MAX as usize], 0)
        };
        // (The first 2 MiB are not written.)
        front_end.submit(0, kind, 4096 + i * 256, &out, read);
    }
    front_end.queues[0].kick();
    requests as usize
}

fn neighbours(piece: u64) -> Vec<u8> {
    bytes(1000 + piece, MIB as usize)
}

/// What lies at the start of the attacked volume.
pub fn own() -> Vec<u8> {
    bytes(77, 64 << 10)
}
