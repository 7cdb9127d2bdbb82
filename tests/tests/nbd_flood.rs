//! Connections by the thousand, opened, half-opened and dropped: what the daemon has open, holds and carries is then what it was.
//! And who comes from one address cannot keep those of others out.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use vold_tests::content::bytes;
use vold_tests::load::Load;
use vold_tests::nbd::*;
use vold_tests::tls::Tls;
use vold_tests::vold::parse_uri;
use vold_tests::{Engine, Vold, wait_for};

/// Connections of one transport.
const CONNECTIONS: usize = 10_000;

/// What the daemon may hold more after so many connections than after the first few hundred. What a connection had is freed, and
/// the allocator keeps some of it for the next ones: of as many as were there at once (up to 32 sockets with buffers of 32 and 256
/// KiB, and those of receives that are being cancelled), not of as many as there were. Seen were 3 to 18 MB after 10,000, and 13 to
/// 35 MB after 100,000. The smallest buffer of a connection, left behind by an eighth of them, would show.
const GROWTH_BYTES: u64 = 40 << 20;

/// Opens and drops them, first a few to have all that is made once, then the many. A batch gives how many of its connections
/// have had a word of the server's: those count. Who comes while others are still leaving may be turned away.
fn leaves_nothing(vold: &Vold, mut batch: impl FnMut() -> usize) {
    let mut flood = |count: usize| {
        let mut received = 0;
        while received < count {
            received += wait_for("somebody is received", || Some(batch()).filter(|some| *some > 0));
        }
    };
    let at_rest = Load::of(vold);
    flood(400);
    let before = Load::back_to(at_rest, vold);
    flood(CONNECTIONS);
    let after = Load::back_to(at_rest, vold);
    let grown = after.resident_bytes.saturating_sub(before.resident_bytes);
    println!(
        "{} connections: {before:?}, then {after:?}: {grown} bytes more",
        CONNECTIONS
    );
    assert!(
        grown <= GROWTH_BYTES,
        "{grown} bytes more after {} connections",
        CONNECTIONS
    );
    assert!(after.threads <= at_rest.threads, "{at_rest:?} {after:?}");
}

/// Half of something, by number.
fn half_a_word(export: &str, which: usize) -> Vec<u8> {
    let flags = 3u32.to_be_bytes();
    let go = option_bytes(OPT_GO, &go_data(export));
    let in_transmission = [&flags[..], &go].concat();
    match which % 8 {
        // Not even the answer to the greeting; half of that; all of that.
        0 => vec![],
        1 => flags[..2].to_vec(),
        2 => flags.to_vec(),
        // Half an option; one without its data; one that was answered.
        3 => in_transmission[..12].to_vec(),
        4 => in_transmission[..20].to_vec(),
        5 => [&flags[..], &option_bytes(OPT_LIST, &[])].concat(),
        // Half a request; half a payload.
        6 => [
            &in_transmission[..],
            &request_bytes(CMD_READ, 0, 1, 0, 4096)[..13],
        ]
        .concat(),
        _ => [
            &in_transmission[..],
            &request_bytes(CMD_WRITE, 0, 1, 0, 8192),
            &[0xee; 4096],
        ]
        .concat(),
    }
}

#[test]
fn connections_over_the_socket_leave_nothing_behind() {
    for engine in Engine::ALL {
        let vold = Vold::start_on(engine);
        let uri = vold.with_volume(1, "64M", "8M");
        let (socket, export) = parse_uri(&uri);
        let mut client = Client::connect(&uri);
        client.write(0, &bytes(1, 8192)).unwrap();
        let mut number = 0;
        leaves_nothing(&vold, || {
            // Fewer than an attachment has sockets. Every ninth does not even listen.
            let held: Vec<(UnixStream, bool)> = (0..24)
                .map(|_| {
                    number += 1;
                    let mut stream = UnixStream::connect(&socket).unwrap();
                    let is_received = number % 9 > 0 && stream.read_exact(&mut [0; 18]).is_ok();
                    if is_received {
                        let _ = stream.write_all(&half_a_word(&export, number));
                    }
                    (stream, is_received)
                })
                .collect();
            held.iter().filter(|(_, is_received)| *is_received).count()
        });
        // Who was there all the while was served, and half a payload is no write.
        assert!(client.read(0, 8192).unwrap() == bytes(1, 8192));
        client.disconnect();
    }
}

