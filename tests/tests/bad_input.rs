//! Bad input is refused with one line that says who, what, why and what to do; the daemon goes on serving, and what was
//! there before is still there.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vold_tests::content::bytes;
use vold_tests::devices::LoopDevice;
use vold_tests::nbd::{self, Client, GoError, Haggle};
use vold_tests::raw::RawStore;
use vold_tests::tools::{output, run, texts};
use vold_tests::vold::parse_uri;
use vold_tests::{Engine, PATIENCE, Refusal, Vold};

/// A daemon that holds something worth losing.
struct Treasure {
    vold: Vold,
    uri: String,
}

impl Treasure {
    fn start() -> Self {
        let vold = Vold::start();
        let uri = vold.with_volume(2, "128M", "16M");
        let treasure = Self { vold, uri };
        let mut client = Client::connect(&treasure.uri);
        client.write(12345, &Self::gold()).unwrap();
        client.flush().unwrap();
        treasure
    }

    fn gold() -> Vec<u8> {
        bytes(99, 100_000)
    }

    /// The daemon serves, and nothing was lost.
    fn is_unharmed(&mut self) {
        assert!(self.vold.alive(), "the daemon must live on");
        assert_eq!(self.vold.ctl("status")["volumes"], 1);
        let mut client = Client::connect(&self.uri);
        assert!(client.read(12345, 100_000).unwrap() == Self::gold());
        client.write(8 << 20, &[1; 4096]).unwrap();
    }
}

#[track_caller]
fn says(refusal: &Refusal, code: &str, words: &[&str]) {
    assert_eq!(refusal.code, code, "{refusal:?}");
    for word in words {
        assert!(
            refusal.message.contains(word),
            "{word:?} is missing in: {}",
            refusal.message
        );
    }
}

#[test]
fn duplicate_names_are_refused() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let path = vold.path("another");
    let store = format!("store add a --path {} --size 128M", path.display());
    says(&vold.refused(&store), "exists", &["\"a\"", "exists already"]);
    assert!(!path.exists(), "nothing of the refused store stays");
    says(
        &vold.refused("customer create acme"),
        "exists",
        &["\"acme\"", "exists"],
    );
    says(
        &vold.refused("vm create vm1 --customer acme"),
        "exists",
        &["\"vm1\"", "exists"],
    );
    says(
        &vold.refused("volume create acme/vol --size 1G"),
        "exists",
        &["acme/vol", "exists"],
    );
    treasure.is_unharmed();
}

#[test]
fn invalid_names_are_wrong_usage_for_volctl_and_refused_by_the_api() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let path = vold.path("never");
    let store = |name: &str, zone: &str| {
        format!(
            "{{\"name\":\"{name}\",\"zone\":\"{zone}\",\"path\":{path:?},\"size_bytes\":{}}}",
            128 << 20
        )
    };
    for name in ["Acme", "-a", "a_b", "ä", "a..", "a b", &"x".repeat(64)] {
        if !name.contains(' ') {
            let said = vold.wrong_usage(&format!("customer create -- {name}"));
            assert!(said.contains("not a valid name"), "{said}");
        }
        for (collection, body) in [
            ("customers", format!("{{\"name\":\"{name}\"}}")),
            ("stores", store(name, "z")),
            ("stores", store("z", name)),
            ("vms", format!("{{\"name\":\"{name}\",\"customer\":\"acme\"}}")),
            ("vms", format!("{{\"name\":\"z\",\"customer\":\"{name}\"}}")),
            (
                "volumes",
                format!("{{\"volume\":\"acme/{name}\",\"size_bytes\":4096}}"),
            ),
            (
                "volumes",
                format!("{{\"volume\":\"{name}/vol\",\"size_bytes\":4096}}"),
            ),
        ] {
            let (status, answer) = post(vold, &format!("/v1/{collection}"), &body);
            assert!(
                (400..500).contains(&status),
                "{collection} {body}: {status} {answer}"
            );
            let json: serde_json::Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(json["error"]["code"], "invalid", "{collection} {body}: {answer}");
            let message = json["error"]["message"].as_str().unwrap();
            for word in [name, "not a valid name", "use 1 to 63 of a-z"] {
                assert!(message.contains(word), "{word:?} is missing in: {message}");
            }
        }
    }
    for collection in ["customers", "stores", "vms", "volumes"] {
        let items = vold.ctl(&format!("{} list", collection.trim_end_matches('s')));
        let expected = if collection == "stores" { 2 } else { 1 };
        assert_eq!(
            items["items"].as_array().unwrap().len(),
            expected,
            "nothing was made"
        );
    }
    assert!(!path.exists());
    treasure.is_unharmed();
}

