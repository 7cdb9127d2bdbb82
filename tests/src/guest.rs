//! A virtual machine whose kernel uses a volume: QEMU with a guest of vm-images/, its serial console, and QMP.
//!
//! The guest runs one script of vm-images/tests and says how it ended. Where a script stops (`at NAME`), the host looks
//! around, changes something, and lets it [go](Guest::go) on. The drive is whatever arguments `volctl attach` printed, so
//! that these are tried too, and each transport is only other arguments.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::tools::{succeed, tool};
use crate::vold::parse_uri;
use crate::{PATIENCE, wait_for};

/// Longest that any single step of a guest may take: an emulated CPU on a loaded machine is slow.
pub const GUEST_PATIENCE: Duration = Duration::from_secs(300);

/// What the guest's own lines begin with on the console; the kernel's stand between them.
const MARK: &str = "vold-test: ";

const MEMORY: &str = "448M";

/// A machine to be started.
pub struct Machine {
    directory: PathBuf,
    name: String,
    qemu: Vec<String>,
    kernel: Option<String>,
    inputs: Vec<PathBuf>,
    user: Option<u32>,
}

impl Machine {
    /// One that runs a script of vm-images/tests; its files go to `directory`.
    pub fn running(directory: &Path, script: &str) -> Self {
        let kernel =
            format!("console=ttyS0,115200 quiet loglevel=4 panic=-1 no_timer_check vold.test={script}");
        Self {
            kernel: Some(kernel),
            ..Self::booting(directory)
        }
    }

