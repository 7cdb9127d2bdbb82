//! `make bench`: vold against qemu-storage-daemon and the bare disk, same client, same disk, one run.
//!
//! One table for each transport. Every target is written full first (its first-write figure is shown apart), then every row runs against every target,
//! `--rounds` times, in an order that rotates from round to round. Shown are medians over the rounds, and the ratio to
//! qemu-storage-daemon on a raw image as least–median–greatest of the rounds' own ratios.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::{Value, json};
use vold_benches::figures::{Sample, Verdict, medians, ratios};
use vold_benches::load::{Duration, FILL, LOADS, Load, Target, Transport, run};
use vold_benches::server::{CpuClock, Qemu, Setup, Vold};

/// Compare vold with QEMU's storage daemon and with the bare disk.
#[derive(Debug, Parser)]
#[command(
    after_help = "Targets: vold-1 vold-2 (replicas), qemu-raw (the base of the ratios), qemu-luks, disk."
)]
struct Args {
    /// Rounds; the table shows medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of every single run
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Size of every volume, in MiB
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..))]
    size: u64,
    /// Directory on the disk to measure; about 7 times --size is used for the time of the run
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Only rows whose name contains this, for example "randread" or "d1"; may be given several times
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Only these targets (qemu-raw is always there); may be given several times
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// Transports; may be given several times [default: all]
    #[arg(long, value_name = "TRANSPORT")]
    via: Vec<Transport>,
    /// Set-up of qemu: "auto" measures four and takes the best
    #[arg(long, default_value = "auto", value_parser = ["auto", "io_uring", "native"])]
    peer_aio: String,
    /// Further arguments of `vold serve`, for example --vold-arg=--io-engine=threads
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    vold_arg: Vec<String>,
    /// Exit with status 1 when vold-1 misses a floor
    #[arg(long)]
    check_floors: bool,
    /// Print one JSON document instead of the table
    #[arg(long)]
    json: bool,
}

/// One column of the comparison.
struct Candidate {
    name: &'static str,
    target: Target,
    clock: Option<CpuClock>,
    fill: Sample,
}

const BASE: &str = "qemu-raw";
/// Whom the floors hold for.
const HELD: &str = "vold-1";

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let loads: Vec<Load> = LOADS
        .into_iter()
        .filter(|load| args.only.is_empty() || args.only.iter().any(|only| load.name.contains(only)))
        .collect();
    ensure!(!loads.is_empty(), "no row contains {:?}", args.only);
    for name in &args.target {
        ensure!(
            ["vold-1", "vold-2", BASE, "qemu-luks", "disk"].contains(&name.as_str()),
            "{name:?} is no target; see --help"
        );
    }
    ensure!(
        !args.check_floors || args.target.is_empty() || args.target.iter().any(|target| target == HELD),
        "--check-floors needs {HELD} among the targets"
    );
    let transports = match args.via.as_slice() {
        [] => &[Transport::Nbd, Transport::VhostUser],
        chosen => chosen,
    };
    let (mut tables, mut missed) = (Vec::new(), false);
    for transport in transports {
        eprintln!("over {}", transport.name());
        let table = compare(&args, &loads, *transport)?;
        if !args.json {
            table.print();
        }
        missed |= table.verdicts.iter().any(|verdict| !verdict.met());
        tables.push(table);
    }
    if args.json {
        let tables: Vec<Value> = tables.iter().map(Table::json).collect();
        println!("{:#}", json!({ "tables": tables }));
    }
    Ok(ExitCode::from(u8::from(args.check_floors && missed)))
}

/// What was measured over one transport.
struct Table {
    transport: Transport,
    head: String,
    loads: Vec<Load>,
    candidates: Vec<Candidate>,
    samples: Samples,
    verdicts: Vec<Verdict>,
}

