//! A hostile front-end, as a QEMU that its guest has taken over: messages, descriptors and memory. The worst that it reaches is that
//! its own device ends; what it passes can neither block nor kill the thread that it shares with its neighbour.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::{Rng, RngExt};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use vold_tests::content::seeded;
use vold_tests::load::Load;
use vold_tests::neighbour::{Street, own};
use vold_tests::vhost::*;
use vold_tests::{scale, wait_for};

const MIB: u64 = 1 << 20;

fn greeted(street: &Street) -> FrontEnd {
    FrontEnd::greeted(street.socket(), Shape::default())
}

/// Many requests, as large as they can be, none of them waited for.
fn load(front_end: &mut FrontEnd) -> usize {
    let requests = 20;
    for i in 0..requests {
        let (kind, out, read) = if i % 2 == 0 {
            (T_IN, vec![], DATA_MAX as usize)
        } else {
            (T_OUT, vec![i as u8; DATA_MAX as usize], 0)
        };
        // (The first 2 MiB are not written.)
        front_end.submit(0, kind, 4096 + i * 256, &out, read);
    }
    front_end.queues[0].kick();
    requests as usize
}

/// Descriptors of all sorts that are neither memory nor an eventfd.
fn strange_descriptors(street: &Street) -> Vec<(&'static str, OwnedFd)> {
    let file = street.vold.path("regular");
    std::fs::write(&file, vec![0; 64 << 10]).unwrap();
    let regular = File::options().read(true).write(true).open(&file).unwrap();
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let (socket, other) = UnixStream::pair().unwrap();
    // (Kept, so that the pipe and the socket stay as they are.)
    let device = |path: &str| File::options().read(true).write(true).open(path).unwrap().into();
    vec![
        ("a regular file", regular.into()),
        ("a pipe to read", read_end),
        ("a pipe to write", write_end),
        ("a socket", socket.into()),
        ("another socket", other.into()),
        ("/dev/null", device("/dev/null")),
        ("/dev/zero", device("/dev/zero")),
        ("a directory", File::open("/").unwrap().into()),
        (
            "a path",
            rustix::fs::open(&file, OFlags::PATH, rustix::fs::Mode::empty()).unwrap(),
        ),
        (
            "an epoll",
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::empty()).unwrap(),
        ),
        ("a file of /proc", File::open("/proc/self/status").unwrap().into()),
    ]
}

#[test]
fn unknown_messages() {
    let street = Street::new();
    for request in [
        0,
        4,
        7,
        19,
        20,
        22,
        23,
        26,
        28,
        33,
        35,
        41,
        44,
        99,
        1000,
        u32::MAX,
    ] {
        let front_end = greeted(&street);
        // (4 and 7 are requests that nobody sends any more, and may be taken.)
        let refused = front_end.wire.refuses(request, &[0; 8], &[]);
        println!("request {request}: refused: {refused}");
        assert!(refused || [4, 7, 35].contains(&request), "request {request}");
        drop(front_end);
        street.goes_on();
    }
    street.is_unharmed();
}

