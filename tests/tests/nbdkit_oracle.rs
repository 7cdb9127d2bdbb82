//! nbdkit as an oracle. Its plugins make data that is known at every offset and refuse a write that brings back another
//! byte; its proxy stands between clients and vold, checks and logs.

use vold_tests::content::sparse_file;
use vold_tests::nbd::{CMD_CACHE, Client};
use vold_tests::nbdkit::Nbdkit;
use vold_tests::tools::{fail, run, succeed, tool};
use vold_tests::vold::Vold;
use vold_tests::{Engine, Setup, scale};

const CONNECTIONS: [&str; 3] = ["1", "4", "8"];

/// Copies with nbdcopy over so many connections, with 64 requests in flight.
fn copy(connections: &str, from: &str, to: &str) -> std::process::Command {
    let mut nbdcopy = tool("nbdcopy");
    nbdcopy
        .args(["--flush", "--requests=64"])
        .arg(format!("--connections={connections}"))
        .args([from, to]);
    nbdcopy
}

/// A daemon with a volume of that size, and stores with room for it.
fn started(setup: Setup, size: u64) -> (Vold, String) {
    let vold = Vold::start_on(setup.engine);
    let store = (size + (256 << 20)).to_string();
    let uri = vold.with_volume(setup.replicas, &store, &size.to_string());
    (vold, uri)
}

/// Copies what `plugin` makes into a volume and back, over 1, 4 and 8 connections. It must compare what comes back.
fn copied_in_and_out(engine: Engine, size: u64, plugin: impl Fn(usize) -> Vec<String>) {
    let setup = Setup { replicas: 2, engine };
    let (vold, uri) = started(setup, size);
    for (round, connections) in CONNECTIONS.into_iter().enumerate() {
        let arguments = plugin(round);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let serve = || Nbdkit::serve(&vold.path(""), &arguments);
        let oracle = serve();
        succeed(&mut copy(connections, &oracle.uri(), &uri));
        succeed(&mut copy(connections, &uri, &oracle.uri()));
        // One wrong byte, in the middle of nowhere, is found.
        let mut client = Client::connect(&uri);
        let at = size / 3;
        let byte = client.read(at, 1).unwrap()[0];
        client.write(at, &[byte ^ 1]).unwrap();
        let said = fail(&mut copy(connections, &uri, &oracle.uri()));
        assert!(said.contains("Input/output error"), "{said}");
        client.write(at, &[byte]).unwrap();
        // nbdcopy breaks off at an error, and nbdkit 1.32 may end by an assertion of its own when a client does
        // (`raw_send_socket`: it replies on a socket that another thread has closed).
        succeed(&mut copy(connections, &uri, &serve().uri()));
    }
}

/// A new seed each time: what was data must become a hole where the next disk has one.
fn sparse_random(engine: Engine) {
    let size = scale(96, 768) << 20;
    copied_in_and_out(engine, size, |round| {
        vec![
            "sparse-random".into(),
            size.to_string(),
            format!("seed={}", round + 1),
            "percent=40".into(),
            format!("runlength={}", 64 << 10 << round),
            "random-content=true".into(),
        ]
    });
}

#[test]
fn sparse_random_disks_come_back_over_1_4_and_8_connections_on_io_uring() {
    sparse_random(Engine::Uring);
}

#[test]
fn sparse_random_disks_come_back_over_1_4_and_8_connections_on_threads() {
    sparse_random(Engine::Threads);
}

/// The pattern is each place's own offset, so a block in a wrong place is a wrong block. The plugin is for reading; the
/// filter in front of it compares. The size ends within an extent.
#[test]
fn a_pattern_of_offsets_comes_back_over_1_4_and_8_connections() {
    let size = (scale(33, 401) << 20) + 4096;
    for engine in Engine::ALL {
        copied_in_and_out(engine, size, |_| {
            vec!["--filter=checkwrite".into(), "pattern".into(), size.to_string()]
        });
    }
}

