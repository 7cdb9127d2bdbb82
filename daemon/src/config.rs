//! What the daemon runs with: the configuration file, overridden by flags. Unknown keys are refused, because a misspelt
//! setting that is silently ignored is worse than a daemon that does not start.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libvol::disk::{Engine, EngineChoice};
use libvol::limits::{BLOCK, BUSY_POLL_DEFAULT, BUSY_POLL_MAX, RESYNC_BYTES_PER_SECOND_DEFAULT};
use libvol::{Error, Kind, Result};
use serde::Deserialize;

use crate::args::Serve;
use crate::operations::{ScrubSettings, Settings};

/// Data-plane threads a daemon may have; each is one core's worth of work.
const SHARDS_MAX: u16 = 64;
/// Longest period of the integrity scrub: what is damaged for a year has lost its good copy, too.
const SCRUB_DAYS_MAX: u32 = 365;

/// The I/O engine, as people write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum IoEngine {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring or fail.
    Uring,
    /// The thread pool.
    Threads,
}

impl From<IoEngine> for EngineChoice {
    fn from(engine: IoEngine) -> Self {
        match engine {
            IoEngine::Auto => EngineChoice::Auto,
            IoEngine::Uring => EngineChoice::Uring,
            IoEngine::Threads => EngineChoice::Threads,
        }
    }
}

/// The configuration file: every key is optional.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    io_engine: Option<IoEngine>,
    busy_poll_us: Option<u32>,
    shards: Option<u16>,
    log: Option<String>,
    #[serde(default)]
    scrub: Scrub,
    #[serde(default)]
    resync: Resync,
    #[serde(default)]
    nbd: Nbd,
}

/// The table `[nbd]`: serving over TCP.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nbd {
    #[serde(default)]
    listen: Vec<String>,
    tls_dir: Option<PathBuf>,
    #[serde(default)]
    tls_1_2: bool,
}

/// NBD over TCP, under TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tcp {
    /// Addresses to listen on, beside sockets that the service manager passes.
    pub(crate) listen: Vec<SocketAddr>,
    /// Where certificates and keys are.
    pub(crate) tls_dir: Option<PathBuf>,
    /// Whether TLS 1.2 is taken as well as 1.3.
    pub(crate) tls_1_2: bool,
}

impl Tcp {
    fn of(args: &crate::args::Tcp, file: Nbd) -> Result<Self> {
        let listen = match args.listen.is_empty() {
            true => file.listen,
            false => args.listen.clone(),
        };
        let tcp = Self {
            listen: listen.iter().map(|text| address(text)).collect::<Result<_>>()?,
            tls_dir: args.tls_dir.clone().or(file.tls_dir),
            tls_1_2: args.tls_1_2 || file.tls_1_2,
        };
        if tcp.tls_dir.is_none() && !tcp.listen.is_empty() {
            return Err(Error::invalid(
                "NBD over TCP needs TLS: give --tls-dir (or nbd.tls_dir); volctl tls init makes what has to be in it",
            ));
        }
        Ok(tcp)
    }
}

fn address(text: &str) -> Result<SocketAddr> {
    if text.starts_with('@') || text.contains('/') {
        return Err(Error::invalid(format!(
            "listen address {text:?}: only ADDRESS:PORT; Unix sockets are made for each attachment, and abstract ones never, since anybody could take the name"
        )));
    }
    text.parse().map_err(|_| {
        Error::invalid(format!(
            "listen address {text:?}: write it as 192.0.2.7:10809 or [::]:10809"
        ))
    })
}

/// The table `[scrub]`: every key is optional.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scrub {
    pass_days: Option<u32>,
    bytes_per_second: Option<u64>,
}

impl Scrub {
    fn settings(&self) -> ScrubSettings {
        let days = |days: u32| Duration::from_secs(u64::from(days) * 86_400);
        ScrubSettings {
            period: match self.pass_days {
                None => ScrubSettings::default().period,
                Some(0) => None,
                Some(pass) => Some(days(pass)),
            },
            bytes_per_second: self.bytes_per_second,
        }
    }
}

/// The table `[resync]`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resync {
    bytes_per_second: Option<u64>,
}

/// The file's keys, for the refusal of others. A test holds it to [`File`].
const KEYS: [&str; 7] = [
    "io_engine",
    "busy_poll_us",
    "shards",
    "log",
    "scrub",
    "resync",
    "nbd",
];

