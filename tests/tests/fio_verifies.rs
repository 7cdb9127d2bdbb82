//! fio's nbd engine writes checksummed blocks at random and finds every one of them again.

use vold_tests::tools::{succeed, tool};
use vold_tests::{Setup, on_every_setup, scale};

on_every_setup!(fixed_block_sizes_from_a_sector_to_a_mebibyte_verify);
on_every_setup!(mixed_and_unaligned_block_sizes_verify);
on_every_setup!(several_jobs_over_connections_of_their_own_verify);

fn fio(directory: &std::path::Path, uri: &str, options: &[&str]) {
    let mut fio = tool("fio");
    fio.current_dir(directory)
        .args([
            "--name=verify",
            "--ioengine=nbd",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--randrepeat=0",
            "--output-format=terse",
        ])
        .arg(format!("--uri={uri}"));
    succeed(fio.args(options));
}

fn fixed_block_sizes_from_a_sector_to_a_mebibyte_verify(setup: Setup) {
    let (vold, uri) = setup.volume("64M");
    for (block, size) in [
        ("512", scale("1M", "16M")),
        ("4k", scale("8M", "64M")),
        ("20k", scale("8M", "64M")),
        ("1M", scale("32M", "64M")),
    ] {
        fio(
            vold.path("").as_path(),
            &uri,
            &[
                "--rw=randrw",
                "--iodepth=32",
                "--fsync=64",
                &format!("--bs={block}"),
                &format!("--size={size}"),
            ],
        );
    }
}

/// (Fully random offsets with a mixture of reads confuse fio's own bookkeeping: it then also fails against memory. So reads
/// are mixed in where blocks do not overlap, and writes may begin anywhere. Of overlapping writes in flight at once either
/// may come last, in parts, so fio is told to keep one back.)
fn mixed_and_unaligned_block_sizes_verify(setup: Setup) {
    let (vold, uri) = setup.volume("64M");
    let size = scale("--size=12M", "--size=64M");
    for options in [
        &["--rw=randrw", "--bsrange=512-1M", "--bs_unaligned"][..],
        &[
            "--rw=randwrite",
            "--bsrange=512-1M",
            "--bs_unaligned",
            "--blockalign=1",
            "--serialize_overlap=1",
        ],
        &["--rw=randrw", "--bs=4999"],
        &["--rw=randrw", "--bs=777", "--io_size=2M"],
    ] {
        let mut all = vec!["--iodepth=16", size];
        all.extend(options);
        fio(vold.path("").as_path(), &uri, &all);
    }
}

fn several_jobs_over_connections_of_their_own_verify(setup: Setup) {
    let (vold, uri) = setup.volume("64M");
    // Again and again, not with fio's loops: from the second one on it expects blocks that it has not written yet, also of
    // nbdkit's memory.
    for _ in 0..scale(1, 8) {
        fio(
            vold.path("").as_path(),
            &uri,
            &[
                "--rw=randrw",
                "--numjobs=4",
                "--iodepth=16",
                "--bssplit=512/20:4k/50:64k/30",
                "--size=8M",
                "--offset_increment=16M",
            ],
        );
    }
}
