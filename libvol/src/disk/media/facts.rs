//! Gathers what the system tells about a file and the devices below it. Judges nothing; what cannot be read is left
//! open or reported as unseen.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat, fstatfs};

/// Layers looked at, over all branches: deeper stacks than that are not built by hand, only by loops.
const LAYERS_MAX: usize = 32;

/// One layer of a stack, from the file down.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    FileSystem(FileSystem),
    Device(Device),
    /// Something is there that cannot be looked at; the text says what.
    Unseen(String),
}

/// A file system, as seen from one file on it.
#[derive(Clone, Debug)]
pub(super) struct FileSystem {
    /// `f_type` of statfs(2).
    pub(super) magic: u64,
    /// Mount options, separated by commas.
    pub(super) options: String,
    /// Flags of the file (`FS_IOC_GETFLAGS`), where there are such.
    pub(super) flags: Option<u32>,
    /// Whether the file's I/O bypasses the page cache.
    pub(super) direct: bool,
    /// Whether an XFS was made with reflink=1.
    pub(super) xfs_reflink: Option<bool>,
    /// Whether the file shares any extent with another.
    pub(super) shared_extents: Option<bool>,
}

/// A block device.
#[derive(Clone, Debug)]
pub(super) struct Device {
    /// The kernel's name.
    pub(super) name: String,
    pub(super) kind: DeviceKind,
}

#[derive(Clone, Debug)]
pub(super) enum DeviceKind {
    /// A disk or partition: nothing known below.
    Plain { zoned: bool },
    /// The file behind it is the next layer.
    Loop,
    Md {
        level: String,
        /// RAID 5/6 with a device that holds contents before they go to their places.
        journal: bool,
    },
    /// Device mapper, with the UUIDs of the mapper devices right below.
    Mapper { uuid: String, below: Vec<String> },
}

/// All layers under an open file or block device.
pub(super) fn layers(file: BorrowedFd<'_>, direct: bool) -> Vec<Layer> {
    let mut layers = Vec::new();
    add_file(file, direct, &mut layers);
    layers
}

fn add_file(file: BorrowedFd<'_>, direct: bool, layers: &mut Vec<Layer>) {
    let Ok(stat) = fstat(file) else {
        layers.push(Layer::Unseen("a file that cannot be examined".into()));
        return;
    };
    if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        add_device(stat.st_rdev, layers);
        return;
    }
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let magic = fstatfs(file).map_or(0, |fs| fs.f_type.cast_unsigned());
    let mut options = std::fs::read_to_string("/proc/self/mountinfo")
        .ok()
        .and_then(|mounts| mount_options(&mounts, major, minor))
        .unwrap_or_default();
    // Defaults from the superblock show only here.
    if let Some(name) = device_path(stat.st_dev).and_then(|path| name_of(&path))
        && let Ok(lines) = std::fs::read_to_string(format!("/proc/fs/ext4/{name}/options"))
    {
        options.extend(lines.lines().flat_map(|line| [",", line]));
    }
    layers.push(Layer::FileSystem(FileSystem {
        magic,
        options,
        flags: rustix::fs::ioctl_getflags(file).ok().map(|flags| flags.bits()),
        direct,
        xfs_reflink: xfs_reflink(file),
        shared_extents: shares_extents(file),
    }));
    // Major 0: no block device of its own (btrfs, overlay, network, memory).
    if major != 0 {
        add_device(stat.st_dev, layers);
    }
}

