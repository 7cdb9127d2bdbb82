//! What every engine must do, run against both, through the runtime and the `Disk` handle.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::runtime::net::{Listener, Stream};
use crate::runtime::{Runtime, SendPart, now, sleep, spawn, timeout, yield_now};

const BLOCK: usize = 4096;
/// Long enough that only a hang reaches it.
const FAR: Duration = Duration::from_secs(120);

fn runtime_on(engine: EngineChoice) -> Runtime {
    Runtime::new(
        make_driver(engine)
            .expect("both engines run where the tests run")
            .0,
    )
}

struct Scratch {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Scratch {
    fn new(blocks: usize) -> (Self, DiskFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = DiskFile::create(&path, (blocks * BLOCK) as u64, true).unwrap();
        (Self { _dir: dir, path }, file)
    }
}

fn lock_free(path: &Path) -> bool {
    match DiskFile::open(path, OpenMode::ReadWrite, true, Duration::ZERO) {
        Ok(_) => true,
        Err(e) if e.kind() == Kind::Busy => false,
        Err(e) => panic!("{e}"),
    }
}

fn pattern(seed: usize) -> Buf {
    let mut buf = Buf::zeroed(BLOCK);
    for (i, byte) in buf.iter_mut().enumerate() {
        *byte = (seed.wrapping_mul(31) ^ i.wrapping_mul(7)) as u8;
    }
    buf
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(FAR, future).await.expect("hung")
}

/// A runtime's end of a socket pair, and the other end for plain blocking use.
fn socket_pair() -> (Stream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Stream::new(OwnedFd::from(ours)), theirs)
}

fn what_was_written_is_read_back(engine: EngineChoice) {
    let (_scratch, file) = Scratch::new(64);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        for i in 0..64 {
            disk.write((i * BLOCK) as u64, Rc::new(pattern(i)), 0..BLOCK)
                .await
                .unwrap();
        }
        disk.sync().await.unwrap();
        for i in (0..64).rev() {
            let (result, buf) = disk.read((i * BLOCK) as u64, Buf::zeroed(BLOCK), 0..BLOCK).await;
            result.unwrap();
            assert_eq!(&buf[..], &pattern(i)[..], "block {i}");
        }
        // Parts of buffers, several blocks at once.
        let buf = Rc::new(Buf::copy_of(
            &[pattern(7).to_vec(), pattern(8).to_vec(), pattern(9).to_vec()].concat(),
        ));
        disk.write(0, buf, BLOCK..3 * BLOCK).await.unwrap();
        let (result, buf) = disk
            .read(BLOCK as u64, Buf::zeroed(3 * BLOCK), BLOCK..2 * BLOCK)
            .await;
        result.unwrap();
        assert!(buf[..BLOCK].iter().chain(&buf[2 * BLOCK..]).all(|b| *b == 0));
        assert_eq!(&buf[BLOCK..2 * BLOCK], &pattern(9)[..]);
        disk.detach();
    }));
}

fn a_read_across_the_end_is_a_partial_transfer(engine: EngineChoice) {
    let (_scratch, file) = Scratch::new(4);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        let (result, _) = disk
            .read(3 * BLOCK as u64, Buf::zeroed(2 * BLOCK), 0..2 * BLOCK)
            .await;
        let error = result.expect_err("half of it is behind the end");
        assert!(
            matches!(error.cause, DiskErrorCause::PartialTransfer(BLOCK)),
            "{error}"
        );
        let (result, _) = disk.read(4 * BLOCK as u64, Buf::zeroed(BLOCK), 0..BLOCK).await;
        let error = result.expect_err("all of it is behind the end");
        assert!(
            matches!(error.cause, DiskErrorCause::PartialTransfer(0)),
            "{error}"
        );
    }));
}

fn an_error_of_the_system_comes_back_with_the_buffer(engine: EngineChoice) {
    let (scratch, file) = Scratch::new(4);
    drop(file);
    let file = DiskFile::open(&scratch.path, OpenMode::ReadOnly, true, Duration::ZERO).unwrap();
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        let buf = Rc::new(pattern(1));
        let error = disk
            .write(0, buf.clone(), 0..BLOCK)
            .await
            .expect_err("opened for reading");
        assert!(
            matches!(&error.cause, DiskErrorCause::Os(e) if e.raw_os_error() == Some(libc::EBADF)),
            "{error}"
        );
        assert_eq!(Rc::strong_count(&buf), 1, "the engine kept nothing");
    }));
}

