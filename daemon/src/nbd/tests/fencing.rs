//! What a lost connection leaves behind, and what its siblings do meanwhile (I3).

use std::sync::Arc;

use libvol::runtime::SendPart;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, ServerConnection};

use super::client::*;
use super::*;
use crate::nbd::link::{GOODBYE, Link};

const SIZE: usize = 1 << 20;

/// A connection that has a write waiting behind reads that run, and one more request in its socket, which it does not read: it
/// is beyond the window, so the connection's reader waits for room, and receives nothing.
pub(super) async fn with_a_write_that_waits(server: &Server) -> (Client, Task<()>) {
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

/// A server without a certificate: enough for whoever gets no further than the first word.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

#[test]
fn a_goodbye_under_tls_is_not_waited_for_when_nobody_takes_it() {
    on_both_with_clock(|clock| async move {
        let config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(NoCertificate));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let stream = Stream::new(OwnedFd::from(ours));
        let link = Link::with_tls(stream.clone(), ServerConnection::new(Arc::new(config)).unwrap());
        // Nobody reads, so the socket is full from here on.
        let _filling = spawn(async move { stream.send(vec![SendPart::Zeros(64 << 20)]).await });
        sleep(Duration::from_millis(20)).await;
        let goodbye = spawn(async move { link.say_goodbye().await });
        sleep(Duration::from_millis(20)).await;
        assert!(!goodbye.is_finished(), "there is no room for it");
        clock.advance(GOODBYE);
        eventually("it is given up", || goodbye.is_finished()).await;
    });
}
