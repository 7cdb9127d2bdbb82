//! Crash simulation for as long as one likes: `soak [--from N] [--seeds N] [--crash-points N] [--threads N]`, or one seed
//! with its trace: `soak --seed N`. See docs/RELIABILITY.md. Ends with status 1 at the first broken promise. Built with the
//! feature `sabotage`, `soak --sabotage` breaks rules on purpose and prints after how many seeds that was noticed;
//! with `--rule NAME,NAME` only those.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vold_tests::sim::{Failure, Faults, Size, run, shrink};

const USAGE: &str =
    "usage: soak [--from SEED] [--seeds N] [--crash-points N] [--threads N] | soak --seed SEED
sizes: [--volumes N] [--workers N] [--requests N] [--rounds N]
faults: [--no-device-errors] [--no-vanishing] [--no-lost-writes] [--no-lost-zeros] [--writes-beside-damage]
        [--of-old]: those there were when seeds up to 268215 were found";

/// Between two lines.
const REPORT_EVERY: Duration = Duration::from_secs(10);

struct Options {
    from: u64,
    seeds: u64,
    crash_points: u64,
    threads: u64,
    one: Option<u64>,
    #[cfg(feature = "sabotage")]
    sabotage: bool,
    /// The one rule to break, instead of all.
    #[cfg(feature = "sabotage")]
    rule: Option<String>,
    size: Size,
    faults: Faults,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        from: 0,
        seeds: u64::MAX,
        crash_points: u64::MAX,
        threads: std::thread::available_parallelism().map_or(2, |n| n.get() as u64),
        one: None,
        #[cfg(feature = "sabotage")]
        sabotage: false,
        #[cfg(feature = "sabotage")]
        rule: None,
        size: Size::default(),
        faults: Faults::default(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--no-device-errors" => options.faults.device_errors = false,
            "--no-vanishing" => options.faults.vanishing = false,
            "--no-lost-writes" => options.faults.lost_writes = false,
            "--no-lost-zeros" => options.faults.lost_zeros = false,
            "--of-old" => options.faults = Faults::of_old(),
            "--writes-beside-damage" => options.faults.writes_beside_damage = true,
            #[cfg(feature = "sabotage")]
            "--sabotage" => options.sabotage = true,
            #[cfg(feature = "sabotage")]
            "--rule" => options.rule = Some(arguments.next().ok_or("--rule: needs a rule's name")?),
            _ => {
                let value = arguments.next().and_then(|value| value.parse::<u64>().ok());
                let value = value.ok_or_else(|| format!("{name}: needs a number"))?;
                let small = u32::try_from(value).unwrap_or(u32::MAX);
                match name.as_str() {
                    "--from" => options.from = value,
                    "--seeds" => options.seeds = value,
                    "--crash-points" => options.crash_points = value,
                    "--threads" => options.threads = value.max(1),
                    "--seed" => options.one = Some(value),
                    "--volumes" => options.size.volumes = small.max(1),
                    "--workers" => options.size.workers = small.max(1),
                    "--requests" => options.size.requests = small,
                    "--rounds" => options.size.rounds = small,
                    _ => return Err(format!("{name}: unknown")),
                }
            }
        }
    }
    Ok(options)
}

/// What all threads share.
struct Shared {
    next: AtomicU64,
    seeds: AtomicU64,
    crash_points: AtomicU64,
    flips: AtomicU64,
    acknowledged: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<Failure>>,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    #[cfg(feature = "sabotage")]
    if options.sabotage {
        return sabotage(&options);
    }
    match options.one {
        Some(seed) => one(seed, &options),
        None => soak(&options),
    }
}

fn one(seed: u64, options: &Options) -> ExitCode {
    match run(seed, options.size, options.faults, true) {
        Ok(report) => {
            println!("seed {seed}: {report:?}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// Breaks every rule in turn, on all threads, and prints how many seeds it took to notice.
#[cfg(feature = "sabotage")]
fn sabotage(options: &Options) -> ExitCode {
    use libvol::sabotage::Rule;
    use vold_tests::sim::sabotage::{SEEDS_MAX, noticed, table};

    let wanted = |rule: &&Rule| {
        let named = |name: &String| name.split(',').any(|name| name == format!("{rule:?}"));
        options.rule.as_ref().is_none_or(named)
    };
    let rules: Vec<Rule> = Rule::ALL.iter().filter(wanted).copied().collect();
    let next = AtomicU64::new(0);
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.threads {
            scope.spawn(|| {
                while let Some(rule) = rules.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let failing = noticed(*rule, options.seeds.min(SEEDS_MAX));
                    println!("{rule:?}: {failing:?}");
                    let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
                    rows.push((*rule, failing));
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(rule, _)| Rule::ALL.iter().position(|other| other == rule));
    print!("{}", table(&rows));
    match rows.iter().all(|(_, failing)| failing.is_some()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn soak(options: &Options) -> ExitCode {
    let shared = Shared {
        next: AtomicU64::new(options.from),
        seeds: AtomicU64::new(0),
        crash_points: AtomicU64::new(0),
        flips: AtomicU64::new(0),
        acknowledged: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    let started = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads)
            .map(|_| scope.spawn(|| work(options, &shared)))
            .collect();
        let mut reported = started;
        while !workers.iter().all(|worker| worker.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            if reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                println!("{}", line(&shared, started));
            }
        }
    });
    println!("{}", line(&shared, started));
    let failure = shared
        .failure
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let Some(failure) = failure else {
        return ExitCode::SUCCESS;
    };
    println!(
        "seed {} breaks a promise: {}\nmaking it smaller ...",
        failure.seed, failure.violation
    );
    println!("{}", shrink::shrink(failure, options.faults));
    ExitCode::FAILURE
}

fn work(options: &Options, shared: &Shared) {
    let end = options.from.saturating_add(options.seeds);
    while !shared.stop.load(Ordering::Relaxed)
        && shared.crash_points.load(Ordering::Relaxed) < options.crash_points
    {
        let seed = shared.next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return;
        }
        match run(seed, options.size, options.faults, false) {
            Ok(report) => {
                shared.seeds.fetch_add(1, Ordering::Relaxed);
                shared
                    .crash_points
                    .fetch_add(report.crash_points, Ordering::Relaxed);
                shared.flips.fetch_add(report.flips, Ordering::Relaxed);
                shared
                    .acknowledged
                    .fetch_add(report.acknowledged, Ordering::Relaxed);
            }
            Err(failure) => {
                shared.stop.store(true, Ordering::Relaxed);
                let mut first = shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(*failure);
                return;
            }
        }
    }
}

fn line(shared: &Shared, started: Instant) -> String {
    let seconds = started.elapsed().as_secs_f64();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (seeds, points) = (count(&shared.seeds), count(&shared.crash_points));
    format!(
        "{seconds:.0} s: {seeds} seeds ({:.1}/s), {points} crash points ({:.0}/s), {} requests acknowledged, {} bits flipped; next seed {}",
        seeds as f64 / seconds,
        points as f64 / seconds,
        count(&shared.acknowledged),
        count(&shared.flips),
        count(&shared.next),
    )
}