    /// One that boots what is on its first drive.
    pub fn booting(directory: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            directory: directory.to_owned(),
            name: format!("vm-{}", NEXT.fetch_add(1, Ordering::Relaxed)),
            qemu: Vec::new(),
            kernel: None,
            inputs: Vec::new(),
            user: None,
        }
    }

    /// The same by UEFI. A boot loader that comes over vhost-user needs it on an emulated CPU (TCG), which keeps translations of the code
    /// that it has run and does not learn that another process has written other code there: SeaBIOS hangs, with any back-end,
    /// and UEFI copies what it runs.
    pub fn booting_by_uefi(directory: &Path) -> Self {
        let mut machine = Self::booting(directory);
        let firmware = image("disk").join("firmware");
        machine
            .qemu
            .extend(["-bios".to_owned(), firmware.display().to_string()]);
        machine
    }

    /// A drive, or anything else, by QEMU's arguments: the JSON list that `volctl attach` gives.
    pub fn with(mut self, arguments: &Value) -> Self {
        let arguments = arguments.as_array().expect("a list of arguments");
        let texts = arguments
            .iter()
            .map(|arg| arg.as_str().expect("texts").to_owned());
        self.qemu.extend(texts);
        self
    }

    /// A parameter for the script.
    pub fn parameter(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        let kernel = self.kernel.as_mut().expect("a script has parameters");
        kernel.push_str(&format!(" vold.{name}={value}"));
        self
    }

    /// Files that the script finds in /tmp/inputs.
    pub fn input(mut self, file: &Path) -> Self {
        self.inputs.push(file.to_owned());
        self
    }

    /// A network in which the host's loopback addresses are 10.0.2.2.
    pub fn network(mut self) -> Self {
        self.qemu
            .extend(["-nic", "user,model=virtio-net-pci"].map(String::from));
        self
    }

    /// QEMU runs as this user, with its files in a directory of the user's.
    ///
    /// # Panics
    /// When the test does not run as root.
    pub fn user(mut self, uid: u32) -> Self {
        self.directory = self.file("home");
        std::fs::create_dir(&self.directory).expect("a directory for the user");
        std::os::unix::fs::chown(&self.directory, Some(uid), Some(uid)).expect("the tests run as root");
        self.user = Some(uid);
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When QEMU or the guest's image is missing, with what to install.
    pub fn start(self) -> Guest {
        let console = self.file("console");
        let errors = self.file("errors");
        let mut command = self.command();
        let mut qemu = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).expect("a file for QEMU's errors"))
            .spawn()
            .expect("QEMU starts");
        let lines = console_lines(&mut qemu, &console);
        Guest {
            input: qemu.stdin.take().expect("piped"),
            qmp_socket: self.file("qmp"),
            qemu,
            lines,
            console,
            errors,
            qmp: None,
        }
    }

    /// QEMU ends at once, because a drive cannot be opened; gives what it said.
    ///
    /// # Panics
    /// When it runs, or ends well.
    pub fn refuses_to_start(self) -> String {
        let mut guest = self.start();
        let status = wait_for("QEMU ends", || guest.qemu.try_wait().expect("own child"));
        let said = std::fs::read_to_string(&guest.errors).expect("QEMU's errors");
        assert!(!status.success(), "QEMU ended with {status}: {said}");
        assert_eq!(guest.console(), "", "nothing was booted");
        said
    }

    fn file(&self, what: &str) -> PathBuf {
        self.directory.join(format!("{}.{what}", self.name))
    }

    fn command(&self) -> Command {
        let qemu = tool("qemu-system-x86_64");
        let mut command = match self.user {
            None => qemu,
            Some(uid) => {
                let mut setpriv = tool("setpriv");
                setpriv
                    .args([format!("--reuid={uid}"), format!("--regid={uid}")])
                    .args(["--clear-groups", "--"])
                    .arg(qemu.get_program());
                setpriv
            }
        };
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", accelerator(), "-cpu", "max", "-m", MEMORY])
            .args(["-chardev", "stdio,id=console,signal=off"])
            .args(["-serial", "chardev:console"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", self.file("qmp").display()));
        // (Shared, as vhost-user needs it.)
        command
            .args(["-machine", "pc,memory-backend=memory", "-object"])
            .arg(format!("memory-backend-memfd,id=memory,size={MEMORY},share=on"))
            .args(&self.qemu);
        if let Some(kernel) = &self.kernel {
            let image = image("guest");
            command
                .arg("-kernel")
                .arg(image.join("kernel"))
                .arg("-initrd")
                .arg(image.join("initramfs"))
                .args(["-append", kernel]);
        }
        if !self.inputs.is_empty() {
            command.args(self.inputs_drive());
        }
        command
    }

    /// An archive on a read-only disk of its own, told by its serial number.
    fn inputs_drive(&self) -> [String; 4] {
        let archive = self.file("inputs");
        let mut tar = tool("tar");
        tar.arg("--create").arg("--file").arg(&archive);
        for file in &self.inputs {
            tar.arg("--directory")
                .arg(file.parent().expect("a file lies in a directory"))
                .arg(file.file_name().expect("a file has a name"));
        }
        succeed(&mut tar);
        [
            "-blockdev".into(),
            format!(
                "driver=raw,node-name=inputs,read-only=on,file.driver=file,file.filename={}",
                archive.display()
            ),
            "-device".into(),
            "virtio-blk-pci,drive=inputs,serial=inputs".into(),
        ]
    }
}

/// `tcg`, an emulated CPU, unless VM_ACCEL says otherwise: KVM within a VM may hang.
fn accelerator() -> &'static str {
    match std::env::var("VM_ACCEL") {
        Ok(accelerator) if accelerator == "kvm" => "kvm",
        Ok(other) if other != "tcg" => panic!("VM_ACCEL={other}: tcg or kvm"),
        _ => "tcg",
    }
}

/// The directory of an image that vm-images/build.sh makes: `guest` or `disk`. Made by the first who asks; a test asks once (what
/// packages there are takes apt seconds to say).
///
/// # Panics
/// When it cannot be made, with what the script said.
pub fn image(what: &str) -> PathBuf {
    static MADE: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../vm-images/build.sh");
    let make = || PathBuf::from(succeed(Command::new(script).arg(what).stdin(Stdio::null())).trim());
    let mut made = MADE.lock().expect("an image could be made");
    made.entry(what.to_owned()).or_insert_with(make).clone()
}

/// A thread that sends every line of the console, and writes all of it to a file.
fn console_lines(qemu: &mut Child, console: &Path) -> Receiver<String> {
    let mut from = BufReader::new(qemu.stdout.take().expect("piped"));
    let mut to = File::create(console).expect("a file for the console");
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        while from.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            let _ = writeln!(to, "{line}");
            let _ = send.send(line);
            bytes.clear();
        }
    });
    receive
}

/// A running machine; ended with the value.
pub struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    console: PathBuf,
    errors: PathBuf,
    qmp_socket: PathBuf,
    qmp: Option<Qmp>,
}

