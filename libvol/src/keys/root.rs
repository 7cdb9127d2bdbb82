//! The root key file: 32 random bytes, mode 0600, owned by whom the daemon runs as.
//!
//! It is the one secret that rests on a disk unwrapped; everything else in the keystore is wrapped under it. A file that
//! others could read, or that cannot be a root key, is refused rather than repaired.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::secret::Secret;

const ROOT_KEY_BYTES: u64 = 32;

/// Makes a new key file, which must not exist, and makes it durable (its directory is the caller's to sync).
pub(crate) fn create(path: &Path) -> Result<Secret<32>> {
    let failed = |e| Error::with_source(Kind::Io, format!("cannot write root key {}", path.display()), e);
    let key = Secret::random()?;
    // create_new is O_EXCL: never through a link, never over another key.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.write_all(key.expose())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    Ok(key)
}

/// Reads a key file.
///
/// # Errors
/// `NotFound` when there is none; `Refused` when it is not a regular file of ours that only we can read; `Damaged` when
/// its length is wrong; `Io`.
pub(crate) fn load(path: &Path) -> Result<Secret<32>> {
    let shown = path.display();
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| match (e.kind(), e.raw_os_error()) {
            (ErrorKind::NotFound, _) => Error::not_found(format!("there is no root key {shown}")),
            (_, Some(libc::ELOOP)) => Error::refused(format!(
                "root key {shown} is a symbolic link; put the file itself there"
            )),
            _ => Error::with_source(Kind::Io, format!("cannot open root key {shown}"), e),
        })?;
    check_file(&file, path)?;
    let mut key = Secret::zeroed()?;
    file.read_exact(key.expose_mut())
        .map_err(|e| Error::with_source(Kind::Io, format!("cannot read root key {shown}"), e))?;
    Ok(key)
}

fn check_file(file: &File, path: &Path) -> Result<()> {
    let shown = path.display();
    let meta = file
        .metadata()
        .map_err(|e| Error::with_source(Kind::Io, format!("cannot examine root key {shown}"), e))?;
    if !meta.is_file() {
        return Err(Error::refused(format!("root key {shown} is not a regular file")));
    }
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us {
        return Err(Error::refused(format!(
            "root key {shown} belongs to uid {}, vold runs as uid {us}; chown it, or run vold as its owner",
            meta.uid()
        )));
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::refused(format!(
            "root key {shown} has mode {mode:04o}, so that others may reach it; chmod 600 it, and if they may have \
             read it, treat every key under it as known"
        )));
    }
    if meta.len() != ROOT_KEY_BYTES {
        return Err(Error::damaged(format!(
            "root key {shown} has {} bytes, a root key has {ROOT_KEY_BYTES}; put back the right file",
            meta.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn key_file() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.key");
        create(&path).unwrap();
        (dir, path)
    }

    #[test]
    fn a_new_root_key_is_random_32_bytes_of_mode_0600_and_loads_again() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (key_a, key_b) = (create(&a).unwrap(), create(&b).unwrap());
        assert_ne!(key_a.expose(), key_b.expose());
        assert_eq!(load(&a).unwrap().expose(), key_a.expose());
        let meta = std::fs::metadata(&a).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777), (32, 0o600));
    }

    #[test]
    fn an_existing_file_is_never_overwritten_by_a_new_key() {
        let (_dir, path) = key_file();
        let before = std::fs::read(&path).unwrap();
        assert_eq!(create(&path).err().unwrap().kind(), Kind::Io);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_key_that_others_can_reach_is_refused_with_the_remedy() {
        let (_dir, path) = key_file();
        for mode in [0o640, 0o604, 0o660, 0o601] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = load(&path).err().unwrap();
            assert_eq!(error.kind(), Kind::Refused);
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        load(&path).unwrap();
    }

    #[test]
    fn a_key_of_another_owner_is_refused() {
        let (_dir, path) = key_file();
        if !rustix::process::geteuid().is_root() {
            // Only root can give a file away. An owner's refusal needs a file of someone else's: the password file is one.
            let error = load(Path::new("/etc/passwd")).err().unwrap();
            assert_eq!(error.kind(), Kind::Refused);
            return;
        }
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        let error = load(&path).err().unwrap();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.to_string().contains("uid 12345"), "{error}");
    }

    #[test]
    fn a_missing_short_long_linked_or_special_file_is_an_error_that_names_it() {
        let (dir, path) = key_file();
        let at = |name: &str| dir.path().join(name);
        let sized = |name: &str, len: usize| {
            std::fs::write(at(name), vec![1; len]).unwrap();
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        sized("empty", 0);
        sized("short", 31);
        sized("long", 33);
        std::os::unix::fs::symlink(&path, at("link")).unwrap();
        std::fs::create_dir(at("directory")).unwrap();
        for (name, kind) in [
            ("missing", Kind::NotFound),
            ("empty", Kind::Damaged),
            ("short", Kind::Damaged),
            ("long", Kind::Damaged),
            ("link", Kind::Refused),
            ("directory", Kind::Refused),
        ] {
            let error = load(&at(name)).err().unwrap();
            assert_eq!(error.kind(), kind, "{name}: {error}");
            assert!(
                error.to_string().contains(&at(name).display().to_string()),
                "{error}"
            );
        }
    }
}
