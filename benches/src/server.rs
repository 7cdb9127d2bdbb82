//! The servers: vold, and qemu-storage-daemon at its best.
//!
//! Peers get direct I/O, an asynchronous engine and, where it helps, an I/O thread: [`Qemu::best`] measures which. A
//! comparison against a badly set up peer shows nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use vold_tests::tools::{output, texts, tool, workspace_binary};
use vold_tests::wait_for;

use crate::load::{Duration, LOADS, Target, Transport, run};

/// CPU time of one process.
#[derive(Clone, Debug)]
pub struct CpuClock {
    stat: PathBuf,
    ticks_per_second: f64,
}

impl CpuClock {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// `getconf`'s.
    pub fn of(pid: u32) -> Result<Self> {
        let ticks = vold_tests::tools::succeed(tool("getconf").arg("CLK_TCK"));
        Ok(Self {
            stat: PathBuf::from(format!("/proc/{pid}/stat")),
            ticks_per_second: ticks.trim().parse().context("CLK_TCK")?,
        })
    }

    /// User and system time of all its threads so far, seconds (fields 14 and 15 of proc(5)'s stat).
    ///
    /// # Errors
    /// The process has ended.
    pub fn seconds(&self) -> Result<f64> {
        let text = fs::read_to_string(&self.stat).context("the server has ended")?;
        // The command, in parentheses, may hold anything; fields are counted from its end, where field 3 follows.
        let rest = &text[text.rfind(')').context("stat")? + 1..];
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / self.ticks_per_second)
    }
}

/// A running process, ended with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `vold` over two stores, with a customer and a VM.
pub struct Vold {
    process: Running,
    api: String,
    dir: PathBuf,
    extra: Vec<String>,
}

impl Vold {
    /// Starts it in `dir` with further arguments of `vold serve`.
    ///
    /// # Errors
    /// What it says when it does not start.
    pub fn start(dir: &Path, store_bytes: u64, extra: &[String]) -> Result<Self> {
        Self::start_with(dir, store_bytes, libvol::limits::EXTENT_BYTES_DEFAULT, extra)
    }

    /// The same with another extent size.
    ///
    /// # Errors
    /// As [`Vold::start`].
    pub fn start_with(dir: &Path, store_bytes: u64, extent_bytes: u64, extra: &[String]) -> Result<Self> {
        let dir = dir.join("vold");
        fs::create_dir(&dir)?;
        let mut vold = Self {
            process: Running(serve(&dir, extra)?),
            api: format!("unix:{}", dir.join("d/api.sock").display()),
            dir,
            extra: extra.to_vec(),
        };
        vold.wait_until_ready()?;
        for store in ["a", "b"] {
            let path = vold.dir.join(store);
            vold.volctl(&format!(
                "store add {store} --path {} --size {store_bytes} --extent-size {extent_bytes}",
                path.display()
            ))?;
        }
        vold.volctl("customer create bench")?;
        vold.volctl("vm create vm --customer bench")?;
        Ok(vold)
    }

    /// Ends the process with kill -9, calls `between`, and starts it again; does not wait until it is ready.
    ///
    /// # Errors
    /// When it does not start; those of `between`.
    pub fn kill_and_start(&mut self, between: impl FnOnce() -> Result<()>) -> Result<()> {
        self.process.0.kill()?;
        self.process.0.wait()?;
        between()?;
        self.process = Running(serve(&self.dir, &self.extra)?);
        Ok(())
    }

    /// The file of a store, `a` or `b`.
    pub fn store(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What it has logged since it was started last.
    ///
    /// # Errors
    /// Reading the file.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("log"))?)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// # Errors
    /// What it says when it ends.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let (ready, log) = (self.dir.join("ready"), self.dir.join("log"));
        let child = &mut self.process.0;
        let ended = wait_for("vold is ready or ends", || {
            if fs::read_to_string(&ready).is_ok_and(|text| text.contains(" ready")) {
                return Some(false);
            }
            child.try_wait().ok().flatten().map(|_| true)
        });
        ensure!(!ended, "vold ended: {}", fs::read_to_string(log)?);
        Ok(())
    }

    /// `volctl` with these words; its JSON.
    ///
    /// # Errors
    /// What it says.
    pub fn volctl(&self, words: &str) -> Result<serde_json::Value> {
        let output = output(
            Command::new(workspace_binary("volctl"))
                .env("VOLD_API", &self.api)
                .args(words.split_whitespace())
                .args(["--output", "json"]),
        );
        let (out, err) = texts(&output);
        ensure!(output.status.success(), "volctl {words}: {err}");
        Ok(serde_json::from_str(&out)?)
    }

    /// A volume, attached.
    ///
    /// # Errors
    /// `volctl`'s.
    pub fn volume(
        &self,
        name: &str,
        size_bytes: u64,
        replicas: usize,
        transport: Transport,
    ) -> Result<Target> {
        self.volctl(&format!(
            "volume create bench/{name} --size {size_bytes} --replicas {replicas}"
        ))?;
        let attachment = self.volctl(&format!("attach bench/{name} --vm vm --via {}", transport.name()))?;
        let text = |field: &'static str| attachment[field].as_str().context(field);
        Ok(match transport {
            Transport::Nbd => Target::Nbd(text("uri")?.to_owned()),
            Transport::VhostUser => Target::VhostUser(text("socket")?.into()),
        })
    }

    /// Its CPU time.
    ///
    /// # Errors
    /// As [`CpuClock::of`].
    pub fn clock(&self) -> Result<CpuClock> {
        CpuClock::of(self.process.0.id())
    }

