//! The stream under TLS.

use libvol::runtime::SendPart;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, ServerConnection};

use super::*;
use crate::nbd::link::{GOODBYE, Link};

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