impl Guest {
    /// Waits until the guest says something that `wanted` takes.
    ///
    /// # Panics
    /// When it fails, ends or is silent for too long before.
    pub fn says<T>(&mut self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + GUEST_PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("waited {GUEST_PATIENCE:?} in vain for the guest: {what}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the guest ended before: {what}\n{}", self.last_words())
                }
            };
            assert!(!line.contains("Kernel panic"), "waiting for {what}: {line}");
            let Some((_, said)) = line.split_once(MARK) else {
                continue;
            };
            if let Some(value) = wanted(said) {
                return value;
            }
            assert!(!said.starts_with("FAIL"), "waiting for {what}: {said}");
        }
    }

    /// Waits until the script stops at this place.
    ///
    /// # Panics
    /// When it fails, ends or is silent for too long before.
    pub fn is_at(&mut self, place: &str) {
        self.says(place, |said| {
            (said.strip_prefix("at ") == Some(place)).then_some(())
        });
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// When QEMU has ended.
    pub fn go(&mut self) {
        self.input.write_all(b"go\n").expect("QEMU runs");
    }

    /// Waits until the script has passed and the machine is off.
    ///
    /// # Panics
    /// When it fails, or QEMU ends in another way.
    pub fn passes(mut self) {
        self.says("PASS", |said| said.starts_with("PASS").then_some(()));
        let status = self.ends();
        assert!(status.success(), "QEMU ended with {status}");
    }

    /// Waits until QEMU has ended.
    ///
    /// # Panics
    /// When it does not.
    pub fn ends(&mut self) -> ExitStatus {
        wait_for("QEMU ends", || self.qemu.try_wait().expect("own child"))
    }

    /// kill -9 of QEMU, as a power cut of the machine.
    pub fn kill(mut self) {
        self.qemu.kill().expect("own child");
        self.qemu.wait().expect("own child");
    }

    /// A QMP command that must succeed; gives what it returns.
    ///
    /// # Panics
    /// When it fails.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        self.try_qmp(command, arguments.clone())
            .unwrap_or_else(|error| panic!("QMP {command} {arguments}: {error}"))
    }

    /// A QMP command that may fail; gives what it returns.
    ///
    /// # Errors
    /// QEMU's.
    pub fn try_qmp(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.monitor().call(command, arguments)
    }

    /// Waits for a QMP event that `wanted` takes.
    ///
    /// # Panics
    /// When it does not come.
    pub fn event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) {
        self.monitor().event(name, wanted);
    }

    fn monitor(&mut self) -> &mut Qmp {
        let socket = &self.qmp_socket;
        self.qmp.get_or_insert_with(|| Qmp::connect(socket))
    }

    /// All that the console has shown.
    pub fn console(&self) -> String {
        std::fs::read_to_string(&self.console).unwrap_or_default()
    }

    fn last_words(&self) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        let errors = std::fs::read_to_string(&self.errors).unwrap_or_default();
        format!("--- the guest's console, last lines ---\n{tail}\n--- QEMU ---\n{errors}---")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.last_words());
        }
    }
}

/// QEMU's monitor: one JSON document a line, answers and events mixed.
struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    fn connect(socket: &Path) -> Self {
        let stream = wait_for("QEMU's monitor", || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        assert!(qmp.read()["QMP"].is_object(), "QMP greets");
        qmp.call("qmp_capabilities", json!({})).expect("QMP begins");
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QMP answers");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP is no JSON ({e}): {line}"))
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{request}").expect("QMP takes commands");
        loop {
            let mut answer = self.read();
            if answer["event"].is_string() {
                self.events.push(answer);
            } else if answer["error"].is_object() {
                return Err(answer["error"].take());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    fn event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) {
        let is_wanted = |event: &Value| event["event"] == name && wanted(&event["data"]);
        while !self.events.iter().any(is_wanted) {
            let event = self.read();
            self.events.push(event);
        }
        self.events.retain(|event| !is_wanted(event));
    }
}

/// An NBD attachment as QMP's `blockdev-add` takes it.
///
/// # Panics
/// When the attachment has no URI.
pub fn nbd_blockdev(attached: &Value, node: &str) -> Value {
    let (socket, export) = parse_uri(attached["uri"].as_str().expect("a URI"));
    json!({
        "driver": "nbd",
        "node-name": node,
        "server": {"type": "unix", "path": socket},
        "export": export,
        "reconnect-delay": 60,
        "cache": {"direct": true},
        "discard": "unmap",
    })
}
