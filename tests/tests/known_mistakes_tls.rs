//! Known mistakes of other NBD servers and clients with TLS, and with who is let in: each test is named after one, says in a
//! line what it was, and shows that its cause is not in vold. The others are in `known_mistakes.rs` and `known_mistakes_data.rs`.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use vold_tests::content::bytes;
use vold_tests::load::{Load, processor_ticks};
use vold_tests::nbd::*;
use vold_tests::tls::{Tls, TlsStream};
use vold_tests::tools::{fail, tool};
use vold_tests::wait_for;

/// That nothing at all is told to who shows this certificate.
fn is_not_let_in(tls: &Tls, what: &str, certificate: Option<&Path>) {
    for (option, data) in [
        (OPT_LIST, vec![]),
        (OPT_INFO, go_data("acme/vol")),
        (OPT_GO, go_data("acme/vol")),
        (OPT_GO, go_data("")),
        (OPT_EXPORT_NAME, b"acme/vol".to_vec()),
    ] {
        // The client may be done before the server has looked at its certificate.
        let Ok(mut haggle) = tls.haggle(certificate) else {
            continue;
        };
        let answer = haggle.ask(option, &data);
        let e = answer
            .err()
            .unwrap_or_else(|| panic!("{what}: option {option} is answered"));
        assert_ne!(
            e.kind(),
            ErrorKind::WouldBlock,
            "{what}: the server keeps the connection"
        );
    }
}

#[test]
fn nbd_server_cve_2013_6410_a_beginning_that_is_taken_for_the_whole() {
    // It was: an address was allowed when one on the list began with it, so that 10.0.0.1 let 10.0.0.10 in, or the reverse.
    let tls = Tls::start();
    for (customer, vm) in [
        ("acme", "vm10"),
        ("acme", "vm"),
        ("acme", "vm1-a"),
        ("acm", "vm1"),
        ("acme2", "vm1"),
        ("acme-vm1", "vm1"),
        ("vm1", "acme"),
    ] {
        let certificate = tls.issue(customer, vm);
        let mut haggle = tls.haggle(Some(&certificate)).unwrap();
        assert_eq!(haggle.list().unwrap(), [""; 0], "{customer}/{vm}");
        for name in ["acme/vol", ""] {
            let kind = haggle.final_kind(OPT_GO, &go_data(name));
            assert_eq!(kind, REP_ERR_UNKNOWN, "{customer}/{vm}: {name:?}");
        }
    }
    // Nor is a name of an export one that begins like it, or looks like it.
    let acme = tls.certificate("acme", "vm1");
    let mut haggle = tls.haggle(Some(&acme)).unwrap();
    for name in [
        "acme/vo",
        "acme/vol2",
        "acme/vol/",
        "/acme/vol",
        "ACME/VOL",
        "acme/vol ",
        "vol",
        "acme",
        "acme/",
        "*",
    ] {
        assert_eq!(
            haggle.final_kind(OPT_GO, &go_data(name)),
            REP_ERR_UNKNOWN,
            "{name:?}"
        );
    }
    assert_eq!(haggle.final_kind(OPT_INFO, &go_data("acme/vol")), REP_ACK);
}

