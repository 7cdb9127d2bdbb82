//! `volctl tls`: a small certificate authority for people without one, in files; no daemon is asked.
//!
//! ```text
//! DIR/ca-cert.pem  ca-key.pem         the authority; its key signs, and stays here
//!     server-cert.pem server-key.pem  what vold shows: vold serve --tls-dir DIR
//!     issued.jsonl                    every certificate issued, a line each, and whether it is revoked
//!     ca-crl.pem                      the revocation list, once something was revoked
//! OUT/ca-cert.pem  client-cert.pem  client-key.pem   for one VM, as QEMU's tls-creds-x509 and libnbd want them
//! ```
//!
//! A VM's certificate names it by the URI `vold://CUSTOMER/VM`, which is all that vold reads of it. Keys are ECDSA P-256, made
//! here, readable by their owner only, and never written over.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use libvol::Kind;
use libvol::ids::Name;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason,
    RevokedCertParams, SanType, SerialNumber,
};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

use crate::Session;
use crate::failure::Failure;
use crate::render::{Human, facts};

/// Days that the authority and its revocation list are good for.
const CA_DAYS: u32 = 3650;
/// QEMU asks for the second one, though TLS 1.3 does not need it.
const KEY_USAGES: [KeyUsagePurpose; 2] = [
    KeyUsagePurpose::DigitalSignature,
    KeyUsagePurpose::KeyEncipherment,
];
/// Clocks differ: certificates are good from a little before they were made.
const EARLIER: Duration = Duration::hours(1);

/// What to do with certificates.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an authority and the server's certificate
    Init(InitArgs),
    /// Issue a VM's certificate
    Issue(IssueArgs),
    /// Revoke all certificates that a VM has been issued; vold takes notice by itself
    Revoke(Whose),
}

/// Arguments of `tls init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Directory of the authority; made when it is missing
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name or address by which VMs' hosts reach vold; may be given several times
    #[arg(long = "server", value_name = "HOST", required = true)]
    servers: Vec<String>,
    /// Days that the server's certificate is good for
    #[arg(long, default_value_t = 825)]
    days: u32,
}

/// Whose certificates, and which authority's.
#[derive(Debug, Args)]
pub(crate) struct Whose {
    /// Directory of the authority
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The VM's customer
    #[arg(long, value_name = "CUSTOMER")]
    customer: Name,
    /// The VM
    #[arg(long, value_name = "VM")]
    vm: Name,
}

/// Arguments of `tls issue`.
#[derive(Debug, Args)]
pub(crate) struct IssueArgs {
    #[command(flatten)]
    whose: Whose,
    /// Directory for the VM's certificate and key; made when it is missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Days that it is good for
    #[arg(long, default_value_t = 365)]
    days: u32,
}

/// A certificate that was issued.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Issued {
    /// Hexadecimal.
    serial: String,
    customer: Name,
    vm: Name,
    /// Seconds since 1970.
    expires_unix_seconds: i64,
    /// Seconds since 1970.
    revoked_unix_seconds: Option<i64>,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    /// Where.
    dir: String,
    /// Which files.
    files: Vec<String>,
    /// What it is good for, or what to do with it.
    note: String,
}

impl Human for Made {
    fn human(&self) -> String {
        facts(&[
            ("Directory", Some(self.dir.clone())),
            ("Files", Some(self.files.join(", "))),
            ("Next", Some(self.note.clone())),
        ])
    }
}

/// Carries it out.
pub(crate) fn run(session: &Session, command: &Command) -> Result<(), Failure> {
    let made = match command {
        Command::Init(args) => init(args),
        Command::Issue(args) => issue(args),
        Command::Revoke(args) => revoke(args),
    };
    session.show(&made?)
}

