//! Creating a volume costs the same whatever its size.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use vold_tests::Vold;

/// Bytes that the daemon has caused to be written to disks so far.
fn written(vold: &Vold) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{}/io", vold.pid())).expect("own child");
    io.lines()
        .find_map(|line| line.strip_prefix("write_bytes: "))
        .expect("a line of proc_pid_io(5)")
        .parse()
        .expect("a number")
}

/// A checksum for each block of a file.
fn blocks(path: &Path) -> Vec<u32> {
    let mut file = File::open(path).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes.chunks(4096).map(crc32c::crc32c).collect()
}

#[test]
fn a_volume_of_64_tib_writes_no_more_at_its_creation_than_one_of_4_kib() {
    let vold = Vold::start();
    vold.add_stores(&["a"], "128M");
    vold.ctl("customer create acme");
    let store = vold.store_path("a");
    // Blocks of the store that a creation changes, and all that the daemon writes for it, catalog included.
    let cost = |name: &str, size: &str| {
        let (before, bytes) = (blocks(&store), written(&vold));
        let volume = vold.ctl(&format!("volume create acme/{name} --size {size}"));
        assert_eq!(volume["allocated_bytes"], 0);
        let bytes = written(&vold) - bytes;
        let changed = blocks(&store).iter().zip(&before).filter(|(a, b)| a != b).count();
        (changed, bytes)
    };
    cost("first", "1M");
    let small = ["s1", "s2", "s3"].map(|name| cost(name, "4K"));
    let huge = ["h1", "h2", "h3"].map(|name| cost(name, "64T"));
    println!("blocks changed, bytes written: 4 KiB {small:?}, 64 TiB {huge:?}");
    let changed = |costs: [(usize, u64); 3]| costs.map(|(changed, _)| changed);
    assert_eq!(changed(small), changed(huge));
    // The catalog's B-trees split now and then; a map of 16 Mi extents would be megabytes at one bit each.
    let least = |costs: [(usize, u64); 3]| costs.map(|(_, bytes)| bytes).into_iter().min().unwrap();
    assert!(
        least(huge) <= least(small) + (256 << 10),
        "4 KiB {small:?}, 64 TiB {huge:?}"
    );
}