/// How far a connection gets before it ends.
fn in_phase(tls: &Tls, phase: usize) -> (TcpStream, Option<Haggle<TlsStream>>) {
    let raw = |stream: &TcpStream| stream.try_clone().unwrap();
    let certificate = tls.certificate("acme", "vm1");
    match phase {
        // Without a word; greeted; with TLS agreed; with half of the client's first TLS message.
        0 => (tls.connect(), None),
        1 => (tls.greeted().unwrap().into_stream(), None),
        2 | 3 => {
            let mut haggle = tls.greeted().unwrap();
            assert_eq!(haggle.final_kind(OPT_STARTTLS, &[]), REP_ACK);
            let mut stream = haggle.into_stream();
            if phase == 3 {
                let mut hello = Vec::new();
                tls.session(Some(&certificate)).write_tls(&mut hello).unwrap();
                stream.write_all(&hello[..hello.len() / 2]).unwrap();
            }
            (stream, None)
        }
        // Under TLS; at the volume's door; in transmission; in the middle of a payload.
        _ => {
            let mut haggle = tls.haggle(Some(&certificate)).unwrap();
            if phase == 5 {
                assert_eq!(haggle.final_kind(OPT_INFO, &go_data("acme/vol")), REP_ACK);
            }
            if phase >= 6 {
                let mut client = haggle.go("acme/vol").unwrap();
                client.read(0, 4096).unwrap();
                if phase == 7 {
                    let mut words = request_bytes(CMD_WRITE, 0, 9, 0, 1 << 20);
                    words.extend([0xee; 100_000]);
                    client.stream().write_all(&words).unwrap();
                }
                haggle = Haggle::go_on(client.into_stream());
            }
            (raw(&haggle.stream().sock), Some(haggle))
        }
    }
}

