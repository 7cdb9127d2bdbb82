//! Opening the file or block device of a store.
//!
//! The lock is `flock` on the very open file description that does the I/O: a new daemon cannot get it until the old
//! one's ring, with every transfer in flight, is gone. Block devices are claimed with `O_EXCL` as well, which keeps
//! mounts and other device nodes of the same device away. A descriptor counts as direct only if the file system really
//! bypasses the page cache. This file does no I/O on the contents, but for writing zeros where a file system cannot
//! allocate; it deliberately does not care what the contents are.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, SeekFrom, StatxFlags};

use crate::buf::Buf;
use crate::error::{Error, Kind, Result};
use crate::runtime::FileSlot;

/// How often a file that somebody else holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// One write of zeros where the file system cannot allocate by itself.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

/// What the opener wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Read and write, exclusively locked.
    ReadWrite,
    /// Read only, for offline checks; a shared lock, so that a running daemon is noticed.
    ReadOnly,
}

/// An open, locked file or block device. Clones share the open file description; threads may share it.
#[derive(Clone, Debug)]
pub struct DiskFile {
    path: PathBuf,
    backing: Backing,
    size_bytes: u64,
    block_device: bool,
    direct: bool,
}

/// What stands behind a [`DiskFile`].
#[derive(Clone, Debug)]
pub enum Backing {
    /// A descriptor of the operating system.
    Os(Arc<OwnedFd>),
    /// A disk that the simulator's driver already knows.
    Simulated(FileSlot),
}

