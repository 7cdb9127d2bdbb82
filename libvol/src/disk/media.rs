//! What kind of medium lies under a store, as far as the system tells: does an overwrite land in place?
//!
//! [`classify`] gathers facts, layer by layer from the file down to the disks, and [`decide`], which is pure, weighs
//! them. The worst layer counts; what is not known to be in place is unknown. Below the last layer that the host sees
//! (the flash of a drive, the image behind a virtual disk) nothing can be told, and the reason says so.

mod facts;

use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};

use crate::disk::{Backing, DiskFile};
use facts::{Device, DeviceKind, FileSystem, Layer};

/// Whether overwriting a byte destroys its old value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediumClass {
    /// Writes land where the old bytes were, as far as the host can tell.
    InPlace,
    /// Copy-on-write, log-structured, journalled data, reflinked or thin.
    NotInPlace,
    /// Cannot be told.
    Unknown,
}

/// The finding with its reason, for `store show` and for what a destruction may claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// The class.
    pub class: MediumClass,
    /// One line: file system, flags, device stack.
    pub reason: String,
}

/// Looks at file system, file flags and device stack.
pub fn classify(file: &DiskFile) -> Medium {
    match file.backing() {
        Backing::Os(descriptor) => decide(&facts::layers(descriptor.as_fd(), file.is_direct())),
        Backing::Simulated(_) => Medium {
            class: MediumClass::InPlace,
            reason: "simulated disk".into(),
        },
    }
}

/// The class of the worst layer, and all layers in words.
fn decide(layers: &[Layer]) -> Medium {
    let judged: Vec<(MediumClass, String)> = layers.iter().map(judge).collect();
    let found = |class| judged.iter().any(|(judged, _)| *judged == class);
    let class = if found(MediumClass::NotInPlace) {
        MediumClass::NotInPlace
    } else if found(MediumClass::Unknown) || judged.is_empty() {
        MediumClass::Unknown
    } else {
        MediumClass::InPlace
    };
    let reason = match judged.is_empty() {
        true => "the system tells nothing about it".into(),
        false => judged
            .into_iter()
            .map(|(_, text)| text)
            .collect::<Vec<_>>()
            .join(" on "),
    };
    Medium { class, reason }
}

fn judge(layer: &Layer) -> (MediumClass, String) {
    match layer {
        Layer::FileSystem(file_system) => judge_file_system(file_system),
        Layer::Device(device) => judge_device(device),
        Layer::Unseen(why) => (MediumClass::Unknown, why.clone()),
    }
}

/// `FS_COMPR_FL`, `FS_JOURNAL_DATA_FL` and `FS_NOCOW_FL` of linux/fs.h.
const FLAG_COMPRESSED: u32 = 0x4;
const FLAG_JOURNAL_DATA: u32 = 0x4000;
const FLAG_NO_COW: u32 = 0x0080_0000;

/// By the magic numbers of statfs(2).
fn judge_file_system(facts: &FileSystem) -> (MediumClass, String) {
    use MediumClass::{InPlace, NotInPlace, Unknown};
    let flag = |bit| facts.flags.is_some_and(|flags| flags & bit != 0);
    let option = |wanted: &str| facts.options.split(',').any(|option| option == wanted);
    let (class, text) = match facts.magic {
        0xEF53 if option("data=journal") || flag(FLAG_JOURNAL_DATA) => {
            (NotInPlace, "ext4 (data=journal: contents go through the journal)")
        }
        0xEF53 => (InPlace, "ext4"),
        0x5846_5342 => match (facts.xfs_reflink, facts.shared_extents) {
            (Some(false), _) => (InPlace, "xfs (reflink=0)"),
            (_, Some(true)) => (NotInPlace, "xfs (shares extents with another file)"),
            (Some(true), _) => (
                Unknown,
                "xfs (reflink=1: any copy of the file may come to share its extents)",
            ),
            (None, _) => (Unknown, "xfs (reflink or not is not told)"),
        },
        0x9123_683E if flag(FLAG_NO_COW) && !flag(FLAG_COMPRESSED) => (
            Unknown,
            "btrfs (no copy-on-write for this file, but for snapshots)",
        ),
        0x9123_683E => (NotInPlace, "btrfs (copy-on-write)"),
        0x2FC1_2FC1 => (NotInPlace, "zfs (copy-on-write)"),
        0xCA45_1A4E => (NotInPlace, "bcachefs (copy-on-write)"),
        0xF2F5_2010 => (NotInPlace, "f2fs (log-structured)"),
        0x3434 => (NotInPlace, "nilfs2 (log-structured)"),
        0x2405_1905 => (NotInPlace, "ubifs (log-structured)"),
        0x4D44 => (InPlace, "vfat"),
        0x2011_BAB0 => (InPlace, "exfat"),
        0x794C_7630 => (Unknown, "overlayfs (the file system below is not told)"),
        0x0102_1994 => (Unknown, "tmpfs (memory, which may be swapped out)"),
        0x6969 => (Unknown, "nfs (what the server does is not told)"),
        0xFF53_4D42 | 0xFE53_4D42 => (Unknown, "smb (what the server does is not told)"),
        0x00C3_6400 => (Unknown, "cephfs (what the cluster does is not told)"),
        0x0102_1997 => (Unknown, "9p (what the host does is not told)"),
        0x6573_5546 => (Unknown, "fuse (what its server does is not told)"),
        magic => {
            return (
                Unknown,
                format!("a file system that vold does not know (magic {magic:#x})"),
            );
        }
    };
    match class {
        InPlace if flag(FLAG_COMPRESSED) => (NotInPlace, format!("{text} (compressed file)")),
        // A file system that buffers although it was asked not to has its reasons, most of them journals.
        InPlace if !facts.direct => (Unknown, format!("{text} (buffered: O_DIRECT refused)")),
        _ => (class, text.to_owned()),
    }
}