fn ten_thousand_interleaved_operations_all_arrive(engine: EngineChoice) {
    const TASKS: usize = 100;
    let (_scratch, file) = Scratch::new(TASKS);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Rc::new(Disk::attach(&file).unwrap());
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let disk = disk.clone();
                spawn(async move {
                    let at = (task * BLOCK) as u64;
                    let mut buf = Buf::zeroed(BLOCK);
                    for round in 0..50 {
                        let written = Rc::new(pattern(task * 1000 + round));
                        disk.write(at, written.clone(), 0..BLOCK).await.unwrap();
                        let (result, back) = disk.read(at, buf, 0..BLOCK).await;
                        result.unwrap();
                        assert_eq!(&back[..], &written[..], "task {task}, round {round}");
                        buf = back;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    }));
}

fn more_operations_than_the_queue_holds_start_at_once(engine: EngineChoice) {
    let (_scratch, file) = Scratch::new(16);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Rc::new(Disk::attach(&file).unwrap());
        let driver = disk.driver().clone();
        // All are submitted before the engine gets its first turn, cancellable ones among them.
        let (idle, _other_end) = socket_pair();
        let mut reads = Vec::new();
        for i in 0..6000 {
            let op = Op::Read {
                file: disk.file,
                at: ((i % 16) * BLOCK) as u64,
                buf: Buf::zeroed(BLOCK),
                range: 0..BLOCK,
            };
            reads.push(submit(&driver, op));
            if i % 10 == 0 {
                let buf = Buf::zeroed(16);
                drop(Box::pin(idle.recv(buf, 0..16)));
                let fd = Rc::new(idle.socket().try_clone().unwrap());
                drop(submit(&driver, Op::Readable { fd: fd.clone() }));
                drop(submit(&driver, Op::HangUp { socket: fd }));
            }
        }
        for read in reads {
            assert_eq!(read.await.result.unwrap(), BLOCK);
        }
    }));
}

fn operations_nobody_waits_for_end_before_the_memory_goes(engine: EngineChoice) {
    let (scratch, file) = Scratch::new(64);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        for i in 0..64 {
            let op = Op::Write {
                file: disk.file,
                at: (i * BLOCK) as u64,
                buf: Rc::new(pattern(i)),
                range: 0..BLOCK,
            };
            drop(submit(disk.driver(), op));
        }
        yield_now().await;
        // Given back while transfers run: the engine lets go when the last has ended.
        disk.detach();
    }));
    drop(runtime);
    assert!(
        lock_free(&scratch.path),
        "no transfer and no table holds the file"
    );
}

fn the_lock_lasts_until_the_driver_is_gone(engine: EngineChoice) {
    let (scratch, file) = Scratch::new(8);
    let runtime = runtime_on(engine);
    let path = scratch.path.clone();
    runtime.block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        drop(file);
        assert!(!lock_free(&path));
        disk.detach();
        assert!(lock_free(&path), "detached, so free at once");
        let file = DiskFile::open(&path, OpenMode::ReadWrite, true, Duration::ZERO).unwrap();
        // Never detached: only the driver's end lets it go.
        let Backing::Os(descriptor) = file.backing() else {
            panic!("a real file")
        };
        crate::runtime::runtime().attach(descriptor.clone()).unwrap();
    }));
    assert!(!lock_free(&scratch.path));
    drop(runtime);
    assert!(lock_free(&scratch.path));
}