/// Settings in force.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// I/O engine.
    pub(crate) engine: Engine,
    /// Data-plane threads.
    pub(crate) shards: usize,
    /// Log filter, as `info` or `vold=debug,libvol=info`.
    pub(crate) log: String,
    /// How fast the background works.
    pub(crate) settings: Settings,
    /// NBD over TCP.
    pub(crate) tcp: Tcp,
}

impl Config {
    /// From the file, if one is named, and the flags.
    ///
    /// # Errors
    /// `Invalid` with the file, the line and the key.
    pub(crate) fn load(args: &Serve) -> Result<Self> {
        let file = match &args.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| {
                    Error::with_source(
                        Kind::Invalid,
                        format!("configuration file {}: cannot be read", path.display()),
                        e,
                    )
                })?;
                parse(path, &text)?
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            tcp: Tcp::of(&args.tcp, file.nbd)?,
            engine: Engine {
                choice: args.io_engine.or(file.io_engine).unwrap_or_default().into(),
                busy_poll: file
                    .busy_poll_us
                    .map_or(BUSY_POLL_DEFAULT, |us| Duration::from_micros(us.into())),
            },
            shards: args
                .shards
                .or(file.shards)
                .map_or_else(|| default_shards(cores), usize::from),
            log: std::env::var("VOLD_LOG")
                .ok()
                .or(file.log)
                .unwrap_or_else(|| "info".into()),
            settings: Settings {
                scrub: file.scrub.settings(),
                resync_bytes_per_second: file
                    .resync
                    .bytes_per_second
                    .unwrap_or(RESYNC_BYTES_PER_SECOND_DEFAULT),
            },
        })
    }
}

/// Half of the cores, because the VMs that a shard serves need the others; one up to two cores, since a second shard would
/// take turns with the first and with the clients; at most eight, each good for some 300,000 requests a second.
fn default_shards(cores: usize) -> usize {
    (cores / 2).clamp(1, 8)
}

fn parse(path: &Path, text: &str) -> Result<File> {
    let path = path.display();
    let invalid = |what: String| Error::invalid(format!("configuration file {path}: {what}"));
    let table: toml::Table = toml::from_str(text).map_err(|e| invalid(located(text, &e)))?;
    if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(invalid(format!(
            "unknown key {key:?}; the keys are {}",
            KEYS.join(", ")
        )));
    }
    let file: File = toml::from_str(text).map_err(|e| invalid(located(text, &e)))?;
    if let Some(shards) = file.shards
        && !(1..=SHARDS_MAX).contains(&shards)
    {
        return Err(invalid(format!("shards = {shards}; use 1 to {SHARDS_MAX}")));
    }
    if let Some(us) = file.busy_poll_us
        && Duration::from_micros(us.into()) > BUSY_POLL_MAX
    {
        return Err(invalid(format!(
            "busy_poll_us = {us}; use 0 (never) to {}",
            BUSY_POLL_MAX.as_micros()
        )));
    }
    if let Some(days) = file.scrub.pass_days
        && days > SCRUB_DAYS_MAX
    {
        return Err(invalid(format!(
            "scrub.pass_days = {days}; use 1 to {SCRUB_DAYS_MAX}, or 0 for none but what is asked for"
        )));
    }
    if let Some(rate) = file.scrub.bytes_per_second
        && rate < BLOCK
    {
        return Err(invalid(format!(
            "scrub.bytes_per_second = {rate}; use {BLOCK} or more, or pass_days = 0 for none but what is asked for"
        )));
    }
    if let Some(rate) = file.resync.bytes_per_second
        && rate < BLOCK
    {
        return Err(invalid(format!(
            "resync.bytes_per_second = {rate}; use {BLOCK} or more"
        )));
    }
    Ok(file)
}

