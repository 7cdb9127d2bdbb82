//! After a crash at any moment, what is pending is what was taken and is not in the used ring.

use proptest::prelude::*;
use rustix::fs::{fstat, ftruncate};

use super::*;
use crate::vhost::guest::{Guest, QUEUE, account, memfd};
use crate::vhost::ring::Ring;

const SIZE: u16 = 8;

fn refused(result: Result<Vec<InflightArea>, BadMemory>) -> String {
    result.err().expect("refused").to_string()
}

/// An area of one queue, and the bytes of it.
fn area() -> (OwnedFd, InflightArea, Mapping) {
    let (fd, len) = create(1, SIZE).unwrap();
    let area = InflightArea::adopt(&account(), &fd, 0, len, 1, SIZE)
        .unwrap()
        .remove(0);
    let bytes = Mapping::new(&account(), &fd, 0, len as usize).unwrap();
    (fd, area, bytes)
}

#[test]
fn its_bytes_lie_as_they_are_drawn() {
    let (fd, len) = create(3, SIZE).unwrap();
    assert_eq!(len, 3 * 192 + 64);
    let stat = fstat(&fd).unwrap();
    assert_eq!(stat.st_size, 3 * 192 + 64);
    assert_eq!(stat.st_blocks, 0, "no memory is used before somebody brings it");
    assert!(
        ftruncate(&fd, 0).is_err() && ftruncate(&fd, 1 << 20).is_err(),
        "its length is sealed"
    );
    let mut areas = InflightArea::adopt(&account(), &fd, 0, len, 3, SIZE).unwrap();
    let area = &mut areas[1];
    area.counter = 0x0102_0304_0506_0708;
    area.started(2).unwrap();
    area.about_to_use(5).unwrap();
    area.about_to_use(2).unwrap();
    area.used(5, 0x1122).unwrap();
    let bytes = Mapping::new(&account(), &fd, 0, len as usize).unwrap();
    let mut queue = [0; 192];
    bytes.read(192, &mut queue).unwrap();
    let mut expected = vec![0; 8];
    for field in [1, SIZE, 2, 0x1122] {
        expected.extend(field.to_ne_bytes());
    }
    expected.extend([0; 32]);
    expected.extend([1, 0, 0, 0, 0, 0]);
    expected.extend(5_u16.to_ne_bytes());
    expected.extend(0x0102_0304_0506_0708_u64.to_ne_bytes());
    expected.resize(192, 0);
    assert_eq!(queue, expected[..]);
    // The others' are only ready.
    bytes.read(384, &mut queue).unwrap();
    assert!(queue[..8] == [0; 8] && queue[12..].iter().all(|byte| *byte == 0));
}

#[test]
fn an_area_of_a_wrong_size_is_refused() {
    for (queues, size) in [
        (0, 8),
        (VHOST_QUEUES_MAX + 1, 8),
        (u16::MAX, 8),
        (1, 0),
        (1, 7),
        (1, 2048),
        (1, u16::MAX),
    ] {
        assert!(
            area_bytes(queues, size).is_err() && create(queues, size).is_err(),
            "{queues} of {size}"
        );
        assert!(InflightArea::adopt(&account(), &memfd(1 << 20), 0, 1 << 20, queues, size).is_err());
    }
    assert_eq!(
        area_bytes(VHOST_QUEUES_MAX, 1024).unwrap(),
        u64::from(VHOST_QUEUES_MAX) * 16_448
    );
    let fd = memfd(384);
    let short = "an inflight area shorter than its queues";
    assert_eq!(
        refused(InflightArea::adopt(&account(), &fd, 0, 383, 2, SIZE)),
        short
    );
    assert_eq!(
        refused(InflightArea::adopt(&account(), &fd, 0, 0, 2, SIZE)),
        short
    );
    let beyond = "memory that goes beyond the end of its file";
    assert_eq!(
        refused(InflightArea::adopt(&account(), &fd, 0, 385, 3, 1024)),
        short
    );
    assert_eq!(
        refused(InflightArea::adopt(&account(), &fd, 1, 384, 2, SIZE)),
        beyond
    );
    assert_eq!(
        refused(InflightArea::adopt(&account(), &fd, u64::MAX, 384, 2, SIZE)),
        beyond
    );
    assert_eq!(
        refused(InflightArea::adopt(
            &account(),
            &fd,
            0,
            u64::MAX,
            VHOST_QUEUES_MAX,
            SIZE
        )),
        beyond
    );
    InflightArea::adopt(&account(), &fd, 0, u64::MAX, 2, SIZE).unwrap();
}

