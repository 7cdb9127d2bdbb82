//! QEMU's programs: qemu-img converts, compares, maps and benches; qemu-io writes and verifies patterns.

use serde_json::Value;
use vold_tests::content::sparse_file;
use vold_tests::tools::{fail, run, tool};
use vold_tests::{Setup, on_every_setup, scale};

on_every_setup!(qemu_img_converts_in_and_out_and_compares_equal);
on_every_setup!(qemu_img_sees_holes_as_zeros_and_benches_reads_and_writes);
on_every_setup!(qemu_io_finds_every_pattern_where_it_was_written);

fn qemu_img_converts_in_and_out_and_compares_equal(setup: Setup) {
    let size: u64 = scale(48, 180) << 20;
    let (vold, uri) = setup.volume(&size.to_string());
    let (image, back) = (vold.path("image"), vold.path("back"));
    let (image, back) = (image.to_str().unwrap(), back.to_str().unwrap());
    sparse_file(image.as_ref(), 3, size);
    run(
        "qemu-img",
        [
            "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, &uri,
        ],
    );
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", image, &uri]);
    run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &uri, back]);
    run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", &uri, back]);
    // The comparison can fail.
    qemu_io(&uri, &["write -P 0x5a 1M 512"]);
    fail(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw", image, &uri]));
}

fn qemu_img_sees_holes_as_zeros_and_benches_reads_and_writes(setup: Setup) {
    let (_vold, uri) = setup.volume("64M");
    qemu_io(&uri, &["write -P 1 4M 1M"]);
    let map: Value =
        serde_json::from_str(&run("qemu-img", ["map", "--output=json", "-f", "raw", &uri])).unwrap();
    let data: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|range| range["zero"] == false)
        .map(|range| {
            (
                range["start"].as_u64().unwrap(),
                range["length"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(data, [(4 << 20, 1 << 20)], "{map}");
    let count = scale("2000", "20000");
    for extra in [&[][..], &["-w", "--pattern=7", "--flush-interval=64"]] {
        let mut bench = tool("qemu-img");
        bench.args(["bench", "-f", "raw", "-c", count, "-d", "32", "-s", "4096"]);
        let said = vold_tests::tools::succeed(bench.args(extra).arg(&uri));
        assert!(said.contains("Run completed"), "{said}");
    }
}

fn qemu_io_finds_every_pattern_where_it_was_written(setup: Setup) {
    let (_vold, uri) = setup.volume("64M");
    qemu_io(
        &uri,
        &[
            "write -P 0xa1 0 1M",
            "write -P 0xb2 1M 64k",
            // Ranges that begin and end within blocks, within sectors, and across extents.
            "write -P 0xc3 3000 5000",
            "write -P 0xd4 4194000 1000",
            "write -f -P 0xe5 8388607 2",
            "flush",
            "read -P 0xa1 0 3000",
            "read -P 0xc3 3000 5000",
            "read -P 0xa1 8000 1040576",
            "read -P 0xb2 1M 64k",
            "read -P 0xd4 4194000 1000",
            "read -P 0 4195000 1000",
            "read -P 0xe5 8388607 2",
            "read -P 0 8388609 100",
            "read -P 0 8388507 100",
            // Zeroes and discards, aligned and not.
            "write -z 64k 64k",
            "read -P 0 64k 64k",
            "write -z 5000 1000",
            "read -P 0xc3 3000 2000",
            "read -P 0 5000 1000",
            "read -P 0xc3 6000 2000",
            "write -z -u 1M 32k",
            "read -P 0 1M 32k",
            "read -P 0xb2 1081344 32k",
            "discard 512k 128k",
            "read -P 0 512k 128k",
            "read -P 0xa1 640k 384k",
            "aio_write -P 0x17 16M 1M",
            "aio_write -P 0x18 17M 1M",
            "aio_flush",
            "read -P 0x17 16M 1M",
            "read -P 0x18 17M 1M",
        ],
    );
    // And with the cache of this connection gone.
    qemu_io(&uri, &["read -P 0x18 17M 1M", "read -P 0xc3 6000 2000"]);
    let said = fail(
        tool("qemu-io")
            .args(["-f", "raw", "-c", "read -P 0x19 17M 1M"])
            .arg(&uri),
    );
    assert!(said.contains("Pattern verification failed"), "{said}");
}

/// Commands on one connection; a wrong pattern or an error fails.
fn qemu_io(uri: &str, commands: &[&str]) {
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw", "-t", "none"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let said = vold_tests::tools::succeed(qemu_io.arg(uri));
    assert!(!said.contains("failed"), "{said}");
}

/// qemu 8.2 and later agree on extended headers. Its own trace tells what it sends.
#[test]
fn qemu_zeroes_more_than_4_gib_with_one_request_of_64_bits() {
    let vold = vold_tests::Vold::start();
    let uri = vold.with_volume(1, "64M", "16G");
    let version = run("qemu-img", ["--version"]);
    let major = |text: &str| text.split(' ').nth(2)?.split('.').next()?.parse::<u32>().ok();
    let extended = major(&version).expect("a version") >= 9;
    let mut qemu_io = tool("qemu-io");
    qemu_io.args([
        "-T",
        "nbd_send_request",
        "-f",
        "raw",
        "-c",
        "write -z -u -n 1M 6G",
        "-c",
        "read -P 0 6G 64K",
    ]);
    let output = vold_tests::tools::output(qemu_io.arg(&uri));
    let (said, traced) = vold_tests::tools::texts(&output);
    assert!(output.status.success(), "{said} {traced}");
    let zeroing: Vec<&str> = traced.lines().filter(|line| line.contains(".type = 6")).collect();
    let at_once = zeroing.iter().any(|line| line.contains("len = 6442450944"));
    assert_eq!(at_once, extended, "{version}: {zeroing:?}");
    assert_eq!(vold.volume("acme/vol")["allocated_bytes"], 0);
}
