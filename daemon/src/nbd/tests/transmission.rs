//! Transmission against the device in memory.

use libvol::error::Kind;
use libvol::limits::{NBD_BYTES_IN_FLIGHT, NBD_PAYLOAD_MAX, NBD_REQUESTS_IN_FLIGHT};

use super::client::*;
use super::*;

const SIZE: usize = 1 << 20;

#[test]
fn what_was_written_is_read_back_at_any_length_and_offset() {
    on_both(|| async {
        let server = Server::new(8 << 20);
        let (mut client, _task) = server.transmit().await;
        let ranges = [
            (0, 1),
            (511, 2),
            (4096, 4096),
            (4095, 4098),
            (12_345, 65_535),
            (1, 65_536),
            (300_000, 262_144),
            (7, 1 << 20),
            (5 << 20, 3 << 20),
        ];
        for (i, (offset, len)) in ranges.into_iter().enumerate() {
            let payload = pattern(i as u8, len);
            let written = client.put(FUA, offset as u64, &payload).await;
            assert_eq!((written.error, written.simple), (0, true));
            assert_eq!(server.device.contents(offset, len), payload);
            let read = client.call(0, READ, offset as u64, len as u32).await;
            assert_eq!(read.data(offset as u64, len), payload);
        }
        assert!(server.device.log.borrow()[0].contains("write 0+1 fua=true"));
    });
}

#[test]
fn small_and_large_writes_may_follow_each_other_in_one_breath() {
    on_both(|| async {
        let server = Server::new(8 << 20);
        let (mut client, _task) = server.transmit().await;
        let lens = [
            4096,
            1 << 20,
            512,
            100_000,
            65_536,
            65_535,
            1,
            400_000,
            4096,
            4096,
        ];
        let mut stream = Vec::new();
        let mut offset = 0;
        for (i, len) in lens.into_iter().enumerate() {
            stream.extend(request(0, WRITE, i as u64, offset, len as u32));
            stream.extend(pattern(i as u8, len));
            offset += len as u64;
        }
        // In pieces of every kind of size, so that headers and payloads are cut anywhere.
        let mut rest = &stream[..];
        for piece in [1, 27, 28, 29, 4096, 70_000, 3, 300_000].iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*piece));
            client.send(now).await;
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        for _ in lens {
            assert_eq!(client.answer(0).await.error, 0);
        }
        let mut offset = 0;
        for (i, len) in lens.into_iter().enumerate() {
            assert_eq!(
                server.device.contents(offset, len),
                pattern(i as u8, len),
                "write {i}"
            );
            offset += len;
        }
    });
}

#[test]
fn every_error_has_its_number_its_text_and_leaves_the_stream_in_step() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let end = SIZE as u64;
        let big = NBD_PAYLOAD_MAX + 1;
        // flags, command, offset, length, error
        let table: &[(u16, u16, u64, u32, u32)] = &[
            (0, READ, end, 1, EINVAL),
            (0, READ, end - 1, 2, EINVAL),
            (0, READ, u64::MAX, 1, EINVAL),
            (0, READ, u64::MAX - 5, 4096, EINVAL),
            (0, READ, 0, big, EINVAL),
            (NO_HOLE, READ, 0, 1, EINVAL),
            (REQ_ONE, READ, 0, 1, EINVAL),
            (1 << 5, READ, 0, 1, EINVAL),
            (1 << 15, READ, 0, 1, EINVAL),
            (0, WRITE, end, 1, ENOSPC),
            (0, WRITE, end - 1, 70_000, ENOSPC),
            (0, WRITE, u64::MAX, 5, ENOSPC),
            (DF, WRITE, 0, 4096, EINVAL),
            (FAST_ZERO, WRITE, 0, 100_000, EINVAL),
            (0, FLUSH, 1, 0, EINVAL),
            (0, FLUSH, 0, 1, EINVAL),
            (DF, FLUSH, 0, 0, EINVAL),
            (0, TRIM, end, 1, EINVAL),
            (0, TRIM, 4096, u32::MAX, EINVAL),
            (NO_HOLE, TRIM, 0, 1, EINVAL),
            (0, CACHE, end, 1, EINVAL),
            (DF, CACHE, 0, 1, EINVAL),
            (0, WRITE_ZEROES, end, 1, ENOSPC),
            (0, WRITE_ZEROES, u64::MAX, u32::MAX, ENOSPC),
            (REQ_ONE, WRITE_ZEROES, 0, 1, EINVAL),
            (FAST_ZERO | NO_HOLE, WRITE_ZEROES, 0, 4096, ENOTSUP),
            (0, BLOCK_STATUS, end, 1, EINVAL),
            (0, BLOCK_STATUS, end - 4096, 4097, EINVAL),
            (0, BLOCK_STATUS, 0, 0, EINVAL),
            (FAST_ZERO, BLOCK_STATUS, 0, 4096, EINVAL),
            (0, 8, 0, 4096, EINVAL),
            (0, 9, 0, 0, EINVAL),
            (u16::MAX, u16::MAX, u64::MAX, u32::MAX, EINVAL),
        ];
        let (mut client, _task) = server.transmit().await;
        for &(flags, command, offset, len, error) in table {
            let what = format!("flags {flags:#x} command {command} {len} at {offset}");
            let payload = if command == WRITE { len } else { 0 };
            client.request(flags, command, 7, offset, len).await;
            client.send(&vec![0xee; payload as usize]).await;
            let answer = client.answer(0).await;
            assert_eq!((answer.cookie, answer.error), (7, error), "{what}");
            assert!(
                !answer.simple && !answer.text.is_empty(),
                "{what}: errors have texts"
            );
            client.prove_in_step().await;
        }
        // DF is known, and this much cannot go unfragmented.
        let unfragmented = client.call(DF, READ, 0, NBD_PAYLOAD_MAX + 1).await;
        assert_eq!(unfragmented.error, EINVAL, "beyond the end comes first");
        server.device.grow(64 << 20);
        assert_eq!(
            client.call(DF, READ, 0, NBD_PAYLOAD_MAX + 1).await.error,
            EOVERFLOW
        );
        assert_eq!(client.call(0, READ, 0, NBD_PAYLOAD_MAX + 1).await.error, EINVAL);
        client.prove_in_step().await;
    });
}

