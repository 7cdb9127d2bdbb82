//! A hostile front-end's memory: what it shares is none, is told wrong, changes or goes away while it is used. That of the guest, the
//! area of what is in flight, and the log. A page that is gone is SIGBUS to whoever touches it; it must not be the daemon's end.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::{Rng, RngExt};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vold_tests::content::seeded;
use vold_tests::load::Load;
use vold_tests::neighbour::{Street, load, own};
use vold_tests::scale;
use vold_tests::vhost::*;

const MIB: u64 = 1 << 20;

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
    for (case, descriptor) in street.strange_descriptors() {
        for (request, payload) in [
            (SET_MEM_TABLE, memory_table(&[region])),
            (ADD_MEM_REG, region.single()),
            (SET_LOG_BASE, [region.len.to_le_bytes(), [0; 8]].concat()),
            (SET_INFLIGHT_FD, inflight_payload(64 << 10, 0, 1, 64)),
        ] {
            let front_end = street.greeted();
            assert!(
                front_end.wire.refuses(request, &payload, &[descriptor.as_fd()]),
                "request {request} with {case}"
            );
            drop(front_end);
        }
        street.goes_on();
    }
    // An eventfd is no memory either; nor is memory that cannot be written.
    let front_end = street.greeted();
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
    let front_end = street.greeted();
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
        let front_end = street.greeted();
        let descriptors = vec![memory.as_fd(); regions.len()];
        let refused = front_end
            .wire
            .refuses(SET_MEM_TABLE, &memory_table(&regions), &descriptors);
        assert!(refused, "{case}");
        drop(front_end);
        if let [region] = regions[..] {
            let front_end = street.greeted();
            let refused = front_end
                .wire
                .refuses(ADD_MEM_REG, &region.single(), &[memory.as_fd()]);
            assert!(refused, "{case}, added");
            drop(front_end);
        }
        street.goes_on();
    }
    // More than there are slots; more than the message says; removed without having been there.
    let front_end = street.greeted();
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
        let front_end = street.greeted();
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
    let front_end = street.greeted();
    assert!(front_end.wire.refuses(REM_MEM_REG, &whole.single(), &[]));
    drop(front_end);
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
        let mut fe = street.greeted();
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
        let fe = street.greeted();
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
    let mut fe = street.greeted();
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
        let mut next = street.greeted();
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
    let mut fe = street.greeted();
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
