//! A hostile front-end, as a QEMU that its guest has taken over: messages, descriptors, queues. The worst that it reaches is that its
//! own device ends; what it passes can neither block nor kill the thread that it shares with its neighbour. (Its memory is in
//! vhost_hostile_memory.rs.)

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::{Rng, RngExt};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use rustix::process::{Resource, getrlimit, setrlimit};
use vold_tests::content::seeded;
use vold_tests::load::Load;
use vold_tests::neighbour::{Street, load, own};
use vold_tests::vhost::*;
use vold_tests::{scale, wait_for};

const MIB: u64 = 1 << 20;

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
        let front_end = street.greeted();
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
        let front_end = street.greeted();
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
        let front_end = street.greeted();
        front_end.wire.send_bytes(bytes, &[]).unwrap();
        street.goes_on();
        drop(front_end);
        street.serves();
    }
    // Random bytes.
    let mut rng = seeded("headers");
    for _ in 0..scale(20, 500) {
        let front_end = street.greeted();
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
            let front_end = street.greeted();
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
            let front_end = street.greeted();
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
        let front_end = street.greeted();
        let _ = front_end.wire.send_bytes(&[1, 0], &[memory_fd; 100]);
        let _ = front_end.wire.send_bytes(&[0, 0, 1], &[event_fd; 100]);
        drop(front_end);
    }
    // None stays behind.
    Load::back_to(before, &street.vold);
    street.is_unharmed();
}

#[test]
fn kick_and_call_descriptors_that_are_no_eventfds() {
    let street = Street::new();
    let before = Load::of(&street.vold);
    let mut strange = street.strange_descriptors();
    strange.push(("memory", memfd_create("memory", MemfdFlags::empty()).unwrap()));
    let index = 0u64.to_le_bytes();
    for (case, descriptor) in &strange {
        for request in [SET_VRING_KICK, SET_VRING_CALL] {
            let front_end = street.greeted();
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
        // (The thief may be waiting, and the device may take what is meant to wake it.)
        wait_for("the thief ends", || {
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            stealing.is_finished().then_some(())
        });
        stealing.join().unwrap();
        drop(fe);
        street.goes_on();
    }
    street.is_unharmed();
}

/// Watches a descriptor so often that whoever makes something of it pays for tens of thousands of wake-ups.
struct Watchers {
    _duplicates: Vec<OwnedFd>,
    _sets: Vec<OwnedFd>,
}

impl Watchers {
    fn of(descriptor: &impl AsFd) -> Self {
        const DUPLICATES: usize = 8000;
        const SETS: usize = 8;
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit).unwrap();
        let duplicates: Vec<OwnedFd> = (0..DUPLICATES)
            .map(|_| descriptor.as_fd().try_clone_to_owned().unwrap())
            .collect();
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let set = |_| {
            let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            for duplicate in &duplicates {
                epoll::add(&set, duplicate, epoll::EventData::new_u64(0), interest).unwrap();
            }
            set
        };
        Self {
            _sets: (0..SETS).map(set).collect(),
            _duplicates: duplicates,
        }
    }
}

/// What it costs to tell of faults counts like all else, and it is the attachment's: each connection has one.
#[test]
fn faults_whose_telling_takes_long_keep_their_front_end_out() {
    let street = Street::new();
    let watched = new_eventfd();
    let _watchers = Watchers::of(&watched);
    let index = 0u64.to_le_bytes();
    let mut faults = 0;
    wait_for("a front-end is turned away", || {
        let Ok((wire, ..)) = greet(street.socket(), &Shape::default()) else {
            return Some(());
        };
        drop(wire);
        let mut fe = street.front_end();
        fe.wire.done(SET_VRING_ERR, &index, &[watched.as_fd()]).unwrap();
        let queue = &mut fe.queues[0];
        queue.write_descriptor(&fe.memory, 5, fe.spare.0, 16, NEXT, 5);
        queue.offer(&fe.memory, 5);
        queue.kick();
        fe.wire.ends();
        faults += 1;
        None
    });
    println!("{faults} faults");
    assert!(faults > 2, "a few are borne");
    street.goes_on();
    // It comes back when that is paid off.
    let mut fe = street.front_end();
    assert_eq!(fe.call(T_IN, 0, &[], 512).status, S_OK);
    drop(fe);
    street.is_unharmed();
}

/// Who watches a descriptor is woken by whoever uses it, at that one's cost.
#[test]
fn descriptors_that_are_watched_so_often_that_to_use_them_takes_long() {
    for case in ["kicks", "calls", "messages"] {
        let street = Street::new();
        let mut fe = street.front_end();
        let _watchers = match case {
            "kicks" => Watchers::of(fe.queues[0].kick_descriptor()),
            "calls" => Watchers::of(fe.queues[0].call_descriptor()),
            _ => Watchers::of(&fe.wire),
        };
        // A good one would go on like this for good.
        wait_for("the front-end is cut off", || {
            match case {
                "kicks" => fe.queues[0].kick(),
                "calls" => {
                    fe.submit(0, T_IN, 0, &[], 512);
                    fe.queues[0].kick();
                    fe.complete_or_end(0);
                }
                _ => drop(fe.wire.number(GET_FEATURES)),
            }
            fe.wire.has_ended().then_some(())
        });
        drop(fe);
        street.goes_on();
        // It comes back when that is paid off.
        wait_for("a front-end that behaves is served", || {
            let mut fe = street.greeted();
            fe.start().ok()?;
            fe.submit(0, T_IN, 0, &[], 512);
            fe.queues[0].kick();
            fe.complete_or_end(0).map(drop)
        });
        street.is_unharmed();
    }
}

#[test]
fn rings_that_make_no_sense() {
    let street = Street::new();
    // Sizes. The device says no at once, or when the queue is to start.
    for size in [0, 3, 63, 1025, 2048, 32768, 65535, 65536, u32::MAX] {
        let fe = street.greeted();
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
        let front_end = street.greeted();
        front_end.share_memory().unwrap();
        assert!(
            front_end.wire.refuses(request, &payload, &[]),
            "request {request}"
        );
        drop(front_end);
    }
    let front_end = street.greeted();
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
    let fe = street.greeted();
    let _ = fe.wire.refuses(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]);
    let _ = fe.wire.refuses(SET_VRING_ENABLE, &vring_state(0, 1), &[]);
    let _ = rustix::io::write(&kick, &1u64.to_ne_bytes());
    street.goes_on();
    drop(fe);
    street.is_unharmed();
}

#[test]
fn a_flood_of_messages_whose_answers_nobody_reads() {
    let street = Street::new();
    let front_end = street.greeted();
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
            1 => drop(street.greeted()),
            2 => {
                let fe = street.greeted();
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
