//! A daemon that serves NBD over TLS, its certificate authority, and a client of its own: one that says when TLS begins, shows
//! which certificate it likes, and tells a goodbye from a cut.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use crate::nbd::{Haggle, OPT_STARTTLS, REP_ACK};
use crate::tools::{output, tool};
use crate::{PATIENCE, Vold};

/// A stream under TLS.
pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// A daemon that listens, its authority's directory, and the port.
pub struct Tls {
    /// The daemon.
    pub vold: Vold,
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
}

impl Tls {
    /// `acme/vol` on `vm1`, `globex/vol` on `vm2`; certificates for both.
    pub fn start() -> Self {
        let (tls, _) = Self::serving(1, "64M", "8M", &[]);
        tls.vold.ctl("customer create globex");
        tls.vold.ctl("vm create vm2 --customer globex");
        tls.vold.ctl("volume create globex/vol --size 8M");
        tls.vold.attach("globex/vol", "vm2");
        tls.issue("acme", "vm1");
        tls.issue("globex", "vm2");
        tls
    }

    /// `acme/vol` of that size on so many stores, attached to `vm1`, and what attach said. `more` goes to the daemon. No
    /// certificates of VMs yet.
    pub fn serving(replicas: usize, store_size: &str, volume_size: &str, more: &[&str]) -> (Self, Value) {
        let vold = daemon(more);
        vold.with_volume(replicas, store_size, volume_size);
        let attached = vold.ctl("attach acme/vol --vm vm1");
        let tls = Self {
            port: port(&attached),
            vold,
        };
        (tls, attached)
    }

    /// The authority's directory, which is also the server's.
    pub fn pki(&self) -> PathBuf {
        pki(&self.vold)
    }

    /// Directory of a VM's certificate.
    pub fn certificate(&self, customer: &str, vm: &str) -> PathBuf {
        self.vold.path(&format!("{customer}-{vm}"))
    }

    /// Issues a VM's certificate.
    pub fn issue(&self, customer: &str, vm: &str) -> PathBuf {
        let out = self.certificate(customer, vm);
        self.issue_by(&self.pki(), customer, vm, &out, "");
        out
    }

    /// Has an authority issue a certificate, with more arguments.
    pub fn issue_by(&self, pki: &Path, customer: &str, vm: &str, out: &Path, more: &str) {
        issue_by(&self.vold, pki, customer, vm, out, more);
    }

    /// A certificate for the same VM from an authority of the same kind that vold does not know.
    pub fn forged(&self, customer: &str, vm: &str) -> PathBuf {
        let (other, out) = (self.vold.path("other"), self.vold.path("forged"));
        self.vold
            .ctl(&format!("tls init --dir {} --server localhost", other.display()));
        self.issue_by(&other, customer, vm, &out, "");
        // So that the client trusts the server.
        std::fs::copy(self.pki().join("ca-cert.pem"), out.join("ca-cert.pem")).expect("own files");
        out
    }

    /// For libnbd's programs.
    pub fn uri(&self, certificate: &Path, export: &str) -> String {
        format!(
            "nbds://localhost:{}/{export}?tls-certificates={}",
            self.port,
            certificate.display()
        )
    }

