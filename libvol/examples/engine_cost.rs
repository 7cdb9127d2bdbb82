//! What an engine costs: 4 KiB random reads (or a socket echo) at a given depth, with processor time per operation.
//!
//! `cargo run --release -p libvol --example engine_cost -- [uring|threads] [depth] [seconds] [read|write|echo]`

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use libvol::buf::Buf;
use libvol::disk::{Disk, DiskFile, EngineChoice, make_driver};
use libvol::runtime::net::Stream;
use libvol::runtime::{Runtime, SendPart, spawn};

const BLOCK: usize = 4096;
/// 256 MiB of file.
const BLOCKS: u64 = 65536;

fn main() {
    let mut args = std::env::args().skip(1);
    let engine = match args.next().as_deref() {
        None | Some("uring") => EngineChoice::Uring,
        Some("threads") => EngineChoice::Threads,
        Some(other) => panic!("no engine {other}: uring or threads"),
    };
    let mut number = |default| {
        args.next()
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let (depth, seconds): (usize, usize) = (number(32), number(5));
    let what = args.next().unwrap_or_else(|| "read".into());

    let path = std::env::temp_dir().join(format!("engine-cost-{}", std::process::id()));
    let file = DiskFile::create(&path, BLOCKS * BLOCK as u64, true).expect("a scratch file");
    std::fs::remove_file(&path).expect("the name is not needed");
    let (driver, line) = make_driver(engine).expect("the engine");
    println!("{line}");
    let runtime = Runtime::new(driver);
    let limit = Duration::from_secs(seconds as u64);
    if what != "echo" {
        runtime.block_on(fill(file.clone()));
    }
    let before = cpu();
    let start = Instant::now();
    let operations = match what.as_str() {
        "read" => runtime.block_on(transfers(file, depth, start + limit, false)),
        "write" => runtime.block_on(transfers(file, depth, start + limit, true)),
        "echo" => runtime.block_on(echo(depth, start + limit)),
        other => panic!("cannot measure {other}: read, write or echo"),
    };
    let wall = start.elapsed();
    let after = cpu();
    let per_operation = |a: Duration, b: Duration| (b - a).as_secs_f64() * 1e9 / operations as f64;
    println!(
        "{what} at depth {depth}: {:.0} operations/s; processor time per operation: {:.0} ns here, {:.0} ns in the kernel",
        operations as f64 / wall.as_secs_f64(),
        per_operation(before.0, after.0),
        per_operation(before.1, after.1),
    );
}

/// Extents that were never written read as zeros without touching the disk.
async fn fill(file: DiskFile) {
    let disk = Disk::attach(&file).expect("attached");
    let mut noise = Buf::zeroed(1 << 20);
    noise
        .iter_mut()
        .enumerate()
        .for_each(|(i, byte)| *byte = (i * 31) as u8);
    let noise = Rc::new(noise);
    for i in 0..BLOCKS / 256 {
        disk.write(i << 20, noise.clone(), 0..1 << 20)
            .await
            .expect("written");
    }
    disk.sync().await.expect("synced");
}

async fn transfers(file: DiskFile, depth: usize, until: Instant, write: bool) -> u64 {
    let disk = Rc::new(Disk::attach(&file).expect("attached"));
    let done = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..depth as u64)
        .map(|task| {
            let (disk, done) = (disk.clone(), done.clone());
            spawn(async move {
                let mut buf = Buf::zeroed(BLOCK);
                let source = Rc::new(Buf::zeroed(BLOCK));
                let mut random = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(task + 1);
                while done.get() % 64 != 0 || Instant::now() < until {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let at = random % BLOCKS * BLOCK as u64;
                    if write {
                        disk.write(at, source.clone(), 0..BLOCK).await.expect("written");
                    } else {
                        let (result, back) = disk.read(at, buf, 0..BLOCK).await;
                        result.expect("read");
                        buf = back;
                    }
                    done.set(done.get() + 1);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    done.get()
}

/// `depth` pairs of sockets within one runtime; one operation is a message there and back: two sends, two receives.
async fn echo(depth: usize, until: Instant) -> u64 {
    let done = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..depth)
        .map(|_| {
            let (a, b) = UnixStream::pair().expect("sockets");
            let (a, b) = (Stream::new(OwnedFd::from(a)), Stream::new(OwnedFd::from(b)));
            spawn(async move {
                let mut buf = Buf::zeroed(BLOCK);
                loop {
                    let (result, back) = b.recv(buf, 0..BLOCK).await;
                    buf = back;
                    if result.expect("received") == 0 {
                        break;
                    }
                    b.send(vec![SendPart::inline(&[1; 28])]).await.expect("sent");
                }
            })
            .detach();
            let done = done.clone();
            spawn(async move {
                let mut buf = Buf::zeroed(BLOCK);
                while Instant::now() < until {
                    a.send(vec![SendPart::inline(&[1; 28])]).await.expect("sent");
                    let (result, back) = a.recv(buf, 0..BLOCK).await;
                    result.expect("received");
                    buf = back;
                    done.set(done.get() + 1);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    done.get()
}

/// Processor time of this process, outside and inside the kernel.
fn cpu() -> (Duration, Duration) {
    // SAFETY: an all-zero rusage is valid, and getrusage fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let duration = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    (duration(usage.ru_utime), duration(usage.ru_stime))
}