#[test]
fn headers_that_make_no_sense() {
    let street = Street::new();
    let header = |request: u32, flags: u32, len: u32| {
        let mut bytes = request.to_le_bytes().to_vec();
        bytes.extend(flags.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes
    };
    for (case, bytes) in [
        ("no version", header(GET_FEATURES, 0, 0)),
        ("version 2", header(GET_FEATURES, 2, 0)),
        ("version 3", header(GET_FEATURES, 3, 0)),
        ("4 GiB", header(SET_MEM_TABLE, 1, u32::MAX)),
        ("2 GiB", header(SET_MEM_TABLE, 1, 1 << 31)),
        ("a megabyte", header(SET_CONFIG, 1, 1 << 20)),
    ] {
        let front_end = greeted(&street);
        front_end.wire.send_bytes(&bytes, &[]).unwrap();
        front_end.wire.ends();
        println!("{case}: ended");
        drop(front_end);
        street.goes_on();
    }
    // Half a header, half a payload, and then nothing more: it waits, and nobody else does. And it goes when the front-end goes.
    for bytes in [
        &header(GET_FEATURES, 1, 0)[..5],
        &header(SET_FEATURES, 1, 8)[..],
        &[&header(SET_FEATURES, 1, 8)[..], &[1, 2, 3]].concat(),
    ] {
        let front_end = greeted(&street);
        front_end.wire.send_bytes(bytes, &[]).unwrap();
        street.goes_on();
        drop(front_end);
        street.serves();
    }
    // Random bytes.
    let mut rng = seeded("headers");
    for _ in 0..scale(20, 500) {
        let front_end = greeted(&street);
        let mut bytes = vec![0; rng.random_range(1..4096)];
        rng.fill_bytes(&mut bytes);
        let _ = front_end.wire.send_bytes(&bytes, &[]);
        drop(front_end);
    }
    street.is_unharmed();
}

#[test]
fn known_messages_of_wrong_sizes() {
    let street = Street::new();
    let mut rng = seeded("sizes");
    for request in 1..=44 {
        for len in [0, 1, 4, 7, 8, 9, 12, 16, 24, 40, 255, 256, 268, 300, 1000, 4096] {
            let front_end = greeted(&street);
            let mut payload = vec![0; len];
            rng.fill_bytes(&mut payload);
            // Whether it is taken, refused or ends the connection: it is no matter for anybody else.
            let _ = front_end.wire.send(request, &payload, &[]);
            let _ = front_end.wire.send(GET_FEATURES, &[], &[]);
            drop(front_end);
        }
        street.goes_on();
    }
    street.is_unharmed();
}

#[test]
fn wrong_counts_of_descriptors() {
    let street = Street::new();
    let before = Load::of(&street.vold);
    let memory = Memory::new(MIB);
    let eventfd = new_eventfd();
    let table = memory_table(&[memory.region()]);
    let table_of_two = memory_table(&[
        memory.region(),
        Region {
            guest: GUEST + 8 * MIB,
            user: USER + 8 * MIB,
            ..memory.region()
        },
    ]);
    let single = memory.region().single();
    let index = 0u64.to_le_bytes();
    let log = [MIB.to_le_bytes(), [0; 8]].concat();
    let inflight = inflight_payload(4096, 0, 1, 64);
    let (memory_fd, event_fd) = (memory.as_fd(), eventfd.as_fd());
    let cases: Vec<(u32, &[u8], BorrowedFd<'_>, usize)> = vec![
        (SET_MEM_TABLE, &table, memory_fd, 1),
        (SET_MEM_TABLE, &table_of_two, memory_fd, 2),
        (ADD_MEM_REG, &single, memory_fd, 1),
        (SET_LOG_BASE, &log, memory_fd, 1),
        (SET_VRING_KICK, &index, event_fd, 1),
        (SET_VRING_CALL, &index, event_fd, 1),
        (SET_INFLIGHT_FD, &inflight, memory_fd, 1),
        (SET_BACKEND_REQ_FD, &[], event_fd, 1),
        (SET_FEATURES, &index, memory_fd, 0),
        (SET_OWNER, &[], memory_fd, 0),
        (SET_VRING_NUM, &index, memory_fd, 0),
        (SET_VRING_ENABLE, &index, event_fd, 0),
    ];
    for (request, payload, descriptor, right) in cases {
        for count in [0, 1, 2, 3, 8, 64, 253] {
            if count == right {
                continue;
            }
            let front_end = greeted(&street);
            let refused = front_end.wire.refuses(request, payload, &vec![descriptor; count]);
            // (A region that is to go need not be proved by a descriptor, nor refused for one.)
            assert!(
                refused,
                "request {request} with {count} descriptors in place of {right}"
            );
            drop(front_end);
        }
        street.goes_on();
    }
    // Descriptors with a request that has none of its own, with half a message, and with one that is never sent to its end.
    for _ in 0..scale(20, 1000) {
        let front_end = greeted(&street);
        let _ = front_end.wire.send_bytes(&[1, 0], &[memory_fd; 100]);
        let _ = front_end.wire.send_bytes(&[0, 0, 1], &[event_fd; 100]);
        drop(front_end);
    }
    // None stays behind.
    Load::back_to(before, &street.vold);
    street.is_unharmed();
}

#[test]
fn memory_that_is_none() {
    let street = Street::new();
    let before = Load::of(&street.vold);
    let region = Region {
        guest: GUEST,
        len: 64 << 10,
        user: USER,
        offset: 0,
    };
    for (case, descriptor) in strange_descriptors(&street) {
        for (request, payload) in [
            (SET_MEM_TABLE, memory_table(&[region])),
            (ADD_MEM_REG, region.single()),
            (SET_LOG_BASE, [region.len.to_le_bytes(), [0; 8]].concat()),
            (SET_INFLIGHT_FD, inflight_payload(64 << 10, 0, 1, 64)),
        ] {
            let front_end = greeted(&street);
            assert!(
                front_end.wire.refuses(request, &payload, &[descriptor.as_fd()]),
                "request {request} with {case}"
            );
            drop(front_end);
        }
        street.goes_on();
    }
    // An eventfd is no memory either; nor is memory that cannot be written.
    let front_end = greeted(&street);
    let table = memory_table(&[region]);
    assert!(
        front_end
            .wire
            .refuses(SET_MEM_TABLE, &table, &[new_eventfd().as_fd()])
    );
    drop(front_end);
    let sealed = File::from(memfd_create("sealed", MemfdFlags::ALLOW_SEALING).unwrap());
    sealed.set_len(64 << 10).unwrap();
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let front_end = greeted(&street);
    assert!(front_end.wire.refuses(SET_MEM_TABLE, &table, &[sealed.as_fd()]));
    drop(front_end);
    Load::back_to(before, &street.vold);
    street.is_unharmed();
}

#[test]
fn regions_that_make_no_sense() {
    let street = Street::new();
    let memory = Memory::new(MIB);
    let whole = memory.region();
    let with = |change: fn(&mut Region)| {
        let mut region = whole;
        change(&mut region);
        region
    };
    let next_to = Region {
        guest: whole.guest + MIB,
        user: whole.user + MIB,
        ..whole
    };
    let cases: Vec<(&str, Vec<Region>)> = vec![
        ("of no bytes", vec![with(|r| r.len = 0)]),
        ("longer than the file", vec![with(|r| r.len = 2 * MIB)]),
        ("of all bytes that there can be", vec![with(|r| r.len = u64::MAX)]),
        ("of half of them", vec![with(|r| r.len = 1 << 63)]),
        ("beyond the file", vec![with(|r| r.offset = MIB)]),
        ("half beyond the file", vec![with(|r| r.offset = MIB / 2)]),
        (
            "at an offset that wraps",
            vec![with(|r| r.offset = u64::MAX - 4095)],
        ),
        (
            "at an address that wraps",
            vec![with(|r| r.guest = u64::MAX - 4095)],
        ),
        (
            "at a user address that wraps",
            vec![with(|r| r.user = u64::MAX - 4095)],
        ),
        ("the same twice", vec![whole, whole]),
        (
            "overlapping by a page",
            vec![whole, with(|r| r.guest += MIB - 4096)],
        ),
    ];
    for (case, regions) in cases {
        let front_end = greeted(&street);
        let descriptors = vec![memory.as_fd(); regions.len()];
        let refused = front_end
            .wire
            .refuses(SET_MEM_TABLE, &memory_table(&regions), &descriptors);
        assert!(refused, "{case}");
        drop(front_end);
        if let [region] = regions[..] {
            let front_end = greeted(&street);
            let refused = front_end
                .wire
                .refuses(ADD_MEM_REG, &region.single(), &[memory.as_fd()]);
            assert!(refused, "{case}, added");
            drop(front_end);
        }
        street.goes_on();
    }
    // More than there are slots; more than the message says; removed without having been there.
    let front_end = greeted(&street);
    let slots = front_end.wire.number(GET_MAX_MEM_SLOTS).unwrap();
    assert!((8..=512).contains(&slots), "{slots} slots");
    for i in 0..slots {
        let region = Region {
            guest: GUEST + i * 2 * MIB,
            user: USER + i * 2 * MIB,
            ..whole
        };
        let wire = &front_end.wire;
        wire.done(ADD_MEM_REG, &region.single(), &[memory.as_fd()])
            .unwrap();
    }
    let one_more = Region {
        guest: GUEST + slots * 2 * MIB,
        user: USER + slots * 2 * MIB,
        ..whole
    };
    assert!(
        front_end
            .wire
            .refuses(ADD_MEM_REG, &one_more.single(), &[memory.as_fd()]),
        "one more than {slots}"
    );
    drop(front_end);
    for count in [9, 255, 1 << 20, u32::MAX] {
        let front_end = greeted(&street);
        let mut table = memory_table(&[whole, next_to]);
        table[..4].copy_from_slice(&count.to_le_bytes());
        assert!(
            front_end
                .wire
                .refuses(SET_MEM_TABLE, &table, &[memory.as_fd(), memory.as_fd()]),
            "{count} regions in the place of 2"
        );
        drop(front_end);
    }
    let front_end = greeted(&street);
    assert!(front_end.wire.refuses(REM_MEM_REG, &whole.single(), &[]));
    drop(front_end);
    street.is_unharmed();
}

#[test]
fn kick_and_call_descriptors_that_are_no_eventfds() {
    let street = Street::new();
    let before = Load::of(&street.vold);
    let mut strange = strange_descriptors(&street);
    strange.push(("memory", memfd_create("memory", MemfdFlags::empty()).unwrap()));
    let index = 0u64.to_le_bytes();
    for (case, descriptor) in &strange {
        for request in [SET_VRING_KICK, SET_VRING_CALL] {
            let front_end = greeted(&street);
            front_end.share_memory().unwrap();
            front_end.prepare_queue(0, 0).unwrap();
            assert!(
                front_end.wire.refuses(request, &index, &[descriptor.as_fd()]),
                "request {request} with {case}"
            );
            drop(front_end);
        }
        street.goes_on();
    }
    drop(strange);
    Load::back_to(before, &street.vold);
    street.is_unharmed();
}

/// A call is a write to an eventfd. One whose count is full makes that block, if it is not told otherwise, and the front-end
/// tells.
#[test]
fn a_call_eventfd_that_is_full_and_blocks() {
    let street = Street::new();
    let mut fe = street.front_end();
    for (case, flags) in [
        ("blocks", EventfdFlags::empty()),
        ("does not block", EventfdFlags::NONBLOCK),
        ("counts one by one", EventfdFlags::SEMAPHORE),
    ] {
        let full = eventfd(0, flags).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let index = 0u64.to_le_bytes();
        fe.wire.done(SET_VRING_CALL, &index, &[full.as_fd()]).unwrap();
        for i in 0..200u64 {
            let head = fe.submit(0, T_IN, i % 16, &[], 512);
            fe.queues[0].kick();
            // Nobody is called any more; the ring tells.
            let done = wait_for("an answer in the ring", || fe.finished(0));
            assert_eq!((done.head, done.status), (head, S_OK), "{case}");
        }
        street.goes_on();
        // Made blocking after it was passed.
        let now = rustix::fs::fcntl_getfl(&full).unwrap() - OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&full, now).unwrap();
        fe.submit(0, T_IN, 0, &[], 512);
        fe.queues[0].kick();
        wait_for("an answer in the ring", || fe.finished(0));
        street.goes_on();
    }
    drop(fe);
    street.is_unharmed();
}