impl DiskFile {
    /// Opens `path` with O_DIRECT (unless `buffered_ok` and the file system refuses it) and locks it, waiting up to
    /// `lock_wait` for an earlier owner to go.
    ///
    /// # Errors
    /// `NotFound`, `ReadOnly`, `Busy` (locked by another process), `Unsupported` (no O_DIRECT, or neither a regular
    /// file nor a block device), `Io`; each names the path and the next step.
    pub fn open(path: &Path, mode: OpenMode, buffered_ok: bool, lock_wait: Duration) -> Result<Self> {
        let looked_at = std::fs::metadata(path).map_err(|e| open_error(path, None, &e))?;
        usable_type(path, &looked_at)?;
        // Root could open it; whoever removed every write permission did not mean to give it to a store.
        if mode == OpenMode::ReadWrite && looked_at.is_file() && looked_at.mode() & 0o222 == 0 {
            return Err(read_only(path, "nobody has write permission on it"));
        }
        // Some kernels open a read-only device for writing all the same and refuse each write.
        if mode == OpenMode::ReadWrite && device_is_read_only(&looked_at) {
            return Err(read_only(path, "the device is read-only"));
        }
        let deadline = Instant::now() + lock_wait;
        let mut told = false;
        loop {
            let error = match try_open(path, mode, buffered_ok, &looked_at)? {
                Attempt::Opened(file) => return Ok(file),
                Attempt::InUse(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(error);
            }
            if !told {
                told = true;
                tracing::info!(path = %path.display(), "in use by another process; waiting up to {lock_wait:?}");
            }
            std::thread::sleep(LOCK_RETRY.min(deadline.saturating_duration_since(Instant::now())));
        }
    }

    /// Creates a regular file of `size_bytes`, fully allocated, and opens it like [`DiskFile::open`].
    ///
    /// # Errors
    /// As `open`; `Exists` when there is something at `path`; `NoSpace`.
    pub fn create(path: &Path, size_bytes: u64, buffered_ok: bool) -> Result<Self> {
        let exists = || {
            Error::exists(format!(
                "{}: exists already; choose another path, or remove it if nothing needs it",
                path.display()
            ))
        };
        // Looked at first for the better message (a directory, a device); `create_new` decides.
        if path.symlink_metadata().is_ok() {
            return Err(exists());
        }
        let open = |direct: bool| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(direct_flag(direct))
                .open(path)
        };
        let (file, direct) = match open(true) {
            // The file system creates the file before it refuses the flag.
            Err(e) if no_direct(&e) && buffered_ok => {
                let _ = std::fs::remove_file(path);
                (open(false), false)
            }
            Err(e) if no_direct(&e) => {
                let _ = std::fs::remove_file(path);
                return Err(needs_direct(path));
            }
            other => (other, true),
        };
        let file = file.map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => exists(),
            io::ErrorKind::NotFound => Error::not_found(format!(
                "{}: its directory does not exist; create the directory first",
                path.display()
            )),
            _ => open_error(path, None, &e),
        })?;
        let made = fill_new(path, &file, size_bytes, direct, buffered_ok);
        let direct = made.inspect_err(|_| {
            // Half a store helps nobody, and its space is wanted back. The first error is the one to report.
            let _ = std::fs::remove_file(path);
        })?;
        Ok(Self {
            path: path.to_owned(),
            backing: Backing::Os(Arc::new(file.into())),
            size_bytes,
            block_device: false,
            direct,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file or device.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether I/O bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// What stands behind it.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// A simulated disk: zero-filled semantics, direct, no lock.
    pub fn simulated(slot: FileSlot, size_bytes: u64) -> Self {
        let path = PathBuf::from(format!("sim:{}", slot.0));
        Self {
            path,
            backing: Backing::Simulated(slot),
            size_bytes,
            block_device: false,
            direct: true,
        }
    }
}

enum Attempt {
    Opened(DiskFile),
    InUse(Error),
}

/// One try to open, claim and lock.
fn try_open(path: &Path, mode: OpenMode, buffered_ok: bool, looked_at: &Metadata) -> Result<Attempt> {
    let claim = match (looked_at.file_type().is_block_device(), mode) {
        (true, OpenMode::ReadWrite) => libc::O_EXCL,
        _ => 0,
    };
    let open = |direct: bool| {
        OpenOptions::new()
            .read(true)
            .write(mode == OpenMode::ReadWrite)
            .custom_flags(direct_flag(direct) | claim)
            .open(path)
    };
    let (opened, mut direct) = match open(true) {
        Err(e) if no_direct(&e) && buffered_ok => (open(false), false),
        Err(e) if no_direct(&e) => return Err(needs_direct(path)),
        other => (other, true),
    };
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Ok(Attempt::InUse(Error::busy(format!(
                "{}: the device is mounted or in use by another process; free it and try again",
                path.display()
            ))));
        }
        Err(e) => return Err(open_error(path, Some(looked_at), &e)),
    };
    // What was opened counts, not what was looked at.
    let metadata = file
        .metadata()
        .map_err(|e| io_error(path, "cannot be examined", e))?;
    usable_type(path, &metadata)?;
    let wanted = match mode {
        OpenMode::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        OpenMode::ReadOnly => FlockOperation::NonBlockingLockShared,
    };
    match rustix::fs::flock(&file, wanted) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
            return Ok(Attempt::InUse(Error::busy(format!(
                "{}: in use by another process; stop the other vold, or wait until it has ended",
                path.display()
            ))));
        }
        Err(e) => return Err(io_error(path, "cannot be locked", e.into())),
    }
    if direct && !really_direct(&file) {
        if !buffered_ok {
            return Err(needs_direct(path));
        }
        direct = false;
    }
    let block_device = metadata.file_type().is_block_device();
    let size_bytes = if block_device {
        rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| io_error(path, "size unknown", e.into()))?
    } else {
        metadata.len()
    };
    Ok(Attempt::Opened(DiskFile {
        path: path.to_owned(),
        backing: Backing::Os(Arc::new(file.into())),
        size_bytes,
        block_device,
        direct,
    }))
}