#[test]
fn unknown_customers_vms_volumes_and_stores_are_named() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    for (words, name) in [
        ("volume create nobody/vol --size 1G", "nobody"),
        ("vm create vm9 --customer nobody", "nobody"),
        ("customer show nobody", "nobody"),
        ("attach acme/vol --vm vm9", "vm9"),
        ("attach acme/none --vm vm1", "acme/none"),
        ("detach acme/none --vm vm1", "acme/none"),
        ("volume show acme/none", "acme/none"),
        ("volume resize acme/none --size 1G", "acme/none"),
        ("volume delete acme/none --now", "acme/none"),
        ("store show z", "\"z\""),
        ("store remove z", "\"z\""),
        (
            "destroy show 00000000-0000-4000-8000-000000000000",
            "00000000-0000-4000-8000-000000000000",
        ),
    ] {
        says(&vold.refused(words), "not_found", &[name]);
    }
    treasure.is_unharmed();
}

#[test]
fn sizes_of_zero_of_odd_bytes_and_above_the_cap_are_refused() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    for (size, word) in [
        ("0", "4"),
        ("1", "4"),
        ("4097", "4"),
        ("1048577", "4"),
        ("65T", "64 TiB"),
        ("16777215T", "64 TiB"),
    ] {
        let refusal = vold.refused(&format!("volume create acme/new --size {size}"));
        says(&refusal, "invalid", &["acme/new", word]);
        let refusal = vold.refused(&format!("volume resize acme/vol --size {size}"));
        says(&refusal, "invalid", &["acme/vol", word]);
    }
    assert!(vold.ctl("volume list")["items"].as_array().unwrap().len() == 1);
    // The cap itself is fine, and takes no time or space.
    let huge = vold.ctl("volume create acme/huge --size 64T");
    assert_eq!(
        (huge["size_bytes"].as_u64(), huge["allocated_bytes"].as_u64()),
        (Some(64 << 40), Some(0))
    );
    vold.destroy("acme/huge");
    treasure.is_unharmed();
}

#[test]
fn more_replicas_than_zones_or_than_three_are_refused() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let refusal = vold.refused("volume create acme/new --size 1M --replicas 3");
    says(
        &refusal,
        "no_space",
        &["acme/new", "3 replicas", "(a, b)", "--replicas 2"],
    );
    for count in ["0", "4", "1000"] {
        let words = format!("volume create acme/new --size 1M --replicas {count}");
        let refusal = vold.refused(&words);
        says(&refusal, "invalid", &["replicas", "1 to 3"]);
    }
    // A third store in an old zone is no third zone.
    let path = vold.path("same-zone");
    vold.ctl(&format!(
        "store add c --path {} --size 128M --zone a",
        path.display()
    ));
    let refusal = vold.refused("volume create acme/new --size 1M --replicas 3");
    says(&refusal, "no_space", &["(a, b)"]);
    treasure.is_unharmed();
}