/// A read of an eventfd blocks when there is nothing in it, and somebody else may have taken what was in it.
#[test]
fn a_kick_eventfd_that_blocks_and_is_emptied_by_somebody_else() {
    let street = Street::new();
    for flags in [EventfdFlags::empty(), EventfdFlags::SEMAPHORE] {
        let mut fe = street.front_end();
        let kick = eventfd(0, flags).unwrap();
        let index = 0u64.to_le_bytes();
        fe.stop_queue(0).unwrap();
        fe.prepare_queue(0, fe.queues[0].used_index(&fe.memory)).unwrap();
        fe.wire.done(SET_VRING_KICK, &index, &[kick.as_fd()]).unwrap();
        let call = fe.queues[0].call_descriptor().try_clone().unwrap();
        fe.wire.done(SET_VRING_CALL, &index, &[call.as_fd()]).unwrap();
        fe.enable_queue(0, true).unwrap();
        let thief = kick.try_clone().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let stealing = std::thread::spawn(move || {
            let mut count = [0; 8];
            while !stopped.load(Ordering::Relaxed) {
                // What one gives, the other takes; whoever comes too late waits for the next.
                rustix::io::write(&thief, &3u64.to_ne_bytes()).unwrap();
                rustix::io::read(&thief, &mut count).unwrap();
                rustix::io::write(&thief, &1u64.to_ne_bytes()).unwrap();
            }
        });
        for _ in 0..scale(50, 1000) {
            fe.submit(0, T_IN, 0, &[], 4096);
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            // (A kick that was stolen is made good by the next of the thief's own.)
            assert_eq!(fe.complete(0).status, S_OK);
        }
        street.goes_on();
        stop.store(true, Ordering::Relaxed);
        // (The thief may be waiting.)
        rustix::io::write(&kick, &5u64.to_ne_bytes()).unwrap();
        stealing.join().unwrap();
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}

#[test]
fn memory_truncated_under_load() {
    let street = Street::new();
    for round in 0..scale(10, 100) {
        let mut fe = street.front_end();
        load(&mut fe);
        // All of it; all but the rings; only the slots of the last heads.
        let (first_slot, ..) = fe.slot(0, 0);
        let (last_slot, ..) = fe.slot(0, 40);
        let left = [0, first_slot - GUEST, last_slot - GUEST][round % 3];
        fe.memory.truncate(left);
        if left == 0 {
            // Not even the ring can be read any more.
            fe.queues[0].kick();
            fe.wire.ends();
        } else {
            // Each request is answered, or the device ends.
            while !fe.pending.is_empty() && fe.complete_or_end(0).is_some() {}
        }
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}

/// Pages that come and go while the device reads and writes them.
#[test]
fn memory_truncated_and_restored_again_and_again() {
    let street = Street::new();
    let mut ended = 0;
    for _ in 0..scale(5, 50) {
        let mut fe = street.front_end();
        let file = fe.memory.file().try_clone().unwrap();
        let (keep, len) = (fe.slot(0, 8).0 - GUEST, fe.memory.region().len);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let flicker = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                file.set_len(keep).unwrap();
                file.set_len(len).unwrap();
            }
        });
        for _ in 0..20 {
            if fe.queues[0].free() < 64 {
                break;
            }
            load(&mut fe);
            while !fe.pending.is_empty() && fe.complete_or_end(0).is_some() {}
        }
        ended += usize::from(fe.wire.has_ended());
        stop.store(true, Ordering::Relaxed);
        flicker.join().unwrap();
        drop(fe);
        street.goes_on();
    }
    println!("{ended} devices ended");
    street.is_unharmed();
}