fn init(args: &InitArgs) -> Result<Made, Failure> {
    let dir = &args.dir;
    let files = ["ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem"];
    make_dir(dir)?;
    check_absent(dir, &files)?;
    let mut params = params(CA_DAYS, "vold certificate authority")?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_key = new_key()?;
    let ca_cert = params.self_signed(&ca_key).map_err(failed)?;
    let mut server = CertificateParams::new(args.servers.clone()).map_err(failed)?;
    dated(&mut server, args.days)?;
    server.distinguished_name = named("vold");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.key_usages = KEY_USAGES.to_vec();
    let server_key = new_key()?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let server_cert = server.signed_by(&server_key, &issuer).map_err(failed)?;
    write_new(&dir.join(files[0]), &ca_cert.pem(), 0o644)?;
    write_new(&dir.join(files[1]), &ca_key.serialize_pem(), 0o600)?;
    write_new(&dir.join(files[2]), &server_cert.pem(), 0o644)?;
    write_new(&dir.join(files[3]), &server_key.serialize_pem(), 0o600)?;
    let shown = dir.display();
    Ok(Made {
        dir: shown.to_string(),
        files: files.map(String::from).to_vec(),
        note: format!(
            "vold serve --listen ADDRESS:10809 --tls-dir {shown}; volctl tls issue --dir {shown} --customer C --vm VM --out DIR"
        ),
    })
}

fn issue(args: &IssueArgs) -> Result<Made, Failure> {
    let files = ["ca-cert.pem", "client-cert.pem", "client-key.pem"];
    make_dir(&args.out)?;
    check_absent(&args.out, &files[1..])?;
    let Whose { dir, customer, vm } = &args.whose;
    let (ca_cert, issuer) = authority(dir)?;
    let uri = format!("vold://{customer}/{vm}");
    let mut client = params(args.days, &format!("{customer}/{vm}"))?;
    client.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(failed)?)];
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    client.key_usages = KEY_USAGES.to_vec();
    let key = new_key()?;
    let cert = client.signed_by(&key, &issuer).map_err(failed)?;
    // Written down first: what is in nobody's list cannot be revoked.
    let _alone = lock(dir)?;
    let serial = client.serial_number.as_ref().map(SerialNumber::to_bytes);
    let mut list = issued(dir)?;
    list.push(Issued {
        serial: hex(&serial.unwrap_or_default()),
        customer: customer.clone(),
        vm: vm.clone(),
        expires_unix_seconds: client.not_after.unix_timestamp(),
        revoked_unix_seconds: None,
    });
    put_issued(dir, &list)?;
    write_over(&args.out.join(files[0]), &ca_cert, 0o644)?;
    write_new(&args.out.join(files[1]), &cert.pem(), 0o644)?;
    write_new(&args.out.join(files[2]), &key.serialize_pem(), 0o600)?;
    Ok(Made {
        dir: args.out.display().to_string(),
        files: files.map(String::from).to_vec(),
        note: format!(
            "good for {} days as {uri}; give the directory to QEMU (-object tls-creds-x509,dir=…,endpoint=client) on that VM's host only",
            args.days
        ),
    })
}

fn revoke(args: &Whose) -> Result<Made, Failure> {
    let (_, issuer) = authority(&args.dir)?;
    let _alone = lock(&args.dir)?;
    let now = OffsetDateTime::now_utc();
    let mut list = issued(&args.dir)?;
    let (mut count, mut already) = (0, 0);
    for entry in &mut list {
        if entry.customer != args.customer || entry.vm != args.vm {
            continue;
        }
        match entry.revoked_unix_seconds {
            Some(_) => already += 1,
            None => {
                entry.revoked_unix_seconds = Some(now.unix_timestamp());
                count += 1;
            }
        }
    }
    let name = format!("{}/{}", args.customer, args.vm);
    if count + already == 0 {
        return Err(Failure::new(
            Kind::NotFound,
            format!("VM {name} has no certificate of this authority"),
        ));
    }
    let params = CertificateRevocationListParams {
        this_update: now - EARLIER,
        next_update: now + Duration::days(CA_DAYS.into()),
        crl_number: SerialNumber::from_slice(&now.unix_timestamp().to_be_bytes()),
        issuing_distribution_point: None,
        revoked_certs: list
            .iter()
            .filter_map(|entry| Some(revoked(entry, entry.revoked_unix_seconds?)))
            .collect::<Result<_, _>>()?,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = params
        .signed_by(&issuer)
        .and_then(|crl| crl.pem())
        .map_err(failed)?;
    // In this order: what is in no list of revoked certificates yet is put there by revoking again.
    put_issued(&args.dir, &list)?;
    write_over(&args.dir.join("ca-crl.pem"), &crl, 0o644)?;
    Ok(Made {
        dir: args.dir.display().to_string(),
        files: vec!["ca-crl.pem".into()],
        note: format!(
            "{count} certificate{} of {name} revoked{}; connections that are open go on: volctl detach ends them",
            if count == 1 { "" } else { "s" },
            match already {
                0 => String::new(),
                already => format!(", {already} before"),
            }
        ),
    })
}

fn revoked(entry: &Issued, unix_seconds: i64) -> Result<RevokedCertParams, Failure> {
    let unusable = || {
        let text = format!(
            "issued.jsonl: the entry of {}/{} with serial {:?} cannot be understood; mend it first: its certificate would stay good",
            entry.customer, entry.vm, entry.serial
        );
        Failure::new(Kind::Damaged, text)
    };
    let serial = unhex(&entry.serial).ok_or_else(unusable)?;
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial),
        revocation_time: OffsetDateTime::from_unix_timestamp(unix_seconds).map_err(|_| unusable())?,
        reason_code: Some(RevocationReason::CessationOfOperation),
        invalidity_date: None,
    })
}