fn add_device(device: u64, layers: &mut Vec<Layer>) {
    if layers.len() >= LAYERS_MAX {
        layers.push(Layer::Unseen("a stack of devices too deep to follow".into()));
        return;
    }
    let found = device_path(device).and_then(|path| Some((name_of(&path)?, path)));
    let Some((name, path)) = found else {
        layers.push(Layer::Unseen("a device that sysfs does not show".into()));
        return;
    };
    let read = |attribute: &str| {
        std::fs::read_to_string(path.join(attribute))
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let below = slaves(&path);
    let mut backing_file = None;
    let kind = if let Some(file) = read("loop/backing_file") {
        backing_file = Some(file);
        DeviceKind::Loop
    } else if let Some(level) = read("md/level") {
        let journal = read("md/journal_mode").is_some_and(|mode| !mode.is_empty());
        DeviceKind::Md { level, journal }
    } else if let Some(uuid) = read("dm/uuid") {
        let uuid_of = |path: &PathBuf| std::fs::read_to_string(path.join("dm/uuid")).ok();
        let below = below
            .iter()
            .filter_map(uuid_of)
            .map(|uuid| uuid.trim().to_owned());
        DeviceKind::Mapper {
            uuid,
            below: below.collect(),
        }
    } else {
        // A partition has no queue of its own; its disk, the directory above, has.
        let zoned = read("queue/zoned").or_else(|| read("../queue/zoned"));
        DeviceKind::Plain {
            zoned: zoned.is_some_and(|model| model != "none"),
        }
    };
    layers.push(Layer::Device(Device { name, kind }));
    if let Some(backing_file) = backing_file {
        match File::open(&backing_file) {
            Ok(file) => add_file(file.as_fd(), true, layers),
            Err(_) => layers.push(Layer::Unseen("a backing file out of sight".into())),
        }
    }
    for path in below {
        match device_number(&path) {
            Some(device) => add_device(device, layers),
            None => layers.push(Layer::Unseen("a device that sysfs does not show".into())),
        }
    }
}

fn device_path(device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

fn name_of(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

/// The devices that a stacked device stands on; none for others. A partition stands on what its disk stands on.
fn slaves(path: &Path) -> Vec<PathBuf> {
    let disk = match path.join("partition").exists() {
        true => path.join(".."),
        false => path.to_owned(),
    };
    let Ok(entries) = std::fs::read_dir(disk.join("slaves")) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries
        .filter_map(|entry| std::fs::canonicalize(entry.ok()?.path()).ok())
        .collect();
    paths.sort();
    paths
}

fn device_number(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(path.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// The options of a mount of the device, from the text of /proc/self/mountinfo (proc(5)): field 3 is the device, field
/// 6 holds the mount's options, and the last field the file system's.
fn mount_options(mountinfo: &str, major: u32, minor: u32) -> Option<String> {
    let device = format!("{major}:{minor}");
    let line = mountinfo
        .lines()
        .rfind(|line| line.split(' ').nth(2) == Some(device.as_str()))?;
    let mount = line.split(' ').nth(5)?;
    let file_system = line.rsplit(' ').next()?;
    Some(format!("{mount},{file_system}"))
}

/// `XFS_IOC_FSGEOMETRY_V4`, `_IOR('X', 124, 112 bytes)`: refused by every other file system.
fn xfs_reflink(file: BorrowedFd<'_>) -> Option<bool> {
    const FSGEOMETRY_V4: libc::c_ulong = (2 << 30) | (112 << 16) | (0x58 << 8) | 124;
    /// Eight 32-bit numbers, four 64-bit numbers, a UUID, and three 32-bit numbers come before the flags.
    const FLAGS_WORD: usize = (8 * 4 + 4 * 8 + 16 + 3 * 4) / 4;
    const FLAG_REFLINK: u32 = 1 << 20;
    let mut geometry = [0u64; 14];
    // SAFETY: the ioctl's number holds its size, 112 bytes, and geometry has as many, aligned for the largest field.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            FSGEOMETRY_V4 as libc::Ioctl,
            geometry.as_mut_ptr(),
        )
    };
    let bytes = geometry[FLAGS_WORD / 2].to_ne_bytes();
    let at = FLAGS_WORD % 2 * 4;
    let flags = u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    (result == 0).then_some(flags & FLAG_REFLINK != 0)
}

/// Walks the extents of the file (`FS_IOC_FIEMAP`, linux/fiemap.h) until a shared one or the end.
fn shares_extents(file: BorrowedFd<'_>) -> Option<bool> {
    const EXTENTS: usize = 64;
    /// 64 extents a call: a file of four million extents is told as unknown rather than walked for ever.
    const CALLS_MAX: usize = 1 << 16;
    const FIEMAP: libc::c_ulong = (3 << 30) | (32 << 16) | (0x66 << 8) | 11;
    const EXTENT_LAST: u32 = 0x1;
    const EXTENT_SHARED: u32 = 0x2000;

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Extent {
        logical: u64,
        physical: u64,
        length: u64,
        reserved64: [u64; 2],
        flags: u32,
        reserved: [u32; 3],
    }
    #[repr(C)]
    struct Map {
        start: u64,
        length: u64,
        flags: u32,
        mapped_extents: u32,
        extent_count: u32,
        reserved: u32,
        extents: [Extent; EXTENTS],
    }

    let mut start = 0;
    for _ in 0..CALLS_MAX {
        let mut map = Map {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: the kernel reads the header and writes at most extent_count extents behind it, all of which is in map.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP as libc::Ioctl, &raw mut map) };
        if result != 0 {
            return None;
        }
        let mapped = &map.extents[..(map.mapped_extents as usize).min(EXTENTS)];
        if mapped.iter().any(|extent| extent.flags & EXTENT_SHARED != 0) {
            return Some(true);
        }
        match mapped.last() {
            Some(last) if last.flags & EXTENT_LAST == 0 => start = last.logical + last.length,
            _ => return Some(false),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_are_those_of_the_device() {
        let mountinfo = "\
            22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,data=journal\n\
            30 22 0:26 / /tmp rw,nosuid - tmpfs tmpfs rw,size=1g\n\
            31 22 254:11 / /srv ro shared:7 master:1 - xfs /dev/vdb rw,attr2\n";
        assert_eq!(
            mount_options(mountinfo, 254, 1).as_deref(),
            Some("rw,relatime,rw,data=journal")
        );
        assert_eq!(mount_options(mountinfo, 254, 11).as_deref(), Some("ro,rw,attr2"));
        assert_eq!(mount_options(mountinfo, 8, 0), None);
        assert_eq!(mount_options("garbage\n\n1 2", 1, 2), None);
    }

    #[test]
    fn a_plain_file_is_no_xfs_with_reflinks_unless_it_is_on_one() {
        let file = tempfile::tempfile().unwrap();
        let magic = fstatfs(&file).unwrap().f_type;
        if magic != 0x5846_5342 {
            assert_eq!(xfs_reflink(file.as_fd()), None);
        }
        assert_ne!(shares_extents(file.as_fd()), Some(true));
    }
}