#[test]
fn regions_removed_while_requests_run() {
    let street = Street::new();
    for round in 0..scale(6, 60) {
        let mut fe = street.front_end();
        load(&mut fe);
        let region = fe.memory.region();
        let (request, payload) = match round % 3 {
            0 => (REM_MEM_REG, region.single()),
            1 => (SET_MEM_TABLE, memory_table(&[])),
            _ => (SET_VRING_ENABLE, vring_state(0, 0).to_vec()),
        };
        let _ = fe.wire.acknowledged(request, &payload, &[]);
        // What runs may end well, since its memory is still there; what is asked for now finds none.
        fe.queues[0].kick();
        street.goes_on();
        drop(fe);
        street.goes_on();
    }
    // Another memory in the place of the one in which the ring is: zeros, which are an empty ring.
    for _ in 0..scale(3, 30) {
        let mut fe = street.front_end();
        load(&mut fe);
        let other = Memory::new(fe.memory.region().len);
        let table = memory_table(&[other.region()]);
        let _ = fe.wire.acknowledged(SET_MEM_TABLE, &table, &[other.as_fd()]);
        fe.queues[0].kick();
        street.goes_on();
        drop(fe);
    }
    street.is_unharmed();
}

#[test]
fn rings_that_make_no_sense() {
    let street = Street::new();
    // Sizes. The device says no at once, or when the queue is to start.
    for size in [0, 3, 63, 1025, 2048, 32768, 65535, 65536, u32::MAX] {
        let fe = greeted(&street);
        fe.set_features(fe.features).unwrap();
        fe.share_memory().unwrap();
        let (kick, call) = (new_eventfd(), new_eventfd());
        let number = 0u64.to_le_bytes();
        let wire = &fe.wire;
        let is_refused = wire.refuses(SET_VRING_NUM, &vring_state(0, size), &[])
            || wire.refuses(SET_VRING_BASE, &vring_state(0, 0), &[])
            || wire.refuses(SET_VRING_ADDR, &fe.vring_addresses(0), &[])
            || wire.refuses(SET_VRING_KICK, &number, &[kick.as_fd()])
            || wire.refuses(SET_VRING_CALL, &number, &[call.as_fd()])
            || wire.refuses(SET_VRING_ENABLE, &vring_state(0, 1), &[]);
        println!("a queue of {size}: refused at once: {is_refused}");
        if !is_refused {
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            wire.ends();
        }
        drop(fe);
        street.goes_on();
    }
    // Queues that there are not.
    for (request, payload) in [
        (SET_VRING_NUM, vring_state(60000, 64).to_vec()),
        (SET_VRING_BASE, vring_state(u32::MAX, 0).to_vec()),
        (SET_VRING_ENABLE, vring_state(256, 1).to_vec()),
        (SET_VRING_ADDR, [&vring_state(255, 0)[..], &[0; 32]].concat()),
    ] {
        let front_end = greeted(&street);
        front_end.share_memory().unwrap();
        assert!(
            front_end.wire.refuses(request, &payload, &[]),
            "request {request}"
        );
        drop(front_end);
    }
    let front_end = greeted(&street);
    let kick = new_eventfd();
    let wire = &front_end.wire;
    assert!(wire.refuses(SET_VRING_KICK, &255u64.to_le_bytes(), &[kick.as_fd()]));
    drop(front_end);
    street.goes_on();

    // Places. The device says no at once, or ends when the queue is to start.
    let shape = Shape::default();
    for place in 0..3 {
        for (case, at) in [
            ("outside", Some(0)),
            ("before", Some(USER - 8)),
            ("odd", None),
            ("wrapping", Some(u64::MAX - 15)),
        ] {
            let fe = FrontEnd::greeted(street.socket(), shape);
            fe.set_features(fe.features).unwrap();
            fe.share_memory().unwrap();
            let state = |number| vring_state(0, number);
            fe.wire.done(SET_VRING_NUM, &state(64), &[]).unwrap();
            fe.wire.done(SET_VRING_BASE, &state(0), &[]).unwrap();
            let mut addresses = fe.vring_addresses(0);
            let field = &mut addresses[8 + 8 * place..16 + 8 * place];
            let own = u64::from_le_bytes((&*field).try_into().unwrap());
            field.copy_from_slice(&at.unwrap_or(own + 1).to_le_bytes());
            let number = 0u64.to_le_bytes();
            let wire = &fe.wire;
            let is_refused = wire.refuses(SET_VRING_ADDR, &addresses, &[])
                || wire.refuses(SET_VRING_KICK, &number, &[kick.as_fd()])
                || wire.refuses(SET_VRING_CALL, &number, &[new_eventfd().as_fd()])
                || wire.refuses(SET_VRING_ENABLE, &state(1), &[]);
            if !is_refused {
                rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                wire.ends();
            }
            println!("place {place} {case}: refused at once: {is_refused}");
            drop(fe);
            street.goes_on();
        }
    }
    // A queue that is started with nothing behind it.
    let fe = greeted(&street);
    let _ = fe.wire.refuses(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]);
    let _ = fe.wire.refuses(SET_VRING_ENABLE, &vring_state(0, 1), &[]);
    let _ = rustix::io::write(&kick, &1u64.to_ne_bytes());
    street.goes_on();
    drop(fe);
    street.is_unharmed();
}

