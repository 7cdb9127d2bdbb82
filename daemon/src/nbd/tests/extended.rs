//! Extended headers: 64-bit lengths, payloads that say so, and replies of their own kind.

use std::time::Duration;

use libvol::limits::NBD_PAYLOAD_MAX;

use super::client::*;
use super::{Server, on_both, on_both_with_clock, pattern, sleep};

const SIZE: usize = 1 << 20;
const BOTH: [&str; 2] = ["base:allocation", "qemu:allocation-depth"];

/// What a BLOCK_STATUS carries: the length, and ids of contexts.
fn about(len: u64, contexts: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    contexts.iter().for_each(|id| payload.extend(id.to_be_bytes()));
    payload
}

#[test]
fn every_command_works_and_every_reply_is_an_extended_one() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start_extended("acme/web", &BOTH).await;
        let bytes = pattern(1, 5000);
        let wrote = client.call_extended(PAYLOAD_LEN, WRITE, 8192, 5000, &bytes).await;
        assert_eq!((wrote.error, wrote.chunks), (0, vec![Chunk::None]));
        let read = client.call_extended(0, READ, 8192, 5000, &[]).await;
        assert_eq!(read.data(8192, 5000), bytes);
        for (command, len) in [(FLUSH, 0), (TRIM, 4096), (CACHE, 4096), (WRITE_ZEROES, 4096)] {
            let offset = if command == FLUSH { 0 } else { 65_536 };
            let answer = client.call_extended(0, command, offset, len, &[]).await;
            assert_eq!(
                (answer.error, answer.chunks),
                (0, vec![Chunk::None]),
                "command {command}"
            );
        }
        let refused = client.call_extended(0, READ, SIZE as u64, 1, &[]).await;
        assert!(refused.error == EINVAL && !refused.text.is_empty());
        // A write that forgets to say so has its payload all the same.
        let forgot = client.call_extended(0, WRITE, 0, 3, b"abc").await;
        assert_eq!(forgot.error, 0);
        let read = client.call_extended(0, READ, 0, 3, &[]).await;
        assert_eq!(read.data(0, 3), b"abc");
    });
}

#[test]
fn lengths_beyond_32_bits_are_carried_out_or_refused_whole() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start_extended("acme/web", &BOTH).await;
        for (command, error) in [
            (READ, EINVAL),
            (TRIM, EINVAL),
            (WRITE_ZEROES, ENOSPC),
            (BLOCK_STATUS, EINVAL),
        ] {
            for len in [1 << 32, (1 << 32) + 4096, u64::MAX, u64::MAX - 4096] {
                let answer = client.call_extended(0, command, 4096, len, &[]).await;
                assert_eq!(answer.error, error, "command {command}, {len} bytes");
            }
        }
        assert!(
            server.device.log.borrow().is_empty(),
            "nothing of them was carried out in part"
        );
        let read = client.call_extended(DF, READ, 0, 1 << 40, &[]).await;
        assert_eq!(read.error, EINVAL, "past the end");
    });
}

#[test]
fn block_status_tells_every_context_or_those_it_is_asked_about() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start_extended("acme/web", &BOTH).await;
        server.device.fill(8192, &pattern(1, 8192));
        let allocation = Chunk::StatusExt(1, vec![(8192, 3), (8192, 0), (SIZE as u64 - 16_384, 3)]);
        let depth = Chunk::StatusExt(2, vec![(8192, 0), (8192, 1), (SIZE as u64 - 16_384, 0)]);
        let len = SIZE as u64;
        let all = client.call_extended(0, BLOCK_STATUS, 0, len, &[]).await;
        assert_eq!(all.chunks, [allocation.clone(), depth.clone()]);
        for (ids, expected) in [
            (&[2][..], vec![depth.clone()]),
            (&[1], vec![allocation.clone()]),
            (&[2, 1], vec![allocation, depth]),
        ] {
            let payload = about(len, ids);
            let some = client
                .call_extended(PAYLOAD_LEN, BLOCK_STATUS, 0, payload.len() as u64, &payload)
                .await;
            assert_eq!(some.chunks, expected, "{ids:?}");
        }
        let one = client
            .call_extended(REQ_ONE, BLOCK_STATUS, 4096, len - 4096, &[])
            .await;
        assert_eq!(one.chunks[0], Chunk::StatusExt(1, vec![(4096, 3)]));
    });
}

