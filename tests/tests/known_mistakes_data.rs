//! Known mistakes of other NBD servers and clients in the transmission phase: each test is named after one, says in a line what
//! it was, and shows that its cause is not in vold. The others are in `known_mistakes.rs` and `known_mistakes_tls.rs`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vold_tests::Vold;
use vold_tests::content::{bytes, random_file};
use vold_tests::nbd::*;
use vold_tests::raw::{BLOCK, RawStore};
use vold_tests::tools::{fail, run, tool};
use vold_tests::vold::parse_uri;

const MIB: u64 = 1 << 20;
const PAYLOAD_MAX: u32 = 32 << 20;

/// `acme/vol` of 80 MiB, thin.
fn started() -> (Vold, String) {
    let vold = Vold::start();
    let uri = vold.with_volume(1, "192M", "80M");
    (vold, uri)
}

#[test]
fn nbd_server_cve_2005_3534_a_request_longer_than_its_buffer() {
    // It was: a request's length was held against the buffer's size, and its header was in the buffer too.
    let (mut vold, uri) = started();
    let mut client = Client::connect(&uri);
    let longest = bytes(1, PAYLOAD_MAX as usize);
    // As long as may be, at an odd place, and what is around it stays as it is.
    client.write(4097, &longest).unwrap();
    assert!(client.read(4097, longest.len()).unwrap() == longest);
    assert_eq!(client.read(4096, 1).unwrap(), [0]);
    assert_eq!(client.read(4097 + longest.len() as u64, 8192).unwrap(), [0; 8192]);
    // Longer reads are refused, and the connection goes on.
    for len in [
        PAYLOAD_MAX + 1,
        PAYLOAD_MAX + 28,
        1 << 31,
        u32::MAX - 15,
        u32::MAX,
    ] {
        assert_eq!(client.command(CMD_READ, 0, 0, len), Err(EINVAL), "{len}");
        assert_eq!(client.read(4096, 1).unwrap(), [0]);
    }
    // Longer writes end it, before anything of them is written, or taken.
    let longer = vec![0xee; PAYLOAD_MAX as usize + 28];
    for len in [PAYLOAD_MAX + 1, PAYLOAD_MAX + 28, u32::MAX - 27, u32::MAX] {
        let mut stream = Client::connect(&uri).into_stream();
        stream.write_all(&request_bytes(CMD_WRITE, 0, 7, 0, len)).unwrap();
        let taken = stream.write_all(&longer[..longer.len().min(len as usize)]);
        assert!(taken.is_err(), "{len}: the payload is taken");
        assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0, "{len}: no answer");
    }
    assert_eq!(Client::connect(&uri).read(0, 4097).unwrap(), [0; 4097]);
    assert!(vold.alive());
}

#[test]
fn nbd_server_cve_2011_0530_a_payload_that_reaches_past_what_was_received() {
    // It was: the earlier fix was lost again: header and payload together could pass the end of the buffer.
    let (_vold, uri) = started();
    let mut stream = Client::connect(&uri).into_stream();
    // Around every size at which a server may change how it receives, in one breath, so that headers and payloads lie anywhere
    // in what one receive brings.
    let mut lengths = Vec::new();
    for around in [4 << 10, 64 << 10, 256 << 10, 512 << 10] {
        lengths.extend([-29i64, -28, -27, -1, 0, 1, 27, 28, 29].map(|more| (around + more) as usize));
    }
    let at = |index: usize| index as u64 * MIB + 13;
    let mut all = Vec::new();
    for (index, len) in lengths.iter().enumerate() {
        all.extend(request_bytes(CMD_WRITE, 0, index as u64, at(index), *len as u32));
        all.extend(bytes(index as u64, *len));
    }
    // Written by one thread and answered to another: who only sends may have to wait for who reads.
    let mut sending = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || sending.write_all(&all).unwrap());
        let mut left: Vec<u64> = (0..lengths.len() as u64).collect();
        while !left.is_empty() {
            let mut reply = [0; 16];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(reply[..8], *b"\x67\x44\x66\x98\0\0\0\0");
            let cookie = u64::from_be_bytes(reply[8..].try_into().unwrap());
            left.retain(|other| *other != cookie);
        }
    });
    let mut client = Client::connect(&uri);
    for (index, len) in lengths.iter().enumerate() {
        let read = client.read(at(index) - 13, MIB as usize).unwrap();
        assert!(read[13..13 + len] == bytes(index as u64, *len), "{len} bytes");
        assert!(read[..13].iter().chain(&read[13 + len..]).all(|byte| *byte == 0));
    }
}

/// A reply in chunks: kind and payload of each.
fn chunks(stream: &mut UnixStream, header_bytes: usize) -> Vec<(u16, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        let mut head = vec![0; header_bytes];
        stream.read_exact(&mut head).unwrap();
        let is_extended = head[..4] == 0x6e8a_278cu32.to_be_bytes();
        assert_eq!(is_extended, header_bytes == 32);
        let u16_at = |at: usize| u16::from_be_bytes(head[at..at + 2].try_into().unwrap());
        let len = match is_extended {
            true => u64::from_be_bytes(head[24..].try_into().unwrap()) as usize,
            false => u32::from_be_bytes(head[16..].try_into().unwrap()) as usize,
        };
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload).unwrap();
        all.push((u16_at(6), payload));
        if u16_at(4) & 1 != 0 {
            return all;
        }
    }
}