#[test]
fn a_read_only_export_refuses_whatever_writes() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start("acme/web-ro", true, false).await;
        assert_eq!(client.put(0, 0, &[1; 4096]).await.error, EPERM);
        assert_eq!(client.put(0, SIZE as u64, &[1; 100_000]).await.error, EPERM);
        assert_eq!(client.put(0, 0, &[]).await.error, EPERM);
        for command in [TRIM, WRITE_ZEROES] {
            assert_eq!(client.call(FUA, command, 0, 4096).await.error, EPERM);
        }
        assert_eq!(client.call(0, FLUSH, 0, 0).await.error, 0);
        assert_eq!(client.call(0, READ, 0, 4096).await.data(0, 4096), [0; 4096]);
        assert_eq!(*server.device.log.borrow(), ["flush", "read 0+4096"]);
    });
}

#[test]
fn simple_replies_are_used_where_structured_ones_were_not_negotiated() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.start("acme/web", false, false).await;
        let payload = pattern(3, 10_000);
        assert_eq!(client.put(0, 4090, &payload).await.error, 0);
        client.request(0, READ, 9, 4090, 20_000).await;
        let read = client.answer(20_000).await;
        let Chunk::Data(_, bytes) = &read.chunks[0] else {
            panic!("{read:?}")
        };
        assert_eq!(bytes[..10_000], payload);
        assert!(bytes[10_000..].iter().all(|b| *b == 0));
        // A failed read carries no data, and DF and block status need structured replies.
        for (flags, command, error) in [(0, READ, EINVAL), (DF, READ, EINVAL), (0, BLOCK_STATUS, EINVAL)] {
            let offset = if flags == DF { 0 } else { SIZE as u64 };
            let answer = client.call(flags, command, offset, 4096).await;
            assert_eq!((answer.simple, answer.error), (true, error));
        }
        client.request(0, READ, 10, 0, 0).await;
        assert_eq!(client.answer(0).await.error, 0);
        server.device.fail(Some(Kind::Io));
        assert_eq!(client.call(0, READ, 0, 4096).await.error, EIO);
        server.device.fail(None);
        assert_eq!(client.put(0, 0, &[1]).await.error, 0);
    });
}

#[test]
fn what_the_device_says_becomes_the_protocols_number_and_no_internals_leak() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        for (kind, error) in [
            (Kind::Io, EIO),
            (Kind::Damaged, EIO),
            (Kind::Internal, EIO),
            (Kind::Unavailable, EIO),
            (Kind::NoSpace, ENOSPC),
            (Kind::ReadOnly, EPERM),
            (Kind::Unsupported, ENOTSUP),
            (Kind::Invalid, EINVAL),
        ] {
            for command in [READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS] {
                server.device.fail(Some(kind));
                let len = if command == FLUSH { 0 } else { 4096 };
                client.request(0, command, 1, 0, len).await;
                if command == WRITE {
                    client.send(&[1; 4096]).await;
                }
                let answer = client.answer(0).await;
                assert_eq!(answer.error, error, "{kind:?} of command {command}");
                assert!(!answer.text.is_empty() && !answer.text.contains("secret-store-name"));
                server.device.fail(None);
                client.prove_in_step().await;
            }
        }
    });
}