/// Locks and allocates a file that was just created, and makes it durable. Returns whether it is direct.
fn fill_new(path: &Path, file: &File, size_bytes: u64, direct: bool, buffered_ok: bool) -> Result<bool> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|e| io_error(path, "cannot be locked", e.into()))?;
    let direct = direct && really_direct(file);
    if !direct && !buffered_ok {
        return Err(needs_direct(path));
    }
    allocate(file, size_bytes).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            Error::new(Kind::NoSpace, no_space_message(path, file, size_bytes))
        }
        Some(libc::EFBIG) => Error::invalid(format!(
            "{}: {} is more than the file system allows for one file; use a smaller size or a block device",
            path.display(),
            gib(size_bytes)
        )),
        _ => io_error(path, "cannot be allocated", e),
    })?;
    file.sync_all()
        .map_err(|e| io_error(path, "cannot be made durable", e))?;
    sync_parent(path).map_err(|e| io_error(path, "its directory cannot be made durable", e))?;
    Ok(direct)
}

fn allocate(file: &File, size_bytes: u64) -> io::Result<()> {
    if size_bytes == 0 {
        return Ok(());
    }
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size_bytes) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => break,
            other => return other.map_err(io::Error::from),
        }
    }
    // The file system cannot reserve: write the zeros. The tail is cut off after, so that every write is aligned.
    let zeros = Buf::zeroed(ZERO_CHUNK_BYTES);
    let mut at = 0;
    while at < size_bytes {
        file.write_all_at(&zeros, at)?;
        at += zeros.len() as u64;
    }
    file.set_len(size_bytes)
}

/// A new name is durable only with its directory.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

fn direct_flag(direct: bool) -> i32 {
    if direct { libc::O_DIRECT } else { 0 }
}

/// `open` refuses O_DIRECT with EINVAL, on every file system that refuses it.
fn no_direct(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EINVAL)
}

/// Some file systems take the flag and go through the page cache all the same (ext4 with data=journal, for one).
/// Kernels since 6.1 tell; an older one is believed.
fn really_direct(file: &File) -> bool {
    match rustix::fs::statx(file.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(told) if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => told.stx_dio_mem_align != 0,
        _ => true,
    }
}

fn usable_type(path: &Path, metadata: &Metadata) -> Result<()> {
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    let what = if file_type.is_dir() {
        "is a directory"
    } else {
        "is neither a regular file nor a block device"
    };
    Err(Error::new(
        Kind::Unsupported,
        format!(
            "{}: {what}; give the path of a file or block device",
            path.display()
        ),
    ))
}

fn open_error(path: &Path, metadata: Option<&Metadata>, e: &io::Error) -> Error {
    let shown = path.display();
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            Error::not_found(format!("{shown}: no such file or device; check the path"))
        }
        Some(libc::EROFS) => read_only(path, "its file system is mounted read-only"),
        Some(libc::EPERM) => read_only(path, "the system forbids writing (is it immutable?)"),
        Some(libc::EACCES) if metadata.is_some_and(device_is_read_only) => {
            read_only(path, "the device is read-only")
        }
        Some(libc::EACCES) => Error::new(
            Kind::Refused,
            format!("{shown}: permission denied; give the user that runs vold read and write access"),
        ),
        Some(libc::EISDIR) => Error::new(
            Kind::Unsupported,
            format!("{shown}: is a directory; give the path of a file or block device"),
        ),
        Some(libc::ENOSPC | libc::EDQUOT) => Error::new(
            Kind::NoSpace,
            format!("{shown}: no space for a new file; free some, or choose another file system"),
        ),
        Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => {
            Error::io(format!("{shown}: there is no device behind it; check the path"))
        }
        _ => Error::io(format!("{shown}: cannot be opened: {e}")),
    }
}

fn device_is_read_only(metadata: &Metadata) -> bool {
    let device = metadata.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    metadata.file_type().is_block_device()
        && std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
            .is_ok_and(|ro| ro.trim() == "1")
}

fn read_only(path: &Path, why: &str) -> Error {
    Error::new(
        Kind::ReadOnly,
        format!(
            "{}: {why}; make it writable, or use another place",
            path.display()
        ),
    )
}

fn needs_direct(path: &Path) -> Error {
    Error::new(
        Kind::Unsupported,
        format!(
            "{}: its file system does not support O_DIRECT; choose another, or allow buffered I/O (--allow-buffered)",
            path.display()
        ),
    )
}

fn io_error(path: &Path, what: &str, e: io::Error) -> Error {
    Error::with_source(Kind::Io, format!("{}: {what}", path.display()), e)
}

