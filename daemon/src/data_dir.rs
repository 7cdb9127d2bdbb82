//! The data directory: where things lie in it, who may enter, and the lock that keeps a second daemon out.
//!
//! ```text
//! DIR/            0711: VMs' processes pass through to their sockets, and can neither list it nor read a file
//!   lock          flock of the running daemon, which wrote its pid into it
//!   catalog.redb  0600
//!   keys/         0700: keystore and root key
//!   audit/        0700: the audit log
//!   api.sock      0600
//!   run/          0711: one socket an attachment, each 0600 and owned by the VM's uid
//! ```
//!
//! An existing directory is taken only if it is the daemon's own and nobody else may write in it: who can, could put
//! keys, links and sockets of theirs there.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libvol::ids::AttachmentId;
use libvol::{Error, Result};
use rustix::fs::{FlockOperation, OFlags, flock};

use crate::process::{own_uid, path_error};

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one for the end.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// What an attachment's socket adds to the directory's path, the longest of all sockets: `/run/` 12 hex digits `.sock`.
const SOCKET_NAME_BYTES: usize = 5 + 12 + 5;

/// A locked data directory. The lock goes with the process, or with this value.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Takes the directory for a daemon: made and laid out where it is missing.
    ///
    /// # Errors
    /// `Busy` with the pid of who has it; `Invalid` when its path is too long for sockets; `Refused`, `ReadOnly`, `Io`.
    pub(crate) fn take(path: &Path) -> Result<Self> {
        make_dir(path, 0o711)?;
        let path = path
            .canonicalize()
            .map_err(|e| path_error(path, "cannot be resolved", e))?;
        let long = path.as_os_str().len();
        if long + SOCKET_NAME_BYTES > SOCKET_PATH_BYTES_MAX {
            return Err(Error::invalid(format!(
                "{}: {long} bytes are too long for the path of a data directory, {} are allowed (a Unix socket's path has at most {SOCKET_PATH_BYTES_MAX}); use a shorter --data-dir",
                path.display(),
                SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES
            )));
        }
        check_own(&path)?;
        let lock = lock(&path)?;
        for (name, mode) in [("keys", 0o700), ("run", 0o711), ("audit", 0o700)] {
            let dir = path.join(name);
            make_dir(&dir, mode)?;
            check_own(&dir)?;
        }
        Ok(Self { path, _lock: lock })
    }

    /// Refuses to begin anew where keys tell that there was a catalog: a fresh one would be another installation's, and every
    /// store would be a stranger to it. (A first start makes the catalog before the keystore.)
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn check_catalog_not_lost(&self) -> Result<()> {
        let catalog = self.catalog();
        if catalog.exists() || !self.has_keystore() {
            return Ok(());
        }
        Err(Error::not_found(format!(
            "{}: the catalog is not there, and the keystore beside it is; put the catalog back, or make a new one from \
             the stores: vold rebuild-catalog --data-dir {} --store PATH... (to begin with nothing, move the directory away)",
            catalog.display(),
            self.path.display()
        )))
    }

    /// Takes the existing directory of a stopped daemon, for an offline check.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Refused`.
    pub(crate) fn take_existing(path: &Path) -> Result<Self> {
        if !path.join("catalog.redb").exists() {
            return Err(Error::not_found(format!(
                "{}: not a vold data directory (no catalog.redb in it)",
                path.display()
            )));
        }
        check_own(path)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        })
    }

    /// Takes the directory of a stopped daemon whose catalog is to be rebuilt: its keys must be there.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `Refused`.
    pub(crate) fn take_for_rebuild(path: &Path) -> Result<Self> {
        let keystore = path.join("keys/keystore");
        if !keystore.exists() {
            return Err(Error::not_found(format!(
                "{}: there is no keystore; put DIR/keys back from a backup first, without it no volume can be opened",
                keystore.display()
            )));
        }
        check_own(path)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        })
    }

    /// Whether the keystore was ever made. Opening it would make an empty one.
    pub(crate) fn has_keystore(&self) -> bool {
        self.keys().join("keystore").exists()
    }

    /// The catalog's file.
    pub(crate) fn catalog(&self) -> PathBuf {
        self.path.join("catalog.redb")
    }

    /// The keystore's directory.
    pub(crate) fn keys(&self) -> PathBuf {
        self.path.join("keys")
    }

    /// The audit log's directory.
    pub(crate) fn audit(&self) -> PathBuf {
        self.path.join("audit")
    }

    /// The API's socket.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// Where an attachment's socket is, in every run. Derived, not recorded: the daemon of a copied directory must not touch
    /// the sockets of the original's.
    pub(crate) fn attachment_socket(&self, id: AttachmentId) -> PathBuf {
        let name = format!("{}.sock", &id.0.simple().to_string()[..12]);
        self.path.join("run").join(name)
    }

    /// Sockets in `DIR/run` now.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path.join("run")) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "sock"))
            .collect()
    }
}