#[test]
fn an_area_at_an_odd_place_is_refused_and_nothing_panics() {
    let fd = memfd(4096);
    assert!(InflightArea::adopt(&account(), &fd, 3, 192, 1, SIZE).is_err());
}

#[test]
fn an_area_of_another_version_or_queue_size_is_refused() {
    for (at, value) in [
        (FEATURES, 1),
        (FEATURES + 6, 1),
        (VERSION_AT, 2),
        (ENTRIES, 4),
        (ENTRIES, 0),
        (ENTRIES, u16::MAX),
    ] {
        let (fd, _, bytes) = area();
        bytes.store_u16(at, value).unwrap();
        assert!(
            InflightArea::adopt(&account(), &fd, 0, 192, 1, SIZE).is_err(),
            "{value} at {at}"
        );
    }
    // Not yet used by anybody.
    let (fd, _, bytes) = area();
    bytes.store_u16(VERSION_AT, 0).unwrap();
    InflightArea::adopt(&account(), &fd, 0, 192, 1, SIZE).unwrap();
    assert_eq!(bytes.load_u16(VERSION_AT), Ok(VERSION));
}

#[test]
fn content_that_makes_no_sense_is_refused() {
    let entry = |head: usize| HEADER_BYTES + ENTRY_BYTES * head;
    // A mark that is none.
    for mark in [2, 0xff] {
        let (_fd, mut area, bytes) = area();
        bytes.store_u8(entry(7), mark).unwrap();
        assert!(area.recover(0).is_err());
    }
    // A last batch whose head or links are no heads, or that loops, or is longer than the queue.
    for (last, links, used_idx, ok) in [
        (8, [0, 0], 1, false),
        (u16::MAX, [0, 0], 1, false),
        (0, [8, 0], 2, false),
        (0, [u16::MAX, 0], 2, false),
        (0, [0, 0], 2, false),
        (0, [1, 0], 3, false),
        (0, [1, 0], 2, true),
        (0, [1, 2], 9, false),
        (0, [1, 2], u16::MAX, false),
        // Links that are not followed may be anything.
        (0, [u16::MAX, u16::MAX], 1, true),
        (u16::MAX, [u16::MAX, u16::MAX], 0, true),
    ] {
        let (_fd, mut area, bytes) = area();
        area.started(5).unwrap();
        bytes.store_u16(LAST_BATCH_HEAD, last).unwrap();
        bytes.store_u16(entry(0) + NEXT, links[0]).unwrap();
        bytes.store_u16(entry(1) + NEXT, links[1]).unwrap();
        let recovered = area.recover(used_idx);
        assert_eq!(recovered.is_ok(), ok, "{last} {links:?} {used_idx}");
    }
    // Of a ring that was begun anew, with nothing in flight: nothing is asked of the rest.
    let (_fd, mut area, bytes) = area();
    bytes.store_u16(USED_IDX, 57).unwrap();
    bytes.store_u16(LAST_BATCH_HEAD, u16::MAX).unwrap();
    assert!(area.recover(0).unwrap().is_empty());
    assert_eq!(bytes.load_u16(USED_IDX), Ok(0));
}

#[test]
fn pending_heads_come_in_the_order_of_their_counters_whatever_these_are() {
    let (_fd, mut area, bytes) = area();
    for (head, counter) in [(0, u64::MAX), (3, 7), (1, 7), (6, 0)] {
        area.started(head).unwrap();
        let entry = HEADER_BYTES + ENTRY_BYTES * usize::from(head);
        bytes.store_u64(entry + COUNTER, counter).unwrap();
    }
    assert_eq!(area.recover(0).unwrap(), [6, 1, 3, 0]);
    area.started(2).unwrap();
    area.started(4).unwrap();
    assert_eq!(area.recover(0).unwrap().len(), 6);
}