#[test]
fn checkwrite_finds_every_byte_of_an_image_in_the_volume_and_one_that_is_wrong() {
    let size = scale(48, 400) << 20;
    let setup = Setup {
        replicas: 1,
        engine: Engine::Uring,
    };
    let (vold, uri) = started(setup, size);
    let image = vold.path("image");
    let image = image.to_str().unwrap();
    sparse_file(image.as_ref(), 4, size);
    succeed(&mut copy("4", image, &uri));
    let check = Nbdkit::proxy(&vold.path(""), &["--filter=checkwrite"], &uri);
    for connections in CONNECTIONS {
        succeed(&mut copy(connections, image, &check.uri()));
        // Its own data, and its own block status.
        succeed(&mut copy(connections, &uri, &check.uri()));
    }
    run(
        "qemu-img",
        ["convert", "-n", "-f", "raw", "-O", "raw", image, &check.uri()],
    );
    let mut client = Client::connect(&uri);
    let at = size - 1;
    let byte = client.read(at, 1).unwrap()[0];
    client.write(at, &[byte ^ 0x80]).unwrap();
    let said = fail(&mut copy("4", image, &check.uri()));
    assert!(said.contains("Input/output error"), "{said}");
    // The check wrote nothing over it.
    assert_eq!(client.read(at, 1).unwrap(), [byte ^ 0x80]);
}

/// The line that ends a request, of its kind and with these words in the line that began it.
fn finished(log: &str, kind: &str, words: &[&str]) -> bool {
    let id = |line: &str| {
        let id = line.split_whitespace().find_map(|word| word.strip_prefix("id="));
        id.map(str::to_owned)
    };
    let began: Vec<String> = log
        .lines()
        .filter(|line| line.contains(&format!(" {kind} id=")))
        .filter(|line| {
            words
                .iter()
                .all(|word| line.split_whitespace().any(|w| w == *word))
        })
        .filter_map(id)
        .collect();
    log.lines()
        .filter(|line| line.contains(&format!(" ...{kind} id=")) && line.ends_with("return=0"))
        .filter_map(id)
        .any(|id| began.contains(&id))
}

#[test]
fn flush_fua_trim_zero_cache_and_block_status_pass_a_logging_proxy() {
    let setup = Setup {
        replicas: 2,
        engine: Engine::Uring,
    };
    let (vold, uri) = setup.volume("64M");
    let log = vold.path("log-of-nbdkit");
    let logfile = format!("logfile={}", log.display());
    let proxy = Nbdkit::proxy(&vold.path(""), &["--filter=log", &logfile], &uri);
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw", "-t", "none"]);
    for command in [
        "write -P 0x21 0 1M",
        "write -f -P 0x22 1M 64k",
        "flush",
        "write -z 2M 128k",
        "write -z -u 0 512k",
        "write -P 0x23 8M 4M",
        "discard 8M 4M",
        "read -P 0 0 512k",
        "read -P 0x21 512k 512k",
        "read -P 0x22 1M 64k",
        "read -P 0 8M 4M",
    ] {
        qemu_io.args(["-c", command]);
    }
    let said = succeed(qemu_io.arg(proxy.uri()));
    assert!(!said.contains("failed"), "{said}");
    let mut client = Client::connect(&proxy.uri());
    client.command(CMD_CACHE, 0, 0, 1 << 20).unwrap();
    client.disconnect();
    let map = |uri: &str| run("nbdinfo", ["--map", uri]);
    assert_eq!(
        map(&proxy.uri()),
        map(&uri),
        "block status is the same behind the proxy"
    );
    assert!(map(&uri).lines().count() > 2, "and there is something to see");

    let log = std::fs::read_to_string(log).unwrap();
    let connect = log
        .lines()
        .find(|line| line.contains(" Connect "))
        .expect("a connection");
    for able in [
        "write=1",
        "flush=1",
        "trim=1",
        "zero=2",
        "fua=2",
        "extents=1",
        "cache=2",
        "fast_zero=1",
    ] {
        assert!(connect.contains(able), "{able}: {connect}");
    }
    for (kind, words) in [
        ("Write", &["offset=0x0", "count=0x100000", "fua=0"][..]),
        ("Write", &["offset=0x100000", "count=0x10000", "fua=1"]),
        ("Flush", &[]),
        ("Zero", &["offset=0x200000", "count=0x20000", "trim=0"]),
        ("Zero", &["offset=0x0", "count=0x80000", "trim=1"]),
        ("Trim", &["offset=0x800000", "count=0x400000"]),
        ("Read", &["offset=0x100000", "count=0x10000"]),
        ("Cache", &["offset=0x0", "count=0x100000"]),
        ("Extents", &["offset=0x0", "count=0x4000000"]),
    ] {
        assert!(
            finished(&log, kind, words),
            "{kind} {words:?} did not succeed:\n{log}"
        );
    }
    // What was trimmed is whole again as free space.
    let allocated = vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
    assert_eq!(allocated, 4 << 20, "the first extent alone is left");
}