    /// Whether nbdinfo can open the export with the certificate, and what it says if not.
    ///
    /// # Errors
    /// What it says.
    pub fn opens(&self, certificate: &Path, export: &str) -> Result<(), String> {
        let said = output(tool("nbdinfo").args(["--size", &self.uri(certificate, export)]));
        match said.status.success() {
            true => {
                assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "8388608");
                Ok(())
            }
            false => Err(String::from_utf8_lossy(&said.stderr).into_owned()),
        }
    }

    /// A connection without a word said yet.
    pub fn connect(&self) -> TcpStream {
        patient(TcpStream::connect(("127.0.0.1", self.port)).expect("vold listens"))
    }

    /// The same from another address of this host.
    pub fn connect_from(&self, address: IpAddr) -> TcpStream {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&socket, &SocketAddr::new(address, 0)).expect("an address of this host");
        connect(&socket, &SocketAddr::from(([127, 0, 0, 1], self.port))).expect("vold listens");
        patient(socket.into())
    }

    /// A connection that has exchanged greetings, and has no TLS yet.
    ///
    /// # Errors
    /// The socket's.
    pub fn greeted(&self) -> io::Result<Haggle<TcpStream>> {
        Haggle::over(self.connect())
    }

    /// A connection under TLS that shows the certificate in a directory, or none. What the server thinks of it shows at the
    /// next thing asked: under TLS 1.3 the client is done first.
    ///
    /// # Errors
    /// The socket's, or of a server that is not the authority's.
    pub fn haggle(&self, certificate: Option<&Path>) -> io::Result<Haggle<TlsStream>> {
        self.haggle_over(self.connect(), certificate)
    }

    /// The same over a connection that is there.
    ///
    /// # Errors
    /// As [`Tls::haggle`].
    pub fn haggle_over(
        &self,
        stream: TcpStream,
        certificate: Option<&Path>,
    ) -> io::Result<Haggle<TlsStream>> {
        let mut haggle = Haggle::over(stream)?;
        haggle.send(OPT_STARTTLS, &[])?;
        assert_eq!(haggle.reply()?.kind, REP_ACK, "TLS is offered");
        Ok(Haggle::go_on(self.encrypt(haggle.into_stream(), certificate)?))
    }

    /// Begins TLS: the client's side is done when it returns.
    ///
    /// # Errors
    /// As [`Tls::haggle`].
    pub fn encrypt(&self, mut stream: TcpStream, certificate: Option<&Path>) -> io::Result<TlsStream> {
        let mut session = self.session(certificate);
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        Ok(StreamOwned::new(session, stream))
    }

    /// A client's TLS session that has not said a word.
    pub fn session(&self, certificate: Option<&Path>) -> ClientConnection {
        let config = Arc::new(client_config(&self.pki().join("ca-cert.pem"), certificate));
        let name = ServerName::try_from("localhost").expect("a name");
        ClientConnection::new(config, name).expect("a session")
    }

    /// Revokes a VM's certificates.
    pub fn revoke(&self, customer: &str, vm: &str) {
        self.vold.ctl(&format!(
            "tls revoke --dir {} --customer {customer} --vm {vm}",
            self.pki().display()
        ));
    }
}

/// A daemon that listens on some port of 127.0.0.1, with an authority of its own. `more` goes to the daemon.
pub fn daemon(more: &[&str]) -> Vold {
    let mut vold = Vold::not_started(None);
    vold.ctl(&format!(
        "tls init --dir {} --server localhost --server 127.0.0.1",
        pki(&vold).display()
    ));
    vold.restart_with(serve_command(&vold, 0, more));
    vold
}

/// What such a daemon is called with, to listen on that port (0: on any).
pub fn serve_command(vold: &Vold, port: u16, more: &[&str]) -> Command {
    let mut command = vold.serve_command();
    command.args(more).arg("--listen");
    command.arg(format!("127.0.0.1:{port}"));
    command.arg("--tls-dir").arg(pki(vold));
    command
}

/// The port of an attachment.
///
/// # Panics
/// When it is not to be had over TLS.
pub fn port(attached: &Value) -> u16 {
    let uri = attached["over_tls"][0]["uri"].as_str().expect("a URI");
    let port = uri.split(':').next_back().and_then(|rest| rest.split('/').next());
    port.and_then(|port| port.parse().ok()).expect("a port")
}

/// Directory of a VM's certificate, which is issued if it is not there.
pub fn issued(vold: &Vold, customer: &str, vm: &str) -> PathBuf {
    let out = vold.path(&format!("{customer}-{vm}"));
    if !out.exists() {
        issue_by(vold, &pki(vold), customer, vm, &out, "");
    }
    out
}

/// The directory of the daemon's authority.
fn pki(vold: &Vold) -> PathBuf {
    vold.path("pki")
}

fn issue_by(vold: &Vold, pki: &Path, customer: &str, vm: &str, out: &Path, more: &str) {
    vold.ctl(&format!(
        "tls issue --dir {} --customer {customer} --vm {vm} --out {} {more}",
        pki.display(),
        out.display()
    ));
}

/// Trusts that authority, and shows the certificate in that directory.
fn client_config(authority: &Path, certificate: Option<&Path>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for authority in certificates(authority) {
        roots.add(authority).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots);
    let Some(dir) = certificate else {
        return config.with_no_client_auth();
    };
    let key = PrivateKeyDer::from_pem_file(dir.join("client-key.pem")).expect("a key");
    config
        .with_client_auth_cert(certificates(&dir.join("client-cert.pem")), key)
        .expect("a certificate and its key")
}

fn certificates(file: &Path) -> Vec<CertificateDer<'static>> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    read.unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
    stream.set_nodelay(true).expect("a socket");
    stream
}
