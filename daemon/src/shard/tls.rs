//! TLS of the NBD port: TLS 1.3, or 1.2 where the operator allows it, with a client certificate that names customer and VM.
//!
//! Files as QEMU's `tls-creds-x509` has them, in one directory: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and
//! `ca-crl.pem` if certificates were revoked. They are looked at again when one of them has changed, so that a revocation or
//! a renewed certificate needs no restart. While a changed file cannot be read, or the revocations have gone, nobody is let
//! in.
//!
//! What a certificate is good for is one URI in its subject alternative name ([`VmIdentity`]); names, and anything else in it,
//! count for nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use libvol::tenant::VmIdentity;
use libvol::{Error, Kind, Result};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const CA: &str = "ca-cert.pem";
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";
const REVOKED: &str = "ca-crl.pem";
const FILES: [&str; 4] = [CA, CERTIFICATE, KEY, REVOKED];

/// When a file was changed, and its length, if it is there.
type Seen = Option<(SystemTime, u64)>;

/// Versions of TLS that are spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Versions {
    /// 1.3 alone.
    Tls13,
    /// 1.3, and 1.2 with clients that know no better (nbd-client of nbd 3.24). Forward secrecy and authenticated ciphers all the
    /// same; but the client's certificate, and so the names of customer and VM, can be read by who listens on the way.
    Tls12And13,
}

impl Versions {
    /// As configured.
    pub(crate) fn of(tls_1_2: bool) -> Self {
        if tls_1_2 { Self::Tls12And13 } else { Self::Tls13 }
    }

    fn supported(self) -> &'static [&'static SupportedProtocolVersion] {
        static TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
        static BOTH: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
        match self {
            Self::Tls13 => &TLS13,
            Self::Tls12And13 => &BOTH,
        }
    }
}

/// The directory, and what was last read from it.
pub(crate) struct TlsFiles {
    dir: PathBuf,
    versions: Versions,
    seen: [Seen; FILES.len()],
    config: Arc<ServerConfig>,
}

impl TlsFiles {
    /// Reads them for the first time.
    ///
    /// # Errors
    /// `Invalid` with the file and what is wrong with it.
    pub(crate) fn load(dir: &Path, versions: Versions) -> Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            versions,
            seen: look(dir),
            config: read(dir, versions)?,
        })
    }

    /// What is in force now.
    ///
    /// # Errors
    /// As [`TlsFiles::load`], when a file has changed and cannot be read, or the list of revoked certificates has gone: those
    /// on it would be let in again.
    pub(crate) fn current(&mut self) -> Result<Arc<ServerConfig>> {
        let now = look(&self.dir);
        if now != self.seen {
            if has_list(&self.seen) && !has_list(&now) {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "TLS: {}: the list of revoked certificates is gone; put it back, or restart vold to do without",
                        self.dir.join(REVOKED).display()
                    ),
                ));
            }
            self.config = read(&self.dir, self.versions)?;
            self.seen = now;
            tracing::info!(
                dir = %self.dir.display(),
                revocation_list = has_list(&now),
                "TLS: certificates read anew"
            );
        }
        Ok(self.config.clone())
    }
}

fn look(dir: &Path) -> [Seen; FILES.len()] {
    FILES.map(|name| {
        let facts = std::fs::metadata(dir.join(name)).ok()?;
        Some((facts.modified().ok()?, facts.len()))
    })
}

/// Whether the list of revoked certificates was there.
fn has_list(seen: &[Seen; FILES.len()]) -> bool {
    let [_, _, _, revoked] = seen;
    revoked.is_some()
}

fn read(dir: &Path, versions: Versions) -> Result<Arc<ServerConfig>> {
    let invalid = |name: &str, what: &dyn std::fmt::Display| {
        Error::new(
            Kind::Invalid,
            format!("TLS: {}: {what}", dir.join(name).display()),
        )
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&dir.join(CA)).map_err(|e| invalid(CA, &e))? {
        roots.add(certificate).map_err(|e| invalid(CA, &e))?;
    }
    let chain = certificates(&dir.join(CERTIFICATE)).map_err(|e| invalid(CERTIFICATE, &e))?;
    let key = PrivateKeyDer::from_pem_file(dir.join(KEY)).map_err(|e| invalid(KEY, &e))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    // A link that leads nowhere is a list that cannot be read, and not none.
    if dir.join(REVOKED).symlink_metadata().is_ok() {
        let lists = CertificateRevocationListDer::pem_file_iter(dir.join(REVOKED))
            .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
            .map_err(|e| invalid(REVOKED, &e))?;
        if lists.is_empty() {
            return Err(invalid(REVOKED, &"there is no list in it"));
        }
        verifier = verifier.with_crls(lists).enforce_revocation_expiration();
    }
    let verifier = verifier.build().map_err(|e| invalid(CA, &e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions.supported())
        .map_err(|e| invalid(CERTIFICATE, &e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| invalid(CERTIFICATE, &e))?;
    // Every session proves its certificate anew: none is resumed over a revocation, and no early data is taken.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // Of TLS 1.2: keys are bound to the whole handshake (RFC 7627). (Its tickets are off unless a ticketer is given.)
    config.require_ems = true;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> std::result::Result<Vec<CertificateDer<'static>>, String> {
    let read =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err("there is no certificate in it".into()),
        Ok(certificates) => Ok(certificates),
        Err(e) => Err(e.to_string()),
    }
}

/// The VM that a verified certificate names: the one URI of its subject alternative name that is a VM's. `None` when there
/// is none, or more than one.
pub(crate) fn identity(certificate: &[u8]) -> Option<VmIdentity> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let mut identities = uris.filter_map(VmIdentity::from_uri);
    let identity = identities.next()?;
    identities.next().is_none().then_some(identity)
}