fn two_threads_share_one_file(engine: EngineChoice) {
    let (_scratch, file) = Scratch::new(128);
    let threads: Vec<_> = (0..2)
        .map(|half| {
            let file = file.clone();
            std::thread::spawn(move || {
                runtime_on(engine).block_on(within(async move {
                    let disk = Disk::attach(&file).unwrap();
                    for i in half * 64..half * 64 + 64 {
                        disk.write((i * BLOCK) as u64, Rc::new(pattern(i)), 0..BLOCK)
                            .await
                            .unwrap();
                    }
                    disk.sync().await.unwrap();
                }));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    runtime_on(engine).block_on(within(async move {
        let disk = Disk::attach(&file).unwrap();
        for i in 0..128 {
            let (result, buf) = disk.read((i * BLOCK) as u64, Buf::zeroed(BLOCK), 0..BLOCK).await;
            result.unwrap();
            assert_eq!(&buf[..], &pattern(i)[..], "block {i}");
        }
    }));
}

fn files_come_and_go_many_times(engine: EngineChoice) {
    let (_scratch, file) = Scratch::new(1);
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        for round in 0..400 {
            let disk = Disk::attach(&file).unwrap();
            let (result, _) = disk.read(0, Buf::zeroed(BLOCK), 0..BLOCK).await;
            result.unwrap_or_else(|e| panic!("round {round}: {e}"));
            disk.detach();
        }
    }));
}

fn timers_fire_in_order_and_not_early(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    let order = Rc::new(RefCell::new(Vec::new()));
    let seen = order.clone();
    runtime.block_on(within(async move {
        let tasks: Vec<_> = [30, 10, 20, 0]
            .into_iter()
            .map(|ms| {
                let order = order.clone();
                spawn(async move {
                    let start = now();
                    sleep(Duration::from_millis(ms)).await;
                    assert!(now() - start >= Duration::from_millis(ms));
                    order.borrow_mut().push(ms);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    }));
    assert_eq!(*seen.borrow(), [0, 10, 20, 30]);
}

fn another_thread_calls_in_and_gets_its_answer(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    let remote = runtime.remote();
    let caller = std::thread::spawn(move || {
        let other = runtime_on(engine);
        other.block_on(async move {
            let mut sum = 0;
            for i in 0..100u64 {
                sum += remote.call(move || async move { i * 2 }).await.unwrap();
            }
            let done = remote.call(|| async { "last" }).await.unwrap();
            (sum, done)
        })
    });
    runtime.block_on(within(async move {
        while !caller.is_finished() {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(caller.join().unwrap(), (9900, "last"));
    }));
}

fn storms_of_wakes_are_neither_lost_nor_harmful(engine: EngineChoice) {
    const EACH: usize = 5000;
    let runtime = runtime_on(engine);
    let unparker = runtime.driver().unparker();
    let seen = Arc::new(AtomicUsize::new(0));
    let storms: Vec<_> = (0..4)
        .map(|_| {
            let (remote, unparker, seen) = (runtime.remote(), unparker.clone(), seen.clone());
            std::thread::spawn(move || {
                for _ in 0..EACH {
                    unparker.unpark();
                    let seen = seen.clone();
                    remote
                        .post(move || {
                            seen.fetch_add(1, Ordering::Relaxed);
                        })
                        .unwrap();
                }
            })
        })
        .collect();
    runtime.block_on(within(async move {
        while seen.load(Ordering::Relaxed) < 4 * EACH {
            sleep(Duration::from_millis(1)).await;
        }
    }));
    for storm in storms {
        storm.join().unwrap();
    }
}

fn a_peer_gets_its_bytes_back(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (stream, mut peer) = socket_pair();
        let client = std::thread::spawn(move || {
            let mut total = 0;
            for len in [1, 100, 4096, 60_000] {
                let sent = vec![len as u8; len];
                peer.write_all(&sent).unwrap();
                let mut back = vec![0; len];
                peer.read_exact(&mut back).unwrap();
                assert_eq!(back, sent);
                total += len;
            }
            total
        });
        let mut echoed = 0;
        loop {
            let (result, buf) = stream.recv(Buf::zeroed(8192), 0..8192).await;
            let n = result.unwrap();
            if n == 0 {
                break;
            }
            echoed += n;
            stream
                .send(vec![SendPart::Buf { buf, range: 0..n }])
                .await
                .unwrap();
        }
        assert_eq!(client.join().unwrap(), echoed);
    }));
}

fn eight_mebibytes_of_many_parts_arrive_in_order(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (stream, mut peer) = socket_pair();
        let mut parts = Vec::new();
        let mut expected = Vec::new();
        for i in 0..1500usize {
            parts.push(SendPart::inline(&(i as u32).to_be_bytes()));
            expected.extend((i as u32).to_be_bytes());
            parts.push(SendPart::Zeros(1000 + i % 3));
            expected.resize(expected.len() + 1000 + i % 3, 0);
            parts.push(SendPart::Buf {
                buf: pattern(i),
                range: i % 100..BLOCK,
            });
            expected.extend(&pattern(i)[i % 100..]);
        }
        parts.push(SendPart::Zeros(1 << 20));
        expected.resize(expected.len() + (1 << 20), 0);
        parts.push(SendPart::Bytes(b"end".to_vec().into()));
        expected.extend(b"end");
        assert!(expected.len() > 8 << 20, "{} bytes", expected.len());
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            all
        });
        stream.send(parts).await.unwrap();
        drop(stream);
        while !reader.is_finished() {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(
            reader.join().unwrap() == expected,
            "bytes lost, changed or out of order"
        );
    }));
}

