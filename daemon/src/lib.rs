//! The daemon's rooms. The binary only calls [`main`]; what else is public is for the fuzz targets in `tests/fuzz`, and is
//! there only when they are built.

mod api;
mod args;
mod check;
mod clear_fault;
mod config;
mod data_dir;
mod depth;
mod device;
mod leavings;
mod nbd;
mod operations;
mod passed;
mod process;
mod rebuild;
mod seldom;
mod serve;
mod shard;
mod vhost;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

// Rules are broken on purpose in builds for one test, and in no daemon.
const _: () = assert!(
    !libvol::sabotage::BUILT_IN,
    "vold must not be built with libvol's feature `sabotage`"
);

/// The whole program: command line, then the command.
pub fn main() -> ExitCode {
    // Wrong usage ends here, with status 2 and the usage on stderr.
    let args = Args::parse();
    let result = process::harden().and_then(|()| match args.command {
        Command::Serve(serve) => serve::run(&serve).map(|()| ExitCode::SUCCESS),
        Command::Check(check) => check::run(&check.data_dir, check.scope(), check.repair),
        Command::RebuildCatalog(rebuild) => rebuild::run(&rebuild).map(|()| ExitCode::SUCCESS),
        Command::ClearFault(clear) => clear_fault::run(&clear).map(|()| ExitCode::SUCCESS),
    });
    result.unwrap_or_else(|e| {
        eprintln!("vold: {e}");
        ExitCode::FAILURE
    })
}
