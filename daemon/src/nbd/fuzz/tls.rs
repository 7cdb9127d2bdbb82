//! The gate over TCP, and what comes after: a stranger's words, its TLS records, and what a client says under TLS that has
//! a certificate, or has none, or the wrong one.

use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use libvol::ids::VolumeId;
use libvol::runtime::{net::Stream, spawn};
use libvol::tenant::VmIdentity;
use libvol::volume::Volume;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};

use super::client::{Client, Pace, pair};
use super::device::Fake;
use super::options::{Shown, Start, Tls};
use super::{BOTH, GREETING, Shelf, Talk, run};
use crate::nbd::{Exports, Lookup, Sessions, go_on_device, receive};
use crate::shard::tls::{TlsFiles, Versions, identity};

/// What the other customer's VM may see.
const FOREIGN: Shown = &[("globex/secret", false)];
/// Client flags and STARTTLS.
const STARTTLS: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
const STARTTLS_ANSWER: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";

/// The NBD server behind TLS.
///
/// ```text
/// | bits 0-1 mode, 2-3 pace, 4 close_notify | which certificate | what the client says |
/// ```
///
/// Modes: in the clear, from the greeting on; as TLS records after STARTTLS; under TLS; half of it under TLS, and then the
/// rest as records.
pub(crate) fn tls(input: &[u8]) {
    let Some((&[how, certificate], said)) = input.split_first_chunk::<2>() else {
        return;
    };
    let pace = Pace::of(how >> 2);
    let said = said.to_vec();
    match how & 3 {
        0 => run(in_the_clear(said, pace)),
        1 => run(as_records(said, pace)),
        mode => {
            let (said, records) = match mode {
                2 => (said, Vec::new()),
                _ => {
                    let (said, records) = said.split_at(said.len() / 2);
                    (said.to_vec(), records.to_vec())
                }
            };
            let certificate = usize::from(certificate) % pki().clients.len();
            run(under_tls(said, records, certificate, pace, how & 16 != 0));
        }
    }
}

async fn in_the_clear(said: Vec<u8>, pace: Pace) {
    let start = Start {
        tls: Tls::Required,
        shown: &[],
        flags: None,
        options_left: 64,
    };
    let talk = Talk::foresee(&said, start);
    let world = World::new(None);
    let (client, socket) = pair();
    let serving = spawn(world.clone().serve(socket));
    let feeding = client.feed(said.clone(), pace, true);
    let heard = client.receive_all().await;
    feeding.await;
    serving.await;
    let heard = heard.strip_prefix(GREETING).expect("a greeting");
    match talk.foreseen.starts_tls {
        false => talk.check(heard, &world.acme),
        // Refused, if what followed came along with it; else the beginning of TLS.
        true => {
            let (last, before) = talk.foreseen.answers.split_last().expect("an answer to STARTTLS");
            let rest = before.iter().fold(heard, |heard, answer| answer.check(heard));
            if !rest.is_empty() {
                only_records(last.check(rest));
            }
        }
    }
    world.all_gone().await;
}

async fn as_records(said: Vec<u8>, pace: Pace) {
    let world = World::new(None);
    let (client, socket) = pair();
    let serving = spawn(world.clone().serve(socket));
    start_tls(&client).await;
    let feeding = client.feed(said, pace, true);
    only_records(&client.receive_all().await);
    feeding.await;
    serving.await;
    world.all_gone().await;
}

async fn under_tls(said: Vec<u8>, records: Vec<u8>, certificate: usize, pace: Pace, close_notify: bool) {
    let start = Start {
        tls: Tls::On,
        shown: [BOTH, FOREIGN].get(certificate).copied().unwrap_or(&[]),
        flags: Some(3),
        options_left: 63,
    };
    let talk = Rc::new(Talk::foresee(&said, start));
    let world = World::new(Some(&talk));
    let (client, socket) = pair();
    let serving = spawn(world.clone().serve(socket));
    start_tls(&client).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let session = ClientConnection::new(pki().clients[certificate].clone(), name).expect("a session");
    let encrypted = client.clone().encrypt(session).await;
    let known = start.shown.len();
    // What is no TLS ends the connection at once, before words that came along with it are answered.
    let garbled = !records.is_empty();
    assert!(
        known == 0 || encrypted.is_some(),
        "a right certificate is turned away"
    );
    if let Some(client) = encrypted {
        let wire = talk.wire(&said);
        let feeding = client.feed(wire, pace, false);
        let ending = spawn({
            let client = client.clone();
            async move {
                feeding.await;
                client.send_raw(&records).await;
                if close_notify {
                    client.close_notify().await;
                }
                client.hang_up();
            }
        });
        let heard = client.receive_all().await;
        ending.await;
        match known {
            0 => assert!(
                heard.is_empty(),
                "words for who has no right to any: {heard:02x?}"
            ),
            _ if garbled => talk.check_up_to(0, &heard, world.shelf(certificate)),
            _ => talk.check(&heard, world.shelf(certificate)),
        }
    }
    client.leave();
    serving.await;
    drop(client);
    world.all_gone().await;
}

async fn start_tls(client: &Client) {
    assert!(client.send(STARTTLS).await);
    let heard = client
        .receive_exactly(GREETING.len() + STARTTLS_ANSWER.len())
        .await;
    assert_eq!(heard, [GREETING, STARTTLS_ANSWER].concat());
}

