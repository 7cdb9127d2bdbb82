//! Every known mistake of other NBD servers and clients, tried on vold over an attachment's own socket: each test is named
//! after one, says in a line what it was, and shows that its cause is not here. Those of TLS and of who is let in are in
//! `known_mistakes_tls.rs`, those of requests and their data in `known_mistakes_data.rs`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vold_tests::content::bytes;
use vold_tests::load::Load;
use vold_tests::nbd::*;
use vold_tests::vold::parse_uri;
use vold_tests::{Engine, Vold, wait_for};

/// `acme/vol` of 8 MiB, served, with something in it.
struct Served {
    vold: Vold,
    uri: String,
    socket: PathBuf,
}

const EXPORT: &str = "acme/vol";
const AT: u64 = 4 << 20;

impl Served {
    fn start() -> Self {
        Self::serving(Vold::start())
    }

    fn start_on(engine: Engine) -> Self {
        Self::serving(Vold::start_on(engine))
    }

    fn serving(vold: Vold) -> Self {
        let uri = vold.with_volume(1, "64M", "8M");
        let socket = parse_uri(&uri).0;
        Client::connect(&uri).write_fua(AT, &bytes(1, 10_000)).unwrap();
        Self { vold, uri, socket }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// A connection that has had the server's first words; it may have to wait for the place of one that has just ended.
    fn greeted(&self) -> UnixStream {
        wait_for("there is a place", || {
            let mut stream = self.connect();
            stream.read_exact(&mut [0; 18]).ok().map(|()| stream)
        })
    }

    /// The same, and has answered them.
    fn haggle(&self) -> Haggle {
        wait_for("there is a place", || Haggle::connect(&self.socket).ok())
    }

    /// A newcomer is served, and what was there is there.
    fn is_unharmed(&mut self) {
        assert!(self.vold.alive());
        let mut client = self.haggle().go(EXPORT).unwrap();
        assert!(client.read(AT, 10_000).unwrap() == bytes(1, 10_000));
        client.disconnect();
    }
}

/// The haggle goes on where it was.
fn in_step(haggle: &mut Haggle) {
    assert_eq!(haggle.list().unwrap(), [EXPORT]);
}

/// Length of a name, and the name, as they go over the wire.
fn named(len: u32, name: &[u8], rest: &[u8]) -> Vec<u8> {
    [&len.to_be_bytes(), name, rest].concat()
}

/// Whichever options carry a name, with what follows it.
const NAMED: [(u32, &[u8]); 4] = [
    (OPT_INFO, &[0, 0]),
    (OPT_GO, &[0, 0]),
    (OPT_LIST_META_CONTEXT, &[0; 4]),
    (OPT_SET_META_CONTEXT, &[0; 4]),
];

#[test]
fn nbd_server_cve_2011_1925_a_failed_negotiation() {
    // It was: the negotiation gave no client back (the export did not exist), and what it gave was used.
    let mut served = Served::start();
    for _ in 0..5 {
        let mut haggle = served.haggle();
        haggle.send(OPT_EXPORT_NAME, b"acme/nothing").unwrap();
        hangs_up(haggle.into_stream());
        assert!(matches!(
            served.haggle().go("acme/nothing"),
            Err(GoError::Refused(reply)) if reply.kind == REP_ERR_UNKNOWN
        ));
        let mut haggle = served.haggle();
        assert_eq!(haggle.final_kind(OPT_ABORT, &[]), REP_ACK);
        hangs_up(haggle.into_stream());
        for first_words in [
            &[0xff; 4][..],
            b"\0\0\0\x03NOTANOPTxxxxxxxx",
            b"GET / HTTP/1.0\r\n\r\n",
        ] {
            let mut stream = served.greeted();
            stream.write_all(first_words).unwrap();
            hangs_up(stream);
        }
    }
    served.is_unharmed();
}

#[test]
fn nbd_server_cve_2013_7441_a_client_that_leaves_during_negotiation() {
    // It was: the process that listens negotiated, and ended itself when a client left or named no export.
    let mut served = Served::start();
    let go = option_bytes(OPT_GO, &go_data(EXPORT));
    let words = [&3u32.to_be_bytes()[..], &go].concat();
    for len in 0..=words.len() {
        let mut stream = served.greeted();
        stream.write_all(&words[..len]).unwrap();
        // By turns with an end of what it sends, and with one of everything.
        if len % 2 == 0 {
            stream.shutdown(Shutdown::Write).unwrap();
        }
    }
    served.is_unharmed();
}

/// To a thread, if it is still there.
fn kill_thread(process: Pid, thread: i32, signal: Signal) {
    let process = process.as_raw_nonzero().get();
    // SAFETY: numbers alone.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal.as_raw()) };
}

#[test]
fn nbd_server_cve_2015_0847_signals() {
    // It was: signal handlers called what must not be called in one, and the server could lock up.
    let mut served = Served::start();
    let pid = Pid::from_raw(served.vold.pid() as i32).unwrap();
    let kill = |signal| kill_process(pid, signal).unwrap();
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            for seed in 0..300 {
                let mut client = wait_for("there is a place", || served.haggle().go(EXPORT).ok());
                client.write(seed * 4096, &bytes(seed, 4096)).unwrap();
            }
        });
        // To the process, for which the kernel takes a thread that waits, and to each thread, in the middle of whatever it does.
        let tasks = std::fs::read_dir(format!("/proc/{}/task", served.vold.pid())).unwrap();
        let threads: Vec<i32> = tasks
            .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        while !clients.is_finished() {
            for signal in [
                Signal::CHILD,
                Signal::PIPE,
                Signal::XFSZ,
                Signal::WINCH,
                Signal::CONT,
            ] {
                kill(signal);
                threads
                    .iter()
                    .for_each(|thread| kill_thread(pid, *thread, signal));
            }
            std::thread::yield_now();
        }
    });
    served.is_unharmed();
    // The one that ends it may come as often as it likes, while clients are there: it ends once, and cleanly.
    let _idle: Vec<Haggle> = (0..5).map(|_| served.haggle()).collect();
    let _client = Client::connect(&served.uri);
    let stat = format!("/proc/{}/stat", served.vold.pid());
    wait_for("the process has ended", || {
        for _ in 0..50 {
            kill(Signal::TERM);
            kill(Signal::INT);
            std::thread::sleep(Duration::from_micros(200));
        }
        std::fs::read_to_string(&stat)
            .unwrap()
            .contains(") Z ")
            .then_some(())
    });
    served.vold.stop();
    served.vold.check_is_clean();
    served.vold.restart();
    served.is_unharmed();
}

