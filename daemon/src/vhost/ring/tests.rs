//! A queue keeps its count whatever the guest says.

use proptest::prelude::*;

use super::*;
use crate::vhost::guest::{self, DATA, Guest, QUEUE, account, memfd};
use crate::vhost::mapping::Mapping;

const SIZE: u16 = 8;

fn ring(guest: &Guest, base: u16, event_idx: bool) -> Ring {
    Ring::new(SIZE, QUEUE, base, event_idx, &guest.memory).unwrap()
}

const JUMPED: Fault = Fault::Ring("an available index that has jumped");

#[test]
fn heads_come_in_order_and_go_back_with_their_lengths() {
    for begin in [0, 5, u16::MAX - 3] {
        let mut guest = Guest::simple();
        guest.begin_at(begin);
        let mut ring = ring(&guest, begin, false);
        assert_eq!(ring.next(&guest.memory), Ok(None));
        for round in 0..20_u16 {
            let heads = [round % SIZE, (round + 3) % SIZE];
            for head in heads {
                guest.offer(SIZE, head);
            }
            for head in heads {
                assert_eq!(ring.next(&guest.memory), Ok(Some(head)));
            }
            assert_eq!((ring.next(&guest.memory), ring.in_flight()), (Ok(None), 2));
            // In another order.
            for (i, head) in [(0, heads[1]), (1, heads[0])] {
                let entry = begin.wrapping_add(2 * round + i);
                let len = u32::from(round) * 1000 + 70_000;
                ring.push_used(&guest.memory, None, head, len).unwrap();
                let bytes = guest.get(QUEUE.used + 4 + 8 * u64::from(entry % SIZE), 8);
                assert_eq!(bytes[..4], u32::from(head).to_le_bytes());
                assert_eq!(bytes[4..], len.to_le_bytes());
                assert_eq!(guest.get_u16(QUEUE.used + 2), entry.wrapping_add(1));
            }
        }
        let end = begin.wrapping_add(40);
        assert_eq!((ring.base(), ring.used_index(), ring.in_flight()), (end, end, 0));
    }
}

#[test]
fn an_index_that_jumps_ahead_or_back_is_a_fault() {
    for (index, ok) in [
        (3, true),
        (11, true),
        (12, false),
        (2, false),
        (0x8003, false),
        (u16::MAX, false),
    ] {
        let mut guest = Guest::simple();
        guest.begin_at(3);
        let mut ring = ring(&guest, 3, false);
        for i in 0..SIZE {
            guest.put_u16(QUEUE.avail + 4 + 2 * u64::from(i), (i + 1) % SIZE);
        }
        guest.put_u16(QUEUE.avail + 2, index);
        match ok {
            true => assert_eq!(ring.next(&guest.memory).map(|head| head.is_some()), Ok(index > 3)),
            false => assert_eq!(ring.next(&guest.memory), Err(JUMPED), "{index}"),
        }
        assert_eq!(ring.ask_for_kicks(&guest.memory, None).is_ok(), ok);
    }
}

#[test]
fn an_index_is_not_taken_back_to_before_what_was_taken() {
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, false);
    guest.offer(SIZE, 0);
    guest.offer(SIZE, 1);
    ring.next(&guest.memory).unwrap();
    ring.next(&guest.memory).unwrap();
    guest.put_u16(QUEUE.avail + 2, 1);
    assert_eq!(ring.next(&guest.memory), Err(JUMPED));
}

#[test]
fn never_more_is_in_flight_than_the_queue_has_places() {
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, false);
    for head in 0..SIZE {
        guest.offer(SIZE, head);
    }
    for head in 0..SIZE {
        assert_eq!(ring.next(&guest.memory), Ok(Some(head)));
    }
    // The used index that the guest can write is not the one that counts.
    guest.put_u16(QUEUE.used + 2, SIZE);
    guest.offer(SIZE, 0);
    assert_eq!(ring.next(&guest.memory), Err(JUMPED));
}

#[test]
fn a_head_outside_the_queue_or_in_flight_already_is_a_fault() {
    for head in [SIZE, u16::MAX] {
        let mut guest = Guest::simple();
        let mut ring = ring(&guest, 0, false);
        guest.offer(SIZE, head);
        assert_eq!(
            ring.next(&guest.memory),
            Err(Fault::Ring("a head outside its queue"))
        );
    }
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, false);
    guest.offer(SIZE, 4);
    guest.offer(SIZE, 4);
    assert_eq!(ring.next(&guest.memory), Ok(Some(4)));
    let twice = Err(Fault::Ring("a head that is in flight already"));
    assert_eq!(ring.next(&guest.memory), twice);
    // Given back, it may come again.
    ring.push_used(&guest.memory, None, 4, 0).unwrap();
    assert_eq!(ring.next(&guest.memory), Ok(Some(4)));
}

