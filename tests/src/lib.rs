//! What the suites share: a real `vold` in a directory of its own, real clients, and an independent reader of raw stores;
//! and the simulated world.
//!
//! | file | job |
//! |---|---|
//! | [`vold`] | a daemon under test: start, kill, restart, stop, check, and `volctl` against it |
//! | [`tools`] | external programs; a missing one fails with the command that installs it |
//! | [`nbd`] | a small NBD client that knows which writes were acknowledged |
//! | [`nbdkit`] | nbdkit's plugins and filters as an oracle |
//! | [`vhost`] | a vhost-user-blk front-end that may send anything, by the specifications alone |
//! | [`disk`] | a vhost-user-blk device through the crate `blkio`, a client that is not ours |
//! | [`neighbour`] | a device that a test attacks, and a neighbour that must not notice |
//! | [`tls`] | a daemon that serves over TLS, certificates of every kind, and a client under TLS |
//! | [`load`] | what a daemon has open, holds in memory and carries |
//! | [`raw`] | reads a raw store by docs/FORMAT.md alone, with another XTS |
//! | [`content`] | seeded bytes to write and to find again |
//! | [`devices`] | loop devices, mounted file systems |
//! | [`guest`] | virtual machines whose kernel uses a volume: QEMU, its console, QMP |
//! | [`transport`] | the ways in which a volume gets to such a machine |
//! | [`sim`] | the engine's real code over simulated disks: power cuts, damage, an oracle |
//!
//! Suites are in `tests/`, one property a file. Nothing here waits for a time: it waits for conditions, with a generous
//! deadline. `VOLD_TEST_FULL=1` makes the same tests longer and larger.

pub mod content;
pub mod devices;
pub mod disk;
pub mod guest;
pub mod load;
pub mod nbd;
pub mod nbdkit;
pub mod neighbour;
pub mod raw;
pub mod sim;
pub mod tls;
pub mod tools;
pub mod transport;
pub mod vhost;
pub mod vold;

pub use vold::{Engine, Refusal, Vold};

use std::time::{Duration, Instant};

/// Longest that any single condition may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Whether the longer and larger variants were asked for (`make test-full`).
pub fn full() -> bool {
    std::env::var_os("VOLD_TEST_FULL").is_some_and(|v| v == "1")
}

/// The quick or the full value.
pub fn scale<T>(quick: T, in_full: T) -> T {
    if full() { in_full } else { quick }
}

/// Waits until `condition` gives something.
///
/// # Panics
/// When it has not within [`PATIENCE`]; `what` says what was waited for.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} in vain for: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A way to run the same property.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Replicas of the volume.
    pub replicas: usize,
    /// I/O engine.
    pub engine: Engine,
}

impl Setup {
    /// A daemon of this kind with `acme/vol` attached to `vm1`; the volume's NBD URI beside it.
    pub fn volume(self, volume_size: &str) -> (Vold, String) {
        let vold = Vold::start_on(self.engine);
        let uri = vold.with_volume(self.replicas, vold::STORE, volume_size);
        (vold, uri)
    }
}

/// Runs a property (a function of [`Setup`]) with 1, 2 and 3 replicas on both engines, as six tests.
#[macro_export]
macro_rules! on_every_setup {
    ($property:ident) => {
        mod $property {
            use $crate::{Engine, Setup};

            $crate::on_every_setup!(@ $property with_one_replica_on_io_uring 1 Uring);
            $crate::on_every_setup!(@ $property with_two_replicas_on_io_uring 2 Uring);
            $crate::on_every_setup!(@ $property with_three_replicas_on_io_uring 3 Uring);
            $crate::on_every_setup!(@ $property with_one_replica_on_threads 1 Threads);
            $crate::on_every_setup!(@ $property with_two_replicas_on_threads 2 Threads);
            $crate::on_every_setup!(@ $property with_three_replicas_on_threads 3 Threads);
        }
    };
    (@ $property:ident $name:ident $replicas:literal $engine:ident) => {
        #[test]
        fn $name() {
            super::$property(Setup {
                replicas: $replicas,
                engine: Engine::$engine,
            });
        }
    };
}