#[test]
fn connections_over_tcp_leave_nothing_behind() {
    let tls = Tls::start();
    let certificate = tls.certificate("acme", "vm1");
    let mut client = tls.haggle(Some(&certificate)).unwrap().go("acme/vol").unwrap();
    client.write(0, &bytes(1, 8192)).unwrap();
    let mut hello = Vec::new();
    tls.session(Some(&certificate)).write_tls(&mut hello).unwrap();
    let start = [&3u32.to_be_bytes()[..], &option_bytes(OPT_STARTTLS, &[])].concat();
    let mut number = 0;
    // A connection, unless the server ends it, and whether it has had a word of the server's.
    let open = |number: usize| -> std::io::Result<(TcpStream, bool)> {
        let mut stream = tls.connect();
        // Half of them end with a reset, so that the other ends do not fill the kernel's table of ports either.
        if number.is_multiple_of(2) {
            set_socket_linger(&stream, Some(Duration::ZERO))?;
        }
        match number % 16 {
            // Without a word.
            0 => return Ok((stream, false)),
            // In plaintext, where there is nothing but STARTTLS.
            1..=7 => {
                stream.read_exact(&mut [0; 18])?;
                stream.write_all(&half_a_word("acme/vol", number))?;
            }
            // Half of the client's first message under TLS; all of it; something else.
            8..=13 => {
                stream.read_exact(&mut [0; 18])?;
                stream.write_all(&start)?;
                stream.read_exact(&mut [0; 20])?;
                stream.write_all(match number % 3 {
                    0 => &hello[..hello.len() / 2],
                    1 => &hello[..],
                    _ => b"GET / HTTP/1.0\r\n\r\n",
                })?;
            }
            // Under TLS: a name, half a request.
            _ => {
                let keep = stream.try_clone()?;
                let mut haggle = tls.haggle_over(stream, Some(&certificate))?;
                haggle.send_raw(&half_a_word("acme/vol", 4 + number / 16 % 4)[4..])?;
                stream = keep;
            }
        }
        Ok((stream, true))
    };
    leaves_nothing(&tls.vold, || {
        // Fewer than an address may have.
        let held: Vec<_> = (0..48)
            .map(|_| {
                number += 1;
                open(number)
            })
            .collect();
        let is_received = |opened: &&std::io::Result<(TcpStream, bool)>| matches!(opened, Ok((_, true)));
        held.iter().filter(is_received).count()
    });
    assert!(client.read(0, 8192).unwrap() == bytes(1, 8192));
}

/// Connections from an address until one is dropped; those that are received stay silent.
fn strangers(tls: &Tls, from: IpAddr, at_most: usize) -> Vec<TcpStream> {
    let mut received = Vec::new();
    for _ in 0..at_most {
        let mut stream = tls.connect_from(from);
        if stream.read_exact(&mut [0; 18]).is_err() {
            break;
        }
        received.push(stream);
    }
    received
}

#[test]
fn strangers_of_one_address_keep_only_each_other_out() {
    let tls = Tls::start();
    let certificate = tls.certificate("acme", "vm1");
    let host = |last: u8| IpAddr::from([127, 0, 0, last]);
    let mut client = tls.haggle(Some(&certificate)).unwrap().go("acme/vol").unwrap();
    let mut crowd = strangers(&tls, host(2), 100);
    assert_eq!(crowd.len(), 64, "an address's share");
    // Others get in, and do what they came for.
    let mut other = tls
        .haggle_over(tls.connect_from(host(3)), Some(&certificate))
        .unwrap();
    assert_eq!(other.list().unwrap(), ["acme/vol"]);
    let mut other = other.go("acme/vol").unwrap();
    other.write(0, b"here").unwrap();
    // A place that is given up is the same address's again.
    crowd.truncate(60);
    wait_for("the server has seen them go", || {
        crowd.extend(strangers(&tls, host(2), 1));
        (crowd.len() == 64).then_some(())
    });
    assert_eq!(strangers(&tls, host(2), 1).len(), 0);
    // Four addresses fill the house; who is in it is served on, and the places come back.
    for last in 4..7 {
        crowd.extend(strangers(&tls, host(last), 100));
    }
    assert_eq!(crowd.len(), 256);
    assert_eq!(strangers(&tls, host(7), 1).len(), 0);
    assert_eq!(client.read(0, 4).unwrap(), b"here");
    assert_eq!(other.read(0, 4).unwrap(), b"here");
    assert!(tls.vold.log().contains("have not said who they are"));
    drop(crowd);
    wait_for("there is a place again", || {
        (strangers(&tls, host(7), 1).len() == 1).then_some(())
    });
}
