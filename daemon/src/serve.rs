//! `vold serve`: from an unlocked directory to a daemon that answers, and back to a clean stop.

use std::io::Write;
use std::sync::Arc;

use libvol::catalog::Catalog;
use libvol::keys::{KeyService, LocalKeystore};
use libvol::{Error, Kind, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::api;
use crate::args::Serve;
use crate::config::Config;
use crate::data_dir::DataDir;
use crate::operations::Operations;
use crate::passed;
use crate::process;
use crate::shard::Bound;

/// Threads of the control plane: requests are few and short, and the shards need the cores.
const CONTROL_THREADS: usize = 2;

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// What it cannot start without: configuration, directory, catalog, keys, engine, API socket.
pub(crate) fn run(args: &Serve) -> Result<()> {
    let config = Config::load(args)?;
    start_log(&config.log)?;
    process::raise_limits();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|e| Error::with_source(Kind::Io, "the control plane cannot start", e))?;
    runtime.block_on(serve(args, &config))
}

async fn serve(args: &Serve, config: &Config) -> Result<()> {
    // From here on a signal waits for its turn, so that a stop during the start is a clean one too.
    let mut stop = StopSignal::listen()?;
    // A limit on file sizes is an error of the store it hits, not the end of all others.
    let _caught = listen_for(SignalKind::from_raw(SIGXFSZ))?;
    let dirs = DataDir::take(&args.data_dir)?;
    let mut bound = Bound::bind(&config.tcp.listen)?;
    let (tcp, doors) = passed::take()?;
    bound.add(tcp);
    let api_socket = dirs.api_socket();
    dirs.check_catalog_not_lost()?;
    let catalog = Catalog::open(&dirs.catalog())?;
    let keys = LocalKeystore::open_or_create(&dirs.keys())?;
    for finding in keys.findings() {
        tracing::warn!("keystore: {finding}");
    }
    let keys: Arc<dyn KeyService> = Arc::new(keys);
    let operations = Operations::start(
        dirs,
        catalog,
        keys,
        config.shards,
        config.engine,
        config.settings.clone(),
        doors,
    )
    .await?;
    let server = api::Server::bind(&api_socket, operations.clone())?;
    if let Some(addresses) = operations.listen(bound, &config.tcp, config.engine).await? {
        let versions = if config.tcp.tls_1_2 { "1.2 and 1.3" } else { "1.3" };
        tracing::info!("nbd: over TLS {versions} on {addresses}");
    }
    announce(&format!(
        "vold {} ready: api {}, {} stores, engine {}",
        env!("CARGO_PKG_VERSION"),
        api_socket.display(),
        operations.store_count(),
        operations.version().io_engine
    ));
    let name = server.run_until(stop.wait()).await;
    tracing::info!("{name}: stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    operations.stop().await;
    tracing::info!("stopped");
    Ok(())
}

/// Standard output's one line, and systemd.
fn announce(line: &str) {
    let mut out = std::io::stdout().lock();
    // Whoever started the daemon may have closed the pipe; it serves all the same.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    tracing::info!("{line}");
    notify(&[sd_notify::NotifyState::Ready]);
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        tracing::warn!("systemd cannot be notified: {e}");
    }
}

fn start_log(filter: &str) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|e| Error::with_source(Kind::Invalid, format!("log filter {filter:?}"), e))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    Ok(())
}

/// A write beyond RLIMIT_FSIZE; the number on every Linux architecture but MIPS.
const SIGXFSZ: i32 = 25;

fn listen_for(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|e| Error::with_source(Kind::Io, "signals cannot be listened for", e))
}

/// SIGTERM or SIGINT.
struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    fn listen() -> Result<Self> {
        Ok(Self {
            terminate: listen_for(SignalKind::terminate())?,
            interrupt: listen_for(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
