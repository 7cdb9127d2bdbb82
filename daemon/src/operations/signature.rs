//! Recognises what is on a block device, so that `store add` does not overwrite somebody's data. Pure.

/// Bytes from the start of a device that [`recognise`] wants to see: up to btrfs's superblock.
pub(super) const PROBE_BYTES: usize = 68 << 10;

/// Magic numbers and where they are, from each format's own description.
const SIGNATURES: &[(&str, usize, &[u8])] = &[
    ("a vold store", 0, b"VOLDSUPR"),
    ("an ext2/3/4 file system", 1080, &[0x53, 0xef]),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 65600, b"_BHRfS_M"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an LVM physical volume", 536, b"LVM2 001"),
    ("a Linux RAID member", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a bcachefs or bcache device", 4120, &[0xc6, 0x85, 0x73, 0xf6]),
    ("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("a SquashFS file system", 0, b"hsqs"),
    ("a partition table or boot sector", 510, &[0x55, 0xaa]),
];

/// What the first bytes of a device say it holds.
pub(super) fn recognise(start: &[u8]) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|(_, at, magic)| start.get(*at..at + magic.len()) == Some(*magic))
        .map(|(what, ..)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signature_is_recognised_within_the_probe_and_zeros_are_nothing() {
        assert_eq!(recognise(&vec![0; PROBE_BYTES]), None);
        assert_eq!(recognise(&[]), None);
        for (what, at, magic) in SIGNATURES {
            let mut start = vec![0; PROBE_BYTES];
            start[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(recognise(&start), Some(*what));
        }
    }
}
