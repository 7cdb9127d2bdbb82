//! Who may see and have what over TLS: every kind of certificate, every kind of export, every way to ask for one. What a VM may
//! not have looks like what there is not, byte for byte, and takes as long.

use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::RngExt;
use vold_tests::content::seeded;
use vold_tests::nbd::*;
use vold_tests::scale;
use vold_tests::tls::Tls;
use vold_tests::vold::parse_uri;

/// The names asked for, as the VM `acme/vm1` means them. All but its own are of one length.
const OWN: &str = "acme/vol";
const FOREIGN: &str = "initech/vol";
const MISSING: &str = "initech/nix";
const DETACHED: &str = "acme/onceup";

/// How a connection fares.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// It has the export: size in bytes and flags.
    Granted(u64, u16),
    /// INFO's or GO's error reply, whole: kind and text.
    Refused(u32, Vec<u8>),
    /// A hang-up that TLS announces, without a word of NBD.
    HungUp,
    /// The names that are listed.
    Listed(Vec<String>),
    /// TLS itself ends: not a byte of NBD comes.
    NotLetIn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Go,
    Info,
    ExportName,
    List,
}

/// Customers acme, globex and initech with a VM and a volume each; acme had another volume once.
fn world() -> Tls {
    let tls = Tls::start();
    tls.vold.ctl("customer create initech");
    tls.vold.ctl("vm create vm3 --customer initech");
    for (volume, vm) in [(FOREIGN, "vm3"), (DETACHED, "vm1")] {
        tls.vold.ctl(&format!("volume create {volume} --size 8M"));
        tls.vold.attach(volume, vm);
    }
    tls.vold.ctl(&format!("detach {DETACHED} --vm vm1"));
    tls
}

fn attempt(tls: &Tls, certificate: Option<&PathBuf>, way: Way, export: &str) -> Outcome {
    let asked = tls
        .haggle(certificate.map(PathBuf::as_path))
        .and_then(|mut haggle| {
            if way == Way::ExportName {
                haggle.send(OPT_EXPORT_NAME, export.as_bytes())?;
                let mut answer = Vec::new();
                let mut word = [0; 10];
                // An end that TLS has not announced is an error here.
                while let n @ 1.. = haggle.stream().read(&mut word)? {
                    answer.extend(&word[..n]);
                    if answer.len() >= 10 {
                        break;
                    }
                }
                return Ok(match answer.first_chunk::<8>() {
                    Some(size) => Outcome::Granted(
                        u64::from_be_bytes(*size),
                        u16::from_be_bytes(answer[8..10].try_into().unwrap()),
                    ),
                    None => {
                        assert_eq!(answer, [0; 0]);
                        Outcome::HungUp
                    }
                });
            }
            if way == Way::List {
                return haggle.list().map(Outcome::Listed);
            }
            let option = if way == Way::Go { OPT_GO } else { OPT_INFO };
            let replies = haggle.ask(option, &go_data(export))?;
            assert!(replies.iter().all(|reply| reply.option == option));
            Ok(match &replies[..] {
                [refused] => Outcome::Refused(refused.kind, refused.data.clone()),
                [info, last] => {
                    assert_eq!((info.kind, last.kind), (REP_INFO, REP_ACK));
                    let info = &info.data;
                    Outcome::Granted(
                        u64::from_be_bytes(info[2..10].try_into().unwrap()),
                        u16::from_be_bytes(info[10..12].try_into().unwrap()),
                    )
                }
                more => panic!("{more:?}"),
            })
        });
    asked.unwrap_or_else(|e| {
        assert_ne!(e.kind(), ErrorKind::WouldBlock, "the server keeps the connection");
        Outcome::NotLetIn
    })
}