fn no_space_message(path: &Path, file: &File, size_bytes: u64) -> String {
    let free = rustix::fs::fstatvfs(file)
        .map(|fs| format!("{} free, ", gib(fs.f_bavail.saturating_mul(fs.f_frsize))))
        .unwrap_or_default();
    format!(
        "{}: {free}{} needed; use a smaller size or another file system",
        path.display(),
        gib(size_bytes)
    )
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    const NO_WAIT: Duration = Duration::ZERO;

    fn open(path: &Path) -> Result<DiskFile> {
        DiskFile::open(path, OpenMode::ReadWrite, true, NO_WAIT)
    }

    fn refusal(path: &Path) -> (Kind, String) {
        let error = open(path).expect_err("refused");
        let line = error.to_string();
        assert!(!line.contains('\n'), "one line: {line}");
        assert!(line.contains(path.to_str().unwrap()), "names the path: {line}");
        (error.kind(), line)
    }

    #[test]
    fn a_created_file_is_private_allocated_and_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let file = DiskFile::create(&path, 8 << 20, true).unwrap();
        assert_eq!((file.size_bytes(), file.is_block_device()), (8 << 20, false));
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 >= 8 << 20, "allocated, not sparse");
        drop(file);
        let again = open(&path).unwrap();
        assert_eq!(again.size_bytes(), 8 << 20);
        assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 0));
    }

    #[test]
    fn what_exists_is_never_overwritten_by_create() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        std::fs::write(&path, b"precious").unwrap();
        for taken in [path.as_path(), dir.path()] {
            let error = DiskFile::create(taken, 1 << 20, true).expect_err("refused");
            assert_eq!(error.kind(), Kind::Exists, "{error}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_file_that_cannot_be_allocated_is_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        // 2^60 bytes are more than any file system here has, or allows in one file.
        let error = DiskFile::create(&path, 1 << 60, true).expect_err("too large");
        assert!(matches!(error.kind(), Kind::NoSpace | Kind::Invalid), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn missing_paths_directories_and_sockets_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(refusal(&dir.path().join("missing")).0, Kind::NotFound);
        let (kind, line) = refusal(dir.path());
        assert_eq!(kind, Kind::Unsupported);
        assert!(line.contains("is a directory"), "{line}");
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(refusal(&socket).0, Kind::Unsupported);
        assert_eq!(refusal(Path::new("/dev/null")).0, Kind::Unsupported);
        let error = DiskFile::create(&dir.path().join("no/such/dir"), 4096, true).expect_err("refused");
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
    }

    #[test]
    fn a_write_protected_file_is_read_only_but_can_be_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(DiskFile::create(&path, 1 << 20, true).unwrap());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        assert_eq!(refusal(&path).0, Kind::ReadOnly);
        DiskFile::open(&path, OpenMode::ReadOnly, true, NO_WAIT).unwrap();
    }

    #[test]
    fn a_second_writer_is_refused_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let writer = DiskFile::create(&path, 1 << 20, true).unwrap();
        assert_eq!(refusal(&path).0, Kind::Busy);
        let read = || DiskFile::open(&path, OpenMode::ReadOnly, true, NO_WAIT);
        assert_eq!(read().expect_err("a daemon runs").kind(), Kind::Busy);
        let clone = writer.clone();
        drop(writer);
        assert_eq!(refusal(&path).0, Kind::Busy);
        drop(clone);
        let readers = [read().unwrap(), read().unwrap()];
        assert_eq!(refusal(&path).0, Kind::Busy);
        drop(readers);
        open(&path).unwrap();
    }

    #[test]
    fn an_opener_waits_for_the_earlier_owner_to_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let owner = DiskFile::create(&path, 1 << 20, true).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || DiskFile::open(&path, OpenMode::ReadWrite, true, Duration::from_secs(60))
        });
        std::thread::sleep(LOCK_RETRY * 3);
        assert!(!waiter.is_finished(), "the lock is held");
        drop(owner);
        waiter.join().unwrap().unwrap();
    }
}