#[test]
fn an_inflight_area_of_wrong_size() {
    let street = Street::new();
    let area = File::from(memfd_create("area", MemfdFlags::empty()).unwrap());
    area.set_len(64 << 10).unwrap();
    for (len, offset, queues, size) in [
        (0, 0, 1, 64),
        (16, 0, 1, 64),
        (1000, 0, 1, 64),
        (64 << 10, 1 << 20, 1, 64),
        (128 << 10, 0, 1, 64),
        (u64::MAX, 0, 1, 64),
        (64 << 10, u64::MAX - 4095, 1, 64),
        (64 << 10, 0, 0, 64),
        (64 << 10, 0, 65535, 64),
        (64 << 10, 0, 1, 0),
        (64 << 10, 0, 1, 65535),
        (64 << 10, 0, 1, 63),
        (64 << 10, 0, 64, 1024),
    ] {
        let mut fe = greeted(&street);
        fe.set_features(fe.features).unwrap();
        fe.share_memory().unwrap();
        let payload = inflight_payload(len, offset, queues, size);
        let case = format!("{len} bytes at {offset}, {queues} queues of {size}");
        let refused = fe.wire.refuses(SET_INFLIGHT_FD, &payload, &[area.as_fd()]);
        // An area of which more is told than there is may do, as long as there is enough for the queues.
        let is_enough = len >= 128 << 10 && offset == 0 && (queues, size) == (1, 64);
        assert!(refused || is_enough, "{case}");
        drop(fe.inflight.take());
        drop(fe);
        let fe = greeted(&street);
        let payload = inflight_payload(0, 0, queues, size);
        if queues == 0 || queues == 65535 || size == 0 || size > 1024 {
            // No area for these.
            let answer = fe.wire.ask(GET_INFLIGHT_FD, &payload, &[]);
            let given = answer.is_ok_and(|answer| !answer.descriptors.is_empty());
            assert!(!given, "an area for {case}");
        }
        drop(fe);
        street.goes_on();
    }
    // An area for other queues than those that are started.
    let mut fe = street.front_end_as(Shape {
        size: 16,
        ..Shape::default()
    });
    let area = fe.inflight.take().unwrap();
    drop(fe);
    let mut fe = greeted(&street);
    fe.inflight = Some(area);
    fe.set_features(fe.features).unwrap();
    fe.share_memory().unwrap();
    let area = fe.inflight.as_ref().unwrap();
    let (payload, descriptor) = (&area.payload, area.descriptor.as_fd());
    let refused = fe.wire.refuses(SET_INFLIGHT_FD, payload, &[descriptor])
        || (0..1).any(|index| fe.start_queue_is_refused(index));
    if !refused {
        fe.queues[0].kick();
        fe.wire.ends();
    }
    drop(fe);
    street.is_unharmed();
}

