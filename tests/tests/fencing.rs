//! Fencing: what a lost connection had begun ends before a later one is served, and never comes after it; whoever loses a volume,
//! or the right to write to it, loses it at once (I3).

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use vold_tests::content::bytes;
use vold_tests::devices::Mounted;
use vold_tests::nbd::*;
use vold_tests::tls::Tls;
use vold_tests::{Engine, PATIENCE, Vold, scale, wait_for};

const EXPORT: &str = "acme/vol";
const REGION: usize = 2 << 20;
const PIECE: usize = 64 << 10;

/// `acme/vol` on a store in a file system that can be held back, attached to `vm1`.
fn on_a_slow_store(engine: Engine) -> (Vold, Mounted, String) {
    let vold = Vold::start_on(engine);
    let mounted = Mounted::new(&vold.path("fs"), 160 << 20, &vold.path("mnt"));
    vold.ctl(&format!(
        "store add a --path {} --size 96M",
        vold.path("mnt/store").display()
    ));
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme");
    vold.ctl("vm create vm2 --customer acme");
    vold.ctl("volume create acme/vol --size 16M");
    let uri = vold.attach(EXPORT, "vm1");
    // So that its extents are there.
    Client::connect(&uri).write_fua(0, &bytes(1, REGION)).unwrap();
    (vold, mounted, uri)
}

/// Asks to write the whole region, in pieces.
fn begin_to_write(client: &mut Client, content: &[u8]) {
    for (index, piece) in content.chunks(PIECE).enumerate() {
        let at = (index * PIECE) as u64;
        client
            .submit(CMD_WRITE, 0, at, piece.len() as u32, piece)
            .unwrap();
    }
}

/// That nothing is answered for a while.
fn gets_no_answer(client: &mut Client) {
    client
        .stream()
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let e = client.stream().read(&mut [0]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WouldBlock);
    client.stream().set_read_timeout(Some(PATIENCE)).unwrap();
}

fn connections(vold: &Vold) -> u64 {
    vold.ctl("attachment list")["items"][0]["connections"]
        .as_u64()
        .unwrap()
}

#[test]
fn writes_of_a_lost_connection_end_before_the_next_connection_is_served() {
    for engine in Engine::ALL {
        let (mut vold, mounted, uri) = on_a_slow_store(engine);
        let (old, new) = (bytes(2, REGION), bytes(3, REGION));
        let frozen = mounted.freeze();
        let mut lost = Client::connect(&uri);
        begin_to_write(&mut lost, &old);
        drop(lost);
        let mut next = Client::connect(&uri);
        wait_for("both are there", || (connections(&vold) == 2).then_some(()));
        // Not even a read: what it would give may be about to change.
        next.submit(CMD_READ, 0, 8 << 20, 4096, &[]).unwrap();
        gets_no_answer(&mut next);
        begin_to_write(&mut next, &new);
        gets_no_answer(&mut next);
        assert_eq!(connections(&vold), 2, "the lost one's writes have not ended");
        drop(frozen);
        while next.in_flight() > 0 {
            assert_eq!(next.reply().unwrap().error, 0);
        }
        assert!(next.read(0, REGION).unwrap() == new);
        wait_for("the lost one has ended", || {
            (connections(&vold) == 1).then_some(())
        });
        assert!(next.read(0, REGION).unwrap() == new, "{engine:?}");
        next.flush().unwrap();
        drop(next);
        vold.stop();
        vold.check_is_clean();
        vold.restart();
        assert!(Client::connect(&uri).read(0, REGION).unwrap() == new);
        vold.stop();
    }
}

