//! What a lost connection leaves behind, and what its siblings do meanwhile (I3).

use super::client::*;
use super::*;

const SIZE: usize = 1 << 20;

/// A connection that has a write waiting behind reads that run, and one more request in its socket, which it does not read: it
/// is beyond the window, so the connection's reader waits for room, and receives nothing.
async fn with_a_write_that_waits(server: &Server) -> (Client, Task<()>) {
    const LONG: u32 = 20 << 20;
    let (old, old_task) = server.transmit().await;
    server.device.hold();
    // Three reads at the device, which is as many as a depth of four allows.
    for i in 0..3 {
        old.request(0, READ, i, 0, LONG).await;
    }
    old.write(0, 3, 0, b"old").await;
    old.request(0, READ, 4, 0, LONG).await;
    eventually("the reads run", || server.device.running.get() == 3).await;
    sleep(Duration::from_millis(20)).await;
    (old, old_task)
}

#[test]
fn requests_of_a_lost_connection_end_before_its_sibling_starts_new_ones() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (old, old_task) = server.transmit().await;
        let (mut new, _new_task) = server.transmit().await;
        server.device.hold();
        old.write(0, 1, 0, b"old").await;
        eventually("the old write runs", || server.device.running.get() == 1).await;
        drop(old);
        // The server learns of the loss with the end of the stream.
        eventually("the loss is known", || server.sessions.leaving_connections() == 1).await;
        new.write(0, 2, 0, b"new").await;
        sleep(Duration::from_millis(10)).await;
        assert_eq!(server.device.log.borrow().len(), 1, "the new write waits");
        server.device.release();
        assert_eq!(new.answer(0).await.error, 0);
        old_task.await;
        assert_eq!(server.device.contents(0, 3), b"new");
    });
}

#[test]
fn a_write_that_waits_behind_a_full_window_does_not_land_after_a_newer_one() {
    on_both(|| async {
        let server = Server::new(64 << 20);
        let (mut new, _new_task) = server.transmit().await;
        let (old, old_task) = with_a_write_that_waits(&server).await;
        old.drop_connection();
        eventually("the loss is known", || server.sessions.leaving_connections() == 1).await;
        new.write(0, 5, 0, b"new").await;
        sleep(Duration::from_millis(20)).await;
        assert_eq!(server.device.log.borrow().len(), 3, "the new write waits");
        server.device.release();
        assert_eq!(new.answer(0).await.error, 0);
        assert_eq!(
            server.device.ended.get(),
            4,
            "after everything of the lost connection"
        );
        old_task.await;
        assert_eq!(server.device.contents(0, 3), b"new");
        let writes = |what: &&String| what.starts_with("write");
        assert_eq!(server.device.log.borrow().iter().filter(writes).count(), 1);
    });
}

#[test]
fn requests_still_in_the_socket_of_a_client_that_hung_up_are_not_served() {
    on_both(|| async {
        for still_reading in [false, true] {
            let server = Server::new(64 << 20);
            let (mut client, task) = server.transmit().await;
            server.device.hold();
            // Fill the window, then leave a write behind in the socket.
            for i in 0..2 {
                client.request(0, READ, i, 0, 32 << 20).await;
            }
            client.write(0, 9, 0, b"too late").await;
            eventually("the reads run", || server.device.running.get() == 2).await;
            if still_reading {
                client.stop_sending();
            } else {
                client.drop_connection();
            }
            server.device.release();
            client.hangup().await;
            task.await;
            let log = server.device.log.borrow();
            assert_eq!(log.len(), 2);
            assert!(log.iter().all(|what| what.starts_with("read")));
        }
    });
}