/// Anything may be in the area: the guest's own QEMU holds it. It begins with 8 bytes of features, then version, descriptors, the last
/// head and the used index; 16 bytes for each descriptor follow.
#[test]
fn an_inflight_area_of_wrong_content() {
    let street = Street::new();
    let mut rng = seeded("inflight content");
    let (mut refused, mut served, mut ended) = (0, 0, 0);
    for round in 0..scale(60, 2000) {
        let mut fe = street.front_end();
        for i in 0..10 {
            fe.submit(0, T_IN, i, &[], 512);
            fe.notify(0);
            fe.complete(0);
        }
        let area = fe.inflight.as_ref().unwrap();
        let file = File::from(area.descriptor.try_clone().unwrap());
        let len = file.metadata().unwrap().len() as usize;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).unwrap();
        match round % 6 {
            // All of it.
            0 => rng.fill_bytes(&mut bytes),
            // Each descriptor in flight, each the next of another.
            1 => {
                for descriptor in bytes[16..16 + 64 * 16].chunks_exact_mut(16) {
                    descriptor[0] = 1;
                    descriptor[6] = rng.random();
                    descriptor[8] = rng.random();
                }
            }
            // A used index far away, and a last head beyond the table or within a loop.
            2 => bytes[12..16].copy_from_slice(&rng.random::<[u8; 4]>()),
            // Other descriptors, another version.
            3 => bytes[8..12].copy_from_slice(&rng.random::<[u8; 4]>()),
            // One descriptor.
            4 => {
                let at = 16 + 16 * rng.random_range(0..64);
                rng.fill_bytes(&mut bytes[at..at + 16]);
            }
            // Some bytes anywhere.
            _ => {
                for _ in 0..8 {
                    let at = rng.random_range(0..16 + 64 * 16);
                    bytes[at] = rng.random();
                }
            }
        }
        // The next front-end brings it along.
        let payload = area.payload.clone();
        drop(fe);
        let mut next = greeted(&street);
        file.write_all_at(&bytes, 0).unwrap();
        next.inflight = Some(Inflight {
            descriptor: file.into(),
            payload,
        });
        next.set_features(next.features).unwrap();
        next.share_memory().unwrap();
        let area = next.inflight.as_ref().unwrap();
        let is_refused = next
            .wire
            .refuses(SET_INFLIGHT_FD, &area.payload, &[area.descriptor.as_fd()])
            || next.start_queue_is_refused(0);
        if is_refused {
            refused += 1;
        } else {
            // Descriptors of no request are replayed: chains of zeros, which end the device. Or all is well.
            next.submit(0, T_IN, 0, &[], 512);
            next.queues[0].kick();
            let wire = &next.wire;
            match next.queues[0].used_before(&next.memory, || wire.has_ended()) {
                Some(_) => served += 1,
                None => ended += 1,
            }
        }
        drop(next);
        if round % 10 == 0 {
            street.goes_on();
        }
    }
    println!("{refused} refused, {served} served, {ended} ended");
    street.is_unharmed();
}

