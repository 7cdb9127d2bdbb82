//! A service manager passes listening sockets (LISTEN_FDS): each leads to the attachment of the volume that it is named after, beside
//! the attachment's own socket, and outlives attachments and daemons.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vold_tests::Vold;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::tools::{succeed, tool};
use vold_tests::vhost::*;
use vold_tests::vold::{STORE, temp_base};

/// The protocol's other side: the socket comes on standard input, and is passed on as the first descriptor.
const MANAGER: &str = "\
import os, sys
os.dup2(0, 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES=sys.argv[1])
os.execv(sys.argv[2], sys.argv[2:])
";

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(temp_base()).unwrap()
}

struct Passed {
    listener: UnixListener,
    path: PathBuf,
}

impl Passed {
    fn new(directory: &Path) -> Self {
        let path = directory.join("passed.sock");
        let listener = UnixListener::bind(&path).unwrap();
        Self { listener, path }
    }

    fn serve(&self, vold: &Vold, name: &str) -> Command {
        let serve = vold.serve_command();
        let mut command = tool("python3");
        command
            .args(["-c", MANAGER, name])
            .arg(serve.get_program())
            .args(serve.get_args())
            .stdin(Stdio::from(OwnedFd::from(self.listener.try_clone().unwrap())));
        for (name, value) in serve.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }
}

#[test]
fn a_device_comes_back_over_a_passed_socket_that_waits_where_no_daemon_is() {
    let mut vold = Vold::start();
    let directory = directory();
    let passed = Passed::new(directory.path());
    let own = vold.with_vhost_volume(2, STORE, "8M");
    vold.stop();
    vold.restart_with(passed.serve(&vold, "acme/vol"));
    let mut load = Load::start(&passed.path, "passed");
    load.run(200);
    for kill in [true, false] {
        load.push();
        if kill {
            vold.kill();
        } else {
            vold.stop();
        }
        load.take();
        // The front-end is back before the daemon is.
        let command = passed.serve(&vold, "acme/vol");
        std::thread::scope(|scope| {
            scope.spawn(|| vold.restart_with(command));
            load.front_end.reconnect(&passed.path);
        });
        load.drain();
        load.run(100);
    }
    // The attachment's own socket leads there as well.
    load.drain();
    load.front_end.hang_up();
    load.front_end.reconnect(&own);
    load.run(100);

    // Who waits when the volume is attached anew is turned away: it may be whoever had it before.
    vold.ctl("detach acme/vol --vm vm1");
    load.front_end.wire.ends();
    load.take();
    let early = Wire::connect(&passed.path).unwrap();
    vold.attach_vhost("acme/vol", "vm1");
    early.ends();
    load.front_end.reconnect(&passed.path);
    load.drain();
    load.run(100);
    load.drain();

    // Where another attachment takes over, the socket leads nowhere: it is the source that goes there.
    let incoming = vold.ctl("attach acme/vol --vm vm1 --via vhost-user --incoming");
    let second = Path::new(incoming["socket"].as_str().unwrap());
    let mut target = FrontEnd::connect(second);
    load.front_end.wire.ends();
    let block = bytes(1, Load::BLOCK);
    target.write(0, &block).unwrap();
    let source = Wire::connect(&passed.path).unwrap();
    vold.kill();
    vold.restart_with(passed.serve(&vold, "acme/vol"));
    target.reconnect(second);
    assert!(target.read(0, Load::BLOCK).unwrap() == block);
    assert!(!source.has_ended(), "it waits");
    vold.ctl("detach acme/vol --vm vm1");
    vold.attach_vhost("acme/vol", "vm1");
    source.ends();
    assert!(passed.path.exists());
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn over_nbd_a_passed_socket_lets_in_the_vms_user_and_nobody_else() {
    let mut vold = Vold::start();
    let directory = directory();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let passed = Passed::new(directory.path());
    // Whoever made it let everybody in.
    std::fs::set_permissions(&passed.path, PermissionsExt::from_mode(0o666)).unwrap();
    vold.with_volume(1, STORE, "8M");
    vold.stop();
    vold.restart_with(passed.serve(&vold, "acme/vol"));
    let uri = format!("nbd+unix:///acme/vol?socket={}", passed.path.display());
    let mut client = Client::connect(&uri);
    client.write(4096, &bytes(7, 4096)).unwrap();
    assert!(client.read(4096, 4096).unwrap() == bytes(7, 4096));
    let mut stranger = tool("setpriv");
    stranger
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "/usr/bin/python3", "-c"])
        .arg("import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(len(s.recv(1)))")
        .arg(&passed.path);
    assert_eq!(succeed(&mut stranger).trim(), "0", "a stranger is told nothing");
    // Descriptors that were passed when they were still taken, by whoever connected before there was a daemon.
    vold.stop();
    let early = Wire::connect(&passed.path).unwrap();
    let descriptor = File::open("/dev/null").unwrap();
    early.send(1, &[0; 8], &[descriptor.as_fd()]).unwrap();
    vold.restart_with(passed.serve(&vold, "acme/vol"));
    early.ends();
    let mut client = Client::connect(&uri);
    assert!(client.read(4096, 4096).unwrap() == bytes(7, 4096));
    vold.stop();
}

#[test]
fn a_socket_that_leads_nowhere_is_refused_at_the_start() {
    let mut vold = Vold::start();
    vold.stop();
    let directory = directory();
    let passed = Passed::new(directory.path());
    let said = vold.refuses_to_start(&mut passed.serve(&vold, "connection"));
    assert!(
        said.contains("\"connection\"") && said.contains("FileDescriptorName=CUSTOMER/NAME"),
        "{said}"
    );
    // A volume that is not there yet may come.
    vold.restart_with(passed.serve(&vold, "acme/not-yet"));
    vold.stop();
}
