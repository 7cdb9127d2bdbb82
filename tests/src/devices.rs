//! Loop devices: block devices that any machine has.

use std::path::{Path, PathBuf};

use crate::tools::{fail_hint, tool};

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
