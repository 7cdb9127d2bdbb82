//! What the process asks of the kernel for itself: no dumps, private files, enough descriptors and locked memory.

use libvol::{Error, Kind, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Locked memory for keys: 2^16 volumes' and customers' secrets of a page each, where we may ask for it.
const MEMLOCK_BYTES: u64 = 256 << 20;

/// Before anything else: nothing of this process reaches a dump (I1), and files are born private.
///
/// # Errors
/// When the kernel refuses to make the process undumpable.
pub(crate) fn harden() -> Result<()> {
    libvol::secret::harden_process()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

/// Raises the limits on descriptors and locked memory as far as allowed; a refusal is logged, not fatal.
pub(crate) fn raise_limits() {
    let files = getrlimit(Resource::Nofile);
    raise(Resource::Nofile, "open files", files.maximum);
    let locked = getrlimit(Resource::Memlock);
    let enough = |limit: Option<u64>| limit.is_none_or(|bytes| bytes >= MEMLOCK_BYTES);
    if !enough(locked.current) {
        let wanted = Rlimit {
            current: Some(MEMLOCK_BYTES),
            maximum: if enough(locked.maximum) {
                locked.maximum
            } else {
                Some(MEMLOCK_BYTES)
            },
        };
        if setrlimit(Resource::Memlock, wanted).is_err() {
            raise(Resource::Memlock, "locked memory", locked.maximum);
        }
    }
}

fn raise(resource: Resource, what: &str, to: Option<u64>) {
    let wanted = Rlimit {
        current: to,
        maximum: to,
    };
    if let Err(e) = setrlimit(resource, wanted) {
        tracing::warn!("the limit on {what} cannot be raised: {e}");
    }
}

/// The uid the daemon runs as.
pub(crate) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// An I/O error about a path.
pub(crate) fn path_error(path: &std::path::Path, what: &str, e: std::io::Error) -> Error {
    let kind = match e.kind() {
        std::io::ErrorKind::NotFound => Kind::NotFound,
        std::io::ErrorKind::PermissionDenied => Kind::Refused,
        std::io::ErrorKind::StorageFull => Kind::NoSpace,
        std::io::ErrorKind::ReadOnlyFilesystem => Kind::ReadOnly,
        _ => Kind::Io,
    };
    Error::with_source(kind, format!("{}: {what}", path.display()), e)
}