/// Makes a directory, with that mode if it was missing; an existing one keeps its mode.
pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(|e| path_error(path, "the directory cannot be made", e))
}

/// Whether a directory is the daemon's own and closed to others' writes.
///
/// # Errors
/// `Refused`, with what to do.
pub(crate) fn check_own(dir: &Path) -> Result<()> {
    let facts = std::fs::metadata(dir).map_err(|e| path_error(dir, "cannot be looked at", e))?;
    match fault(facts.uid(), facts.mode(), own_uid()) {
        Some(fault) => Err(Error::refused(format!("{}: {fault}", dir.display()))),
        None => Ok(()),
    }
}

fn fault(owner: u32, mode: u32, own: u32) -> Option<String> {
    if owner != own {
        return Some(format!(
            "the directory belongs to uid {owner}, vold runs as uid {own}; chown it, or run vold as its owner"
        ));
    }
    (mode & 0o022 != 0).then(|| {
        format!(
            "others may write in the directory (mode {:o}); take that away: chmod go-w",
            mode & 0o7777
        )
    })
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(&path)
        .map_err(|e| path_error(&path, "the lock cannot be opened", e))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut pid = String::new();
        let _ = file.read_to_string(&mut pid);
        let holder = match pid.trim() {
            "" => "another vold".to_owned(),
            pid => format!("vold with pid {pid}"),
        };
        return Err(Error::busy(format!(
            "data directory {} is in use by {holder}; stop it first, or use another --data-dir",
            dir.display()
        )));
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(|e| path_error(&path, "the lock cannot be written", e))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::Kind;

    #[test]
    fn a_missing_directory_is_made_and_a_second_owner_is_refused_with_the_firsts_pid() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        let first = DataDir::take(&dir).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&first.keys())), (0o711, 0o700));
        let second = DataDir::take(&dir).err().unwrap();
        assert_eq!(second.kind(), Kind::Busy);
        assert!(
            second
                .to_string()
                .contains(&format!("pid {}", std::process::id())),
            "{second}"
        );
        drop(first);
        DataDir::take(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_in_or_own_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("d");
        let keys = DataDir::take(&dir).unwrap().keys();
        for (place, was) in [(dir.clone(), 0o711), (keys, 0o700), (dir.join("run"), 0o711)] {
            for mode in [0o777, 0o720, 0o702, 0o1777] {
                std::fs::set_permissions(&place, Permissions::from_mode(mode)).unwrap();
                let refusal = DataDir::take(&dir).err().expect("refused");
                assert_eq!(refusal.kind(), Kind::Refused, "{mode:o}");
                let words = [place.display().to_string(), "chmod go-w".to_owned()];
                assert!(
                    words.iter().all(|word| refusal.message().contains(word)),
                    "{refusal}"
                );
            }
            std::fs::set_permissions(&place, Permissions::from_mode(was)).unwrap();
        }
        DataDir::take(&dir).unwrap();
        let foreign = fault(1000, 0o700, 0).expect("root's daemon takes no user's directory");
        assert!(
            foreign.contains("uid 1000") && foreign.contains("uid 0"),
            "{foreign}"
        );
        assert!(fault(0, 0o700, 1000).is_some());
    }

    #[test]
    fn a_lock_that_is_a_link_is_not_followed() {
        let parent = tempfile::tempdir().unwrap();
        let (dir, elsewhere) = (parent.path().join("d"), parent.path().join("elsewhere"));
        drop(DataDir::take(&dir).unwrap());
        std::fs::write(&elsewhere, "kept").unwrap();
        std::fs::remove_file(dir.join("lock")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.join("lock")).unwrap();
        assert!(DataDir::take(&dir).is_err());
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "kept");
    }

    #[test]
    fn a_directory_too_long_for_its_sockets_is_refused_at_once_and_the_longest_allowed_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path().canonicalize().unwrap();
        let room = SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES - parent.as_os_str().len() - 1;
        let longest = DataDir::take(&parent.join("d".repeat(room))).unwrap();
        for socket in [
            longest.attachment_socket(AttachmentId::random()),
            longest.api_socket(),
        ] {
            drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        }
        let error = DataDir::take(&parent.join("d".repeat(room + 1))).err().unwrap();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.message().contains("shorter --data-dir"), "{error}");
    }
}