fn a_gone_peer_is_an_error_and_no_signal(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (stream, peer) = socket_pair();
        drop(peer);
        let error = stream
            .send(vec![SendPart::Zeros(10)])
            .await
            .expect_err("nobody there");
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        let (result, _) = stream.recv(Buf::zeroed(10), 0..10).await;
        assert_eq!(result.unwrap(), 0);
    }));
}

fn sockets_in_non_blocking_mode_work_too(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stream = Stream::new(OwnedFd::from(ours));
        let receiving = spawn({
            let stream = stream.clone();
            async move { stream.recv(Buf::zeroed(100), 0..100).await }
        });
        sleep(Duration::from_millis(5)).await;
        theirs.write_all(b"late").unwrap();
        let (result, buf) = receiving.await;
        assert_eq!(&buf[..result.unwrap()], b"late");
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).map(|_| all.len())
        });
        stream.send(vec![SendPart::Zeros(4 << 20)]).await.unwrap();
        drop(stream);
        while !reader.is_finished() {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(reader.join().unwrap().unwrap(), 4 << 20);
    }));
}

fn connections_are_accepted_until_the_listener_closes(engine: EngineChoice) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let listener = Rc::new(Listener::unix(UnixListener::bind(&path).unwrap()).unwrap());
        let accepting = spawn({
            let listener = listener.clone();
            async move {
                let mut accepted = 0;
                loop {
                    match listener.accept().await {
                        Ok(stream) => {
                            accepted += 1;
                            stream.send(vec![SendPart::inline(b"hello")]).await.unwrap();
                        }
                        Err(e) => return (accepted, e),
                    }
                }
            }
        });
        for _ in 0..3 {
            let path = path.clone();
            let client = std::thread::spawn(move || {
                let mut greeting = String::new();
                UnixStream::connect(path)
                    .unwrap()
                    .read_to_string(&mut greeting)
                    .unwrap();
                greeting
            });
            while !client.is_finished() {
                sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(client.join().unwrap(), "hello");
        }
        // Time for the next accept to be pending.
        sleep(Duration::from_millis(5)).await;
        listener.close();
        let (accepted, error) = accepting.await;
        assert_eq!((accepted, error.raw_os_error()), (3, Some(libc::EINVAL)));
        let error = listener.accept().await.err().expect("closed for good");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }));
}

fn a_forgotten_receive_is_cancelled_and_lets_its_socket_go(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (stream, mut peer) = socket_pair();
        let waited = timeout(Duration::from_millis(5), stream.recv(Buf::zeroed(100), 0..100)).await;
        assert!(waited.is_none(), "nothing was sent");
        drop(stream);
        let closed = std::thread::spawn(move || peer.read(&mut [0; 1]));
        while !closed.is_finished() {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(
            closed.join().unwrap().unwrap(),
            0,
            "end of stream: the socket is closed"
        );
    }));
}

fn shutdown_ends_a_pending_receive(engine: EngineChoice) {
    let runtime = runtime_on(engine);
    runtime.block_on(within(async move {
        let (stream, _peer) = socket_pair();
        let receiving = spawn({
            let stream = stream.clone();
            async move { stream.recv(Buf::zeroed(100), 0..100).await.0 }
        });
        sleep(Duration::from_millis(5)).await;
        stream.shutdown();
        assert_eq!(receiving.await.unwrap(), 0);
    }));
}

