//! Connections of one attachment among each other.

use libvol::limits::{NBD_CONNECTIONS_PER_ATTACHMENT, NBD_PAYLOAD_MAX, VOLUME_BYTES_IN_FLIGHT};

use super::client::*;
use super::*;

const SIZE: usize = 1 << 20;

#[test]
fn ending_all_waits_for_requests_that_run_and_drops_those_that_wait() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (client, first) = server.transmit().await;
        let (mut idle, second) = server.transmit().await;
        assert_eq!(server.sessions.connections(), 2);
        server.device.hold();
        for i in 0..30 {
            client.write(0, i, i * 4096, &[7; 4096]).await;
        }
        eventually("the device has its share", || server.device.running.get() == 20).await;
        let ending = spawn({
            let sessions = server.sessions.clone();
            async move { sessions.end_all().await }
        });
        idle.hangup().await;
        second.await;
        sleep(Duration::from_millis(10)).await;
        assert!(!ending.is_finished() && !first.is_finished());
        assert_eq!(server.sessions.connections(), 1);
        server.device.release();
        ending.await;
        assert_eq!(
            server.device.ended.get(),
            20,
            "what ran has ended, what waited never started"
        );
        assert_eq!(server.device.running.get(), 0);
        assert_eq!(server.sessions.connections(), 0);
        first.await;
        // And nobody comes in any more.
        let (mut late, task) = server.connect();
        assert_eq!(late.hangup().await, 0);
        task.await;
        assert_eq!(server.device.log.borrow().len(), 20);
    });
}

#[test]
fn ending_all_ends_handshakes_and_clients_that_do_not_read() {
    on_both(|| async {
        let server = Server::new(8 << 20);
        let (_shy, shy_task) = server.connect();
        let (deaf, deaf_task) = server.transmit().await;
        server.device.fill(0, &[1; 4 << 20]);
        for i in 0..8 {
            deaf.request(0, READ, i, 0, 4 << 20).await;
        }
        eventually("reads were served", || server.device.ended.get() >= 1).await;
        server.sessions.end_all().await;
        shy_task.await;
        deaf_task.await;
        assert_eq!(Rc::strong_count(&server.sessions), 1);
    });
}

#[test]
fn draining_answers_new_requests_with_eshutdown_and_waits_for_earlier_ones() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.transmit().await;
        server.device.hold();
        client.write(0, 1, 0, &[7; 4096]).await;
        eventually("the write runs", || server.device.running.get() == 1).await;
        let draining = spawn({
            let sessions = server.sessions.clone();
            async move { sessions.drain(FAR).await }
        });
        sleep(Duration::from_millis(5)).await;
        for command in [READ, FLUSH, TRIM] {
            let answer = client.call(0, command, 0, 0).await;
            assert_eq!(answer.error, ESHUTDOWN);
        }
        assert_eq!(client.put(0, 0, &[1; 100_000]).await.error, ESHUTDOWN);
        assert!(!draining.is_finished());
        server.device.release();
        let answer = client.answer(0).await;
        assert_eq!((answer.cookie, answer.error), (1, 0));
        draining.await;
        server.sessions.end_all().await;
    });
}

#[test]
fn draining_gives_up_in_time_on_a_request_that_hangs() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (client, _task) = server.transmit().await;
        server.device.hold();
        client.write(0, 1, 0, &[7; 4096]).await;
        eventually("the write runs", || server.device.running.get() == 1).await;
        server.sessions.drain(Duration::from_millis(20)).await;
        assert_eq!(server.device.running.get(), 1);
        server.device.release();
        server.sessions.end_all().await;
    });
}

#[test]
fn an_attachment_has_so_many_connections_and_no_more() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let mut open = Vec::new();
        for _ in 0..NBD_CONNECTIONS_PER_ATTACHMENT {
            open.push(server.transmit().await);
        }
        assert_eq!(server.sessions.connections(), NBD_CONNECTIONS_PER_ATTACHMENT);
        // One more is told so, and gets in when another has left.
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        let refused = client.option(7, &export_query("acme/web", &[])).await;
        assert_eq!(refused[0].0, (1 << 31) + 2);
        let (left, left_task) = open.pop().unwrap();
        drop(left);
        left_task.await;
        let accepted = client.option(7, &export_query("acme/web", &[])).await;
        assert_eq!(accepted.last().unwrap().0, 1);
        // Handshakes without end are limited too.
        let mut shy: Vec<_> = (0..NBD_CONNECTIONS_PER_ATTACHMENT)
            .map(|_| server.connect())
            .collect();
        let (mut last, last_task) = shy.pop().unwrap();
        let (mut over, over_task) = server.connect();
        last.greet(3).await;
        assert_eq!(over.hangup().await, 0);
        over_task.await;
        assert!(!last_task.is_finished());
        server.sessions.end_all().await;
    });
}

