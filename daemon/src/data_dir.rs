//! The data directory: where things lie in it, who may enter, and the lock that keeps a second daemon out.
//!
//! ```text
//! DIR/            0711: VMs' processes pass through to their sockets, and can neither list it nor read a file
//!   lock          flock of the running daemon, which wrote its pid into it
//!   catalog.redb  0600
//!   keys/         0700: keystore and root key
//!   api.sock      0600
//!   run/          0711: one socket an attachment, each 0600 and owned by the VM's uid
//! ```

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libvol::ids::{AttachmentId, InstallationId};
use libvol::{Error, Result};
use rustix::fs::{FlockOperation, flock};

use crate::process::path_error;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one for the end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A locked data directory. The lock goes with the process, or with this value.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Takes the directory for a daemon: made and laid out where it is missing.
    ///
    /// # Errors
    /// `Busy` with the pid of who has it; `Refused`, `ReadOnly`, `Io`.
    pub(crate) fn take(path: &Path) -> Result<Self> {
        make_dir(path, 0o711)?;
        let path = path
            .canonicalize()
            .map_err(|e| path_error(path, "cannot be resolved", e))?;
        let lock = lock(&path)?;
        make_dir(&path.join("keys"), 0o700)?;
        let run = path.join("run");
        make_dir(&run, 0o711)?;
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
            "{}: the catalog is not there, and the keystore beside it is; put the catalog back, or make a new one from the              stores: vold rebuild-catalog --data-dir {} --store PATH... (to begin with nothing, move the directory away)",
            catalog.display(),
            self.path.display()
        )))
    }

    /// Takes the existing directory of a stopped daemon, for an offline check.
    ///
    /// # Errors
    /// `NotFound`, `Busy`.
    pub(crate) fn take_existing(path: &Path) -> Result<Self> {
        if !path.join("catalog.redb").exists() {
            return Err(Error::not_found(format!(
                "{}: not a vold data directory (no catalog.redb in it)",
                path.display()
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        })
    }

    /// Takes the directory of a stopped daemon whose catalog is to be rebuilt: its keys must be there.
    ///
    /// # Errors
    /// `NotFound`, `Busy`.
    pub(crate) fn take_for_rebuild(path: &Path) -> Result<Self> {
        let keystore = path.join("keys/keystore");
        if !keystore.exists() {
            return Err(Error::not_found(format!(
                "{}: there is no keystore; put DIR/keys back from a backup first, without it no volume can be opened",
                keystore.display()
            )));
        }
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

    /// The API's socket.
    ///
    /// # Errors
    /// `Invalid` when the path is too long for a socket.
    pub(crate) fn api_socket(&self) -> Result<PathBuf> {
        let path = self.path.join("api.sock");
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Error::invalid(format!(
                "{}: the path is longer than the {SOCKET_PATH_BYTES_MAX} bytes a Unix socket may have; use a shorter --data-dir",
                path.display()
            )));
        }
        Ok(path)
    }

    /// Where an attachment's socket is, in every run: `DIR/run`, or, where that is too long, a directory of this
    /// installation under `/run` (root) or `$XDG_RUNTIME_DIR`. Derived, not recorded: the daemon of a copied directory
    /// must not touch the sockets of the original's.
    ///
    /// # Errors
    /// `Invalid` when every place is too long; `Io`.
    pub(crate) fn attachment_socket(
        &self,
        installation: InstallationId,
        id: AttachmentId,
    ) -> Result<PathBuf> {
        let name = format!("{}.sock", &id.0.simple().to_string()[..12]);
        let near = self.path.join("run").join(&name);
        if near.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return Ok(near);
        }
        let base = if crate::process::own_uid() == 0 {
            Some(PathBuf::from("/run"))
        } else {
            std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)
        };
        let far = base.map(|base| {
            base.join(format!("vold-{}", &installation.0.simple().to_string()[..12]))
                .join(&name)
        });
        match far {
            Some(far) if far.as_os_str().len() <= SOCKET_PATH_BYTES_MAX => Ok(far),
            _ => Err(Error::invalid(format!(
                "{}: longer than the {SOCKET_PATH_BYTES_MAX} bytes a Unix socket's path may have; use a shorter --data-dir",
                near.display()
            ))),
        }
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

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
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
    fn a_socket_of_a_long_directory_moves_elsewhere_or_is_refused_never_cut() {
        let parent = tempfile::tempdir().unwrap();
        let short = DataDir::take(parent.path()).unwrap();
        let (installation, id) = (InstallationId::random(), AttachmentId::random());
        let near = short.attachment_socket(installation, id).unwrap();
        assert!(near.starts_with(short.path.join("run")));
        let long = DataDir::take(&parent.path().join("d".repeat(120))).unwrap();
        assert_eq!(long.api_socket().unwrap_err().kind(), Kind::Invalid);
        if let Ok(far) = long.attachment_socket(installation, id) {
            assert!(far.as_os_str().len() <= SOCKET_PATH_BYTES_MAX);
        }
    }
}
