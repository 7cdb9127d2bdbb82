//! A daemon under test: its own directory, its own stores, and `volctl` against it.
//!
//! The directory lies in `/var/tmp` (a real file system, where `/tmp` may be memory without O_DIRECT) and its path is short
//! enough for sockets. When a test fails, the daemon's log is printed. Whatever happens, the process ends with the value.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use tempfile::TempDir;

use crate::tools::{texts, workspace_binary};
use crate::{PATIENCE, wait_for};

/// Default size of a store in tests: a few dozen extents.
pub const STORE: &str = "256M";

/// I/O engine to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    Uring,
    /// The thread pool.
    Threads,
}

impl Engine {
    /// Both.
    pub const ALL: [Engine; 2] = [Engine::Uring, Engine::Threads];

    fn flag(self) -> &'static str {
        match self {
            Engine::Uring => "uring",
            Engine::Threads => "threads",
        }
    }
}

/// A refused command.
#[derive(Debug)]
pub struct Refusal {
    /// `error.code` of the JSON answer.
    pub code: String,
    /// The line for people.
    pub message: String,
}

/// A daemon, or where one was: the directory outlives the process.
pub struct Vold {
    root: TempDir,
    engine: Option<Engine>,
    process: Option<Child>,
}

impl Vold {
    /// A running daemon with an empty data directory, on the engine it chooses itself.
    pub fn start() -> Self {
        Self::launch(None)
    }

    /// The same on a certain engine.
    pub fn start_on(engine: Engine) -> Self {
        Self::launch(Some(engine))
    }

    fn launch(engine: Option<Engine>) -> Self {
        let mut vold = Self::not_started(engine);
        vold.restart();
        vold
    }

    /// A directory, and nothing running in it yet.
    pub fn not_started(engine: Option<Engine>) -> Self {
        let root = tempfile::Builder::new()
            .prefix("vold-")
            .tempdir_in(temp_base())
            .expect("a temporary directory");
        // VMs' clients of other uids must be able to pass through.
        std::fs::set_permissions(root.path(), Permissions::from_mode(0o711)).expect("own directory");
        Self {
            root,
            engine,
            process: None,
        }
    }