/// Nobody else changes the authority's files as long as the value lives.
fn lock(dir: &Path) -> Result<std::fs::File, Failure> {
    let held = std::fs::File::open(dir).and_then(|dir| dir.lock().map(|()| dir));
    held.map_err(|e| unusable(dir, &e))
}

/// The authority's certificate, and itself, to sign with.
fn authority(dir: &Path) -> Result<(String, Issuer<'static, KeyPair>), Failure> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(&path).map_err(|e| {
            let text = format!(
                "{}: {e}; is this an authority's directory? volctl tls init makes one",
                path.display()
            );
            Failure::new(Kind::NotFound, text)
        })
    };
    let (cert, key) = (read("ca-cert.pem")?, read("ca-key.pem")?);
    let key = KeyPair::from_pem(&key).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(&cert, key).map_err(failed)?;
    Ok((cert, issuer))
}

fn issued(dir: &Path) -> Result<Vec<Issued>, Failure> {
    let path = dir.join("issued.jsonl");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unusable(&path, &e)),
    };
    text.lines()
        .map(|line| serde_json::from_str(line).map_err(|e| unusable(&path, &e)))
        .collect()
}

fn put_issued(dir: &Path, list: &[Issued]) -> Result<(), Failure> {
    let lines: Result<Vec<String>, _> = list.iter().map(serde_json::to_string).collect();
    let mut text = lines.map_err(failed)?.join("\n");
    text.push('\n');
    write_over(&dir.join("issued.jsonl"), &text, 0o600)
}

fn params(days: u32, name: &str) -> Result<CertificateParams, Failure> {
    let mut params = CertificateParams::default();
    dated(&mut params, days)?;
    params.distinguished_name = named(name);
    Ok(params)
}

fn dated(params: &mut CertificateParams, days: u32) -> Result<(), Failure> {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - EARLIER;
    let end = now.checked_add(Duration::days(days.into()));
    params.not_after = end.ok_or_else(|| Failure::new(Kind::Invalid, format!("{days} days: too long")))?;
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(failed)?;
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.use_authority_key_identifier_extension = true;
    Ok(())
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn new_key() -> Result<KeyPair, Failure> {
    KeyPair::generate().map_err(failed)
}

fn make_dir(dir: &Path) -> Result<(), Failure> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| unusable(dir, &e))
}

/// # Errors
/// `Exists` with the first that is there.
fn check_absent(dir: &Path, files: &[&str]) -> Result<(), Failure> {
    let paths = files.iter().map(|name| dir.join(name));
    match paths.into_iter().find(|path| path.exists()) {
        None => Ok(()),
        Some(there) => Err(Failure::new(
            Kind::Exists,
            format!(
                "{}: there is one already, and it is never written over; use another directory",
                there.display()
            ),
        )),
    }
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|e| unusable(path, &e))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|e| unusable(path, &e))
}

/// Whole, or as it was.
fn write_over(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let beside = path.with_extension("new");
    let _ = std::fs::remove_file(&beside);
    write_new(&beside, text, mode)?;
    std::fs::rename(&beside, path).map_err(|e| unusable(path, &e))
}

fn unusable(path: &Path, e: &dyn std::fmt::Display) -> Failure {
    Failure::new(Kind::Io, format!("{}: {e}", path.display()))
}

fn failed(e: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Invalid, format!("certificates: {e}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks_exact(2);
    pairs
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