#[test]
fn every_certificate_and_every_export_in_every_way() {
    let tls = world();
    tls.issue("acme", "vm-without-volumes");
    // A certificate of acme/vm1 that is revoked, and one that was issued after.
    let revoked = tls.vold.path("revoked");
    tls.issue_by(&tls.pki(), "acme", "vm1", &revoked, "");
    tls.revoke("acme", "vm1");
    let right = tls.vold.path("right");
    tls.issue_by(&tls.pki(), "acme", "vm1", &right, "");
    let expired = tls.vold.path("expired");
    tls.issue_by(&tls.pki(), "acme", "vm1", &expired, "--days 0");
    std::thread::sleep(Duration::from_secs(1));
    let certificates = [
        ("right", Some(right), Some("acme/vol")),
        (
            "of another customer's VM",
            Some(tls.certificate("globex", "vm2")),
            Some("globex/vol"),
        ),
        (
            "of a VM without volumes",
            Some(tls.certificate("acme", "vm-without-volumes")),
            Some(""),
        ),
        ("expired", Some(expired), None),
        ("revoked", Some(revoked), None),
        ("of another authority", Some(tls.forged("acme", "vm1")), None),
        ("none", None, None),
    ];
    let mut refusals = Vec::new();
    for (what, certificate, has) in &certificates {
        for way in [Way::Go, Way::Info, Way::ExportName, Way::List] {
            for export in [OWN, FOREIGN, MISSING, DETACHED] {
                let outcome = attempt(&tls, certificate.as_ref(), way, export);
                println!("{what} | {way:?} | {export} | {outcome:?}");
                let expected = match (has, way) {
                    (None, _) => Outcome::NotLetIn,
                    (Some(has), Way::List) => {
                        Outcome::Listed(has.split_whitespace().map(str::to_owned).collect())
                    }
                    (Some(has), _) if *has == export => Outcome::Granted(8 << 20, FLAGS),
                    (Some(_), Way::ExportName) => Outcome::HungUp,
                    (Some(_), _) => {
                        let Outcome::Refused(REP_ERR_UNKNOWN, text) = &outcome else {
                            panic!("{what} | {way:?} | {export} | {outcome:?}");
                        };
                        refusals.push(text.clone());
                        continue;
                    }
                };
                assert_eq!(outcome, expected, "{what} | {way:?} | {export}");
            }
        }
    }
    // Not for any of them is there another word than for the others: not its name, and not another reason.
    assert_eq!(refusals.len(), 2 * (3 + 4 + 4));
    refusals.dedup();
    assert_eq!(refusals.len(), 1, "{refusals:?}");
}

/// Flush, FUA, trim, zeroes, multi-conn, cache, fast zeroes; no structured replies were agreed.
const FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11;

/// Times of the answers to INFO for either name, asked by turns in an order drawn by lot.
fn times(samples: usize, names: [&str; 2], mut connect: impl FnMut() -> Box<dyn Ask>) -> [Vec<Duration>; 2] {
    let mut random = seeded("foreign or missing first");
    let data = names.map(go_data);
    let mut times = [Vec::new(), Vec::new()];
    while times[0].len() < samples {
        let mut connection = connect();
        // A handshake has 64 options; the first ones of a connection are not like the others.
        for round in 0..28 {
            let first = random.random_range(0..2);
            for which in [first, 1 - first] {
                let begun = Instant::now();
                connection.ask_info(&data[which]);
                if round > 0 {
                    times[which].push(begun.elapsed());
                }
            }
        }
    }
    times
}

/// Makes a connection.
type Connect<'a> = &'a dyn Fn() -> Box<dyn Ask>;

trait Ask {
    fn ask_info(&mut self, data: &[u8]);
}

impl<S: Read + Write> Ask for Haggle<S> {
    fn ask_info(&mut self, data: &[u8]) {
        let replies = self.ask(OPT_INFO, data).unwrap();
        assert_eq!(replies[0].kind, REP_ERR_UNKNOWN);
    }
}

/// Half of the samples are faster, half are slower.
fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

#[test]
fn the_time_of_an_answer_does_not_tell_a_foreign_export_from_a_missing_one() {
    let tls = world();
    let certificate = tls.certificate("acme", "vm1");
    let (socket, _) = parse_uri(&tls.vold.attach(OWN, "vm1"));
    let at_the_gate = || -> Box<dyn Ask> { Box::new(tls.haggle(Some(&certificate)).unwrap()) };
    let at_the_door = || -> Box<dyn Ask> {
        let mut haggle = tls.haggle(Some(&certificate)).unwrap();
        haggle.ask(OPT_INFO, &go_data(OWN)).unwrap();
        Box::new(haggle)
    };
    let on_the_socket = || -> Box<dyn Ask> {
        Box::new(vold_tests::wait_for("there is a place", || {
            Haggle::connect(&socket).ok()
        }))
    };
    let places: [(&str, Connect<'_>); 3] = [
        ("the gate", &at_the_gate),
        ("the door", &at_the_door),
        ("the socket", &on_the_socket),
    ];
    // The work is the same by construction (docs/SECURITY.md). This is to notice should that ever change by much, such as a
    // look into the catalog for one of the names; and in the long run, by less.
    let (samples, bound) = scale((600, 1.5), (20_000, 1.1));
    for (where_, connect) in places {
        for other in [MISSING, DETACHED] {
            let [mut foreign, mut missing] = times(samples, [FOREIGN, other], connect);
            let ratio = median(&mut foreign) / median(&mut missing);
            println!("{where_}: {FOREIGN} / {other}: {ratio:.3} of {samples} each");
            assert!(
                ratio < bound && ratio > 1.0 / bound,
                "{where_}: {FOREIGN} / {other}: {ratio}"
            );
        }
    }
}