fn a_hang_up_is_noticed_while_bytes_are_still_to_be_received(engine: EngineChoice) {
    runtime_on(engine).block_on(within(async {
        for half in [true, false] {
            let (ours, mut theirs) = socket_pair();
            theirs.write_all(b"unread").unwrap();
            let noticed = spawn({
                let ours = ours.clone();
                async move { ours.hung_up().await }
            });
            sleep(Duration::from_millis(5)).await;
            assert!(!noticed.is_finished(), "bytes alone are no hang-up");
            if half {
                theirs.shutdown(std::net::Shutdown::Write).unwrap();
            } else {
                drop(theirs);
            }
            noticed.await;
            let (result, buf) = ours.recv(Buf::zeroed(16), 0..16).await;
            assert_eq!(&buf[..result.unwrap()], b"unread");
            // One's own end counts, and what has happened is noticed at once.
            ours.shutdown();
            ours.hung_up().await;
        }
    }));
}

fn a_dropped_runtime_ends_its_tasks_and_closes_what_they_held(engine: EngineChoice) {
    let (scratch, file) = Scratch::new(8);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut peer = {
        let runtime = runtime_on(engine);
        let (stream, peer) = socket_pair();
        let listener = Listener::unix(UnixListener::bind(&socket).unwrap()).unwrap();
        // Tasks that wait for a disk, a socket, a listener, a timer, another task, and for nothing at all.
        let disk = Rc::new(Disk::attach(&file).unwrap());
        drop(file);
        spawn(async move {
            let mut buf = Buf::zeroed(BLOCK);
            loop {
                buf = disk.read(0, buf, 0..BLOCK).await.1;
            }
        })
        .detach();
        let receiving = spawn({
            let stream = stream.clone();
            async move { stream.recv(Buf::zeroed(100), 0..100).await }
        });
        spawn(async move {
            let _ = receiving.await;
        })
        .detach();
        spawn(async move {
            let _ = listener.accept().await;
        })
        .detach();
        spawn({
            let stream = stream.clone();
            async move {
                sleep(FAR).await;
                drop(stream);
            }
        })
        .detach();
        spawn(async move {
            std::future::pending::<()>().await;
            drop(stream);
        })
        .detach();
        runtime.block_on(async { sleep(Duration::from_millis(5)).await });
        drop(runtime);
        peer
    };
    assert!(lock_free(&scratch.path), "the disk's file is closed");
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0, "the stream is closed");
    assert!(UnixStream::connect(&socket).is_err(), "the listener is closed");
}

/// Makes io_uring_setup fail with `errno` for this thread, as a container's filter does.
fn forbid_io_uring(errno: i32) {
    let statement = |code: u32, jump_if_true: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: jump_if_true,
        jf: 0,
        k,
    };
    let mut program = [
        // The number of the system call is the first word of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        statement(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the filter and its program live until the call returns, which copies them; both settings concern this
    // thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let installed = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter);
        assert_eq!(installed, 0, "{}", io::Error::last_os_error());
    }
}

#[test]
fn where_io_uring_is_refused_threads_take_over_and_the_line_says_why() {
    for (errno, reason) in [(libc::EPERM, "forbidden"), (libc::ENOSYS, "no io_uring")] {
        std::thread::spawn(move || {
            forbid_io_uring(errno);
            let (driver, line) = make_driver(EngineChoice::Auto).unwrap();
            assert_eq!(driver.name(), "threads");
            assert!(line.contains(reason) && !line.contains('\n'), "{line}");
            what_was_written_is_read_back(EngineChoice::Auto);
            let error = make_driver(EngineChoice::Uring)
                .err()
                .expect("forced, and refused");
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains(reason), "{error}");
        })
        .join()
        .unwrap();
    }
    let (driver, line) = make_driver(EngineChoice::Auto).unwrap();
    assert_eq!(
        (driver.name(), line.as_str()),
        ("io_uring", "I/O engine: io_uring")
    );
}