/// Sets all targets up, measures, and takes them down.
fn compare(args: &Args, loads: &[Load], transport: Transport) -> Result<Table> {
    let wanted = |name: &str| name == BASE || args.target.is_empty() || args.target.iter().any(|t| t == name);
    let scratch = tempfile::Builder::new()
        .prefix("vold-bench-")
        .tempdir_in(&args.dir)?;
    let dir = scratch.path();
    let size = args.size << 20;
    let fill = |name: &str, target: &Target, clock: Option<&CpuClock>| -> Result<Sample> {
        eprintln!("filling {name}");
        run(FILL, target, size, Duration::Once, clock, dir).with_context(|| format!("filling {name}"))
    };

    let raw_image = Qemu::image(dir, "raw", size, false)?;
    let first = Qemu::start(dir, "fill", &raw_image, false, Setup::ALL[0], transport)?;
    let raw_fill = fill(BASE, &first.target, Some(&first.clock()?))?;
    drop(first);
    let setup = match args.peer_aio.as_str() {
        "auto" => {
            eprintln!("choosing qemu's set-up");
            Qemu::best(dir, &raw_image, size, args.seconds.min(3), transport)?
        }
        aio => *Setup::ALL
            .iter()
            .find(|setup| setup.aio == aio)
            .expect("checked by the parser"),
    };
    let raw = Qemu::start(dir, "raw", &raw_image, false, setup, transport)?;
    let mut candidates = vec![Candidate {
        name: BASE,
        target: raw.target.clone(),
        clock: Some(raw.clock()?),
        fill: raw_fill,
    }];

    let mut vold = None;
    if wanted("vold-1") || wanted("vold-2") {
        // Room for both volumes on either store, and for metadata.
        let vold = vold.insert(Vold::start(dir, size * 2 + (512 << 20), &args.vold_arg)?);
        for (name, volume, replicas) in [("vold-1", "one", 1), ("vold-2", "two", 2)] {
            if wanted(name) {
                let target = vold.volume(volume, size, replicas, transport)?;
                let clock = vold.clock()?;
                let fill = fill(name, &target, Some(&clock))?;
                candidates.push(Candidate {
                    name,
                    target,
                    clock: Some(clock),
                    fill,
                });
            }
        }
    }
    let mut luks = None;
    if wanted("qemu-luks") {
        let image = Qemu::image(dir, "luks", size, true)?;
        let qemu = luks.insert(Qemu::start(dir, "luks", &image, true, setup, transport)?);
        let clock = qemu.clock()?;
        let fill = fill("qemu-luks", &qemu.target, Some(&clock))?;
        candidates.push(Candidate {
            name: "qemu-luks",
            target: qemu.target.clone(),
            clock: Some(clock),
            fill,
        });
    }
    // The bare disk has another client than vhost-user-blk.
    if wanted("disk") && transport == Transport::Nbd {
        let path = dir.join("disk.img");
        std::fs::File::create(&path)?.set_len(size)?;
        let target = Target::File(path);
        let fill = fill("disk", &target, None)?;
        candidates.push(Candidate {
            name: "disk",
            target,
            clock: None,
            fill,
        });
    }

    let samples = measure(args, loads, &candidates, size, dir)?;
    let client = match transport {
        Transport::Nbd => vold_tests::tools::run("fio", ["--version"]).trim().to_owned(),
        Transport::VhostUser => "libblkio, one queue".into(),
    };
    let head = format!(
        "over {}; {}; qemu-storage-daemon {}; {client}; {} MiB a volume, {} rounds of {} s, on {}",
        transport.name(),
        vold.as_ref().map_or(Ok("no vold".into()), Vold::describe)?,
        setup.describe(),
        args.size,
        args.rounds,
        args.seconds,
        args.dir.display()
    );
    Ok(Table {
        transport,
        head,
        verdicts: verdicts(loads, &candidates, &samples, transport),
        loads: loads.to_vec(),
        candidates,
        samples,
    })
}

/// Each measured load that has a floor, against it.
fn verdicts(
    loads: &[Load],
    candidates: &[Candidate],
    samples: &Samples,
    transport: Transport,
) -> Vec<Verdict> {
    let Some(held) = candidates.iter().position(|candidate| candidate.name == HELD) else {
        return Vec::new();
    };
    let verdict = |(load, row): (&Load, &Vec<Vec<Sample>>)| {
        Some(Verdict {
            load: load.name,
            floor: load.floor(transport)?,
            ratio: ratios(&row[held], &row[0])?.1,
        })
    };
    loads.iter().zip(samples).filter_map(verdict).collect()
}