fn judge_device(device: &Device) -> (MediumClass, String) {
    use MediumClass::{InPlace, NotInPlace};
    let name = &device.name;
    match &device.kind {
        DeviceKind::Plain { zoned: true } => (NotInPlace, format!("{name} (zoned)")),
        DeviceKind::Plain { .. } => match remark_by_name(name) {
            Some((class, remark)) => (class, format!("{name} ({remark})")),
            None => (InPlace, name.clone()),
        },
        DeviceKind::Loop => (InPlace, format!("{name} (loop)")),
        DeviceKind::Md { level, journal: true } => (
            NotInPlace,
            format!("{name} (md {level} with a journal of contents)"),
        ),
        DeviceKind::Md { level, .. } => (InPlace, format!("{name} (md {level})")),
        DeviceKind::Mapper { uuid, below } => {
            let (class, what) = judge_mapper(uuid, below);
            (class, format!("{name} ({what})"))
        }
    }
}

fn remark_by_name(name: &str) -> Option<(MediumClass, &'static str)> {
    let by_prefix = [
        ("nbd", MediumClass::Unknown, "network block device"),
        ("rbd", MediumClass::Unknown, "network block device"),
        ("drbd", MediumClass::Unknown, "replicated by DRBD"),
        ("bcache", MediumClass::Unknown, "cached by bcache"),
        ("zram", MediumClass::NotInPlace, "compressed memory"),
        ("zd", MediumClass::NotInPlace, "zfs volume"),
        (
            "vd",
            MediumClass::InPlace,
            "virtual disk: what the hypervisor does below is not told",
        ),
        (
            "xvd",
            MediumClass::InPlace,
            "virtual disk: what the hypervisor does below is not told",
        ),
    ];
    by_prefix
        .into_iter()
        .find(|(prefix, ..)| name.starts_with(prefix))
        .map(|(_, class, remark)| (class, remark))
}

