//! What the protocol allows and ordinary clients seldom do, with the real daemon.

use std::collections::HashMap;
use std::io::Read;

use vold_tests::content::bytes;
use vold_tests::nbd::{
    CMD_CACHE, CMD_READ, CMD_WRITE, Client, EINVAL, ENOTSUP, FAST_ZERO, FLAG_SEND_CACHE, FLAG_SEND_FAST_ZERO,
    FUA, Haggle, NO_HOLE, OPT_ABORT, REP_ACK,
};
use vold_tests::vold::parse_uri;
use vold_tests::{Setup, Vold, on_every_setup};

on_every_setup!(a_hundred_and_twenty_eight_requests_in_flight_on_one_connection_are_all_answered);

fn started() -> (Vold, String) {
    let vold = Vold::start();
    let uri = vold.with_volume(1, "128M", "64M");
    (vold, uri)
}

#[test]
fn cache_is_offered_changes_nothing_and_is_held_to_the_volumes_end() {
    let (vold, uri) = started();
    let mut client = Client::connect(&uri);
    assert_ne!(client.flags() & FLAG_SEND_CACHE, 0);
    client.write(5000, &bytes(1, 9000)).unwrap();
    let before = vold.volume("acme/vol")["allocated_bytes"].clone();
    client.command(CMD_CACHE, 0, 0, 1 << 20).unwrap();
    client.command(CMD_CACHE, 0, 777, 1).unwrap();
    client.command(CMD_CACHE, 0, client.size() - 4096, 4096).unwrap();
    assert_eq!(client.command(CMD_CACHE, 0, client.size(), 1), Err(EINVAL));
    assert_eq!(client.command(CMD_CACHE, 0, u64::MAX - 5, 4096), Err(EINVAL));
    assert_eq!(client.command(CMD_CACHE, NO_HOLE, 0, 4096), Err(EINVAL));
    assert_eq!(client.read(5000, 9000).unwrap(), bytes(1, 9000));
    assert_eq!(vold.volume("acme/vol")["allocated_bytes"], before);
}

#[test]
fn write_zeroes_makes_holes_unless_told_not_to_and_is_fast_or_refused_where_it_must_be_fast() {
    let (vold, uri) = started();
    let allocated = || vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
    let mut client = Client::connect(&uri);
    assert_ne!(client.flags() & FLAG_SEND_FAST_ZERO, 0);
    const EXTENT: u64 = 4 << 20;
    let extent = EXTENT as u32;

    // A hole stays one; without a hole the space is there afterwards.
    client.write_zeroes(0, extent, 0).unwrap();
    assert_eq!(allocated(), 0);
    client.write_zeroes(0, extent, NO_HOLE).unwrap();
    assert_eq!(allocated(), EXTENT);
    assert_eq!(client.read(0, 4 << 20).unwrap(), vec![0; 4 << 20]);

    // Over data, in each way, to the byte, and with FUA.
    for (i, flags) in [0, NO_HOLE, FAST_ZERO, FUA, FUA | NO_HOLE]
        .into_iter()
        .enumerate()
    {
        let at = EXTENT * (1 + i as u64);
        client.write(at, &bytes(7, 1 << 20)).unwrap();
        client.write_zeroes(at + 1000, 500_000, flags).unwrap();
        let mut expected = bytes(7, 1 << 20);
        expected[1000..501_000].fill(0);
        assert!(client.read(at, 1 << 20).unwrap() == expected, "flags {flags}");
    }
    // Keeping the space means writing zeros: that is not fast, and nothing is done.
    client.write(EXTENT * 8, b"still here").unwrap();
    assert_eq!(
        client.write_zeroes(EXTENT * 8, extent, NO_HOLE | FAST_ZERO),
        Err(ENOTSUP)
    );
    assert_eq!(client.read(EXTENT * 8, 10).unwrap(), b"still here");
    // Whole extents become holes, and their space free.
    let before = allocated();
    client.write_zeroes(0, extent, FAST_ZERO).unwrap();
    vold_tests::wait_for("the extent is given back", || {
        (allocated() == before - EXTENT).then_some(())
    });
}

#[test]
fn export_name_gives_the_export_with_and_without_the_zeroes() {
    let (_vold, uri) = started();
    let (socket, export) = parse_uri(&uri);
    let flags = Client::connect(&uri).flags();
    for no_zeroes in [false, true] {
        // By its name, and by the default one.
        for name in [export.as_str(), ""] {
            let mut client = Haggle::export_name(&socket, name, no_zeroes).unwrap();
            assert_eq!((client.size(), client.flags()), (64 << 20, flags));
            client.write(4096, &bytes(3, 4096)).unwrap();
            assert_eq!(client.read(4096, 4096).unwrap(), bytes(3, 4096));
            client.disconnect();
        }
    }
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let (mut vold, uri) = started();
    let (socket, _) = parse_uri(&uri);
    let mut haggle = Haggle::connect(&socket).unwrap();
    let answer = haggle.ask(OPT_ABORT, &[]).unwrap();
    assert_eq!((answer.len(), answer[0].kind), (1, REP_ACK));
    let mut rest = Vec::new();
    haggle.into_stream().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [0; 0]);
    assert!(vold.alive());
    Client::connect(&uri).write(0, b"served").unwrap();
}

/// All are sent before the first reply is taken.
fn a_hundred_and_twenty_eight_requests_in_flight_on_one_connection_are_all_answered(setup: Setup) {
    let (_vold, uri) = setup.volume("64M");
    let mut client = Client::connect(&uri);
    // Even pieces are read, odd ones written, in an order that is not theirs.
    const PIECES: u64 = 128;
    const PIECE: u64 = 12_288;
    for piece in (0..PIECES).step_by(2) {
        client
            .write(piece * PIECE, &bytes(piece, PIECE as usize))
            .unwrap();
    }
    let mut sent = HashMap::new();
    for i in 0..PIECES {
        let piece = i * 37 % PIECES;
        let at = piece * PIECE;
        let cookie = if piece.is_multiple_of(2) {
            client.submit(CMD_READ, 0, at, PIECE as u32, &[])
        } else {
            let data = bytes(1000 + piece, PIECE as usize);
            client.submit(CMD_WRITE, 0, at, PIECE as u32, &data)
        };
        sent.insert(cookie.unwrap(), piece);
    }
    assert_eq!(client.in_flight(), PIECES as usize);
    for _ in 0..PIECES {
        let done = client.reply().unwrap();
        let piece = sent.remove(&done.cookie).expect("each is answered once");
        assert_eq!(done.error, 0);
        if piece.is_multiple_of(2) {
            assert!(done.data == bytes(piece, PIECE as usize), "piece {piece}");
        }
    }
    for piece in (1..PIECES).step_by(2) {
        assert!(
            client.read(piece * PIECE, PIECE as usize).unwrap() == bytes(1000 + piece, PIECE as usize),
            "piece {piece}"
        );
    }
}