/// Samples by load, candidate and round.
type Samples = Vec<Vec<Vec<Sample>>>;

fn measure(
    args: &Args,
    loads: &[Load],
    candidates: &[Candidate],
    size: u64,
    dir: &std::path::Path,
) -> Result<Samples> {
    let mut samples: Samples = vec![vec![Vec::new(); candidates.len()]; loads.len()];
    for round in 0..args.rounds as usize {
        for (load, row) in loads.iter().zip(&mut samples) {
            eprintln!("round {} of {}: {}", round + 1, args.rounds, load.name);
            for turn in 0..candidates.len() {
                let which = (turn + round) % candidates.len();
                let candidate = &candidates[which];
                let sample = run(
                    *load,
                    &candidate.target,
                    size,
                    Duration::Seconds(args.seconds),
                    candidate.clock.as_ref(),
                    dir,
                )
                .with_context(|| candidate.name)?;
                row[which].push(sample);
            }
        }
    }
    Ok(samples)
}

impl Table {
    fn print(&self) {
        println!("{}\n", self.head);
        println!(
            "{:<19} {:<10} {:>9} {:>8} {:>9} {:>9} {:>11}  ratio to {BASE} (least–greatest)",
            "load", "target", "IOPS", "MB/s", "p50 µs", "p99 µs", "CPU µs/req"
        );
        for (load, row) in self.loads.iter().zip(&self.samples) {
            for (candidate, rounds) in self.candidates.iter().zip(row) {
                let ratio = ratios(rounds, &row[0]).map_or(String::new(), |(least, middle, greatest)| {
                    format!("{middle:.2} ({least:.2}–{greatest:.2})")
                });
                print_line(load.name, candidate.name, &medians(rounds), &ratio);
            }
            println!();
        }
        for candidate in &self.candidates {
            let ratio = format!("{:.2}", candidate.fill.iops / self.candidates[0].fill.iops);
            print_line(FILL.name, candidate.name, &candidate.fill, &ratio);
        }
        println!();
        for verdict in &self.verdicts {
            println!(
                "floor {:<10} {:<19} {HELD} {:.2} of {BASE}, at least {:.2}: {}",
                self.transport.name(),
                verdict.load,
                verdict.ratio,
                verdict.floor,
                if verdict.met() { "met" } else { "MISSED" }
            );
        }
        println!();
    }

    fn json(&self) -> Value {
        let object = |sample: &Sample| {
            json!({
                "iops": sample.iops, "mb_per_s": sample.mb_per_s, "p50_us": sample.p50_us, "p99_us": sample.p99_us,
                "server_cpu_us_per_request": sample.cpu_us,
            })
        };
        let mut rows = Vec::new();
        for (load, row) in self.loads.iter().zip(&self.samples) {
            for (candidate, rounds) in self.candidates.iter().zip(row) {
                let mut entry = object(&medians(rounds));
                entry["load"] = json!(load.name);
                entry["target"] = json!(candidate.name);
                entry["rounds"] = rounds.iter().map(object).collect();
                if let Some((least, middle, greatest)) = ratios(rounds, &row[0]) {
                    entry["ratio"] = json!({"least": least, "median": middle, "greatest": greatest});
                }
                rows.push(entry);
            }
        }
        for candidate in &self.candidates {
            let mut entry = object(&candidate.fill);
            entry["load"] = json!(FILL.name);
            entry["target"] = json!(candidate.name);
            rows.push(entry);
        }
        let floors: Vec<_> = self
            .verdicts
            .iter()
            .map(|v| json!({"load": v.load, "target": HELD, "floor": v.floor, "ratio": v.ratio, "met": v.met()}))
            .collect();
        json!({
            "transport": self.transport.name(), "what": self.head, "base": BASE, "rows": rows, "floors": floors,
        })
    }
}

fn print_line(load: &str, target: &str, sample: &Sample, ratio: &str) {
    let cpu = sample.cpu_us.map_or("-".into(), |cpu| format!("{cpu:.1}"));
    println!(
        "{load:<19} {target:<10} {:>9.0} {:>8.1} {:>9.0} {:>9.0} {cpu:>11}  {ratio}",
        sample.iops, sample.mb_per_s, sample.p50_us, sample.p99_us
    );
}
