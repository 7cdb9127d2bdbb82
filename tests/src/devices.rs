//! Loop devices, the block devices that any machine has, and file systems mounted from them.

use std::path::{Path, PathBuf};

use crate::tools::{fail_hint, succeed, tool};

/// A loop device over a file; detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Over `file`.
    ///
    /// # Panics
    /// When loop devices are refused, with what is needed.
    pub fn over(file: &Path) -> Self {
        Self::with(file, &["--direct-io=on"])
    }

    /// One that may not be written.
    ///
    /// # Panics
    /// As [`Self::over`].
    pub fn read_only_over(file: &Path) -> Self {
        Self::with(file, &["--read-only"])
    }

    fn with(file: &Path, options: &[&str]) -> Self {
        let output = tool("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output()
            .expect("losetup starts");
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(
            output.status.success(),
            "{}",
            fail_hint(
                "losetup",
                &output,
                "block devices are tested on loop devices: run as root with /dev/loop-control present"
            )
        );
        Self(path.into())
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = tool("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// An ext4 file system of its own on a loop device, mounted; unmounted when dropped.
pub struct Mounted {
    device: LoopDevice,
    directory: PathBuf,
}

impl Mounted {
    /// Makes a file of `bytes` at `image`, a file system in it, and mounts that at `directory`, which is made too.
    ///
    /// # Panics
    /// When loop devices or mounts are refused, with what is needed.
    pub fn new(image: &Path, bytes: u64, directory: &Path) -> Self {
        std::fs::File::create(image)
            .and_then(|file| file.set_len(bytes))
            .expect("the image's file");
        std::fs::create_dir(directory).expect("the mount point");
        let device = LoopDevice::over(image);
        succeed(tool("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(device.path()));
        let mounted = Self {
            device,
            directory: directory.to_owned(),
        };
        mounted.mount(&[]);
        mounted
    }

    /// The device that is mounted.
    pub fn device(&self) -> &Path {
        self.device.path()
    }

    /// Mounts it anew, writable or not. Nothing may be open in it.
    ///
    /// # Panics
    /// When it cannot be.
    pub fn remount(&self, read_only: bool) {
        self.mount(&["-o", if read_only { "remount,ro" } else { "remount,rw" }]);
    }

    /// Holds back whoever writes in it, until the value is dropped.
    ///
    /// # Panics
    /// When it cannot be frozen.
    pub fn freeze(&self) -> Frozen {
        succeed(tool("fsfreeze").arg("--freeze").arg(&self.directory));
        Frozen(self.directory.clone())
    }

    fn mount(&self, options: &[&str]) {
        let output = tool("mount")
            .args(options)
            .arg(self.device.path())
            .arg(&self.directory)
            .output()
            .expect("mount starts");
        assert!(
            output.status.success(),
            "{}",
            fail_hint("mount", &output, "mounted file systems are tested as root only")
        );
    }
}

/// A file system that holds its writers back.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = tool("fsfreeze").arg("--unfreeze").arg(&self.0).status();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tool("umount").arg(&self.directory).status();
    }
}