/// The runs of the one chunk that answers a compact BLOCK_STATUS: length and flags.
fn runs(stream: &mut UnixStream, flags: u16, offset: u64, len: u32) -> Vec<(u64, u64)> {
    stream
        .write_all(&request_bytes(7, flags, 1, offset, len))
        .unwrap();
    let chunks = chunks(stream, 20);
    let [(5, payload)] = &chunks[..] else {
        panic!("{chunks:?}")
    };
    let word = |bytes: &[u8]| u64::from(u32::from_be_bytes(bytes.try_into().unwrap()));
    let runs = payload[4..].chunks_exact(8);
    runs.map(|run| (word(&run[..4]), word(&run[4..]))).collect()
}

/// A volume of 64 GiB on a small store: one hole, but for a block at the start, one at 5 GiB and the last one.
fn huge() -> (Vold, String) {
    let vold = Vold::start();
    vold.with_volume(1, "192M", "8M");
    vold.ctl("volume create acme/huge --size 64G");
    let uri = vold.attach("acme/huge", "vm1");
    let mut client = Client::connect(&uri);
    for at in [0, 5 << 30, (64 << 30) - 4096] {
        client.write(at, &[7; 4096]).unwrap();
    }
    client.disconnect();
    (vold, uri)
}

/// A connection with structured replies, or extended headers, and `base:allocation`.
fn with_status(uri: &str, option: u32) -> UnixStream {
    let (socket, export) = parse_uri(uri);
    let mut haggle = Haggle::connect(&socket).unwrap();
    haggle.ask(option, &[]).unwrap();
    let query = contexts_data(&export, &["base:allocation"]);
    assert_eq!(haggle.ask(OPT_SET_META_CONTEXT, &query).unwrap().len(), 2);
    haggle.go(&export).unwrap().into_stream()
}

#[test]
fn nbdkit_cve_2025_47711_the_status_of_a_range_of_4_gib() {
    // It was: the runs of a range were one byte longer than 32 bits can say, and their sum failed an assertion.
    let (mut vold, uri) = huge();
    let mut stream = with_status(&uri, OPT_STRUCTURED_REPLY);
    for offset in [
        0,
        1,
        511,
        4095,
        4096,
        4097,
        1 << 30,
        (5 << 30) - 1,
        (64 << 30) - u64::from(u32::MAX),
    ] {
        for len in [u32::MAX, u32::MAX - 1, u32::MAX - 4095, 1 << 31, 1] {
            for flags in [0, 8] {
                let runs = runs(&mut stream, flags, offset, len);
                let total: u64 = runs.iter().map(|(run, _)| run).sum();
                assert!(runs.iter().all(|(run, _)| *run > 0), "{runs:?}");
                // All of it, or one run and no more of it than was asked.
                assert!(
                    total == u64::from(len) || (flags == 8 && total < u64::from(len)),
                    "{runs:?}"
                );
                assert!(flags == 0 || runs.len() == 1, "{runs:?}");
            }
        }
    }
    // The rest of an extent of 4 MiB is zeros that take up space.
    let extent = 4 * MIB;
    assert_eq!(
        runs(&mut stream, 0, 0, u32::MAX),
        [(4096, 0), (extent - 4096, 2), (u64::from(u32::MAX) - extent, 3)]
    );
    // With 64 bits: the whole device in one answer.
    let mut stream = with_status(&uri, OPT_EXTENDED_HEADERS);
    let mut request = [&0x21e4_1c71u32.to_be_bytes()[..], &[0, 0, 0, 7]].concat();
    request.extend(
        [
            1u64.to_be_bytes(),
            0u64.to_be_bytes(),
            (64u64 << 30).to_be_bytes(),
        ]
        .concat(),
    );
    stream.write_all(&request).unwrap();
    let chunks = chunks(&mut stream, 32);
    let [(6, payload)] = &chunks[..] else {
        panic!("{chunks:?}")
    };
    let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
    let runs: Vec<(u64, u64)> = payload[8..]
        .chunks_exact(16)
        .map(|run| (word(&run[..8]), word(&run[8..])))
        .collect();
    let hole = |from: u64, to: u64| (to - from, 3);
    assert_eq!(
        runs,
        [
            (4096, 0),
            (extent - 4096, 2),
            hole(extent, 5 << 30),
            (4096, 0),
            (extent - 4096, 2),
            hole((5 << 30) + extent, (64 << 30) - extent),
            (extent - 4096, 2),
            (4096, 0)
        ]
    );
    // And what an ordinary client makes of it.
    assert!(run("nbdinfo", ["--map", "--totals", &uri]).contains("12288"));
    assert!(vold.alive());
}