#[test]
fn nbd_server_tls_eof_busy_loop() {
    // It was: the end of a TLS stream reads as no bytes, which was taken for "not yet" and asked again, without end.
    let tls = Tls::start();
    let before = Load::of(&tls.vold);
    let ticks = processor_ticks(&tls.vold);
    for phase in 0..8 {
        for how in 0..4 {
            let (stream, mut encrypted) = in_phase(&tls, phase);
            match how {
                // Without a word of TLS; with one; with one, and the socket left open; with a reset.
                0 => stream.shutdown(Shutdown::Write).unwrap(),
                1 | 2 => {
                    if let Some(haggle) = &mut encrypted {
                        let tls = haggle.stream();
                        tls.conn.send_close_notify();
                        tls.conn.write_tls(&mut tls.sock).unwrap();
                    }
                    if how == 1 || encrypted.is_none() {
                        stream.shutdown(Shutdown::Write).unwrap();
                    }
                }
                _ => {
                    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
                    drop((stream, encrypted));
                    continue;
                }
            }
            // The server ends it too, whatever was left unsaid.
            let mut stream = stream;
            let ended = std::io::copy(&mut stream, &mut std::io::sink());
            assert!(
                ended.is_ok() || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
                "{phase} {how}"
            );
        }
    }
    Load::back_to(before, &tls.vold);
    // A loop in the handshake would go on until the time for that is up, ten seconds: all of it together is less work.
    let ticks = processor_ticks(&tls.vold) - ticks;
    assert!(ticks < 300, "{ticks} ticks of the processor");
    // A later one would go on and on: half a second with next to no work shows that there is none.
    wait_for("the daemon rests", || {
        let before = processor_ticks(&tls.vold);
        std::thread::sleep(Duration::from_millis(500));
        (processor_ticks(&tls.vold) - before <= 4).then_some(())
    });
    // What came of the payload that was cut off in the middle: nothing.
    let mut client = tls
        .haggle(Some(&tls.certificate("acme", "vm1")))
        .unwrap()
        .go("acme/vol")
        .unwrap();
    assert!(client.read(0, 1 << 20).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn nbdkit_cve_2021_3716_what_was_agreed_before_tls() {
    // It was: structured replies that were agreed in plaintext, by whoever sits in between, stayed agreed under TLS.
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    let mut plain = tls.greeted().unwrap();
    for (option, data) in [
        (OPT_STRUCTURED_REPLY, vec![]),
        (OPT_EXTENDED_HEADERS, vec![]),
        (
            OPT_SET_META_CONTEXT,
            contexts_data("acme/vol", &["base:allocation"]),
        ),
    ] {
        assert_eq!(plain.final_kind(option, &data), REP_ERR_TLS_REQD);
    }
    assert_eq!(plain.final_kind(OPT_STARTTLS, &[]), REP_ACK);
    let stream = tls.encrypt(plain.into_stream(), Some(&acme)).unwrap();
    let mut haggle = Haggle::go_on(stream);
    // Nothing is agreed: contexts need structured replies first, and replies are simple ones, which this client insists on.
    let query = contexts_data("acme/vol", &["base:allocation"]);
    assert_eq!(haggle.final_kind(OPT_SET_META_CONTEXT, &query), REP_ERR_INVALID);
    assert_eq!(haggle.final_kind(OPT_STARTTLS, &[]), REP_ERR_INVALID);
    let mut client = haggle.go("acme/vol").unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.read(8 << 20, 1), Err(EINVAL));
    // Bytes put behind STARTTLS, to be read as the client's first words under TLS: they end it, unanswered.
    for injected in [
        option_bytes(OPT_STRUCTURED_REPLY, &[]),
        vec![0],
        b"IHAVEOPT".to_vec(),
    ] {
        let mut plain = tls.greeted().unwrap();
        plain
            .send_raw(&[option_bytes(OPT_STARTTLS, &[]), injected].concat())
            .unwrap();
        hangs_up(plain.into_stream());
    }
}

#[test]
fn nbdkit_a_rejected_write_under_tls() {
    // It was: the payload of a write that was rejected was read from the socket beneath TLS: ciphertext was thrown away, and
    // client and server were out of step.
    let tls = Tls::start();
    tls.vold.ctl("detach acme/vol --vm vm1");
    tls.vold.ctl("attach acme/vol --vm vm1 --read-only");
    for (customer, vm, error, at) in [
        ("acme", "vm1", EPERM, 0),
        ("globex", "vm2", ENOSPC, (8 << 20) - 10),
    ] {
        let certificate = tls.certificate(customer, vm);
        let haggle = tls.haggle(Some(&certificate)).unwrap();
        let mut client = haggle.go(&format!("{customer}/vol")).unwrap();
        // Below and above a TLS record, what one receive takes, and the longest.
        for len in [
            11,
            4096,
            16_383,
            16_384,
            16_385,
            65_536,
            300_000,
            1 << 20,
            32 << 20,
        ] {
            assert_eq!(client.write(at, &bytes(1, len)), Err(error), "{len}");
            assert_eq!(client.read(12_345, 5).unwrap(), [0; 5], "{len}");
        }
        // In one breath, among others.
        let mut expected = std::collections::HashMap::new();
        for round in 0..20u64 {
            let rejected = client
                .submit(CMD_WRITE, 0, at, 20_000, &bytes(round, 20_000))
                .unwrap();
            expected.insert(rejected, error);
            let read = client.submit(CMD_READ, 0, round * 4096, 512, &[]).unwrap();
            expected.insert(read, 0);
        }
        while client.in_flight() > 0 {
            let done = client.reply().unwrap();
            assert_eq!(expected.remove(&done.cookie), Some(done.error));
        }
    }
}

#[test]
fn libnbd_cve_2019_14842_a_downgrade() {
    // It was: where TLS was required and the other side did not begin it, the connection went on in plaintext.
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    // Agreed, and then not begun: whatever comes instead is no NBD any more.
    let plain_words = [
        option_bytes(OPT_GO, &go_data("acme/vol")),
        option_bytes(OPT_LIST, &[]),
        option_bytes(OPT_ABORT, &[]),
        request_bytes(CMD_READ, 0, 1, 0, 512),
        vec![0; 300],
    ];
    for words in plain_words {
        let mut plain = tls.greeted().unwrap();
        assert_eq!(plain.final_kind(OPT_STARTTLS, &[]), REP_ACK);
        plain.send_raw(&words).unwrap();
        let mut said = Vec::new();
        let _ = plain.into_stream().read_to_end(&mut said);
        // An alert of TLS at the most: 2 bytes in a record.
        assert!(said.is_empty() || (said[0] == 21 && said.len() == 7), "{said:?}");
    }
    // Plaintext in the middle of TLS.
    let mut haggle = tls.haggle(Some(&acme)).unwrap();
    assert_eq!(haggle.list().unwrap(), ["acme/vol"]);
    let mut beneath = haggle.stream().sock.try_clone().unwrap();
    beneath
        .write_all(&option_bytes(OPT_GO, &go_data("acme/vol")))
        .unwrap();
    assert!(haggle.reply().is_err());
    // An older TLS: the only version offered is 1.3, said to be 1.2.
    let mut hello = Vec::new();
    tls.session(Some(&acme)).write_tls(&mut hello).unwrap();
    let versions = [0, 43, 0, 3, 2, 3, 4];
    let at = hello
        .windows(7)
        .position(|window| window == versions)
        .expect("TLS 1.3 is offered");
    hello[at + 6] = 3;
    let mut plain = tls.greeted().unwrap();
    assert_eq!(plain.final_kind(OPT_STARTTLS, &[]), REP_ACK);
    plain.send_raw(&hello).unwrap();
    let mut said = Vec::new();
    let _ = plain.into_stream().read_to_end(&mut said);
    // Fatal alert 70: protocol version.
    assert_eq!(said[5..], [2, 70], "{said:?}");
    // Without TLS, nothing: not even with a word of leaving it out.
    let mut plain = tls.greeted().unwrap();
    assert_eq!(plain.final_kind(OPT_GO, &go_data("acme/vol")), REP_ERR_TLS_REQD);
    plain.send(OPT_EXPORT_NAME, b"acme/vol").unwrap();
    hangs_up(plain.into_stream());
}

#[test]
fn libnbd_cve_2024_7383_a_peer_that_is_not_verified() {
    // It was: the other side's certificate was not always held against the authority and the name that it had to have.
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    let file = |dir: &str, name: &str| tls.vold.path(dir).join(name);
    is_not_let_in(&tls, "none", None);
    is_not_let_in(&tls, "of another authority", Some(&tls.forged("acme", "vm1")));
    // The server's own: of the right authority, and no VM's.
    std::fs::create_dir(tls.vold.path("server")).unwrap();
    for part in ["cert", "key"] {
        let from = tls.pki().join(format!("server-{part}.pem"));
        std::fs::copy(from, file("server", &format!("client-{part}.pem"))).unwrap();
    }
    is_not_let_in(&tls, "the server's own", Some(&tls.vold.path("server")));
    // A VM's certificate signs for another VM, with and without itself in the chain.
    std::fs::create_dir(tls.vold.path("usurper")).unwrap();
    for part in ["cert", "key"] {
        let from = acme.join(format!("client-{part}.pem"));
        std::fs::copy(from, file("usurper", &format!("ca-{part}.pem"))).unwrap();
    }
    let usurped = tls.vold.path("usurped");
    tls.issue_by(&tls.vold.path("usurper"), "globex", "vm2", &usurped, "");
    is_not_let_in(&tls, "signed by a VM", Some(&usurped));
    let chain = [usurped.join("client-cert.pem"), acme.join("client-cert.pem")]
        .map(|part| std::fs::read(part).unwrap());
    std::fs::write(usurped.join("client-cert.pem"), chain.concat()).unwrap();
    is_not_let_in(&tls, "signed by a VM, with its chain", Some(&usurped));
    // The other direction: who does not know vold's authority, or meets it under another name, goes no further.
    std::fs::copy(
        tls.vold.path("other").join("ca-cert.pem"),
        file("forged", "ca-cert.pem"),
    )
    .unwrap();
    fail(tool("nbdinfo").args(["--size", &tls.uri(&tls.vold.path("forged"), "acme/vol")]));
    let other_name = tls.uri(&acme, "acme/vol").replace("localhost", "127.0.0.2");
    fail(tool("nbdinfo").args(["--size", &other_name]));
    tls.opens(&acme, "acme/vol").unwrap();
}