#[test]
fn requests_of_no_bytes_succeed_without_the_device() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        let end = SIZE as u64;
        for command in [WRITE, TRIM, CACHE, WRITE_ZEROES] {
            assert_eq!(client.call(FUA, command, end, 0).await.error, 0);
        }
        let read = client.call(0, READ, end, 0).await;
        assert_eq!(
            (read.simple, read.error, read.chunks),
            (false, 0, vec![Chunk::None])
        );
        assert_eq!(client.call(0, CACHE, 0, SIZE as u32).await.error, 0);
        assert!(server.device.log.borrow().is_empty());
        assert_eq!(client.call(0, WRITE, end + 1, 0).await.error, ENOSPC);
    });
}

#[test]
fn reads_come_as_few_chunks_of_data_and_holes_or_as_one_if_asked() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        server.device.fill(8192, &pattern(1, 8192));
        let read = client.call(0, READ, 1, 30_000).await;
        let expected = [
            Chunk::Hole(1, 8191),
            Chunk::Data(8192, pattern(1, 8192)),
            Chunk::Hole(16_384, 30_001 - 16_384),
        ];
        assert_eq!(read.chunks, expected);
        let whole = client.call(DF, READ, 1, 30_000).await;
        let [Chunk::Data(1, bytes)] = &whole.chunks[..] else {
            panic!("{whole:?}")
        };
        assert_eq!(bytes[..], server.device.contents(1, 30_000));
        let hole = client.call(DF, READ, 65_536, 65_536).await;
        assert_eq!(hole.chunks, [Chunk::Hole(65_536, 65_536)]);
    });
}

#[test]
fn reads_of_many_pieces_and_of_the_greatest_length_arrive_whole() {
    on_both(|| async {
        let server = Server::new(40 << 20);
        let (mut client, _task) = server.transmit().await;
        // Every second block is data: far more slices than one message takes.
        for block in (0..2048).step_by(2) {
            server.device.fill(block * 4096, &pattern(block as u8, 4096));
        }
        let len = NBD_PAYLOAD_MAX;
        for flags in [0, DF] {
            let read = client.call(flags, READ, 4096, len).await;
            let data = read.data(4096, len as usize);
            assert!(data == server.device.contents(4096, len as usize));
        }
        let payload = pattern(9, NBD_PAYLOAD_MAX as usize);
        assert_eq!(client.put(0, 3, &payload).await.error, 0);
        assert!(server.device.contents(3, payload.len()) == payload);
    });
}

#[test]
fn commands_reach_the_device_with_their_flags() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        server.device.fill(0, &[5; 65_536]);
        assert_eq!(client.call(FUA, TRIM, 4096, 8192).await.error, 0);
        assert_eq!(client.call(0, WRITE_ZEROES, 0, 100).await.error, 0);
        assert_eq!(client.call(NO_HOLE | FUA, WRITE_ZEROES, 0, 4096).await.error, 0);
        assert_eq!(client.call(FAST_ZERO, WRITE_ZEROES, 0, 4096).await.error, 0);
        assert_eq!(client.call(FUA, FLUSH, 0, 0).await.error, 0);
        // Existing clients set FUA on reads too.
        assert_eq!(
            client.call(FUA, READ, 4096, 4096).await.data(4096, 4096),
            [0; 4096]
        );
        let expected = [
            "trim 4096+8192 fua=true",
            "zero 0+100 fua=false no_hole=false",
            "zero 0+4096 fua=true no_hole=true",
            "zero 0+4096 fua=false no_hole=false",
            "flush",
            "read 4096+4096",
        ];
        assert_eq!(*server.device.log.borrow(), expected);
    });
}

#[test]
fn block_status_tells_data_from_holes_and_one_run_if_asked() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        server.device.fill(8192, &[1; 4096]);
        let status = client.call(0, BLOCK_STATUS, 100, 20_000).await;
        let runs = vec![(8092, 3), (4096, 0), (7812, 3)];
        assert_eq!(status.chunks, [Chunk::Status(1, runs)]);
        let one = client.call(REQ_ONE, BLOCK_STATUS, 100, 20_000).await;
        assert_eq!(one.chunks, [Chunk::Status(1, vec![(8092, 3)])]);
    });
}