#[test]
fn a_queue_of_a_wrong_size_alignment_or_place_is_refused() {
    let guest = Guest::simple();
    let new = |size, addresses| Ring::new(size, addresses, 0, true, &guest.memory);
    for size in [0, 3, 1000, 1025, 2048, 32768, u16::MAX] {
        assert!(new(size, QUEUE).is_err(), "{size}");
    }
    for size in [1, 2, 256, 1024] {
        assert!(new(size, QUEUE).is_ok(), "{size}");
    }
    for addresses in [
        RingAddresses {
            desc: 0x1008,
            ..QUEUE
        },
        RingAddresses {
            avail: 0x6001,
            ..QUEUE
        },
        RingAddresses {
            used: 0x8002,
            ..QUEUE
        },
        RingAddresses {
            desc: guest::END - 112,
            ..QUEUE
        },
        RingAddresses {
            avail: guest::END - 20,
            ..QUEUE
        },
        RingAddresses {
            used: guest::END - 68,
            ..QUEUE
        },
        RingAddresses {
            desc: u64::MAX - 15,
            ..QUEUE
        },
        RingAddresses {
            avail: u64::MAX - 1,
            ..QUEUE
        },
        RingAddresses {
            used: u64::MAX - 3,
            ..QUEUE
        },
    ] {
        assert!(new(SIZE, addresses).is_err(), "{addresses:?}");
    }
    // At the very end.
    assert!(
        new(
            SIZE,
            RingAddresses {
                avail: guest::END - 22,
                ..QUEUE
            }
        )
        .is_ok()
    );
}

#[test]
fn a_base_that_is_not_near_the_used_index_is_refused() {
    let mut guest = Guest::simple();
    guest.begin_at(100);
    for (base, ok) in [(100, true), (108, true), (109, false), (99, false), (0, false)] {
        assert_eq!(
            Ring::new(SIZE, QUEUE, base, false, &guest.memory).is_ok(),
            ok,
            "{base}"
        );
    }
}