#[test]
fn a_loss_that_the_engine_does_not_tell_in_time_is_known_before_a_newer_request_starts() {
    on_both_deaf(|| async {
        let server = Server::new(64 << 20);
        let (mut new, _new_task) = server.transmit().await;
        let (old, old_task) = with_a_write_that_waits(&server).await;
        old.drop_connection();
        new.write(0, 5, 0, b"new").await;
        new.request(0, READ, 6, 0, 3).await;
        sleep(Duration::from_millis(20)).await;
        assert_eq!(server.device.log.borrow().len(), 3, "the newer requests wait");
        assert_eq!(server.sessions.leaving_connections(), 1);
        server.device.release();
        for _ in 0..2 {
            assert_eq!(new.answer(0).await.error, 0);
        }
        old_task.await;
        assert_eq!(server.device.contents(0, 3), b"new");
        let log = server.device.log.borrow();
        let last = log
            .iter()
            .rposition(|what| what.starts_with("write 0+3"))
            .unwrap();
        assert!(
            log[..3].iter().all(|what| what.starts_with("read")) && last >= 3,
            "{log:?}"
        );
    });
}

#[test]
fn whichever_way_the_ends_of_connections_and_newer_writes_meet_the_newer_write_stays() {
    async fn rounds() {
        let server = Server::new(SIZE);
        for round in 0..60u8 {
            let (old, old_task) = server.transmit().await;
            let (mut new, new_task) = server.transmit().await;
            // One breath: the server learns of all of it at once, in whichever order.
            let olds = pattern(round, 3 * 4096);
            old.write(0, 1, 4096, &olds).await;
            if round % 2 == 0 {
                old.write(0, 2, 0, &olds).await;
            }
            match round % 3 {
                0 => drop(old),
                1 => old.drop_connection(),
                _ => old.stop_sending(),
            }
            let news = pattern(round ^ 0xff, 4 * 4096);
            assert_eq!(new.put(0, 0, &news).await.error, 0);
            assert!(server.device.contents(0, news.len()) == news, "round {round}");
            old_task.await;
            assert!(
                server.device.contents(0, news.len()) == news,
                "round {round}, later"
            );
            drop(new);
            new_task.await;
        }
    }
    on_both(rounds);
    on_both_deaf(rounds);
}

#[test]
fn a_connection_that_is_cut_in_the_middle_of_a_payload_has_written_nothing_of_it_and_keeps_nobody_waiting() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let payload = vec![0xee; 300_000];
        let mut words = request(0, WRITE, 1, 0, payload.len() as u32);
        words.extend(&payload);
        for sent in [1, 27, 28, 29, 4096, 28 + 65_536, 28 + 262_144, words.len() - 1] {
            let (old, old_task) = server.transmit().await;
            let (mut new, new_task) = server.transmit().await;
            old.send(&words[..sent]).await;
            old.drop_connection();
            assert_eq!(new.put(0, 4096, &[7; 4096]).await.error, 0);
            old_task.await;
            assert!(server.device.contents(0, 4096).iter().all(|byte| *byte == 0));
            assert!(server.device.contents(4096, 4096).iter().all(|byte| *byte == 7));
            assert!(
                server
                    .device
                    .contents(8192, SIZE - 8192)
                    .iter()
                    .all(|byte| *byte == 0)
            );
            drop(new);
            new_task.await;
        }
    });
}

#[test]
fn a_payload_that_stands_still_keeps_neither_siblings_nor_a_detach_waiting() {
    on_both_with_clock(|clock| async move {
        let server = Server::new(SIZE);
        let (old, old_task) = server.transmit().await;
        let (mut new, _new_task) = server.transmit().await;
        old.send(&request(0, WRITE, 1, 0, 4096)).await;
        old.send(&[0xee; 1000]).await;
        assert_eq!(new.put(0, 0, &[7; 4096]).await.error, 0);
        let before = clock.now();
        server.sessions.end_all().await;
        assert!(
            clock.now() - before < Duration::from_secs(20),
            "it does not wait for the payload"
        );
        old_task.await;
        // Whatever comes now comes too late.
        old.try_send(&[0xee; 3096]).await;
        assert!(server.device.contents(0, 4096).iter().all(|byte| *byte == 7));
        assert_eq!(server.device.log.borrow().len(), 1);
    });
}
