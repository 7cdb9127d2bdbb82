//! The front-end of these suites and the client `blkio` do what front-ends do: another back-end, QEMU's, serves them both. What they
//! then find wrong with vold is vold's. What both offer is the table in docs/VHOST-USER.md.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;

use tempfile::TempDir;
use vold_tests::content::bytes;
use vold_tests::disk::{Ask, Disk};
use vold_tests::tools::{docs_have_rows, run, tool};
use vold_tests::vhost::*;
use vold_tests::wait_for;

/// qemu-storage-daemon with a file of zeros as a device.
struct Qemu {
    process: Child,
    socket: PathBuf,
    _directory: TempDir,
}

impl Qemu {
    fn start() -> Self {
        let directory = tempfile::tempdir_in(vold_tests::vold::temp_base()).unwrap();
        let path = |name: &str| directory.path().join(name);
        File::create(path("image")).unwrap().set_len(16 << 20).unwrap();
        let socket = path("sock");
        let process = tool("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=image,discard=unmap,filename={}",
                path("image").display()
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=disk,node-name=image,writable=on,num-queues=2,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .spawn()
            .unwrap();
        let is_there = |socket: &Path| socket.exists().then_some(());
        wait_for("qemu-storage-daemon listens", || is_there(&socket));
        Self {
            process,
            socket,
            _directory: directory,
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_front_end_is_served_by_qemus_back_end() {
    let qemu = Qemu::start();
    for features in [
        Shape::default().features,
        Shape::default().features & !F_EVENT_IDX,
    ] {
        let shape = Shape {
            queues: 2,
            features,
            ..Shape::default()
        };
        let mut fe = FrontEnd::connect_as(&qemu.socket, shape);
        assert_eq!(fe.capacity(), 16 << 20);
        for i in 0..200u64 {
            fe.write(i * 8192, &bytes(i, 8192)).unwrap();
        }
        assert_eq!(fe.call(T_FLUSH, 0, &[], 0).status, S_OK);
        for i in 0..200u64 {
            assert!(fe.read(i * 8192, 8192).unwrap() == bytes(i, 8192));
        }
        // Both queues full, over and over.
        for _ in 0..20 {
            for queue in 0..2 {
                for i in 0..20 {
                    fe.submit(queue, T_IN, i * 16, &[], 8192);
                }
                fe.notify(queue);
            }
            for queue in 0..2 {
                for _ in 0..20 {
                    assert_eq!(fe.complete(queue).status, S_OK);
                }
            }
        }
        assert_eq!(fe.call(T_WRITE_ZEROES, 0, &segment(0, 16, 0), 0).status, S_OK);
        assert!(fe.read(0, 8192).unwrap() == vec![0; 8192]);
        assert_eq!(fe.call(T_IN, 1 << 40, &[], 512).status, S_IOERR);

        // A table of its own for a chain; and a chain that loops.
        let (at, _) = fe.spare;
        fe.write_header(at, T_IN, 16);
        let parts = [
            Part::readable(at, 16),
            Part::writable(at + 4096, 4096),
            Part::writable(at + 64, 1),
        ];
        let chain = fe.queues[0].indirect_chain(&fe.memory, at + 8192, &parts);
        assert_eq!(fe.judge(chain, at + 64), Some(S_OK));
        assert!(fe.memory.read(at + 4096, 4096) == bytes(1, 8192)[..4096]);
        assert_eq!(
            fe.stop_queue(0).unwrap() as u16,
            fe.queues[0].used_index(&fe.memory)
        );
    }
}

#[test]
fn blkio_is_served_by_qemus_back_end() {
    let qemu = Qemu::start();
    let mut disk = Disk::connect(&qemu.socket, 2, 64, 1 << 20).unwrap();
    assert_eq!(disk.capacity().unwrap(), 16 << 20);
    for i in 0..16 {
        disk.write(i << 20, &bytes(i, 1 << 20));
    }
    assert_eq!(disk.call(Ask::Flush), 0);
    for i in 0..16 {
        assert!(disk.read(i << 20, 1 << 20) == bytes(i, 1 << 20));
    }
    let zeroes = Ask::WriteZeroes {
        at: 512,
        len: 1024,
        may_unmap: true,
    };
    assert_eq!(disk.call(zeroes), 0);
    assert!(disk.read(512, 1024) == vec![0; 1024]);
}

/// Device features by bit, and protocol features by bit, as docs/VHOST-USER.md has them.
const FEATURES: [(u32, &str); 14] = [
    (32, "VIRTIO 1 (32)"),
    (28, "indirect descriptors (28)"),
    (29, "event index (29)"),
    (34, "packed ring (34)"),
    (9, "FLUSH (9)"),
    (11, "CONFIG_WCE (11)"),
    (13, "DISCARD (13)"),
    (14, "WRITE_ZEROES (14)"),
    (12, "MQ (12)"),
    (10, "TOPOLOGY (10)"),
    (6, "BLK_SIZE (6)"),
    (2, "SEG_MAX (2)"),
    (1, "SIZE_MAX (1)"),
    (26, "log of written pages (26)"),
];
const PROTOCOL_FEATURES: [(u32, &str); 11] = [
    (0, "MQ (0)"),
    (9, "CONFIG (9)"),
    (3, "REPLY_ACK (3)"),
    (5, "BACKEND_REQ (5)"),
    (15, "CONFIGURE_MEM_SLOTS (15)"),
    (12, "INFLIGHT_SHMFD (12)"),
    (1, "LOG_SHMFD (1)"),
    (13, "RESET_DEVICE (13)"),
    (16, "STATUS (16)"),
    (20, "GET_VRING_BASE_INFLIGHT (20)"),
    (23, "GET_VRING_BASE_SKIP_DRAIN (23)"),
];

/// The answers, a row of the table each.
fn features(socket: &Path) -> Vec<(&'static str, bool)> {
    let wire = wait_for("there is a place", || Wire::connect(socket).ok());
    let device = wire.number(GET_FEATURES).unwrap();
    let protocol = wire.number(GET_PROTOCOL_FEATURES).unwrap();
    let has = |bits: u64| move |&(bit, name): &(u32, &'static str)| (name, bits >> bit & 1 != 0);
    let device = FEATURES.iter().map(has(device));
    device
        .chain(PROTOCOL_FEATURES.iter().map(has(protocol)))
        .collect()
}

#[test]
fn the_table_in_the_docs_is_what_the_programs_answer() {
    let vold = vold_tests::Vold::start();
    let qemu = Qemu::start();
    let ours = features(&vold.with_vhost_volume(1, vold_tests::vold::STORE, "8M"));
    let theirs = features(&qemu.socket);
    let rows: Vec<String> = (ours.iter().zip(&theirs))
        .map(|((name, ours), (_, theirs))| {
            let yes = |has: bool| if has { "yes" } else { "no" };
            format!("| {name} | {} | {} |", yes(*ours), yes(*theirs))
        })
        .collect();
    let lacking: Vec<&str> = ours
        .iter()
        .filter(|(_, has)| !has)
        .map(|(name, _)| *name)
        .collect();
    assert_eq!(lacking, ["packed ring (34)"]);
    let are_those = run("qemu-storage-daemon", ["--version"]).contains(" 10.");
    docs_have_rows("VHOST-USER.md", &rows, are_those);
}