#[test]
fn a_detach_waits_for_what_is_in_flight_and_the_next_vm_sees_nothing_of_it_later() {
    let (mut vold, mounted, uri) = on_a_slow_store(Engine::Uring);
    let (old, new) = (bytes(2, REGION), bytes(3, REGION));
    let mut client = Client::connect(&uri);
    let frozen = mounted.freeze();
    begin_to_write(&mut client, &old);
    // A payload in the middle, too.
    client
        .stream()
        .write_all(&request_bytes(CMD_WRITE, 0, 99, 0, 4096))
        .unwrap();
    client.stream().write_all(&[0xee; 1000]).unwrap();
    let mut detach = vold
        .volctl("detach acme/vol --vm vm1")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Its socket goes first: nobody comes in any more.
    let (socket, _) = vold_tests::vold::parse_uri(&uri);
    wait_for("the door is closed", || {
        Haggle::connect(&socket).is_err().then_some(())
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(detach.try_wait().unwrap().is_none(), "writes are in flight");
    drop(frozen);
    assert!(detach.wait().unwrap().success());
    let uri = vold.attach(EXPORT, "vm2");
    let mut next = Client::connect(&uri);
    begin_to_write(&mut next, &new);
    while next.in_flight() > 0 {
        assert_eq!(next.reply().unwrap().error, 0);
    }
    // The old one goes on where it was: nobody listens.
    let _ = client.stream().write_all(&[0xee; 3096]);
    let _ = client.submit(CMD_WRITE, 0, 0, 4096, &[0xee; 4096]);
    let mut rest = Vec::new();
    let _ = client.stream().read_to_end(&mut rest);
    assert!(next.read(0, REGION).unwrap() == new);
    next.disconnect();
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn an_attachment_that_is_made_read_only_ends_who_could_write() {
    let tls = Tls::start();
    let certificate = tls.certificate("acme", "vm1");
    let uri = tls.vold.attach(EXPORT, "vm1");
    let mut local = Client::connect(&uri);
    let mut remote = tls.haggle(Some(&certificate)).unwrap().go(EXPORT).unwrap();
    local.write(0, b"local").unwrap();
    remote.write(512, b"remote").unwrap();
    // While it stands, it stays as it is.
    assert_eq!(
        tls.vold.refused("attach acme/vol --vm vm1 --read-only").code,
        "busy"
    );
    tls.vold.ctl("detach acme/vol --vm vm1");
    let attached = tls.vold.ctl("attach acme/vol --vm vm1 --read-only");
    // Neither of the old ones reaches the new attachment, for a read as little as for a write.
    for command in [CMD_WRITE, CMD_READ] {
        let payload = if command == CMD_WRITE { &b"later"[..] } else { &[] };
        let _ = local.submit(command, 0, 0, 5, payload);
        assert!(local.reply().is_err());
        let _ = remote.submit(command, 0, 512, 5, payload);
        assert!(remote.reply().is_err());
    }
    let mut local = Client::connect(attached["uri"].as_str().unwrap());
    let mut remote = tls.haggle(Some(&certificate)).unwrap().go(EXPORT).unwrap();
    assert_eq!(local.write(0, b"later"), Err(EPERM));
    assert_eq!(remote.write_zeroes(0, 4096, 0), Err(EPERM));
    assert_eq!(local.read(0, 5).unwrap(), b"local");
    assert_eq!(remote.read(512, 6).unwrap(), b"remote");
}

#[test]
fn a_newer_write_stays_however_it_meets_the_end_of_an_older_connection() {
    for engine in Engine::ALL {
        let vold = Vold::start_on(engine);
        let uri = vold.with_volume(1, "64M", "8M");
        let connect = || {
            wait_for("there is a place", || {
                let (socket, export) = vold_tests::vold::parse_uri(&uri);
                Haggle::connect(&socket).ok()?.go(&export).ok()
            })
        };
        let mut next = connect();
        for round in 0..scale(60, 1000) {
            let mut old: Client<UnixStream> = std::mem::replace(&mut next, connect());
            let (olds, news) = (bytes(round, 40_000), bytes(1_000_000 + round, 50_000));
            // Whole writes, and one that is cut off at some byte.
            for at in [3000, 9000] {
                old.submit(CMD_WRITE, 0, at, 40_000, &olds).unwrap();
            }
            let cut = [request_bytes(CMD_WRITE, 0, 77, 0, 40_000), olds].concat();
            old.stream()
                .write_all(&cut[..(round as usize * 7919) % cut.len()])
                .unwrap();
            drop(old);
            next.write(0, &news).unwrap();
            assert!(next.read(0, 50_000).unwrap() == news, "{engine:?}, round {round}");
        }
        wait_for("all older ones have ended", || {
            (connections(&vold) == 1).then_some(())
        });
        let last = bytes(1_000_000 + scale(59, 999), 50_000);
        assert!(next.read(0, 50_000).unwrap() == last, "{engine:?}");
    }
}

#[test]
fn a_payload_that_is_cut_off_under_tls_is_no_write() {
    let tls = Tls::start();
    let certificate = tls.certificate("acme", "vm1");
    let mut next = tls.haggle(Some(&certificate)).unwrap().go(EXPORT).unwrap();
    let words = [request_bytes(CMD_WRITE, 0, 7, 0, 300_000), vec![0xee; 300_000]].concat();
    for cut in [1, 28, 29, 16_384, 16_385, 100_000, words.len() - 1] {
        let mut old = tls.haggle(Some(&certificate)).unwrap().go(EXPORT).unwrap();
        old.stream().write_all(&words[..cut]).unwrap();
        // With TLS's goodbye, and without.
        if cut % 2 == 0 {
            let stream = old.stream();
            stream.conn.send_close_notify();
            stream.conn.write_tls(&mut stream.sock).unwrap();
        }
        drop(old);
        let news = bytes(cut as u64, 300_000);
        next.write(0, &news).unwrap();
        assert!(next.read(0, 300_000).unwrap() == news, "cut after {cut}");
    }
    wait_for("all others have ended", || {
        (tls.vold.ctl("status")["connections"] == 1).then_some(())
    });
    assert!(next.read(0, 300_000).unwrap() == bytes(words.len() as u64 - 1, 300_000));
}