#[test]
fn an_inflight_area_and_a_log_that_are_truncated_in_use() {
    let street = Street::new();
    // The area, in memory of the front-end's own.
    let mut fe = greeted(&street);
    let own_area = File::from(memfd_create("area", MemfdFlags::empty()).unwrap());
    fe.take_inflight().unwrap();
    let area = fe.inflight.take().unwrap();
    let len = File::from(area.descriptor).metadata().unwrap().len();
    own_area.set_len(len).unwrap();
    fe.inflight = Some(Inflight {
        descriptor: own_area.try_clone().unwrap().into(),
        payload: area.payload,
    });
    fe.start().unwrap();
    assert!(fe.read(0, 4096).unwrap() == own()[..4096]);
    own_area.set_len(0).unwrap();
    load(&mut fe);
    while !fe.pending.is_empty() && fe.complete_or_end(0).is_some() {}
    assert!(fe.wire.has_ended(), "without its area a device ends");
    drop(fe);
    street.goes_on();

    // The log.
    let shape = Shape {
        features: Shape::default().features | F_LOG_ALL,
        ..Shape::default()
    };
    let mut fe = FrontEnd::greeted(street.socket(), shape);
    assert_ne!(fe.features & F_LOG_ALL, 0, "LOG_ALL is offered");
    let log = File::from(memfd_create("log", MemfdFlags::empty()).unwrap());
    log.set_len(4 * MIB).unwrap();
    let payload = [(4 * MIB).to_le_bytes(), [0; 8]].concat();
    fe.wire.ask(SET_LOG_BASE, &payload, &[log.as_fd()]).unwrap();
    fe.start().unwrap();
    assert!(fe.read(0, 4096).unwrap() == own()[..4096]);
    let mut bitmap = vec![0; 4 << 20];
    log.read_exact_at(&mut bitmap, 0).unwrap();
    assert!(bitmap.iter().any(|byte| *byte != 0), "what was written is logged");
    log.set_len(0).unwrap();
    load(&mut fe);
    while !fe.pending.is_empty() && fe.complete_or_end(0).is_some() {}
    // (Whether it ends or goes on without: what is not logged is missed by the front-end's own guest alone.)
    drop(fe);
    street.is_unharmed();
}