#[test]
fn a_stores_path_that_is_missing_taken_too_small_or_relative_is_refused() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let missing = vold.path("no/such/directory/store");
    let refusal = vold.refused(&format!("store add n --path {} --size 128M", missing.display()));
    says(
        &refusal,
        "not_found",
        &[
            missing.to_str().unwrap(),
            "directory does not exist",
            "create the directory first",
        ],
    );
    assert!(!vold.path("no").exists());
    let refusal = vold.refused(&format!("store add n --path {}", vold.path("none").display()));
    says(
        &refusal,
        "invalid",
        &["\"n\"", "none", "does not exist", "--size to create it"],
    );

    let taken = vold.path("taken");
    fs::write(&taken, "somebody's file").unwrap();
    let refusal = vold.refused(&format!("store add n --path {} --size 128M", taken.display()));
    says(
        &refusal,
        "exists",
        &[taken.to_str().unwrap(), "exists already", "choose another path"],
    );
    assert_eq!(fs::read(&taken).unwrap(), b"somebody's file");

    let own = vold.store_path("a");
    let refusal = vold.refused(&format!("store add n --path {} --size 128M", own.display()));
    says(
        &refusal,
        "busy",
        &[own.to_str().unwrap(), "\"a\"", "choose another path"],
    );

    let small = vold.path("small");
    let refusal = vold.refused(&format!("store add n --path {} --size 1M", small.display()));
    says(
        &refusal,
        "invalid",
        &["\"n\"", "too small", "the least is 64 MiB"],
    );
    assert!(!small.exists());

    let directory = vold.path("");
    let refusal = vold.refused(&format!("store add n --path {} --size 128M", directory.display()));
    says(
        &refusal,
        "invalid",
        &[
            directory.to_str().unwrap().trim_end_matches('/'),
            "is a directory",
            "/n.store",
        ],
    );
    // (volctl makes a path absolute by itself; the API does not know the caller's directory.)
    let relative = "{\"name\":\"n\",\"path\":\"relative/path\",\"size_bytes\":134217728}";
    let (status, answer) = post(vold, "/v1/stores", relative);
    assert_eq!(status, 400, "{answer}");
    for word in ["\\\"n\\\"", "relative/path", "not an absolute path"] {
        assert!(answer.contains(word), "{word:?} is missing in: {answer}");
    }

    let endless = vold.path("endless");
    let refusal = vold.refused(&format!("store add n --path {} --size 40T", endless.display()));
    // Which limit it meets first is the file system's affair.
    assert!(
        ["no_space", "invalid"].contains(&refusal.code.as_str()),
        "{refusal:?}"
    );
    for word in [endless.to_str().unwrap(), "40960.0 GiB", "use a smaller size"] {
        assert!(
            refusal.message.contains(word),
            "{word:?} is missing in: {refusal:?}"
        );
    }
    assert!(
        !endless.exists(),
        "a store that the disk has no room for leaves nothing behind"
    );
    treasure.is_unharmed();
}

#[test]
fn a_read_only_and_a_too_small_device_and_one_that_holds_something_are_refused() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let (image, tiny, system) = (vold.path("ro"), vold.path("tiny"), vold.path("fs"));
    File::create(&image).unwrap().set_len(128 << 20).unwrap();
    File::create(&tiny).unwrap().set_len(4 << 20).unwrap();
    File::create(&system).unwrap().set_len(128 << 20).unwrap();
    run("mke2fs", ["-q", "-F", system.to_str().unwrap()]);

    let read_only = LoopDevice::read_only_over(&image);
    let refusal = vold.refused(&format!("store add n --path {}", read_only.path().display()));
    says(
        &refusal,
        "read_only",
        &[
            read_only.path().to_str().unwrap(),
            "the device is read-only",
            "make it writable",
        ],
    );

    let small = LoopDevice::over(&tiny);
    let refusal = vold.refused(&format!("store add n --path {}", small.path().display()));
    says(
        &refusal,
        "invalid",
        &[small.path().to_str().unwrap(), "too small", "the least is 64 MiB"],
    );

    let taken = LoopDevice::over(&system);
    let refusal = vold.refused(&format!("store add n --path {}", taken.path().display()));
    says(
        &refusal,
        "exists",
        &["ext2/3/4", taken.path().to_str().unwrap(), "clear it (wipefs"],
    );
    run("e2fsck", ["-fn", taken.path().to_str().unwrap()]);
    treasure.is_unharmed();
}

