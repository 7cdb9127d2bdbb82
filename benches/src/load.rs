//! The loads, run by fio: its nbd engine against a server's socket, io_uring against a raw file. Over vhost-user-blk, for which
//! fio has no engine, [`crate::vhost`] runs them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vold_tests::tools::{output, texts, tool};

use crate::figures::Sample;
use crate::server::CpuClock;
use crate::vhost;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Its name.
    pub name: &'static str,
    /// fio's `rw`.
    pub rw: &'static str,
    /// Request size in bytes.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// The least ratio of vold with one replica to qemu-storage-daemon on a raw image, median over the rounds, over NBD;
    /// none where nothing is promised.
    pub floor_nbd: Option<f64>,
    /// The same over vhost-user-blk.
    pub floor_vhost: Option<f64>,
}

impl Load {
    /// What is promised over a transport.
    pub fn floor(&self, transport: Transport) -> Option<f64> {
        match transport {
            Transport::Nbd => self.floor_nbd,
            Transport::VhostUser => self.floor_vhost,
        }
    }
}

/// How client and server speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// NBD over a Unix socket.
    Nbd,
    /// vhost-user-blk.
    VhostUser,
}

impl Transport {
    /// As `volctl attach --via` has it.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Nbd => "nbd",
            Transport::VhostUser => "vhost-user",
        }
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// All rows: the random 4 KiB loads of databases and boot disks, deep and alone; the streams of copies.
pub const LOADS: [Load; 6] = [
    Load {
        name: "4k randread d32",
        rw: "randread",
        block_bytes: 4 * KIB,
        depth: 32,
        floor_nbd: Some(1.2),
        floor_vhost: Some(1.0),
    },
    Load {
        name: "4k randwrite d32",
        rw: "randwrite",
        block_bytes: 4 * KIB,
        depth: 32,
        floor_nbd: Some(1.3),
        floor_vhost: Some(1.0),
    },
    Load {
        name: "4k randread d1",
        rw: "randread",
        block_bytes: 4 * KIB,
        depth: 1,
        floor_nbd: Some(0.95),
        floor_vhost: None,
    },
    Load {
        name: "4k randwrite d1",
        rw: "randwrite",
        block_bytes: 4 * KIB,
        depth: 1,
        floor_nbd: None,
        floor_vhost: None,
    },
    Load {
        name: "1M read d8",
        rw: "read",
        block_bytes: MIB,
        depth: 8,
        floor_nbd: None,
        floor_vhost: None,
    },
    Load {
        name: "1M write d8",
        rw: "write",
        block_bytes: MIB,
        depth: 8,
        floor_nbd: Some(1.4),
        floor_vhost: None,
    },
];

/// Writes everything once, from first to last byte.
pub const FILL: Load = Load {
    name: "first write, 1M d8",
    rw: "write",
    block_bytes: MIB,
    depth: 8,
    floor_nbd: None,
    floor_vhost: None,
};

/// Where the load goes.
#[derive(Clone, Debug)]
pub enum Target {
    /// An NBD export.
    Nbd(String),
    /// The socket of a vhost-user-blk device.
    VhostUser(std::path::PathBuf),
    /// A file, around all servers.
    File(std::path::PathBuf),
}

/// How long to run.
#[derive(Clone, Copy, Debug)]
pub enum Duration {
    /// Seconds.
    Seconds(u32),
    /// Until every byte has been touched once.
    Once,
}

/// Runs a load; `clock` is that of the server's process.
///
/// # Errors
/// The client's, with what it said.
pub fn run(
    load: Load,
    target: &Target,
    size_bytes: u64,
    duration: Duration,
    clock: Option<&CpuClock>,
    scratch: &Path,
) -> Result<Sample> {
    let mut fio = tool("fio");
    fio.current_dir(scratch).args([
        "--name=load",
        "--output-format=json",
        "--randrepeat=0",
        "--norandommap",
        "--group_reporting",
    ]);
    match target {
        Target::Nbd(uri) => fio.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        Target::VhostUser(socket) => return vhost::run(load, socket, size_bytes, duration, clock),
        Target::File(path) => fio
            .args(["--ioengine=io_uring", "--direct=1"])
            .arg(format!("--filename={}", path.display())),
    };
    fio.arg(format!("--rw={}", load.rw))
        .arg(format!("--bs={}", load.block_bytes))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--size={size_bytes}"));
    match duration {
        Duration::Seconds(seconds) => {
            fio.args(["--time_based".into(), format!("--runtime={seconds}")]);
        }
        Duration::Once => {
            fio.args(["--refill_buffers", "--end_fsync=1"]);
        }
    }
    let before = clock.map(CpuClock::seconds).transpose()?;
    let output = output(&mut fio);
    let after = clock.map(CpuClock::seconds).transpose()?;
    let (out, err) = texts(&output);
    if !output.status.success() {
        bail!("{}: fio failed: {}", load.name, err.trim());
    }
    let json = &out[out
        .find('{')
        .with_context(|| format!("fio printed no JSON: {out}{err}"))?..];
    let json: Value = serde_json::from_str(json).context("fio's JSON")?;
    let job = &json["jobs"][0];
    if job["error"] != 0 {
        bail!(
            "{}: fio reports error {}: {}",
            load.name,
            job["error"],
            err.trim()
        );
    }
    let side = if load.rw.ends_with("read") {
        "read"
    } else {
        "write"
    };
    let figures = &job[side];
    let number = |value: &Value, name: &str| {
        value
            .as_f64()
            .with_context(|| format!("fio's JSON has no {side}.{name}"))
    };
    let percentile = |which: &str| -> Result<f64> {
        Ok(number(&figures["clat_ns"]["percentile"][which], which)? / 1000.0)
    };
    let requests = number(&figures["total_ios"], "total_ios")?;
    Ok(Sample {
        iops: number(&figures["iops"], "iops")?,
        mb_per_s: number(&figures["bw_bytes"], "bw_bytes")? / 1e6,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        cpu_us: before
            .zip(after)
            .map(|(before, after)| (after - before) * 1e6 / requests),
    })
}