#[test]
fn an_export_that_grows_serves_its_new_bytes_at_once() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        assert_eq!(client.put(0, SIZE as u64, &[1; 512]).await.error, ENOSPC);
        server.device.grow(2 * SIZE);
        assert_eq!(client.put(0, SIZE as u64, &[1; 512]).await.error, 0);
        assert_eq!(
            client
                .call(0, READ, SIZE as u64, 512)
                .await
                .data(SIZE as u64, 512),
            [1; 512]
        );
    });
}

#[test]
fn a_goodbye_is_answered_by_everything_asked_before_it() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, task) = server.transmit().await;
        server.device.hold();
        for i in 0..100 {
            client.write(0, i, i * 4096, &[i as u8; 4096]).await;
        }
        client.request(0, DISC, 0, 0, 0).await;
        eventually("requests are running", || server.device.running.get() > 0).await;
        server.device.release();
        let mut cookies: Vec<u64> = Vec::new();
        for _ in 0..100 {
            let answer = client.answer(0).await;
            assert_eq!(answer.error, 0);
            cookies.push(answer.cookie);
        }
        cookies.sort_unstable();
        assert_eq!(cookies, (0..100).collect::<Vec<_>>());
        assert_eq!(client.hangup().await, 0);
        task.await;
        assert_eq!(server.device.ended.get(), 100);
    });
}

#[test]
fn as_many_requests_as_allowed_are_in_flight_and_below_the_clients_depth_at_the_device() {
    on_both(|| async {
        let server = Server::new(8 << 20);
        let (mut client, _task) = server.transmit().await;
        server.device.hold();
        let many = NBD_REQUESTS_IN_FLIGHT as u64 + 50;
        let mut stream = Vec::new();
        for i in 0..many {
            stream.extend(request(0, READ, i, i * 4096, 4096));
        }
        client.send(&stream).await;
        let cap = (NBD_REQUESTS_IN_FLIGHT * 2).div_ceil(3);
        eventually("the device has its share", || server.device.running.get() == cap).await;
        // Nothing more comes in while none is answered.
        sleep(Duration::from_millis(20)).await;
        assert_eq!(server.device.running.get(), cap);
        server.device.release();
        let mut cookies: Vec<u64> = Vec::new();
        for _ in 0..many {
            cookies.push(client.answer(0).await.cookie);
        }
        cookies.sort_unstable();
        assert_eq!(cookies, (0..many).collect::<Vec<_>>());
        assert_eq!(server.device.running_max.get(), cap);
    });
}

#[test]
fn replies_overtake_each_other() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        server.device.hold();
        client.request(0, READ, 1, 0, 4096).await;
        eventually("the read waits", || server.device.running.get() == 1).await;
        // A refusal needs no device.
        assert_eq!(client.call(0, READ, SIZE as u64, 1).await.error, EINVAL);
        server.device.release();
        assert_eq!(client.answer(0).await.cookie, 1);
    });
}

#[test]
fn a_client_that_does_not_read_its_replies_costs_bounded_memory() {
    on_both(|| async {
        let server = Server::new(64 << 20);
        let (client, task) = server.transmit().await;
        server.device.fill(0, &pattern(1, 8 << 20));
        let len = 8u32 << 20;
        let fit = NBD_BYTES_IN_FLIGHT / len as usize;
        for i in 0..64 {
            client.request(0, READ, i, 0, len).await;
        }
        eventually("some are served", || server.device.ended.get() > 0).await;
        sleep(Duration::from_millis(50)).await;
        assert!(
            server.device.log.borrow().len() <= fit,
            "{} reads",
            server.device.log.borrow().len()
        );
        assert!(!task.is_finished());
        client.drop_connection();
        task.await;
    });
}

#[test]
fn a_slow_reader_gets_every_byte() {
    on_both(|| async {
        let server = Server::new(8 << 20);
        let (mut client, _task) = server.transmit().await;
        server.device.fill(0, &pattern(2, 8 << 20));
        let len = 1usize << 20;
        for i in 0..100u64 {
            client.request(0, READ, i, i % 7 * 4096, len as u32).await;
        }
        let mut seen = 0;
        for _ in 0..100 {
            let answer = client.answer(0).await;
            let offset = answer.cookie % 7 * 4096;
            assert!(answer.data(offset, len) == server.device.contents(offset as usize, len));
            seen += 1;
        }
        assert_eq!(seen, 100);
    });
}