#[test]
fn a_store_in_use_by_another_daemon_stays_out_and_the_daemon_says_by_what() {
    let mut treasure = Treasure::start();
    // A copy of the whole data directory: as a mistaken restore on the same host would be.
    let other = Vold::not_started(None);
    let copied = output(
        std::process::Command::new("cp")
            .arg("-a")
            .arg(treasure.vold.data_dir())
            .arg(other.data_dir()),
    );
    assert!(copied.status.success(), "{copied:?}");
    let mut other = other;
    other.restart();
    let store = other.store("a");
    assert_eq!(store["state"], "offline", "{store}");
    let reason = store["reason"].as_str().unwrap();
    assert!(
        reason.contains("in use") && reason.contains("store-a"),
        "{reason}"
    );
    assert!(!other.ctl("status")["warnings"].as_array().unwrap().is_empty());
    treasure.is_unharmed();
}

#[test]
fn a_second_daemon_on_the_same_directory_is_refused_with_the_firsts_pid() {
    let mut treasure = Treasure::start();
    let vold = &treasure.vold;
    let line = vold.refuses_to_start(&mut vold.serve_command());
    let dir = vold.data_dir();
    for word in [dir.to_str().unwrap(), &format!("pid {}", vold.pid()), "in use"] {
        assert!(line.contains(word), "{word:?} is missing in: {line}");
    }
    treasure.is_unharmed();
}

/// Stops the daemon, ruins store b's file with `ruin`, starts again: `b` is offline for a reason that has these words,
/// nothing else is hurt, and with the file put back everything is as it was.
fn a_ruined_store_stays_offline(words: &[&str], ruin: impl FnOnce(&std::path::Path)) {
    let mut treasure = Treasure::start();
    let vold = &mut treasure.vold;
    // A volume on store a alone must not mind.
    vold.stop();
    let path = vold.store_path("b");
    let saved = vold.path("saved");
    run(
        "cp",
        ["--sparse=always", path.to_str().unwrap(), saved.to_str().unwrap()],
    );
    ruin(&path);
    vold.restart();
    let store = vold.store("b");
    assert_eq!(store["state"], "offline", "{store}");
    let reason = store["reason"].as_str().unwrap();
    for word in words {
        assert!(reason.contains(word), "{word:?} is missing in: {reason}");
    }
    assert_eq!(vold.store("a")["state"], "online");
    let status = vold.ctl("status");
    assert!(
        status["warnings"]
            .as_array()
            .unwrap()
            .iter()
            .any(|w| w.as_str().unwrap().contains('b')),
        "{status}"
    );
    // The mirrored volume goes on without it, and says so.
    let volume = vold.volume("acme/vol");
    let replicas = volume["replicas"].as_array().unwrap();
    let on = |store: &str| replicas.iter().find(|replica| replica["store"] == store).unwrap();
    assert_eq!(
        (&on("a")["state"], &on("b")["state"]),
        (&"in_sync".into(), &"away".into()),
        "{volume}"
    );
    assert!(on("b")["reason"].as_str().unwrap().contains("\"b\""), "{volume}");
    // What needs only store a works.
    vold.ctl("volume create acme/single --size 1M --replicas 1");
    let uri = vold.attach("acme/single", "vm1");
    Client::connect(&uri).write(0, b"fine").unwrap();
    vold.destroy("acme/single");
    vold.stop();

    fs::rename(&saved, &path).unwrap();
    vold.restart();
    assert_eq!(vold.store("b")["state"], "online");
    treasure.uri = treasure.vold.attach("acme/vol", "vm1");
    treasure.is_unharmed();
    treasure.vold.stop();
    treasure.vold.check_is_clean();
}

#[test]
fn a_store_that_is_gone_stays_offline() {
    a_ruined_store_stays_offline(&["store-b", "no such file", "check the path"], |path| {
        fs::remove_file(path).unwrap();
    });
}