#[test]
fn a_flood_of_messages_whose_answers_nobody_reads() {
    let street = Street::new();
    let front_end = greeted(&street);
    let mut stream = UnixStream::from(front_end.wire.as_fd().try_clone_to_owned().unwrap());
    stream.set_nonblocking(true).unwrap();
    let requests = message(GET_FEATURES, 0, &[]).repeat(1000);
    let mut sent = 0usize;
    // Until neither side takes more, or it is cut off.
    let mut still = 0;
    while still < 50 && sent < 64 << 20 {
        match stream.write(&requests) {
            Ok(count) => (sent, still) = (sent + count, 0),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                still += 1;
                street.goes_on();
            }
            Err(_) => break,
        }
    }
    println!("{sent} bytes of requests");
    assert!(sent < 64 << 20, "what is not read is kept without end");
    drop(front_end);
    drop(stream);
    street.is_unharmed();
}

/// Of two front-ends the second is turned away, and the first notices nothing.
#[test]
fn a_second_front_end_beside_the_first() {
    let street = Street::new();
    let mut fe = street.front_end();
    for _ in 0..scale(20, 500) {
        assert!(
            greet(street.socket(), &Shape::default()).is_err(),
            "one at a time"
        );
        assert!(fe.read(0, 4096).unwrap() == own()[..4096]);
    }
    drop(fe);
    street.is_unharmed();
}

/// Connected, half started, in the middle of requests: front-ends that go leave nothing behind.
#[test]
fn front_ends_that_come_and_go_leave_nothing_behind() {
    let street = Street::new();
    let before = Load::of(&street.vold);
    for round in 0..scale(60, 2000) {
        match round % 6 {
            0 => drop(UnixStream::connect(street.socket()).unwrap()),
            1 => drop(greeted(&street)),
            2 => {
                let fe = greeted(&street);
                fe.share_memory().unwrap();
                fe.prepare_queue(0, 0).unwrap();
            }
            3 => drop(street.front_end()),
            4 => {
                let mut fe = street.front_end();
                load(&mut fe);
            }
            _ => {
                let mut fe = street.front_end();
                load(&mut fe);
                fe.stop_queue(0).unwrap();
            }
        }
    }
    Load::back_to(before, &street.vold);
    street.is_unharmed();
}

/// GET_VRING_BASE is answered when everything that was taken has been answered; RESET_DEVICE and starting again do no harm.
#[test]
fn queues_that_are_stopped_reset_and_started_under_load() {
    let street = Street::new();
    let mut fe = street.front_end();
    for round in 0..scale(20, 500u32) {
        let requests = load(&mut fe);
        let base = fe.stop_queue(0).unwrap();
        // As many were answered as were taken from the ring.
        let mut answered = 0;
        while fe.finished(0).is_some() {
            answered += 1;
        }
        let used = fe.queues[0].used_index(&fe.memory);
        assert_eq!(base as u16, used, "taken and answered");
        if round % 4 == 3 {
            fe.wire.done(RESET_DEVICE, &[], &[]).unwrap();
            fe.set_features(fe.features).unwrap();
            fe.share_memory().unwrap();
            fe.give_inflight().unwrap();
        }
        fe.start_queue(0).unwrap();
        for _ in answered..requests {
            assert_eq!(fe.complete(0).status, S_OK);
        }
        assert!(fe.pending.is_empty());
    }
    drop(fe);
    street.is_unharmed();
}