    /// A path within the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.path("d")
    }

    /// The file of a store added by [`Self::add_stores`].
    pub fn store_path(&self, name: &str) -> PathBuf {
        self.path(&format!("store-{name}"))
    }

    /// The API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.data_dir().join("api.sock")
    }

    /// Process id of the running daemon.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").id()
    }

    /// What `vold serve` is called with.
    pub fn serve_command(&self) -> Command {
        let mut command = Command::new(workspace_binary("vold"));
        command.arg("serve").arg("--data-dir").arg(self.data_dir());
        if let Some(engine) = self.engine {
            command.args(["--io-engine", engine.flag()]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until it says that it is ready; gives that line.
    ///
    /// # Panics
    /// When it ends instead, or runs already.
    pub fn restart(&mut self) -> String {
        self.restart_with(self.serve_command())
    }

    /// The same with another command line.
    pub fn restart_with(&mut self, mut command: Command) -> String {
        assert!(self.process.is_none(), "the daemon runs already");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(self.log_for_append())
            .spawn()
            .expect("vold starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        self.process = Some(child);
        let (send, receive) = mpsc::channel();
        // Reads on until the end, so that the daemon never writes into a closed pipe.
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        match receive.recv_timeout(PATIENCE) {
            Ok(line) => {
                assert!(line.contains(" ready"), "the first line is no ready line: {line}");
                line
            }
            Err(e) => {
                let status = self.process.as_mut().expect("just started").try_wait();
                panic!("vold did not become ready ({e}); its process: {status:?}");
            }
        }
    }

    /// Starts the daemon where it must refuse to run; gives what it said.
    ///
    /// # Panics
    /// When it does not end with status 1, or says more than its one line of reason at the end.
    pub fn refuses_to_start(&self, command: &mut Command) -> String {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vold starts");
        let deadline = std::time::Instant::now() + PATIENCE;
        while child.try_wait().expect("a child").is_none() {
            if std::time::Instant::now() > deadline {
                let _ = child.kill();
                panic!("{command:?} runs, and must not");
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let output = child.wait_with_output().expect("a child");
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(1), "status 1 is due\n{out}{err}");
        assert!(!err.contains("panicked"), "a panic is no refusal: {err}");
        let line = err.lines().last().unwrap_or_default().to_owned();
        assert!(
            line.starts_with("vold: "),
            "the last line gives the reason: {err}"
        );
        line
    }

    /// kill -9, as a power cut of the process.
    pub fn kill(&mut self) {
        let mut child = self.process.take().expect("the daemon runs");
        child.kill().expect("own child");
        child.wait().expect("own child");
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Panics
    /// When it does not end, or not with status 0.
    pub fn stop(&mut self) {
        let status = self.terminate();
        assert_eq!(status.code(), Some(0), "a clean stop has status 0");
    }

    fn terminate(&mut self) -> ExitStatus {
        let mut child = self.process.take().expect("the daemon runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("own child");
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("own child") {
                return status;
            }
            if std::time::Instant::now() > deadline {
                let _ = child.kill();
                panic!("vold did not end within {PATIENCE:?} of SIGTERM");
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Whether the process still runs.
    pub fn alive(&mut self) -> bool {
        match &mut self.process {
            Some(child) => child.try_wait().expect("own child").is_none(),
            None => false,
        }
    }

    /// `vold check` of the daemon's directory.
    pub fn check_command(&self) -> Command {
        let mut command = Command::new(workspace_binary("vold"));
        command
            .arg("check")
            .arg("--data-dir")
            .arg(self.data_dir())
            .stdin(Stdio::null());
        command
    }

    /// `vold check` of the stopped daemon's directory.
    pub fn check(&self) -> Output {
        assert!(self.process.is_none(), "check is for a stopped daemon");
        self.check_command().output().expect("vold check starts")
    }

    /// `vold check` that must find nothing wrong; gives its report.
    ///
    /// # Panics
    /// When it finds something.
    pub fn check_is_clean(&self) -> String {
        let output = self.check();
        let (out, err) = texts(&output);
        assert_eq!(
            output.status.code(),
            Some(0),
            "vold check found damage:\n{out}{err}"
        );
        format!("{out}{err}")
    }

    /// `vold check` that must find damage; gives its report.
    ///
    /// # Panics
    /// When it ends otherwise than with status 1.
    pub fn check_finds_damage(&self) -> String {
        let output = self.check();
        let (out, err) = texts(&output);
        assert_eq!(
            output.status.code(),
            Some(1),
            "vold check must find damage:\n{out}{err}"
        );
        assert!(!err.contains("panicked"), "{err}");
        format!("{out}{err}")
    }

    /// `vold rebuild-catalog` of the stopped daemon's directory from these files, with more arguments.
    pub fn rebuild_command(&self, stores: &[PathBuf], more: &[&str]) -> Command {
        let mut command = Command::new(workspace_binary("vold"));
        command
            .args(["rebuild-catalog", "--data-dir"])
            .arg(self.data_dir())
            .stdin(Stdio::null());
        for store in stores {
            command.arg("--store").arg(store);
        }
        command.args(more);
        command
    }

    /// A rebuild that must succeed; gives its report.
    ///
    /// # Panics
    /// When it does not.
    pub fn rebuild(&self, stores: &[PathBuf], more: &[&str]) -> String {
        let output = self
            .rebuild_command(stores, more)
            .output()
            .expect("vold rebuild-catalog starts");
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(0), "vold rebuild-catalog\n{out}{err}");
        out
    }

    /// `volctl` with these words (split at blanks) against this daemon.
    pub fn volctl(&self, words: &str) -> Command {
        let mut command = Command::new(workspace_binary("volctl"));
        command
            .env("VOLD_API", format!("unix:{}", self.api_socket().display()))
            .args(words.split_whitespace())
            .stdin(Stdio::null());
        command
    }

    /// A command that must succeed; gives its JSON document.
    ///
    /// # Panics
    /// When it does not.
    pub fn ctl(&self, words: &str) -> Value {
        let output = self
            .volctl(words)
            .args(["--output", "json"])
            .output()
            .expect("volctl starts");
        let (out, err) = texts(&output);
        assert_eq!(output.status.code(), Some(0), "volctl {words}\n{out}{err}");
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("volctl {words}: no JSON ({e}): {out}"))
    }

    /// A command that must be refused with status 1, one line and one JSON error.
    ///
    /// # Panics
    /// When it is not.
    pub fn refused(&self, words: &str) -> Refusal {
        let output = self
            .volctl(words)
            .args(["--output", "json"])
            .output()
            .expect("volctl starts");
        let (out, err) = texts(&output);
        assert_eq!(
            output.status.code(),
            Some(1),
            "volctl {words} must be refused\n{out}{err}"
        );
        // (A wait reports its progress there too, before it gives up.)
        let reasons = err.lines().filter(|line| line.starts_with("volctl: ")).count();
        assert_eq!(reasons, 1, "one line gives the reason: {err}");
        assert!(
            err.lines().count() == 1 || words.starts_with("destroy wait"),
            "{err}"
        );
        let json: Value =
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("volctl {words}: no JSON ({e}): {out}"));
        let field = |name: &str| json["error"][name].as_str().unwrap_or_default().to_owned();
        let refusal = Refusal {
            code: field("code"),
            message: field("message"),
        };
        assert!(
            !refusal.message.is_empty() && !refusal.message.contains('\n'),
            "{out}"
        );
        assert_ne!(refusal.code, "internal", "{out}");
        refusal
    }

    /// Wrong usage: status 2 and no word to the daemon.
    ///
    /// # Panics
    /// When the status is another.
    pub fn wrong_usage(&self, words: &str) -> String {
        let output = self.volctl(words).output().expect("volctl starts");
        let (_, err) = texts(&output);
        assert_eq!(
            output.status.code(),
            Some(2),
            "volctl {words} is wrong usage\n{err}"
        );
        err
    }

    /// Adds file stores, each in a zone of its own.
    pub fn add_stores(&self, names: &[&str], size: &str) {
        for name in names {
            let path = self.store_path(name);
            self.ctl(&format!(
                "store add {name} --path {} --size {size}",
                path.display()
            ));
        }
    }

    /// Customer `acme` with VM `vm1`, volume `acme/vol` on `replicas` stores (a, b, c), attached; gives its URI.
    pub fn with_volume(&self, replicas: usize, store_size: &str, volume_size: &str) -> String {
        self.with_detached_volume(replicas, store_size, volume_size);
        self.attach("acme/vol", "vm1")
    }

    /// The same, but attached to nobody yet.
    pub fn with_detached_volume(&self, replicas: usize, store_size: &str, volume_size: &str) {
        self.add_stores(&["a", "b", "c"][..replicas], store_size);
        self.ctl("customer create acme");
        self.ctl("vm create vm1 --customer acme");
        self.ctl(&format!(
            "volume create acme/vol --size {volume_size} --replicas {replicas}"
        ));
    }

    /// Attaches; gives the NBD URI.
    pub fn attach(&self, volume: &str, vm: &str) -> String {
        let attachment = self.ctl(&format!("attach {volume} --vm {vm}"));
        attachment["uri"]
            .as_str()
            .expect("an NBD attachment has a URI")
            .to_owned()
    }

    /// Attaches over vhost-user; gives the socket.
    pub fn attach_vhost(&self, volume: &str, vm: &str) -> PathBuf {
        let attachment = self.ctl(&format!("attach {volume} --vm {vm} --via vhost-user"));
        let socket = attachment["socket"].as_str();
        socket.expect("a vhost-user attachment has a socket").into()
    }

    /// As [`Self::with_volume`], over vhost-user; gives the socket.
    pub fn with_vhost_volume(&self, replicas: usize, store_size: &str, volume_size: &str) -> PathBuf {
        self.with_detached_volume(replicas, store_size, volume_size);
        self.attach_vhost("acme/vol", "vm1")
    }

    /// `volume show`.
    pub fn volume(&self, volume: &str) -> Value {
        self.ctl(&format!("volume show {volume}"))
    }

    /// `store show`.
    pub fn store(&self, name: &str) -> Value {
        self.ctl(&format!("store show {name}"))
    }

    /// Detaches, deletes and waits until every replica is destroyed; gives the volume's id.
    pub fn destroy(&self, volume: &str) -> String {
        if let Some(vm) = self.volume(volume)["attached_to"].as_str() {
            self.ctl(&format!("detach {volume} --vm {vm}"));
        }
        let destroy = self.ctl(&format!("volume delete {volume} --now"));
        let id = destroy["volume_id"].as_str().expect("an id").to_owned();
        let done = self.ctl(&format!("destroy wait {id} --timeout 110s"));
        assert_eq!(done["state"], "destroyed", "{done}");
        id
    }

    /// Waits until no extent of any named store waits for its scrub.
    pub fn wait_until_scrubbed(&self, stores: &[&str]) {
        wait_for("no space is pending scrub", || {
            stores
                .iter()
                .all(|name| self.store(name)["pending_scrub_bytes"] == 0)
                .then_some(())
        });
    }

    /// All that the daemon has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn log_for_append(&self) -> File {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .expect("the log file")
    }
}

impl Vold {
    /// The kernel closes a killed daemon's files late, in one queue for all processes. Files deleted before that would be
    /// freed there, and hold up every other daemon that a test kills: so waits, for a while, until nobody has a store.
    fn wait_until_let_go(&self) {
        let Ok(entries) = std::fs::read_dir(self.root.path()) else {
            return;
        };
        let deadline = std::time::Instant::now() + PATIENCE / 2;
        for entry in entries.flatten() {
            let is_store = entry.file_name().to_string_lossy().starts_with("store-");
            let Some(file) = is_store.then(|| File::open(entry.path()).ok()).flatten() else {
                continue;
            };
            let free = || flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
            while !free() && std::time::Instant::now() < deadline {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

impl Drop for Vold {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
            self.wait_until_let_go();
        }
        let log = self.log();
        if std::thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(60)..];
            eprintln!("--- the daemon's log, last lines ---\n{}\n---", tail.join("\n"));
        } else {
            assert!(
                !log.contains("panicked at"),
                "the daemon panicked during the test:\n{log}"
            );
        }
    }
}

/// The socket of an NBD URI as vold prints it, and the export's name.
///
/// # Panics
/// When it is none.
pub fn parse_uri(uri: &str) -> (PathBuf, String) {
    let rest = uri.strip_prefix("nbd+unix:///").expect("nbd+unix:///");
    let (export, socket) = rest.split_once("?socket=").expect("?socket=");
    (PathBuf::from(decode(socket)), decode(export))
}

/// Percent-decoding.
fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next().expect("digit"), bytes.next().expect("digit")];
            let digits = std::str::from_utf8(&digits).expect("hex");
            out.push(u8::from_str_radix(digits, 16).expect("hex"));
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).expect("UTF-8")
}

/// Where temporary directories go: `$VOLD_TEST_DIR`, else `/var/tmp`.
pub fn temp_base() -> PathBuf {
    match std::env::var_os("VOLD_TEST_DIR") {
        Some(dir) => dir.into(),
        None => {
            let var = PathBuf::from("/var/tmp");
            if var.is_dir() { var } else { std::env::temp_dir() }
        }
    }
}