#[test]
fn a_store_that_is_no_vold_store_stays_offline() {
    a_ruined_store_stays_offline(&["store-b", "not a vold store", "check the path"], |path| {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&bytes(5, 1 << 20), 0).unwrap();
    });
}

#[test]
fn a_truncated_store_stays_offline() {
    let words = [
        "store-b",
        "is truncated",
        "134217728 bytes",
        "only 73400320",
        "put the whole file back",
        "volctl store remove --lost b",
    ];
    a_ruined_store_stays_offline(&words, |path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(70 << 20).unwrap();
    });
}

#[test]
fn an_empty_file_in_a_stores_place_stays_offline() {
    let words = ["store-b", "not a vold store", "only 0 bytes", "check the path"];
    a_ruined_store_stays_offline(&words, |path| {
        File::create(path).unwrap();
    });
}

#[test]
fn a_store_of_an_unknown_format_version_stays_offline() {
    let words = [
        "store-b",
        "version 7",
        "up to version 1",
        "start the vold that wrote it",
    ];
    a_ruined_store_stays_offline(&words, |path| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        for at in [0, 64 << 10] {
            let mut superblock = [0; 4096];
            file.read_exact_at(&mut superblock, at).unwrap();
            superblock[8] = 7;
            let crc = crc32c::crc32c(&superblock[..4092]);
            superblock[4092..].copy_from_slice(&crc.to_le_bytes());
            file.write_all_at(&superblock, at).unwrap();
        }
    });
}

#[test]
fn a_store_of_another_installation_stays_offline() {
    let stranger = Vold::start();
    stranger.add_stores(&["b"], "128M");
    let theirs = stranger.store_path("b");
    let mut stranger = stranger;
    stranger.stop();
    let words = ["store-b", "belongs to another installation", "use it there"];
    a_ruined_store_stays_offline(&words, |path| {
        fs::copy(theirs, path).unwrap();
    });
}

#[test]
fn a_damaged_superblock_copy_alone_hurts_nothing() {
    let mut treasure = Treasure::start();
    treasure.vold.stop();
    let raw = RawStore::open(&treasure.vold.store_path("a"));
    raw.flip(100, 64);
    treasure.vold.restart();
    assert_eq!(treasure.vold.store("a")["state"], "online");
    treasure.is_unharmed();
}

#[test]
fn a_configuration_with_unknown_keys_bad_values_or_no_syntax_is_refused_by_line() {
    let vold = Vold::not_started(None);
    let config = vold.path("vold.toml");
    for (text, words) in [
        ("shard_count = 4\n", &["shard_count", "unknown key"][..]),
        ("shards = 1\n[vhost]\nport = 1\n", &["vhost", "unknown key"]),
        ("shards = 1\n[nbd]\nport = 1\n", &["line 3", "port"]),
        ("\nio_engine = \"spdk\"\n", &["line 2", "spdk"]),
        ("shards = 0\n", &["shards", "1 to"]),
        ("shards = = 2\n", &["line 1"]),
        ("\u{0}\u{1}", &["line 1"]),
    ] {
        fs::write(&config, text).unwrap();
        let line = vold.refuses_to_start(vold.serve_command().arg("--config").arg(&config));
        assert!(line.contains(config.to_str().unwrap()), "{line}");
        for word in words {
            assert!(line.contains(word), "{word:?} is missing in: {line}");
        }
    }
    let missing = vold.path("missing.toml");
    let line = vold.refuses_to_start(vold.serve_command().arg("--config").arg(&missing));
    assert!(line.contains("missing.toml"), "{line}");
    assert!(
        !vold.data_dir().join("catalog.redb").exists(),
        "nothing is made with a wrong configuration"
    );
}

