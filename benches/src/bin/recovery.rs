//! `make bench-recovery`: how long a volume of two replicas is away after a crash with every mark of its stores taken, and how
//! fast it reconciles.
//!
//! Recovery is held against what fio reads from one of the same store files in the same run: it reads both replicas whole.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use vold_benches::load::{Duration, FILL, LOADS, Target, Transport, run};
use vold_benches::server::Vold;
use vold_tests::nbd::Client;
use vold_tests::wait_for;

const MIB: u64 = 1 << 20;

/// Measure recovery after a crash
#[derive(Debug, Parser)]
struct Args {
    /// Extents of the volume, all of them marked when the daemon dies; a store has 8192 marks
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u64).range(16..=8192))]
    extents: u64,
    /// MiB of an extent
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    extent_size: u64,
    /// Directory on the disk to measure; twice the volume, and an eighth, is used for the time of the run
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Exit with status 1 when a figure misses what is promised: first I/O within 1 s, 0.8 of fio's rate
    #[arg(long)]
    check_floors: bool,
}

fn main() -> ExitCode {
    match measure(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("recovery: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Result<bool> {
    let dir = tempfile::Builder::new()
        .prefix("vold-recovery-")
        .tempdir_in(&args.dir)?;
    let extent = args.extent_size * MIB;
    let size = args.extents * extent;
    let mut vold = Vold::start_with(dir.path(), size + size / 8 + 64 * MIB, extent, &[])?;
    let target = vold.volume("v", size, 2, Transport::Nbd)?;
    run(FILL, &target, size, Duration::Once, None, dir.path())?;
    let Target::Nbd(uri) = &target else {
        unreachable!("a volume is an NBD export")
    };
    let met = recovery(&mut vold, uri, args.extents, extent, dir.path())?;
    Ok(met || !args.check_floors)
}

/// Every extent is written somewhere, then the daemon is killed.
fn recovery(vold: &mut Vold, uri: &str, extents: u64, extent_bytes: u64, scratch: &Path) -> Result<bool> {
    let mut client = Client::connect(uri);
    for extent in 0..extents {
        client
            .write(
                extent * extent_bytes + extent % (extent_bytes / 4096) * 4096,
                &[extent as u8; 4096],
            )
            .map_err(|e| anyhow::anyhow!("a write is refused: error {e}"))?;
    }
    let store = Target::File(vold.store("a"));
    let read = LOADS
        .iter()
        .find(|load| load.name.starts_with("1M read"))
        .context("a load")?;
    let mut disk = None;
    vold.kill_and_start(|| {
        disk = Some(run(
            *read,
            &store,
            extents * extent_bytes,
            Duration::Seconds(4),
            None,
            scratch,
        )?);
        Ok(())
    })?;
    let started = Instant::now();
    vold.wait_until_ready()?;
    let ready = started.elapsed();
    // Far from where recovery begins.
    Client::connect(uri)
        .read((extents - 1) * extent_bytes, 4096)
        .map_err(|e| anyhow::anyhow!("a read is refused: error {e}"))?;
    let first = started.elapsed();
    wait_for("everything is reconciled", || {
        let shown = vold.volctl("volume show bench/v").ok()?;
        (shown["recovering_extents"] == 0).then_some(())
    });
    let all = started.elapsed();
    let marked = vold
        .log()?
        .lines()
        .filter(|line| line.contains("reconciling extents"))
        .find_map(|line| {
            line.split("extents=")
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
        .context("the daemon says how many extents it reconciles")?;
    let rate = (2 * marked * extent_bytes) as f64 / 1e6 / (all - ready).as_secs_f64();
    let disk = disk.context("measured")?.mb_per_s;
    println!(
        "recovery: {marked} of {extents} extents marked, 2 replicas ({} MiB to read): ready after {:.2} s, first read after {:.2} s, all after {:.2} s",
        2 * marked * extent_bytes / MIB,
        ready.as_secs_f64(),
        first.as_secs_f64(),
        all.as_secs_f64()
    );
    println!(
        "recovery: {rate:.0} MB/s, fio reads {disk:.0} MB/s from one of the stores: {:.2}",
        rate / disk
    );
    Ok(first.as_secs_f64() < 1.0 && rate >= 0.8 * disk)
}