/// The device mapper names its devices' makers, and LVM its inner devices' parts, in their UUIDs. A thin volume stands
/// on a pool, a snapshot on its origin and its store of changes; those are told by the devices below.
fn judge_mapper(uuid: &str, below: &[String]) -> (MediumClass, &'static str) {
    use MediumClass::{InPlace, NotInPlace, Unknown};
    let any_below = |suffixes: &[&str]| {
        below
            .iter()
            .any(|uuid| suffixes.iter().any(|s| uuid.ends_with(s)))
    };
    if uuid.ends_with("-tpool") || any_below(&["-tpool"]) {
        return (NotInPlace, "thin volume");
    }
    if uuid.ends_with("-cow") || any_below(&["-cow", "-real"]) {
        return (NotInPlace, "volume with snapshots");
    }
    if uuid.starts_with("VDO-") || uuid.ends_with("-vpool") || any_below(&["-vpool"]) {
        return (NotInPlace, "deduplicated by VDO");
    }
    if any_below(&["-cpool", "-cvol", "-cdata", "-corig"]) {
        return (Unknown, "cached volume");
    }
    match uuid.split('-').next() {
        Some("LVM") => (InPlace, "LVM volume"),
        Some("CRYPT") => (InPlace, "dm-crypt"),
        Some("mpath") => (InPlace, "multipath"),
        Some(part) if part.starts_with("part") => (InPlace, "partition"),
        _ => (Unknown, "device-mapper device of unknown kind"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::disk::OpenMode;

    fn file_system(magic: u64) -> FileSystem {
        FileSystem {
            magic,
            options: "rw,relatime".into(),
            flags: Some(0x80000),
            direct: true,
            xfs_reflink: None,
            shared_extents: None,
        }
    }

    fn device(name: &str, kind: DeviceKind) -> Layer {
        Layer::Device(Device {
            name: name.into(),
            kind,
        })
    }

    fn plain(name: &str) -> Layer {
        device(name, DeviceKind::Plain { zoned: false })
    }

    fn mapper(uuid: &str, below: &[&str]) -> Layer {
        let below = below.iter().map(|uuid| (*uuid).to_owned()).collect();
        device(
            "dm-0",
            DeviceKind::Mapper {
                uuid: uuid.into(),
                below,
            },
        )
    }

    #[test]
    fn file_systems_are_judged_by_how_they_overwrite() {
        use MediumClass::{InPlace, NotInPlace, Unknown};
        let base = file_system;
        let journal = FileSystem {
            options: "rw,data=journal".into(),
            ..base(0xEF53)
        };
        let journal_flag = FileSystem {
            flags: Some(FLAG_JOURNAL_DATA),
            ..base(0xEF53)
        };
        let ordered = FileSystem {
            options: "rw,data=ordered".into(),
            ..base(0xEF53)
        };
        let buffered = FileSystem {
            direct: false,
            ..base(0xEF53)
        };
        let xfs = |reflink, shared| FileSystem {
            xfs_reflink: reflink,
            shared_extents: shared,
            ..base(0x5846_5342)
        };
        let no_cow = FileSystem {
            flags: Some(FLAG_NO_COW),
            ..base(0x9123_683E)
        };
        let no_cow_compressed = FileSystem {
            flags: Some(FLAG_NO_COW | FLAG_COMPRESSED),
            ..base(0x9123_683E)
        };
        let table = [
            (base(0xEF53), InPlace),
            (ordered, InPlace),
            (journal, NotInPlace),
            (journal_flag, NotInPlace),
            (buffered, Unknown),
            (xfs(None, None), Unknown),
            (xfs(None, Some(true)), NotInPlace),
            (xfs(Some(true), Some(false)), Unknown),
            (xfs(Some(true), Some(true)), NotInPlace),
            (xfs(Some(false), Some(false)), InPlace),
            (base(0x9123_683E), NotInPlace),
            (no_cow, Unknown),
            (no_cow_compressed, NotInPlace),
            (base(0x2FC1_2FC1), NotInPlace),
            (base(0xCA45_1A4E), NotInPlace),
            (base(0xF2F5_2010), NotInPlace),
            (base(0x794C_7630), Unknown),
            (base(0x0102_1994), Unknown),
            (base(0x6969), Unknown),
            (base(0xDEAD_BEEF), Unknown),
        ];
        for (facts, class) in table {
            let shown = format!("{facts:?}");
            let medium = decide(&[Layer::FileSystem(facts)]);
            assert_eq!(medium.class, class, "{shown}: {}", medium.reason);
            assert!(!medium.reason.contains('\n'));
        }
    }

    #[test]
    fn devices_are_judged_by_kind_and_by_what_they_stand_on() {
        use MediumClass::{InPlace, NotInPlace, Unknown};
        let md = |journal| {
            let level = "raid1".to_owned();
            device("md0", DeviceKind::Md { level, journal })
        };
        let table = [
            (plain("sda1"), InPlace),
            (plain("nvme0n1"), InPlace),
            (plain("vda"), InPlace),
            (device("sdz", DeviceKind::Plain { zoned: true }), NotInPlace),
            (plain("nbd3"), Unknown),
            (plain("zd16"), NotInPlace),
            (device("loop7", DeviceKind::Loop), InPlace),
            (md(false), InPlace),
            (md(true), NotInPlace),
            (mapper("LVM-abc", &[]), InPlace),
            (mapper("LVM-abc", &["LVM-pool-tpool"]), NotInPlace),
            (mapper("LVM-abc", &["LVM-x-real", "LVM-x-cow"]), NotInPlace),
            (mapper("LVM-abc", &["LVM-x-cpool", "LVM-x-corig"]), Unknown),
            (mapper("CRYPT-LUKS2-abc", &[]), InPlace),
            (mapper("part1-mpath-abc", &["mpath-abc"]), InPlace),
            (mapper("", &[]), Unknown),
        ];
        for (layer, class) in table {
            let shown = format!("{layer:?}");
            let medium = decide(&[layer]);
            assert_eq!(medium.class, class, "{shown}: {}", medium.reason);
        }
    }

    #[test]
    fn the_worst_layer_counts_and_the_reason_names_them_all() {
        let good = Layer::FileSystem(file_system(0xEF53));
        let stack = [good, mapper("LVM-a", &["LVM-p-tpool"]), plain("sda")];
        let medium = decide(&stack);
        assert_eq!(medium.class, MediumClass::NotInPlace);
        assert_eq!(medium.reason, "ext4 on dm-0 (thin volume) on sda");
        let unseen = [plain("sda"), Layer::Unseen("a backing file out of sight".into())];
        assert_eq!(decide(&unseen).class, MediumClass::Unknown);
        assert_eq!(decide(&[]).class, MediumClass::Unknown);
    }

    #[test]
    fn a_real_file_gets_a_finding_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(DiskFile::create(&path, 1 << 20, true).unwrap());
        let file = DiskFile::open(&path, OpenMode::ReadOnly, true, Duration::ZERO).unwrap();
        let medium = classify(&file);
        let Backing::Os(descriptor) = file.backing() else {
            panic!("a real file")
        };
        let magic = rustix::fs::fstatfs(descriptor).unwrap().f_type;
        assert!(!medium.reason.is_empty());
        if magic == 0xEF53 {
            assert!(medium.reason.starts_with("ext4"), "{medium:?}");
        }
        println!("{medium:?}");
    }
}