    /// Version and engine, for the head of the table.
    ///
    /// # Errors
    /// `volctl`'s.
    pub fn describe(&self) -> Result<String> {
        let version = self.volctl("version")?;
        let text = |field: &str| version[field].as_str().unwrap_or("?").to_owned();
        Ok(format!("vold {} ({})", text("version"), text("io_engine")))
    }
}

fn serve(dir: &Path, extra: &[String]) -> Result<Child> {
    Command::new(workspace_binary("vold"))
        .arg("serve")
        .arg("--data-dir")
        .arg(dir.join("d"))
        .args(extra)
        .stdin(Stdio::null())
        .stdout(fs::File::create(dir.join("ready"))?)
        .stderr(fs::File::create(dir.join("log"))?)
        .spawn()
        .context("vold")
}

/// How qemu-storage-daemon is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// `io_uring` or `native`.
    pub aio: &'static str,
    /// A thread of its own for the export.
    pub iothread: bool,
}

impl Setup {
    /// What to choose from.
    pub const ALL: [Setup; 4] = [
        Setup {
            aio: "io_uring",
            iothread: true,
        },
        Setup {
            aio: "native",
            iothread: true,
        },
        Setup {
            aio: "io_uring",
            iothread: false,
        },
        Setup {
            aio: "native",
            iothread: false,
        },
    ];

    /// For people.
    pub fn describe(self) -> String {
        let thread = if self.iothread { "iothread" } else { "main loop" };
        format!("aio={}, {thread}", self.aio)
    }
}

/// `qemu-storage-daemon` with one export.
pub struct Qemu {
    process: Running,
    /// The export.
    pub target: Target,
}

impl Qemu {
    /// Makes the image `dir/NAME.img`: raw and sparse, or LUKS.
    ///
    /// # Errors
    /// `qemu-img`'s.
    pub fn image(dir: &Path, name: &str, size_bytes: u64, luks: bool) -> Result<PathBuf> {
        let path = dir.join(format!("{name}.img"));
        let mut command = tool("qemu-img");
        if luks {
            // A short key derivation: it is paid once at opening, not in the data path.
            command.args([
                "create",
                "-q",
                "-f",
                "luks",
                "--object",
                "secret,id=s,data=bench",
                "-o",
                "key-secret=s,iter-time=10",
            ]);
        } else {
            command.args(["create", "-q", "-f", "raw"]);
        }
        let output = output(command.arg(&path).arg(size_bytes.to_string()));
        ensure!(output.status.success(), "qemu-img create: {}", texts(&output).1);
        Ok(path)
    }

    /// Serves an image.
    ///
    /// # Errors
    /// What it says when it does not start.
    pub fn start(
        dir: &Path,
        name: &str,
        image: &Path,
        luks: bool,
        setup: Setup,
        transport: Transport,
    ) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let _ = fs::remove_file(&socket);
        let mut command = tool("qemu-storage-daemon");
        command
            .args(["--object", "secret,id=s,data=bench"])
            .args(["--object", "iothread,id=io0"])
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={},cache.direct=on,aio={}",
                image.display(),
                setup.aio
            ))
            .arg("--blockdev")
            .arg(if luks {
                "driver=luks,node-name=disk,file=file,key-secret=s,cache.direct=on"
            } else {
                "driver=raw,node-name=disk,file=file,cache.direct=on"
            });
        let iothread = if setup.iothread { ",iothread=io0" } else { "" };
        match transport {
            Transport::Nbd => command
                .arg("--nbd-server")
                .arg(format!("addr.type=unix,addr.path={}", socket.display()))
                .arg("--export")
                .arg(format!(
                    "type=nbd,id=export,node-name=disk,name=disk,writable=on{iothread}"
                )),
            Transport::VhostUser => command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}{iothread}",
                socket.display()
            )),
        };
        command
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join(format!("{name}.log")))?);
        let mut process = Running(command.spawn().context("qemu-storage-daemon")?);
        let ended = wait_for("qemu-storage-daemon listens or ends", || {
            if socket.exists() {
                return Some(false);
            }
            process.0.try_wait().ok().flatten().map(|_| true)
        });
        if ended {
            let log = fs::read_to_string(dir.join(format!("{name}.log")))?;
            bail!("qemu-storage-daemon ended: {}", log.trim());
        }
        Ok(Self {
            process,
            target: match transport {
                Transport::Nbd => Target::Nbd(format!("nbd+unix:///disk?socket={}", socket.display())),
                Transport::VhostUser => Target::VhostUser(socket),
            },
        })
    }

    /// The set-up that reads 4 KiB at random fastest from `image`, which must be filled.
    ///
    /// # Errors
    /// When none of them works.
    pub fn best(
        dir: &Path,
        image: &Path,
        size_bytes: u64,
        seconds: u32,
        transport: Transport,
    ) -> Result<Setup> {
        let mut best: Option<(f64, Setup)> = None;
        for setup in Setup::ALL {
            let measured = Self::start(dir, "probe", image, false, setup, transport).and_then(|qemu| {
                run(
                    LOADS[0],
                    &qemu.target,
                    size_bytes,
                    Duration::Seconds(seconds),
                    None,
                    dir,
                )
            });
            match measured {
                Ok(sample) => {
                    eprintln!("  qemu with {}: {:.0} IOPS", setup.describe(), sample.iops);
                    if best.is_none_or(|(iops, _)| sample.iops > iops) {
                        best = Some((sample.iops, setup));
                    }
                }
                Err(e) => eprintln!("  qemu with {} is no choice here: {e:#}", setup.describe()),
            }
        }
        Ok(best.context("no set-up of qemu-storage-daemon works here")?.1)
    }

    /// Its CPU time.
    ///
    /// # Errors
    /// As [`CpuClock::of`].
    pub fn clock(&self) -> Result<CpuClock> {
        CpuClock::of(self.process.0.id())
    }
}