#[test]
fn wrong_usage_of_either_program_is_status_2() {
    let vold = Vold::start();
    for words in [
        "",
        "frobnicate",
        "volume create acme/vol",
        "volume create acme --size 1G",
        "volume create acme/vol --size 1.5G",
        "attach acme/vol",
        "volume show a/b/c",
    ] {
        vold.wrong_usage(words);
    }
    let binary = vold_tests::tools::workspace_binary("vold");
    for args in [&[][..], &["serve"], &["mend"], &["check"]] {
        let output = output(std::process::Command::new(&binary).args(args));
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
    }
}

#[test]
fn volctl_without_a_daemon_says_where_it_looked() {
    let vold = Vold::not_started(None);
    let output = output(&mut vold.volctl("status"));
    let (out, err) = texts(&output);
    assert_eq!((output.status.code(), out.as_str()), (Some(1), ""));
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.contains(vold.api_socket().to_str().unwrap()), "{err}");
}

#[test]
fn garbage_on_the_api_socket_hurts_nobody() {
    let mut treasure = Treasure::start();
    let connect = |vold: &Vold| {
        let stream = UnixStream::connect(vold.api_socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    for seed in 0..20 {
        let mut stream = connect(&treasure.vold);
        let _ = stream.write_all(&bytes(seed, 5000));
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    for (path, body) in [
        ("/v1/customers", "{"),
        ("/v1/customers", "[]"),
        ("/v1/customers", "{\"name\":7}"),
        ("/v1/customers", "{\"name\":\"a\",\"extra\":1}"),
        ("/v1/volumes", "{\"volume\":\"acme\",\"size_bytes\":1}"),
        ("/v1/volumes", "{\"volume\":\"acme/x\",\"size_bytes\":-1}"),
        ("/v1/volumes", "{\"volume\":\"acme/x\",\"size_bytes\":1e99}"),
        ("/v1/volumes/acme/vol/resize", "null"),
        ("/v1/attachments", "{\"volume\":\"../..\",\"vm\":\"vm1\"}"),
        ("/v1/nothing", "{}"),
        ("/v1/volumes/..%2f..%2fetc", "{}"),
    ] {
        let (status, answer) = post(&treasure.vold, path, body);
        assert!((400..500).contains(&status), "{path} {body}: {status} {answer}");
        let json: serde_json::Value = serde_json::from_str(&answer)
            .unwrap_or_else(|e| panic!("{path} {body}: the refusal is no JSON ({e}): {answer}"));
        assert!(json["error"]["message"].is_string(), "{answer}");
    }
    // A body beyond the limit, declared or sent.
    let (status, _) = post(
        &treasure.vold,
        "/v1/customers",
        &format!("{{\"name\":\"{}\"}}", "x".repeat(1 << 20)),
    );
    assert!((400..500).contains(&status), "{status}");
    // A client that says nothing holds nobody up.
    let _silent = connect(&treasure.vold);
    treasure.is_unharmed();
}

#[test]
fn garbage_on_an_nbd_socket_hurts_nobody() {
    let mut treasure = Treasure::start();
    let (socket, export) = parse_uri(&treasure.uri);
    for seed in 0..20 {
        // Instead of flags; instead of an option; after a proper option's magic.
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(&bytes(seed, 4000)).unwrap_or_default();
        ends(stream);
        let mut haggle = Haggle::connect(&socket).unwrap();
        haggle.send_raw(&bytes(seed, 4000)).unwrap_or_default();
        ends(haggle.into_stream());
    }
    // Options with lengths and names that lie.
    let mut haggle = Haggle::connect(&socket).unwrap();
    let answer = haggle.ask(nbd::OPT_GO, &[0xff; 10]).unwrap();
    assert_eq!(answer.last().unwrap().kind, nbd::REP_ERR_INVALID);
    let answer = haggle.ask(nbd::OPT_LIST, b"unexpected").unwrap();
    assert_eq!(answer.last().unwrap().kind, nbd::REP_ERR_INVALID);
    let answer = haggle.ask(0x1234_5678, b"what?").unwrap();
    assert_eq!(answer.last().unwrap().kind, nbd::REP_ERR_UNSUP);
    assert!(matches!(haggle.go(&"n".repeat(4096)), Err(GoError::Refused(_))));
    // A length of 4 GiB is refused or hung up on, and never waited for with memory in hand.
    let mut haggle = Haggle::connect(&socket).unwrap();
    haggle.send_raw(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
    match haggle.reply() {
        Ok(reply) => assert_eq!(reply.kind, nbd::REP_ERR_TOO_BIG),
        Err(e) => assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock, "no answer"),
    }
    // In transmission: each wrong request gets its own error, and the connection goes on.
    let mut client = Haggle::connect(&socket).unwrap().go(&export).unwrap();
    let size = client.size();
    assert_eq!(client.command(77, 0, 0, 512), Err(nbd::EINVAL));
    assert_eq!(client.read(size, 512), Err(nbd::EINVAL));
    assert_eq!(client.read(u64::MAX - 100, 512), Err(nbd::EINVAL));
    assert_eq!(client.write(size - 256, &[0; 512]), Err(nbd::ENOSPC));
    assert_eq!(client.write(u64::MAX - 100, &[0; 512]), Err(nbd::ENOSPC));
    assert!(client.trim(size, 4096).is_err());
    assert!(client.write_zeroes(size - 1, 2, 0).is_err());
    assert!(client.command(nbd::CMD_READ, 0x8000, 0, 512).is_err());
    assert_eq!(client.read(12345, 1000).unwrap(), Treasure::gold()[..1000]);
    let stream = client.into_stream();
    (&stream).write_all(&bytes(3, 100_000)).unwrap_or_default();
    ends(stream);
    treasure.is_unharmed();
}

/// The server hangs up (or has answered and hung up) within the handshake's deadline.
fn ends(mut stream: UnixStream) {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    if let Err(e) = stream.read_to_end(&mut rest) {
        assert_ne!(
            e.kind(),
            std::io::ErrorKind::WouldBlock,
            "the server keeps a broken connection"
        );
    }
}

#[test]
fn more_connections_than_an_attachment_may_have_are_turned_away_and_the_old_ones_work() {
    let mut treasure = Treasure::start();
    let (socket, export) = parse_uri(&treasure.uri);
    let mut clients = Vec::new();
    let mut turned_away = 0;
    for _ in 0..40 {
        match Haggle::connect(&socket) {
            Ok(haggle) => match haggle.go(&export) {
                Ok(client) => clients.push(client),
                Err(_) => turned_away += 1,
            },
            Err(_) => turned_away += 1,
        }
    }
    assert!(clients.len() >= 8, "{} connections are few", clients.len());
    assert!(turned_away > 0, "there is a limit");
    for client in &mut clients {
        assert_eq!(client.read(12345, 4).unwrap(), Treasure::gold()[..4]);
    }
    drop(clients);
    // The daemon sees the ends of connections a moment later.
    vold_tests::wait_for("a connection is free again", || {
        Haggle::connect(&socket)
            .ok()
            .and_then(|haggle| haggle.go(&export).ok())
            .map(drop)
    });
    std::thread::sleep(Duration::from_millis(50));
    vold_tests::wait_for("the volume is served", || {
        Haggle::connect(&socket)
            .ok()
            .and_then(|haggle| haggle.go(&export).ok())
            .map(drop)
    });
    treasure.is_unharmed();
}

#[test]
fn a_forced_engine_is_the_engine() {
    for (engine, name) in [(Engine::Uring, "io_uring"), (Engine::Threads, "threads")] {
        let vold = Vold::start_on(engine);
        assert_eq!(vold.ctl("version")["io_engine"], name);
        assert!(vold.log().contains(name), "the choice is logged: {}", vold.log());
    }
}

/// A POST over the API's socket; gives status and body.
fn post(vold: &Vold, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(vold.api_socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: vold\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    // A server that refuses by the head may close before it has read the body.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    (
        status.unwrap_or_else(|| panic!("no HTTP answer: {answer}")),
        body.to_owned(),
    )
}