#[test]
fn payloads_that_make_no_sense_are_refused_and_skipped() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start_extended("acme/web", &BOTH[..1]).await;
        let len = SIZE as u64;
        for payload in [
            about(len, &[]),
            about(len, &[2]),
            about(len, &[1, 1]),
            about(len, &[1, 9]),
            about(len, &[0]),
            about(0, &[1]),
            about(len + 1, &[1]),
            about(u64::MAX, &[1]),
            about(len, &[1])[..11].to_vec(),
            vec![0; 7],
            vec![],
            vec![1; 100],
            vec![1; 1 << 20],
        ] {
            let answer = client
                .call_extended(PAYLOAD_LEN, BLOCK_STATUS, 0, payload.len() as u64, &payload)
                .await;
            assert_eq!(answer.error, EINVAL, "{} bytes of payload", payload.len());
        }
        // On commands that take none, too.
        for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 99] {
            let answer = client
                .call_extended(PAYLOAD_LEN, command, 0, 4096, &[7; 4096])
                .await;
            assert_eq!(answer.error, EINVAL, "command {command}");
        }
        assert!(server.device.log.borrow().is_empty());
        let read = client.call_extended(0, READ, 0, 10, &[]).await;
        assert_eq!(read.data(0, 10), [0; 10]);
    });
}

#[test]
fn a_payload_beyond_the_limit_or_a_compact_request_ends_the_connection() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let largest = u64::from(NBD_PAYLOAD_MAX);
        for bytes in [
            request_extended(PAYLOAD_LEN, WRITE, 1, 0, largest + 1),
            request_extended(0, WRITE, 1, 0, u64::MAX),
            request_extended(PAYLOAD_LEN, BLOCK_STATUS, 1, 0, 1 << 63),
            [&request(0, READ, 1, 0, 512)[..], &[0; 4]].concat(),
        ] {
            let (mut client, _task) = server.connect();
            client.start_extended("acme/web", &BOTH).await;
            client.try_send(&bytes).await;
            assert_eq!(client.hangup().await, 0);
        }
    });
}

#[test]
fn contexts_that_stop_coming_end_the_connection() {
    on_both_with_clock(|clock| async move {
        let server = Server::new(SIZE);
        let (mut client, task) = server.connect();
        client.start_extended("acme/web", &BOTH).await;
        let payload = about(4096, &[1]);
        let mut words = request_extended(PAYLOAD_LEN, BLOCK_STATUS, 1, 0, payload.len() as u64);
        words.extend(&payload[..8]);
        client.send(&words).await;
        for _ in 0..10_000 {
            clock.advance(Duration::from_secs(1));
            sleep(Duration::from_millis(1)).await;
            if task.is_finished() {
                break;
            }
        }
        assert!(task.is_finished(), "it is given up");
        assert_eq!(client.hangup().await, 0);
        assert!(server.device.log.borrow().is_empty());
    });
}

#[test]
fn extended_headers_come_with_structured_replies_and_are_not_taken_back() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        assert_eq!(
            client.option(11, &[1]).await[0].0,
            (1 << 31) + 3,
            "it takes no data"
        );
        assert_eq!(client.option(11, &[]).await, [(1, vec![])]);
        assert_eq!(client.option(8, &[]).await[0].0, (1 << 31) + 10);
        // Contexts need no other negotiation; DF and the payload flag are announced.
        let set = client.option(10, &context_query("acme/web", &BOTH)).await;
        assert_eq!(set.len(), 3);
        let told = client.option(6, &export_query("acme/web", &[])).await;
        let flags = u16::from_be_bytes(told[0].1[10..12].try_into().unwrap());
        assert_eq!(flags & (1 << 7 | 1 << 12), 1 << 7 | 1 << 12);
        // Namespaces are listed, and not set.
        let listed = client.option(9, &context_query("acme/web", &["qemu:"])).await;
        assert_eq!(listed[0].1, [&[0; 4][..], b"qemu:allocation-depth"].concat());
        let listed = client.option(9, &context_query("acme/web", &[])).await;
        assert_eq!(listed.len(), 3);
        let set = client
            .option(10, &context_query("acme/web", &["qemu:", "base:"]))
            .await;
        assert_eq!(set.len(), 1);
        // What was chosen before is gone with that.
        client.option(7, &export_query("acme/web", &[])).await;
        let status = client.call_extended(0, BLOCK_STATUS, 0, 4096, &[]).await;
        assert_eq!(status.error, EINVAL);
    });
}
