//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use libvol::ids::Name;
use libvol::store::CheckScope;

use crate::config::IoEngine;

/// Serves encrypted, mirrored volumes to virtual machines.
#[derive(Debug, Parser)]
#[command(name = "vold", version, about)]
pub(crate) struct Args {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon.
    Serve(Serve),
    /// Check catalog, stores and replicas of a stopped daemon; exit 1 when anything is damaged.
    Check(Check),
    /// Make a new catalog from the stores and the keystore, after the old one was lost or damaged.
    RebuildCatalog(RebuildCatalog),
    /// Let a stopped daemon use a store again whose device failed, or that is an old copy, after you have looked at it.
    ClearFault(ClearFault),
}

/// `vold serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// Directory of catalog, keys and sockets; made when it is missing.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// Configuration file (TOML); flags override it.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// I/O engine.
    #[arg(long, value_enum)]
    pub(crate) io_engine: Option<IoEngine>,
    /// Data-plane threads.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) shards: Option<u16>,
    /// NBD over TCP.
    #[command(flatten)]
    pub(crate) tcp: Tcp,
}

/// Serving NBD over TCP.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Tcp {
    /// Serve NBD over TLS on this address, as 192.0.2.7:10809 or [::]:10809; may be given several times.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Vec<String>,
    /// Directory of ca-cert.pem, server-cert.pem, server-key.pem and, if certificates were revoked, ca-crl.pem.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Take TLS 1.2 as well as 1.3, for nbd-client, which knows no other; its certificate is then readable on the way.
    #[arg(long)]
    pub(crate) tls_1_2: bool,
}

/// `vold check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// Directory of the stopped daemon.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// Skip the free extents, which should hold zeros.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Repair what can be repaired, and check again; exit 1 when damage is left.
    #[arg(long)]
    pub(crate) repair: bool,
}

/// `vold rebuild-catalog`.
#[derive(Debug, clap::Args)]
pub(crate) struct RebuildCatalog {
    /// Directory of the stopped daemon; its keys must be in it.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// File or device of a store; give every store of the installation.
    #[arg(long = "store", value_name = "PATH", required = true, num_args = 1..)]
    pub(crate) stores: Vec<PathBuf>,
    /// Go on without the volumes and replicas that cannot be had any more; they are listed.
    #[arg(long)]
    pub(crate) accept_loss: bool,
}

/// `vold clear-fault`.
#[derive(Debug, clap::Args)]
pub(crate) struct ClearFault {
    /// Directory of the stopped daemon.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// The store's name.
    #[arg(long, value_name = "NAME")]
    pub(crate) store: Name,
}

impl Check {
    /// How much to read.
    pub(crate) fn scope(&self) -> CheckScope {
        if self.quick {
            CheckScope::Quick
        } else {
            CheckScope::Full
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_status_2() {
        for wrong in [
            &["vold"][..],
            &["vold", "serve"],
            &["vold", "serve", "--data-dir", "/x", "--shards", "0"],
            &["vold", "serve", "--data-dir", "/x", "--io-engine", "spdk"],
            &["vold", "check"],
            &["vold", "rebuild-catalog", "--data-dir", "/x"],
            &["vold", "rebuild-catalog", "--data-dir", "/x", "--store"],
            &["vold", "mend"],
        ] {
            let error = Args::try_parse_from(wrong).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong:?}");
        }
    }
}
