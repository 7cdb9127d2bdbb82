//! libnbd's programs: what nbdinfo is told is true, and nbdcopy brings back what it took.

use serde_json::Value;
use vold_tests::content::{random_file, sparse_file};
use vold_tests::nbd::Client;
use vold_tests::tools::{run, same_bytes};
use vold_tests::{Setup, on_every_setup, scale};

on_every_setup!(nbdinfo_shows_the_export_as_it_is);
on_every_setup!(nbdcopy_brings_back_random_data_over_several_connections);
on_every_setup!(nbdcopy_brings_back_sparse_data_and_holes_take_no_space);

fn nbdinfo_shows_the_export_as_it_is(setup: Setup) {
    let (vold, uri) = setup.volume("64M");
    assert_eq!(run("nbdinfo", ["--size", &uri]).trim(), "67108864");
    let json: Value = serde_json::from_str(&run("nbdinfo", ["--json", &uri])).unwrap();
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], 64 << 20);
    assert_eq!(json["structured"], true, "{json}");
    assert_eq!(export["is_read_only"], false);
    for can in [
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_fast_zero",
        "can_cache",
        "can_multi_conn",
        "can_df",
    ] {
        assert_eq!(export[can], true, "{can}: {json}");
    }
    let contexts = export["contexts"].as_array().expect("contexts");
    assert!(contexts.iter().any(|c| c == "base:allocation"), "{json}");
    let preferred = export["block_size_preferred"].as_u64().expect("block sizes");
    assert_eq!(preferred, 4096);
    assert!(vold.volume("acme/vol")["replicas"].as_array().unwrap().len() == setup.replicas);

    // A new volume is one hole; what is written is data, to the block; what is trimmed is a hole again.
    let map = || run("nbdinfo", ["--map", &uri]);
    assert_eq!(fields(&map()), [[0, 64 << 20, 1]]);
    let mut client = Client::connect(&uri);
    client.write(8 << 20, &vec![7; 1 << 20]).unwrap();
    client.write((32 << 20) + 4096, &[1]).unwrap();
    assert_eq!(
        fields(&map()),
        [
            [0, 8 << 20, 1],
            [8 << 20, 1 << 20, 0],
            [9 << 20, (23 << 20) + 4096, 1],
            [(32 << 20) + 4096, 4096, 0],
            [(32 << 20) + 8192, (32 << 20) - 8192, 1],
        ]
    );
    client.trim(8 << 20, 1 << 20).unwrap();
    client.trim((32 << 20) + 4096, 4096).unwrap();
    assert_eq!(fields(&map()), [[0, 64 << 20, 1]]);
}

/// Offset, length and 1 for zeros or 0 for data, of each line; neighbours of one kind joined. (Whether zeros take up space
/// in a partly written extent is vold's own affair.)
fn fields(map: &str) -> Vec<[u64; 3]> {
    let mut ranges: Vec<[u64; 3]> = Vec::new();
    for line in map.lines() {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .take(3)
            .map(|field| field.parse().unwrap())
            .collect();
        let zero = numbers[2] >> 1;
        match ranges.last_mut() {
            Some(last) if last[2] == zero => last[1] += numbers[1],
            _ => ranges.push([numbers[0], numbers[1], zero]),
        }
    }
    ranges
}

fn nbdcopy_brings_back_random_data_over_several_connections(setup: Setup) {
    let size: usize = scale(48, 180) << 20;
    let (vold, uri) = setup.volume(&size.to_string());
    let (image, back) = (vold.path("image"), vold.path("back"));
    random_file(&image, 1, size);
    run(
        "nbdcopy",
        [
            "--flush",
            "--connections=4",
            "--requests=16",
            image.to_str().unwrap(),
            &uri,
        ],
    );
    run("nbdcopy", ["--connections=4", &uri, back.to_str().unwrap()]);
    assert!(same_bytes(&image, &back));
}

fn nbdcopy_brings_back_sparse_data_and_holes_take_no_space(setup: Setup) {
    let size = 160 << 20;
    let (vold, uri) = setup.volume(&size.to_string());
    let (image, back) = (vold.path("image"), vold.path("back"));
    // Data in the first 32 MiB only.
    sparse_file(&image, 2, 32 << 20);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(size).unwrap();
    run(
        "nbdcopy",
        ["--flush", "--destination-is-zero", image.to_str().unwrap(), &uri],
    );
    run("nbdcopy", [&uri, back.to_str().unwrap()]);
    assert!(same_bytes(&image, &back));
    let allocated = vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
    assert!(
        (8 << 20..=40 << 20).contains(&allocated),
        "{allocated} bytes are allocated for 32 MiB"
    );
}
