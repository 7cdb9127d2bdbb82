//! nbdkit as an oracle: an independent server whose plugins make data that is known without storing it, and whose filters
//! check and log what passes through.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::tools::tool;
use crate::vold::parse_uri;
use crate::wait_for;

/// A running nbdkit on a Unix socket; ended with the value.
pub struct Nbdkit {
    process: Child,
    socket: PathBuf,
}

impl Nbdkit {
    /// Serves `arguments` (filters, a plugin, its parameters) on a socket in `directory`.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn serve(directory: &Path, arguments: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("nbdkit-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (socket, pid) = (directory.join(&name), directory.join(format!("{name}.pid")));
        // The pid file is written when the socket takes connections.
        let mut process = tool("nbdkit")
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .arg("--pidfile")
            .arg(&pid)
            .args(arguments)
            .spawn()
            .expect("nbdkit starts");
        wait_for("nbdkit serves", || {
            let ended = process.try_wait().expect("own child");
            assert!(ended.is_none(), "nbdkit {arguments:?} ended: {ended:?}");
            pid.exists().then_some(())
        });
        Self { process, socket }
    }

    /// A proxy: `filters` (with their parameters) in front of what a URI of vold's names.
    ///
    /// # Panics
    /// As [`Self::serve`].
    pub fn proxy(directory: &Path, filters: &[&str], uri: &str) -> Self {
        let (socket, export) = parse_uri(uri);
        let (flags, parameters): (Vec<&str>, Vec<&str>) =
            filters.iter().partition(|word| word.starts_with("--filter="));
        let target = [format!("socket={}", socket.display()), format!("export={export}")];
        let mut arguments = flags;
        arguments.push("nbd");
        arguments.extend(parameters);
        arguments.extend(target.iter().map(String::as_str));
        Self::serve(directory, &arguments)
    }

    /// Where it serves.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