#[test]
fn a_server_task_that_is_dropped_starts_nothing_more() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (client, task) = server.transmit().await;
        server.device.hold();
        for i in 0..30 {
            client.write(0, i, i * 4096, &[7; 4096]).await;
        }
        eventually("the device has its share", || server.device.running.get() == 20).await;
        drop(task);
        eventually("the loss is known", || server.sessions.leaving_connections() == 1).await;
        server.device.release();
        server.sessions.end_all().await;
        assert_eq!(server.device.ended.get(), 20);
    });
}

#[test]
fn a_request_whose_task_has_not_run_yet_when_all_is_ended_does_not_start() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (old, _old_task) = server.transmit().await;
        let (new, _new_task) = server.transmit().await;
        server.device.hold();
        old.write(0, 1, 0, b"old").await;
        eventually("the old write runs", || server.device.running.get() == 1).await;
        drop(old);
        eventually("the loss is known", || server.sessions.leaving_connections() == 1).await;
        new.write(0, 2, 0, b"new").await;
        // Long enough for the server to have taken it; should it not have, the test shows less and still passes.
        sleep(Duration::from_millis(20)).await;
        // Run queue: the old write, whose end starts the new one behind us, then this task.
        server.device.release();
        yield_now().await;
        assert_eq!(server.device.ended.get(), 1);
        server.sessions.end_all().await;
        assert_eq!(*server.device.log.borrow(), ["write 0+3 fua=false"]);
    });
}

#[test]
fn zeros_that_are_written_end_with_a_piece_and_looks_at_once_when_all_is_ended() {
    const LONG: u32 = 100 << 20;
    on_both(|| async {
        let server = Server::new(128 << 20);
        let (client, _task) = server.transmit().await;
        server.device.hold();
        client.request(NO_HOLE, WRITE_ZEROES, 1, 0, LONG).await;
        client.request(0, BLOCK_STATUS, 2, 0, LONG).await;
        eventually("both run", || server.device.running.get() == 2).await;
        let ending = spawn({
            let sessions = server.sessions.clone();
            async move { sessions.end_all().await }
        });
        eventually("the look has ended", || server.device.ended.get() == 1).await;
        assert!(!ending.is_finished(), "a piece runs");
        server.device.release();
        ending.await;
        assert_eq!(
            *server.device.log.borrow(),
            ["zero 0+33554432 fua=false no_hole=true", "status 0+104857600"]
        );
    });
}

#[test]
fn zeros_that_are_written_take_their_room_of_the_window() {
    on_both(|| async {
        let server = Server::new(128 << 20);
        let (client, _task) = server.transmit().await;
        server.device.hold();
        for i in 0..8 {
            client.request(NO_HOLE, WRITE_ZEROES, i, 0, NBD_PAYLOAD_MAX).await;
        }
        eventually("those run that have room", || server.device.running.get() == 2).await;
        server.device.release();
        eventually("all have been served", || server.device.ended.get() == 8).await;
        assert_eq!(server.device.running_max.get(), 2);
        server.sessions.end_all().await;
    });
}

#[test]
fn connections_share_the_bytes_of_their_attachment_and_one_without_any_may_always_bring_one_request() {
    on_both(|| async {
        let server = Server::new(64 << 20);
        let (mut first, _first_task) = server.transmit().await;
        let (second, _second_task) = server.transmit().await;
        let (third, _third_task) = server.transmit().await;
        server.device.fill(0, &vec![1; NBD_PAYLOAD_MAX as usize]);
        // Two connections take all there is.
        assert_eq!(VOLUME_BYTES_IN_FLIGHT, 4 * NBD_PAYLOAD_MAX as usize);
        for client in [&first, &second] {
            for i in 0..2 {
                client.request(0, READ, i, 0, NBD_PAYLOAD_MAX).await;
            }
        }
        eventually("four reads were served", || server.device.ended.get() == 4).await;
        // Nobody takes the replies, so nothing is given back.
        third.request(0, READ, 0, 0, NBD_PAYLOAD_MAX).await;
        third.request(0, READ, 1, 0, 4096).await;
        eventually("the lone read was served", || server.device.ended.get() == 5).await;
        sleep(Duration::from_millis(20)).await;
        assert_eq!(server.device.log.borrow().len(), 5, "and one more is too much");
        for _ in 0..2 {
            assert_eq!(first.answer(0).await.error, 0);
        }
        eventually("what was given back lets it in", || {
            server.device.ended.get() == 6
        })
        .await;
        // What a connection that is cut off had is given back too.
        second.drop_connection();
        first.request(0, READ, 2, 0, NBD_PAYLOAD_MAX).await;
        first.request(0, READ, 3, 0, NBD_PAYLOAD_MAX).await;
        eventually("there is room for both", || server.device.ended.get() == 8).await;
        server.sessions.end_all().await;
    });
}