#[test]
fn after_a_crash_it_goes_on_behind_what_was_in_flight() {
    let mut guest = Guest::simple();
    guest.begin_at(65_534);
    for head in [5, 2, 7] {
        guest.offer(SIZE, head);
    }
    // Two were taken before; the front-end does not know it.
    let mut resumed = ring(&guest, 65_534, false);
    resumed.resume(&[5, 2]).unwrap();
    assert_eq!((resumed.in_flight(), resumed.base()), (2, 0));
    assert_eq!(resumed.next(&guest.memory), Ok(Some(7)));
    assert_eq!(resumed.next(&guest.memory), Ok(None));
    for head in [2, 7, 5] {
        resumed.push_used(&guest.memory, None, head, 1).unwrap();
    }
    assert_eq!(guest.get_u16(QUEUE.used + 2), 1);
    for wrong in [&[8][..], &[1, 2, 1], &[u16::MAX]] {
        assert!(ring(&guest, 1, false).resume(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn kicks_are_asked_for_and_what_came_meanwhile_is_seen() {
    for event_idx in [false, true] {
        let mut guest = Guest::simple();
        let mut ring = ring(&guest, 0, event_idx);
        let avail_event = QUEUE.used + 4 + 8 * u64::from(SIZE);
        guest.put(QUEUE.used, &[0, 0]);
        ring.refuse_kicks(&guest.memory, None).unwrap();
        assert_eq!(guest.get_u16(QUEUE.used), u16::from(!event_idx));
        guest.offer(SIZE, 1);
        ring.next(&guest.memory).unwrap();
        assert_eq!(ring.ask_for_kicks(&guest.memory, None), Ok(false));
        assert_eq!(guest.get_u16(QUEUE.used), 0);
        assert_eq!(guest.get_u16(avail_event), u16::from(event_idx));
        guest.offer(SIZE, 2);
        assert_eq!(ring.ask_for_kicks(&guest.memory, None), Ok(true));
        assert_eq!(ring.next(&guest.memory), Ok(Some(2)));
    }
}

#[test]
fn without_event_indices_the_guest_is_called_unless_it_says_no() {
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, false);
    assert_eq!(ring.wants_call(&guest.memory), Ok(true), "the first time");
    assert_eq!(
        ring.wants_call(&guest.memory),
        Ok(false),
        "nothing was given back"
    );
    for (flags, wants) in [(0, true), (1, false), (0xfffe, true), (0xffff, false)] {
        guest.put_u16(QUEUE.avail, flags);
        guest.offer(SIZE, 0);
        ring.next(&guest.memory).unwrap();
        ring.push_used(&guest.memory, None, 0, 0).unwrap();
        assert_eq!(ring.wants_call(&guest.memory), Ok(wants), "{flags:#x}");
    }
}

#[test]
fn writes_to_the_used_ring_are_logged_where_the_front_end_says() {
    let mut guest = Guest::simple();
    let fd = memfd(4096);
    let log = DirtyLog::new(&account(), &fd, 0, 2).unwrap();
    let bits = Mapping::new(&account(), &fd, 0, 2).unwrap();
    let logged = |addresses| Ring::new(SIZE, addresses, 0, true, &guest.memory).unwrap();
    let mut silent = logged(QUEUE);
    // Entries in page 9, the event index after them in page 10.
    let mut ring = logged(RingAddresses {
        log_used: Some(0x9ffc - 8 * u64::from(SIZE)),
        ..QUEUE
    });
    let mut wild = logged(RingAddresses {
        log_used: Some(u64::MAX),
        ..QUEUE
    });
    guest.offer(SIZE, 0);
    silent.next(&guest.memory).unwrap();
    silent.push_used(&guest.memory, Some(&log), 0, 1).unwrap();
    silent.ask_for_kicks(&guest.memory, Some(&log)).unwrap();
    assert_eq!(bits.load_u16(0), Ok(0));
    ring.next(&guest.memory).unwrap();
    ring.push_used(&guest.memory, Some(&log), 0, 1).unwrap();
    assert_eq!(bits.load_u16(0).map(u16::from_le), Ok(1 << 9));
    ring.ask_for_kicks(&guest.memory, Some(&log)).unwrap();
    assert_eq!(bits.load_u16(0).map(u16::from_le), Ok(0b11 << 9));
    wild.next(&guest.memory).unwrap();
    wild.push_used(&guest.memory, Some(&log), 0, 1).unwrap();
    assert!(log.ignored() > 0);
}

#[test]
fn a_ring_whose_memory_has_gone_is_told_by_whatever_touches_it() {
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, true);
    guest.offer(SIZE, 0);
    ring.next(&guest.memory).unwrap();
    rustix::fs::ftruncate(&guest.fd, 0x6000).unwrap();
    assert_eq!(ring.push_used(&guest.memory, None, 0, 1), Err(Fault::Gone));
    assert_eq!(ring.next(&guest.memory), Err(Fault::Gone));
    assert_eq!(ring.ask_for_kicks(&guest.memory, None), Err(Fault::Gone));
    assert_eq!(ring.wants_call(&guest.memory), Ok(true));
    assert!(Ring::new(SIZE, QUEUE, 0, true, &guest.memory).is_err());
}

#[test]
fn a_ring_whose_region_was_removed_is_a_fault() {
    let mut guest = Guest::simple();
    let mut ring = ring(&guest, 0, true);
    guest.offer(SIZE, 0);
    ring.next(&guest.memory).unwrap();
    let nothing = GuestMemory::empty();
    assert!(ring.next(&nothing).is_err() && ring.chain(&nothing, 0).is_err());
    assert!(ring.push_used(&nothing, None, 0, 1).is_err());
    // What was done with the memory it began with goes on.
    guest.chain(QUEUE.desc, 1, &[(DATA, 1, false)]);
    ring.chain(&guest.memory, 1).unwrap();
}

proptest! {
    #[test]
    fn with_event_indices_the_guest_is_called_when_its_event_was_passed(
        begin in prop_oneof![Just(0), Just(65_530), any::<u16>()],
        steps in prop::collection::vec((1..=SIZE, -12..12_i32, any::<bool>()), 1..12),
    ) {
        let mut guest = Guest::simple();
        guest.begin_at(begin);
        let mut ring = ring(&guest, begin, true);
        ring.wants_call(&guest.memory).unwrap();
        // Used entries not yet called for, by their numbers.
        let mut pushed = Vec::new();
        for (count, event, ask) in steps {
            for head in 0..count {
                guest.offer(SIZE, head);
                prop_assert_eq!(ring.next(&guest.memory), Ok(Some(head)));
                pushed.push(ring.used_index());
                ring.push_used(&guest.memory, None, head, 0).unwrap();
            }
            if ask {
                let event = ring.used_index().wrapping_add(event as u16);
                guest.put_u16(QUEUE.avail + 4 + 2 * u64::from(SIZE), event);
                prop_assert_eq!(ring.wants_call(&guest.memory), Ok(pushed.contains(&event)));
                pushed.clear();
            }
        }
    }
}