#[test]
fn a_head_that_the_area_has_no_place_for_is_a_fault() {
    let (_fd, mut area, _) = area();
    for head in [SIZE, 1023, u16::MAX] {
        assert!(
            area.started(head).is_err() && area.about_to_use(head).is_err() && area.used(head, 1).is_err()
        );
    }
}

#[test]
fn an_area_that_is_cut_off_is_told() {
    let fd = memfd(192);
    let mut area = InflightArea::adopt(&account(), &fd, 0, 192, 1, SIZE)
        .unwrap()
        .remove(0);
    ftruncate(&fd, 0).unwrap();
    assert_eq!(area.started(0), Err(Fault::Gone));
    assert!(area.is_broken() && area.recover(0).is_err());
}

/// Where the process ends while it gives a head back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Crash {
    BeforeMark,
    BeforeLink,
    BeforeUsed,
    BeforeUnmark,
    After,
}

const CRASHES: [Crash; 5] = [
    Crash::BeforeMark,
    Crash::BeforeLink,
    Crash::BeforeUsed,
    Crash::BeforeUnmark,
    Crash::After,
];

proptest! {
    #[test]
    fn after_a_crash_at_any_step_exactly_what_was_not_given_back_is_pending_in_order(
        begin in prop_oneof![Just(0), Just(65_533), any::<u16>()],
        lives in prop::collection::vec((prop::collection::vec((any::<bool>(), 0..8_usize), 0..24), 0..5_usize), 1..5),
    ) {
        let (fd, len) = create(2, SIZE).unwrap();
        let mut guest = Guest::simple();
        guest.begin_at(begin);
        // What the guest has not got back, in the order in which it offered it; how many of them were marked.
        let mut offered: Vec<u16> = Vec::new();
        let mut marked: Vec<u16> = Vec::new();
        for (steps, crash) in lives {
            // Another process.
            let mut area = InflightArea::adopt(&account(), &fd, 0, len, 2, SIZE).unwrap().remove(1);
            let used = guest.get_u16(QUEUE.used + 2);
            let mut ring = Ring::new(SIZE, QUEUE, used, false, &guest.memory).unwrap();
            let mut taken = area.recover(ring.used_index()).unwrap();
            prop_assert_eq!(&taken, &marked);
            ring.resume(&taken).unwrap();
            let mut end = CRASHES[crash];
            for (take, which) in steps {
                if take {
                    let Some(free) = (0..SIZE).find(|head| !offered.contains(head)) else { continue };
                    guest.offer(SIZE, free);
                    offered.push(free);
                }
                // What is left from before comes first.
                if let Some(head) = ring.next(&guest.memory).unwrap() {
                    prop_assert_eq!(Some(&head), offered.get(marked.len()));
                    area.started(head).unwrap();
                    taken.push(head);
                    marked.push(head);
                } else if !taken.is_empty() {
                    let head = taken.remove(which % taken.len());
                    area.about_to_use(head).unwrap();
                    ring.push_used(&guest.memory, None, head, 0).unwrap();
                    area.used(head, ring.used_index()).unwrap();
                    offered.retain(|other| *other != head);
                    marked.retain(|other| *other != head);
                }
            }
            // The end, in the middle of something.
            if end == Crash::BeforeMark {
                ring.next(&guest.memory).unwrap();
                continue;
            }
            if taken.is_empty() {
                end = Crash::BeforeLink;
            }
            if end > Crash::BeforeLink {
                let head = taken[0];
                area.about_to_use(head).unwrap();
                if end > Crash::BeforeUsed {
                    ring.push_used(&guest.memory, None, head, 0).unwrap();
                    offered.retain(|other| *other != head);
                    marked.retain(|other| *other != head);
                }
                if end > Crash::BeforeUnmark {
                    area.used(head, ring.used_index()).unwrap();
                }
            }
        }
    }
}