#[test]
fn more_may_wait_on_the_threads_engine_than_the_process_may_have_descriptors() {
    const CHILD: &str = "VOLD_TEST_FEW_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        // The limit is the whole process' own.
        let name = "disk::tests::more_may_wait_on_the_threads_engine_than_the_process_may_have_descriptors";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("1 passed"),
            "{said}"
        );
        return;
    }
    let few = libc::rlimit {
        rlim_cur: 64,
        rlim_max: 64,
    };
    // SAFETY: the value is a valid limit, and this process runs this test alone.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few) }, 0);
    runtime_on(EngineChoice::Threads).block_on(within(async {
        let (ours, theirs) = socket_pair();
        let waits: Vec<_> = (0..200)
            .map(|_| {
                let ours = ours.clone();
                spawn(async move { ours.hung_up().await })
            })
            .collect();
        sleep(Duration::from_millis(5)).await;
        drop(theirs);
        for wait in waits {
            wait.await;
        }
    }));
}

#[test]
fn a_block_device_is_claimed_and_classified_with_what_is_below_it() {
    let (scratch, file) = Scratch::new(1024);
    drop(file);
    let output = std::process::Command::new("losetup")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["--find", "--show", "--direct-io=on"])
        .arg(&scratch.path)
        .output()
        .expect("losetup is missing: apt-get install mount");
    assert!(
        output.status.success(),
        "losetup failed: {}; block devices are tested on loop devices: run as root with /dev/loop-control present",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let outcome = std::panic::catch_unwind(|| {
        let file = DiskFile::open(&device, OpenMode::ReadWrite, false, Duration::ZERO).unwrap();
        assert!(file.is_block_device() && file.is_direct());
        assert_eq!(file.size_bytes(), 1024 * BLOCK as u64);
        let error = DiskFile::open(&device, OpenMode::ReadWrite, false, Duration::ZERO).expect_err("claimed");
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        let error = DiskFile::create(&device, 4096, false).expect_err("there already");
        assert_eq!(error.kind(), Kind::Exists, "{error}");
        let medium = classify(&file);
        assert!(medium.reason.contains("(loop) on "), "{medium:?}");
        for engine in [EngineChoice::Uring, EngineChoice::Threads] {
            let file = file.clone();
            runtime_on(engine).block_on(within(async move {
                let disk = Disk::attach(&file).unwrap();
                disk.write(BLOCK as u64, Rc::new(pattern(3)), 0..BLOCK)
                    .await
                    .unwrap();
                disk.sync().await.unwrap();
                let (result, buf) = disk.read(BLOCK as u64, Buf::zeroed(BLOCK), 0..BLOCK).await;
                result.unwrap();
                assert_eq!(&buf[..], &pattern(3)[..]);
            }));
        }
        println!("{medium:?}");
    });
    let detached = std::process::Command::new("losetup")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .arg("--detach")
        .arg(&device)
        .status();
    assert!(detached.expect("ran above").success());
    outcome.unwrap();
}

macro_rules! on_both_engines {
    ($($name:ident)*) => {
        mod uring {
            $(#[test] fn $name() { super::$name(super::EngineChoice::Uring) })*
        }
        mod threads {
            $(#[test] fn $name() { super::$name(super::EngineChoice::Threads) })*
        }
    };
}

on_both_engines! {
    what_was_written_is_read_back
    a_read_across_the_end_is_a_partial_transfer
    an_error_of_the_system_comes_back_with_the_buffer
    ten_thousand_interleaved_operations_all_arrive
    more_operations_than_the_queue_holds_start_at_once
    operations_nobody_waits_for_end_before_the_memory_goes
    the_lock_lasts_until_the_driver_is_gone
    two_threads_share_one_file
    files_come_and_go_many_times
    timers_fire_in_order_and_not_early
    another_thread_calls_in_and_gets_its_answer
    storms_of_wakes_are_neither_lost_nor_harmful
    a_peer_gets_its_bytes_back
    eight_mebibytes_of_many_parts_arrive_in_order
    a_gone_peer_is_an_error_and_no_signal
    sockets_in_non_blocking_mode_work_too
    connections_are_accepted_until_the_listener_closes
    a_forgotten_receive_is_cancelled_and_lets_its_socket_go
    a_hang_up_is_noticed_while_bytes_are_still_to_be_received
    shutdown_ends_a_pending_receive
    a_dropped_runtime_ends_its_tasks_and_closes_what_they_held
}