/// The error on one line, with the number of the line it is about.
fn located(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
            format!("line {line}: {message}")
        }
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let error = parse(Path::new("/etc/vold.toml"), text).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        let line = error.to_string();
        assert!(!line.contains('\n'), "one line: {line}");
        assert!(line.contains("/etc/vold.toml"), "names the file: {line}");
        line
    }

    #[test]
    fn every_key_is_optional_and_known() {
        let path = Path::new("f");
        assert_eq!(parse(path, "").unwrap(), File::default());
        let all = "io_engine = \"threads\"\nbusy_poll_us = 50\nshards = 3\nlog = \"debug\"\n\
            [scrub]\npass_days = 7\nbytes_per_second = 5000000\n[resync]\nbytes_per_second = 9000000\n\
            [nbd]\nlisten = [\"[::]:10809\"]\ntls_dir = \"/etc/vold/tls\"\ntls_1_2 = true\n";
        let file = parse(path, all).unwrap();
        assert_eq!(
            (file.io_engine, file.busy_poll_us),
            (Some(IoEngine::Threads), Some(50))
        );
        assert_eq!((file.shards, file.log.as_deref()), (Some(3), Some("debug")));
        let scrub = ScrubSettings {
            period: Some(Duration::from_secs(7 * 86_400)),
            bytes_per_second: Some(5_000_000),
        };
        assert_eq!(file.scrub.settings(), scrub);
        assert_eq!(file.resync.bytes_per_second, Some(9_000_000));
        assert_eq!(
            (file.nbd.listen.len(), file.nbd.tls_dir.clone(), file.nbd.tls_1_2),
            (1, Some("/etc/vold/tls".into()), true)
        );
        assert!(refusal("[resync]\nbytes_per_second = 1\n").contains("4096 or more"));
        let written: toml::Table = toml::from_str(all).unwrap();
        assert!(
            KEYS.iter().all(|key| written.contains_key(*key)),
            "the test writes every key"
        );
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let line = refusal("shards = 2\nshard_count = 4\n");
        assert!(
            line.contains("\"shard_count\"") && line.contains("io_engine"),
            "{line}"
        );
        let line = refusal("[vhost]\nport = 1\n");
        assert!(line.contains("\"vhost\""), "{line}");
        let line = refusal("[nbd]\nport = 1\n");
        assert!(line.contains("line 2") && line.contains("port"), "{line}");
        let line = refusal("[scrub]\ndays = 1\n");
        assert!(line.contains("line 2") && line.contains("days"), "{line}");
    }

    #[test]
    fn the_scrub_takes_14_days_unless_told_otherwise() {
        let of = |text| parse(Path::new("f"), text).unwrap().scrub.settings();
        assert_eq!(of(""), ScrubSettings::default());
        assert_eq!(of("[scrub]\n"), ScrubSettings::default());
        assert_eq!(of("[scrub]\npass_days = 0\n").period, None);
        let fixed = of("[scrub]\nbytes_per_second = 4096\n");
        assert_eq!(fixed.period, ScrubSettings::default().period);
        assert_eq!(fixed.bytes_per_second, Some(4096));
        assert!(refusal("[scrub]\npass_days = 366\n").contains("1 to 365"));
        assert!(refusal("[scrub]\nbytes_per_second = 4095\n").contains("4096 or more"));
        assert!(refusal("[scrub]\npass_days = -1\n").contains("line 2"));
        assert!(refusal("scrub = 3\n").contains("line 1"));
    }

    #[test]
    fn a_bad_value_or_bad_syntax_names_the_line() {
        assert!(refusal("\nio_engine = \"spdk\"\n").contains("line 2"));
        assert!(refusal("shards = \"two\"\n").contains("line 1"));
        assert!(refusal("\n\nshards = = 2\n").contains("line 3"));
        assert!(refusal("shards = 0\n").contains("1 to 64"));
        assert!(refusal("shards = 65\n").contains("1 to 64"));
        assert!(refusal("busy_poll_us = 1001\n").contains("0 (never) to 1000"));
        assert!(refusal("busy_poll_us = -1\n").contains("line 1"));
    }

    #[test]
    fn half_of_the_cores_serve() {
        let defaults: Vec<usize> = [1, 2, 3, 4, 8, 16, 64].into_iter().map(default_shards).collect();
        assert_eq!(defaults, [1, 1, 1, 2, 4, 8, 8]);
    }

    #[test]
    fn flags_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vold.toml");
        std::fs::write(&path, "io_engine = \"uring\"\nshards = 3\n").unwrap();
        let mut args = Serve {
            data_dir: "/x".into(),
            config: Some(path),
            io_engine: None,
            shards: None,
            tcp: crate::args::Tcp::default(),
        };
        let config = Config::load(&args).unwrap();
        assert_eq!((config.engine, config.shards), (EngineChoice::Uring.into(), 3));
        args.io_engine = Some(IoEngine::Threads);
        args.shards = Some(1);
        let config = Config::load(&args).unwrap();
        assert_eq!((config.engine, config.shards), (EngineChoice::Threads.into(), 1));
    }
}