#[test]
fn nbdkit_cve_2025_47712_a_range_that_is_rounded_up_past_32_bits() {
    // It was: a filter rounded a range up to whole blocks in 32 bits; one close to 4 GiB became none at all.
    let (_vold, uri) = huge();
    let mut client = Client::connect(&uri);
    let four_gib = 1u64 << 32;
    for (offset, len) in [
        (1, u32::MAX),
        (4095, u32::MAX),
        (1, u32::MAX - 4094),
        (511, u32::MAX - 510),
    ] {
        let end = offset + u64::from(len);
        client.write(0, &[1; 4096]).unwrap();
        client.write(four_gib - 4096, &[2; 12_288]).unwrap();
        client.command(CMD_CACHE, 0, offset, len).unwrap();
        client.write_zeroes(offset, len, FAST_ZERO).unwrap();
        // The first byte and the first one after it are as they were, everything between is gone.
        let first = client.read(0, 8192).unwrap();
        assert!(first[..offset as usize].iter().all(|byte| *byte == 1));
        assert!(first[offset as usize..].iter().all(|byte| *byte == 0));
        let last = client.read(four_gib - 4096, 12_288).unwrap();
        let zeros = (end - (four_gib - 4096)) as usize;
        assert!(last[..zeros].iter().all(|byte| *byte == 0));
        assert!(last[zeros..].iter().all(|byte| *byte == 2));
        // A trim leaves what it likes within its range, and everything else alone.
        client.write(0, &[3; 4096]).unwrap();
        client.trim(offset, len).unwrap();
        assert!(
            client
                .read(0, offset as usize)
                .unwrap()
                .iter()
                .all(|byte| *byte == 3)
        );
        assert!(
            client.read(end, 4096).unwrap()[..4096 - (end % 4096) as usize]
                .iter()
                .all(|byte| *byte == 2)
        );
    }
    // Past the end of the device, and of 64 bits, is past the end.
    for offset in [(64 << 30) - 4096, u64::MAX - u64::from(u32::MAX), u64::MAX] {
        assert_eq!(client.write_zeroes(offset, u32::MAX, 0), Err(ENOSPC));
        assert_eq!(client.trim(offset, u32::MAX), Err(EINVAL));
        assert_eq!(client.command(CMD_CACHE, 0, offset, u32::MAX), Err(EINVAL));
    }
    assert_eq!(client.read(5 << 30, 4096).unwrap(), [7; 4096]);
}

#[test]
fn libnbd_cve_2022_0485_an_error_that_is_read_as_success() {
    // It was: the copy asked only whether a request had ended, not how; what could not be read or written counted as done.
    let (mut vold, uri) = started();
    let content = bytes(3, 8 << 20);
    let mut client = Client::connect(&uri);
    client.write(0, &content).unwrap();
    client.flush().unwrap();
    // The device refuses writes beyond its first MiBs: every request tells, and so does a copy.
    let limit = |limit: &str| {
        run(
            "prlimit",
            [
                format!("--pid={}", vold.pid()),
                format!("--fsize={limit}:unlimited"),
            ],
        )
    };
    limit("8388608");
    let refused = (40..56).filter(|mib| client.write(mib * MIB, &content[..MIB as usize]) == Err(EIO));
    assert!(refused.count() > 8, "writes beyond the limit fail, and say so");
    let refused = (40..56).filter(|mib| client.write_zeroes(mib * MIB, MIB as u32, NO_HOLE) == Err(EIO));
    assert!(refused.count() > 8, "so do zeros that are written");
    let source = vold.path("source");
    random_file(&source, 5, 80 << 20);
    let source = source.to_str().unwrap().to_owned();
    fail(tool("nbdcopy").args([&source, &uri]));
    limit("unlimited");
    run("nbdcopy", ["--flush", &source, &uri]);
    client.write(0, &content).unwrap();
    client.flush().unwrap();
    client.disconnect();
    // Data that has no good copy: no read gives anything else in its place.
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    let raw = RawStore::open(&vold.store_path("a"));
    let physical = raw.extents_of(raw.slot(&id).unwrap().dataset)[&0];
    raw.flip(raw.data_at(physical) + 5 * BLOCK as u64 + 100, 1);
    vold.restart();
    let mut client = Client::connect(&uri);
    assert_eq!(client.read(5 * BLOCK as u64, 1), Err(EIO));
    assert_eq!(client.read(0, 1 << 20), Err(EIO));
    assert!(client.read(6 * BLOCK as u64, 4096).unwrap() == content[6 * BLOCK..7 * BLOCK]);
    // Structured: an error that names itself, and no data beside it that could be taken for the block.
    let mut stream = with_status(&uri, OPT_STRUCTURED_REPLY);
    for flags in [0, 4] {
        stream
            .write_all(&request_bytes(CMD_READ, flags, 1, 5 * BLOCK as u64, 4096))
            .unwrap();
        let chunks = chunks(&mut stream, 20);
        let [(0x8001, payload)] = &chunks[..] else {
            panic!("{chunks:?}")
        };
        assert_eq!(payload[..4], EIO.to_be_bytes());
    }
    fail(tool("nbdcopy").args([&uri, vold.path("back").to_str().unwrap()]));
}
