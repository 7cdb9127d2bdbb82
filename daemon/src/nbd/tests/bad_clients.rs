//! Clients that break the protocol, leave in the middle of it, or stand still.

use libvol::limits::{NBD_PAYLOAD_MAX, NBD_PAYLOAD_SECONDS};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::client::*;
use super::*;

const SIZE: usize = 1 << 20;

#[test]
fn garbage_instead_of_a_request_ends_the_connection_and_leaves_nothing() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, task) = server.transmit().await;
        server.device.hold();
        client.write(0, 1, 0, &[9; 4096]).await;
        eventually("the write is running", || server.device.running.get() == 1).await;
        client.try_send(&[0x55; 300]).await;
        client.hangup().await;
        assert!(!task.is_finished(), "the write still runs");
        server.device.release();
        task.await;
        assert_eq!(server.device.contents(0, 1), [9]);

        let (mut client, task) = server.transmit().await;
        client
            .try_send(&request(0, WRITE, 1, 0, NBD_PAYLOAD_MAX + 1))
            .await;
        client.hangup().await;
        task.await;
        assert_eq!(Rc::strong_count(&server.sessions), 1);
        assert_eq!(
            Rc::strong_count(&server.device),
            3,
            "the server's and the shelf's"
        );
    });
}

#[test]
fn a_client_that_leaves_at_any_byte_of_a_write_writes_nothing() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let mut write = request(0, WRITE, 1, 0, 70_000);
        write.extend(pattern(5, 70_000));
        for len in (0..64).chain([1000, 65_536, 70_000, 70_027]) {
            let (client, task) = server.transmit().await;
            client.send(&write[..len]).await;
            drop(client);
            within(task).await;
        }
        assert!(server.device.log.borrow().is_empty());
        assert_eq!(Rc::strong_count(&server.sessions), 1);
    });
}

#[test]
fn arbitrary_bytes_end_in_replies_or_a_hangup_and_never_in_a_panic() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let mut runner = TestRunner::deterministic();
        let requests = prop::collection::vec(
            (
                any::<u16>(),
                0u16..10,
                any::<u64>(),
                any::<u64>(),
                0u32..200_000,
                0usize..5000,
            ),
            0..40,
        );
        for round in 0..200 {
            let requests = requests.new_tree(&mut runner).unwrap().current();
            let (mut client, task) = server.connect();
            client.start("acme/web", round % 2 == 0, false).await;
            let mut stream = Vec::new();
            for (flags, command, cookie, offset, len, payload) in requests {
                // Mostly plausible, so that it gets past the first checks.
                let flags = if flags % 3 == 0 { flags } else { flags & 1 };
                let offset = if offset % 5 == 0 {
                    offset
                } else {
                    offset % SIZE as u64
                };
                stream.extend(request(flags, command, cookie, offset, len));
                stream.extend(vec![cookie as u8; payload]);
            }
            client.try_send(&stream).await;
            client.drop_connection();
            within(task).await;
        }
        assert_eq!(Rc::strong_count(&server.sessions), 1);
        assert_eq!(server.device.running.get(), 0);
    });
}

#[test]
fn a_payload_that_stops_coming_ends_the_connection_and_a_slow_one_does_not() {
    const STEP: Duration = Duration::from_secs(NBD_PAYLOAD_SECONDS * 2 / 3);
    on_both_with_clock(|clock| async move {
        let server = Server::new(16 << 20);
        for refused in [false, true] {
            let (mut client, task) = server.transmit().await;
            // Far more than a socket holds, so that what was sent was received, but for the end.
            let (len, piece) = (12u32 << 20, vec![7; 4 << 20]);
            let offset = if refused { 16 << 20 } else { 0 };
            client.request(0, WRITE, 1, offset, len).await;
            for _ in 0..3 {
                clock.advance(STEP);
                client.send(&piece).await;
            }
            let answer = client.answer(0).await;
            assert_eq!(
                (answer.cookie, answer.error != 0),
                (1, refused),
                "{STEP:?} between its pieces"
            );
            // Between requests a client may be silent as long as it likes.
            clock.advance(STEP * 100);
            yield_now().await;
            client.request(0, WRITE, 2, offset, len).await;
            client.send(&piece).await;
            // Both only now: the first for the timer, the second for what was still in the socket.
            clock.advance(STEP);
            sleep(Duration::from_millis(5)).await;
            assert!(!task.is_finished());
            clock.advance(STEP * 2);
            client.hangup().await;
            task.await;
        }
        assert_eq!(
            server.device.log.borrow().len(),
            1,
            "a write that is not whole is none"
        );
    });
}