#[test]
fn nbd_server_cve_2022_26495_a_name_of_4_gib_less_one() {
    // It was: the name's length plus one was allocated, which was nothing for 2^32 - 1, and the name was read into it.
    let mut served = Served::start();
    let mut haggle = served.haggle();
    assert_eq!(haggle.final_kind(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
    for (option, rest) in NAMED {
        for len in [u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1, 1000] {
            let kind = haggle.final_kind(option, &named(len, b"acme/vol", rest));
            assert_eq!(kind, REP_ERR_INVALID, "option {option}, length {len}");
            in_step(&mut haggle);
        }
    }
    // The same of a context's name, and of how many there are.
    let query = |count: u32, len: u32| {
        let queries = [&count.to_be_bytes()[..], &len.to_be_bytes(), b"base:allocation"].concat();
        named(8, b"acme/vol", &queries)
    };
    for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        for (count, len) in [
            (1, u32::MAX),
            (1, 16),
            (u32::MAX, 15),
            (u32::MAX, u32::MAX),
            (2, 15),
        ] {
            assert_eq!(haggle.final_kind(option, &query(count, len)), REP_ERR_INVALID);
            in_step(&mut haggle);
        }
    }
    served.is_unharmed();
}

#[test]
fn nbd_server_cve_2022_26496_a_name_longer_than_its_array() {
    // It was: a name was read into an array on the stack, however long it said to be.
    let mut served = Served::start();
    let mut haggle = served.haggle();
    assert_eq!(haggle.final_kind(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
    for len in [
        255, 256, 257, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 8192, 16_000,
    ] {
        let name = vec![b'n'; len];
        for (option, rest) in NAMED {
            // The protocol's longest string is 4096 bytes.
            let expected = if len <= 4096 {
                REP_ERR_UNKNOWN
            } else {
                REP_ERR_INVALID
            };
            let kind = haggle.final_kind(option, &named(len as u32, &name, rest));
            assert_eq!(kind, expected, "option {option}, {len} bytes");
        }
        in_step(&mut haggle);
        let mut other = served.haggle();
        other.send(OPT_EXPORT_NAME, &name).unwrap();
        hangs_up(other.into_stream());
    }
    served.is_unharmed();
}

#[test]
fn qemu_cve_2017_7539_a_handshake_in_pieces() {
    // It was: every message was expected whole and at once; one that came in pieces, or never to its end, failed an assertion.
    let mut served = Served::start();
    let words = [
        &3u32.to_be_bytes()[..],
        &option_bytes(OPT_STRUCTURED_REPLY, &[]),
        &option_bytes(OPT_INFO, &go_data(EXPORT)),
        &option_bytes(OPT_GO, &go_data(EXPORT)),
    ]
    .concat();
    let in_pieces = |words: &[u8]| {
        let mut stream = served.greeted();
        for byte in words {
            stream.write_all(&[*byte]).unwrap();
            // The server gets its chance to see each alone.
            std::thread::yield_now();
        }
        stream
    };
    let mut haggle = Haggle::go_on(in_pieces(&words));
    let kinds: Vec<(u32, u32)> = std::iter::from_fn(|| Some(haggle.reply().unwrap()))
        .map(|reply| (reply.option, reply.kind))
        .take(5)
        .collect();
    let expected = [
        (OPT_STRUCTURED_REPLY, REP_ACK),
        (OPT_INFO, REP_INFO),
        (OPT_INFO, REP_ACK),
        (OPT_GO, REP_INFO),
        (OPT_GO, REP_ACK),
    ];
    assert_eq!(kinds, expected);
    for len in [1, 3, 4, 5, 19, 20, 21, words.len() - 1] {
        drop(in_pieces(&words[..len]));
    }
    served.is_unharmed();
}

#[test]
fn qemu_cve_2017_9524_a_client_that_hangs_up_at_once() {
    // It was: who hung up before the negotiation had ended left half an object behind, which was freed as a whole one.
    let mut served = Served::start();
    let before = Load::of(&served.vold);
    for round in 0..400 {
        // The last has the server wait for its answer.
        let stream = if round % 4 == 3 {
            served.greeted()
        } else {
            served.connect()
        };
        match round % 4 {
            1 => stream.shutdown(Shutdown::Both).unwrap(),
            // What came is not taken: the end is a reset.
            2 => (&stream).write_all(b"\r\n\r\n").unwrap_or_default(),
            _ => {}
        }
    }
    Load::back_to(before, &served.vold);
    served.is_unharmed();
}

#[test]
fn qemu_cve_2017_10664_a_reply_to_a_client_that_has_gone() {
    // It was: SIGPIPE was not ignored, and the reply to somebody who had gone killed the server.
    // On both engines: io_uring never lets a send raise the signal, the system call does.
    for engine in Engine::ALL {
        let mut served = Served::start_on(engine);
        let status = std::fs::read_to_string(format!("/proc/{}/status", served.vold.pid())).unwrap();
        let ignored = status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:\t"))
            .unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_ne!(
            ignored & 1 << (Signal::PIPE.as_raw() - 1),
            0,
            "SIGPIPE is ignored"
        );
        for _ in 0..20 {
            let mut client = wait_for("there is a place", || {
                Haggle::connect(&served.socket)
                    .ok()
                    .and_then(|haggle| haggle.go(EXPORT).ok())
            });
            for _ in 0..16 {
                client.submit(CMD_READ, 0, 0, 1 << 20, &[]).unwrap();
            }
            // One reply has begun to come, the rest has nowhere to go.
            client.stream().read_exact(&mut [0; 16]).unwrap();
            drop(client);
        }
        served.is_unharmed();
    }
}

#[test]
fn qemu_cve_2017_15118_an_option_that_is_longer_or_shorter_than_its_name() {
    // It was: INFO and GO held the name against the option's length, and not against the array on the stack.
    let mut served = Served::start();
    let mut haggle = served.haggle();
    for option in [OPT_INFO, OPT_GO] {
        let cases: [(&str, Vec<u8>, u32); 9] = [
            ("no length", vec![0, 0, 0], REP_ERR_INVALID),
            ("a name and no count", named(8, b"acme/vol", &[]), REP_ERR_INVALID),
            ("half a count", named(8, b"acme/vol", &[0]), REP_ERR_INVALID),
            (
                "fewer kinds than counted",
                named(8, b"acme/vol", &[0, 2, 0, 1]),
                REP_ERR_INVALID,
            ),
            (
                "more kinds than counted",
                named(8, b"acme/vol", &[0, 0, 0, 1]),
                REP_ERR_INVALID,
            ),
            (
                "the most kinds, none there",
                named(8, b"acme/vol", &[0xff, 0xff]),
                REP_ERR_INVALID,
            ),
            (
                "a name that fills the option, and says to be longer",
                named(16_382, &[b'n'; 16_380], &[]),
                REP_ERR_INVALID,
            ),
            (
                "a name that fills the option",
                named(16_378, &[b'n'; 16_378], &[0, 0]),
                REP_ERR_INVALID,
            ),
            (
                "one byte more than an option may have",
                vec![0; 16_385],
                REP_ERR_TOO_BIG,
            ),
        ];
        for (what, data, expected) in cases {
            assert_eq!(haggle.final_kind(option, &data), expected, "{what}");
            in_step(&mut haggle);
        }
    }
    // Kinds without end, known or not, are one answer each at most.
    let mut kinds = vec![0x0f, 0xff];
    kinds.extend((0..0x0fffu16).flat_map(|kind| (kind % 7).to_be_bytes()));
    let replies = haggle.ask(OPT_INFO, &named(8, b"acme/vol", &kinds)).unwrap();
    assert_eq!((replies.len(), replies.last().unwrap().kind), (5, REP_ACK));
    served.is_unharmed();
}

#[test]
fn qemu_cve_2017_15119_options_without_end() {
    // It was: options of any length were read and thrown away at full speed, for as long as the client liked.
    let mut served = Served::start();
    // So many, and no more.
    let mut haggle = served.haggle();
    let mut answered = 0;
    while haggle.ask(99, &[]).is_ok() {
        answered += 1;
        assert!(answered <= 64, "options go on and on");
    }
    assert_eq!(answered, 64);
    // So long, and no longer: what is longer is not waited for, and not taken.
    let mut haggle = served.haggle();
    assert_eq!(haggle.final_kind(99, &vec![7; 1 << 20]), REP_ERR_TOO_BIG);
    in_step(&mut haggle);
    for (option, len) in [
        (99u32, (1u32 << 20) + 1),
        (99, u32::MAX),
        (OPT_EXPORT_NAME, 16_385),
    ] {
        let mut haggle = served.haggle();
        let header = [b"IHAVEOPT", &option.to_be_bytes()[..], &len.to_be_bytes()].concat();
        haggle.send_raw(&header).unwrap();
        let taken = haggle.send_raw(&vec![7; len.min(8 << 20) as usize]);
        assert!(
            taken.is_err() || option == OPT_EXPORT_NAME,
            "{len} bytes are taken"
        );
        hangs_up(haggle.into_stream());
    }
    served.is_unharmed();
}

#[test]
fn qemu_cve_2020_10761_an_error_that_repeats_the_name() {
    // It was: an error named the export, and with the longest name it was longer than an error's text may be.
    let mut served = Served::start();
    let mut haggle = served.haggle();
    assert_eq!(haggle.final_kind(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
    for name in [
        "%s%n%p%d".repeat(512),
        "ü".repeat(2048),
        format!("x{}", "ü".repeat(2047)),
        "\r\n\u{1b}[2J".repeat(682),
        "x".repeat(4096),
    ] {
        assert!(name.len() > 4090 && name.len() <= 4096);
        for (option, rest) in NAMED {
            let replies = haggle
                .ask(option, &named(name.len() as u32, name.as_bytes(), rest))
                .unwrap();
            let [reply] = &replies[..] else {
                panic!("{replies:?}")
            };
            assert_eq!(reply.kind, REP_ERR_UNKNOWN);
            assert!(reply.data.len() <= 4096, "{} bytes of text", reply.data.len());
            assert!(std::str::from_utf8(&reply.data).is_ok());
        }
        in_step(&mut haggle);
    }
    // Nor does the log take it in whole.
    let longest = served.vold.log().lines().map(str::len).max().unwrap();
    assert!(longest < 1000, "a line of {longest} bytes");
    served.is_unharmed();
}

#[test]
fn qemu_cve_2024_7409_clients_in_the_handshake_of_a_server_that_goes() {
    // It was: whoever closed the server did not know of clients that were still in their handshake; they were served on.
    let mut served = Served::start();
    let reluctant = |served: &Served| {
        let silent = served.connect();
        let greeted = served.haggle().into_stream();
        let mut halfway = served.haggle();
        halfway
            .send_raw(&option_bytes(OPT_GO, &go_data(EXPORT))[..20])
            .unwrap();
        let mut informed = served.haggle();
        informed.ask(OPT_INFO, &go_data(EXPORT)).unwrap();
        [silent, greeted, halfway.into_stream(), informed.into_stream()]
    };
    let clients = reluctant(&served);
    wait_for("all are there", || {
        (served.vold.ctl("status")["handshakes"] == 4).then_some(())
    });
    served.vold.ctl("detach acme/vol --vm vm1");
    let [silent, rest @ ..] = clients;
    (&silent).read_exact(&mut [0; 18]).unwrap();
    for client in [silent].into_iter().chain(rest) {
        // Whatever it says now, nobody answers.
        let _ = (&client).write_all(&option_bytes(OPT_GO, &go_data(EXPORT)));
        hangs_up(client);
    }
    served.socket = parse_uri(&served.vold.attach(EXPORT, "vm1")).0;
    served.is_unharmed();
    // The daemon's own end.
    let _clients = reluctant(&served);
    served.vold.stop();
    served.vold.check_is_clean();
    served.vold.restart();
    served.is_unharmed();
}

#[test]
fn nbdkit_cve_2019_14850_work_for_whoever_connects() {
    // It was: the export was opened for every connection, before it had said a word: cheap to ask for, dear to do.
    let served = Served::start();
    let before = Load::of(&served.vold);
    let idle: Vec<Haggle> = (0..30).map(|_| served.haggle()).collect();
    let status = wait_for("all are there", || {
        let status = served.vold.ctl("status");
        (status["handshakes"] == 30).then_some(status)
    });
    assert_eq!(status["connections"], 0, "none has the volume");
    assert_eq!(served.vold.ctl("attachment list")["items"][0]["connections"], 0);
    let during = Load::of(&served.vold);
    // A descriptor and a task each, and the 32 KiB that the longest option takes.
    assert!(during.tasks <= before.tasks + 30, "{before:?} {during:?}");
    assert!(
        during.descriptors <= before.descriptors + 32,
        "{before:?} {during:?}"
    );
    assert!(
        during.resident_bytes <= before.resident_bytes + (4 << 20),
        "{before:?} {during:?}"
    );
    drop(idle);
    Load::back_to(before, &served.vold);
}

#[test]
fn nbdkit_cve_2019_14851_info_more_than_once() {
    // It was: INFO opened the export, and the option that opened it a second time failed an assertion.
    let mut served = Served::start();
    let mut haggle = served.haggle();
    let (own, missing) = (go_data(EXPORT), go_data("acme/nothing"));
    for _ in 0..3 {
        assert_eq!(haggle.final_kind(OPT_INFO, &own), REP_ACK);
        assert_eq!(haggle.final_kind(OPT_INFO, &own), REP_ACK);
        assert_eq!(haggle.final_kind(OPT_INFO, &missing), REP_ERR_UNKNOWN);
        assert_eq!(haggle.final_kind(OPT_GO, &missing), REP_ERR_UNKNOWN);
        in_step(&mut haggle);
        assert_eq!(haggle.final_kind(OPT_INFO, &go_data("")), REP_ACK);
        assert_eq!(haggle.final_kind(OPT_STARTTLS, &[]), (1 << 31) | 2);
    }
    assert_eq!(
        served.vold.ctl("status")["connections"],
        0,
        "INFO is no connection"
    );
    let mut client = haggle.go(EXPORT).unwrap();
    assert!(client.read(AT, 10_000).unwrap() == bytes(1, 10_000));
    // And another word than GO at the end.
    let mut haggle = served.haggle();
    assert_eq!(haggle.final_kind(OPT_INFO, &own), REP_ACK);
    haggle.send(OPT_EXPORT_NAME, EXPORT.as_bytes()).unwrap();
    let mut size = [0; 10];
    haggle.stream().read_exact(&mut size).unwrap();
    assert_eq!(size[..8], (8u64 << 20).to_be_bytes());
    served.is_unharmed();
}
