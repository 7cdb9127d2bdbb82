//! The front-end of these suites and the client `blkio` do what front-ends do: another back-end, QEMU's, serves them both. What they
//! then find wrong with vold is vold's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;

use tempfile::TempDir;
use vold_tests::content::bytes;
use vold_tests::disk::{Ask, Disk};
use vold_tests::tools::tool;
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