/// After STARTTLS nothing is said but in TLS.
fn only_records(mut bytes: &[u8]) {
    while let Some((head, rest)) = bytes.split_first_chunk::<5>() {
        assert!(
            (20..=23).contains(&head[0]) && head[1] == 3,
            "not a TLS record: {head:02x?}"
        );
        let len = usize::from(u16::from_be_bytes([head[3], head[4]]));
        bytes = rest.get(len..).unwrap_or(&[]);
    }
}

/// Two customers, and what each has.
#[derive(Clone)]
struct World {
    acme: Shelf,
    globex: Shelf,
    sessions: Rc<Sessions>,
}

impl World {
    fn new(talk: Option<&Talk>) -> Self {
        let world = Self {
            acme: Shelf::new(BOTH),
            globex: Shelf::new(FOREIGN),
            sessions: Sessions::new(),
        };
        if let Some(talk) = talk
            && let Some((name, _)) = talk.foreseen.agreed
        {
            match name.starts_with("acme/") {
                true => world.acme.expect(talk),
                false => world.globex.expect(talk),
            }
        }
        world
    }

    fn shelf(&self, certificate: usize) -> &Shelf {
        [&self.acme, &self.globex][certificate]
    }

    /// As the gate and the doors do it: received without a volume, then from door to door.
    async fn serve(self, socket: Stream) {
        let judge = |certificate: &[u8]| {
            let vm = identity(certificate)?;
            Some(Lobby(self.shelf_of(&vm)?))
        };
        let Some((mut volume, mut moving, lobby)) = receive(socket, pki().server.clone(), judge).await else {
            return;
        };
        let shelf = lobby.0;
        loop {
            let door = Rc::new(Door {
                shelf: shelf.clone(),
                volume,
            });
            match go_on_device(moving, door, self.sessions.clone()).await {
                Some((next, on_its_way)) => (volume, moving) = (next, on_its_way),
                None => return,
            }
        }
    }

    fn shelf_of(&self, vm: &VmIdentity) -> Option<Shelf> {
        match (vm.customer.to_string().as_str(), vm.vm.to_string().as_str()) {
            ("acme", "vm1") => Some(self.acme.clone()),
            ("globex", "vm2") => Some(self.globex.clone()),
            other => panic!("nobody has issued a certificate to {other:?}"),
        }
    }

    async fn all_gone(self) {
        let Self {
            acme,
            globex,
            sessions,
        } = self;
        acme.all_gone(&sessions).await;
        globex.all_gone(&sessions).await;
    }
}

fn volume_of(shelf: &Shelf, name: &str) -> Option<VolumeId> {
    Some(VolumeId::from_bytes([shelf.index(name)? as u8 + 1; 16]))
}

/// What a VM sees before it has named a volume.
struct Lobby(Shelf);

impl Exports<Rc<Volume>> for Lobby {
    fn find(&self, name: &str) -> Lookup {
        volume_of(&self.0, name).map_or(Lookup::Missing, Lookup::Elsewhere)
    }

    fn list(&self) -> Vec<(String, String)> {
        Exports::list(&self.0)
    }
}

/// What it sees at a volume's door.
struct Door {
    shelf: Shelf,
    volume: VolumeId,
}

impl Exports<Rc<Fake>> for Door {
    fn find(&self, name: &str) -> Lookup<Rc<Fake>> {
        match volume_of(&self.shelf, name) {
            Some(volume) if volume == self.volume => self.shelf.find(name),
            Some(volume) => Lookup::Elsewhere(volume),
            None => Lookup::Missing,
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        Exports::list(&self.shelf)
    }
}

/// An authority, the server, and clients: of acme, of globex, without a certificate, with one of another authority, and
/// with one that names no VM.
struct Pki {
    server: Arc<ServerConfig>,
    clients: Vec<Arc<ClientConfig>>,
}

fn pki() -> &'static Pki {
    static PKI: OnceLock<Pki> = OnceLock::new();
    PKI.get_or_init(Pki::make)
}

struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn make() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed");
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    fn issue(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.contains("://") {
                true => SanType::URI((*name).try_into().expect("a URI")),
                false => SanType::DnsName((*name).try_into().expect("a name")),
            })
            .collect();
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate, key)
    }
}

impl Pki {
    fn make() -> Self {
        let (ours, theirs) = (Authority::make(), Authority::make());
        let dir = tempfile::tempdir().expect("a directory");
        let (certificate, key) = ours.issue(&["localhost"]);
        let file = |name: &str, text: String| std::fs::write(dir.path().join(name), text).expect("written");
        file("ca-cert.pem", ours.pem.clone());
        file("server-cert.pem", certificate.pem());
        file("server-key.pem", key.serialize_pem());
        let server = TlsFiles::load(dir.path(), Versions::Tls13).and_then(|mut files| files.current());
        let client = |shown: Option<(&Authority, &str)>| {
            let mut roots = RootCertStore::empty();
            roots.add(ours.der.clone()).expect("an authority");
            let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("TLS 1.3")
                .with_root_certificates(roots);
            let Some((authority, name)) = shown else {
                return Arc::new(builder.with_no_client_auth());
            };
            let (certificate, key) = authority.issue(&[name]);
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            let config = builder.with_client_auth_cert(vec![certificate.der().clone()], key);
            Arc::new(config.expect("a certificate and its key"))
        };
        Self {
            server: server.expect("the files are right"),
            clients: vec![
                client(Some((&ours, "vold://acme/vm1"))),
                client(Some((&ours, "vold://globex/vm2"))),
                client(None),
                client(Some((&theirs, "vold://acme/vm1"))),
                client(Some((&ours, "vm1"))),
            ],
        }
    }
}
