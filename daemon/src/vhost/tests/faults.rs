//! What a front-end is told of a ring that its guest has broken.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::front_end::{ENTRIES, FEATURES, FrontEnd, READ, WRITE};
use super::*;
use crate::vhost::guest::{NEXT, QUEUE};
use crate::vhost::message::number::{REM_MEM_REG, SET_VRING_ERR, SET_VRING_NUM};

const TAKEN_BACK: u64 = 1 << 8;

/// Passes an eventfd for the faults of the one queue.
async fn watch_faults(guest: &FrontEnd) -> OwnedFd {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    assert!(pass(guest, &event).await);
    event
}

async fn pass(guest: &FrontEnd, descriptor: &OwnedFd) -> bool {
    let queue = 0u64.to_ne_bytes();
    guest.ask(SET_VRING_ERR, &queue, Some(descriptor.as_fd())).await
}

/// How often it was signalled since this was last asked.
fn signalled(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(e) => {
            assert_eq!(e, rustix::io::Errno::AGAIN);
            0
        }
    }
}

/// A chain that never ends.
fn loops(guest: &mut FrontEnd) {
    guest.guest.descriptor(QUEUE.desc, 3, (0x1_0000, 16), NEXT, 3);
    guest.offer(3);
}

#[test]
fn a_ring_that_its_guest_breaks_is_told_of_once_before_the_end() {
    type Break = fn(&mut FrontEnd);
    let faults: [(&str, Break); 4] = [
        ("a chain that loops", loops),
        ("a head that there is not", |guest| guest.offer(ENTRIES)),
        ("an index that has jumped", |guest| {
            guest.guest.put_u16(QUEUE.avail + 2, ENTRIES + 7);
            rustix::io::write(&guest.kick, &1u64.to_ne_bytes()).unwrap();
        }),
        ("data that is nowhere", |guest| {
            guest.lay(3, READ, 0, 512);
            guest.guest.descriptor(QUEUE.desc, 4, (0x7000_0000, 512), 3, 5);
            guest.offer(3);
        }),
    ];
    for (what, break_it) in faults {
        on_both(|| async move {
            let attachment = Attachment::new();
            let (mut guest, task) = attachment.start().await;
            let faults = watch_faults(&guest).await;
            assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
            assert_eq!(signalled(&faults), 0, "there is no fault yet");
            break_it(&mut guest);
            assert!(guest.is_cut().await, "{what}");
            assert_eq!(signalled(&faults), 1, "{what}");
            task.await;
            assert_eq!(signalled(&faults), 0, "{what}: it is told of once");
        });
    }
}

#[test]
fn memory_that_goes_under_requests_is_one_fault_of_their_ring() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        let faults = watch_faults(&guest).await;
        attachment.device.hold();
        for head in [0, 3] {
            guest.lay(head, READ, 0, 512);
            guest.offer(head);
        }
        eventually("they are at the device", || attachment.device.running.get() == 2).await;
        rustix::fs::ftruncate(&guest.guest.fd, 0x9000).unwrap();
        attachment.device.release();
        assert!(guest.is_cut().await);
        assert_eq!(signalled(&faults), 1, "of the first of two");
    });
}

#[test]
fn a_ring_that_cannot_be_started_is_told_of() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES).await;
        let faults = watch_faults(&guest).await;
        assert!(guest.pass_memory().await);
        assert!(guest.starting_queue_is_the_end(ENTRIES + 1).await);
        assert_eq!(signalled(&faults), 1);
    });
}

#[test]
fn what_is_no_fault_of_a_ring_is_not_told_as_one() {
    on_both(|| async {
        for ends in [
            "it goes",
            "it is refused",
            "a message makes no sense",
            "the attachment ends",
        ] {
            let attachment = Attachment::new();
            let (mut guest, task) = attachment.start().await;
            let faults = watch_faults(&guest).await;
            assert_eq!(guest.carry_out(0, 99, 0, 512).await, 2, "an unknown kind");
            match ends {
                "it goes" => guest.hang_up().await,
                "it is refused" => {
                    assert!(!guest.tell_queue(SET_VRING_NUM, 0, 64).await);
                    assert!(!guest.tell(REM_MEM_REG, &[0, 1, 1, 1, 0]).await);
                    guest.hang_up().await;
                }
                "a message makes no sense" => guest.send(SET_VRING_NUM, &[0; 3], None),
                _ => attachment.sessions.end_all(FAR).await,
            }
            task.await;
            assert_eq!(signalled(&faults), 0, "{ends}");
        }
    });
}

#[test]
fn the_descriptor_passed_last_is_signalled_and_one_that_is_taken_back_is_not() {
    on_both(|| async {
        for taken_back in [false, true] {
            let attachment = Attachment::new();
            let (mut guest, _task) = attachment.start().await;
            let first = watch_faults(&guest).await;
            let second = watch_faults(&guest).await;
            if taken_back {
                assert!(guest.tell(SET_VRING_ERR, &[TAKEN_BACK]).await);
            }
            loops(&mut guest);
            assert!(guest.is_cut().await);
            assert_eq!(
                (signalled(&first), signalled(&second)),
                (0, u64::from(!taken_back))
            );
        }
    });
}

#[test]
fn one_that_is_full_holds_up_nobody() {
    on_both(|| async {
        // And blocking: a write would wait for ever.
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.start().await;
        assert!(pass(&guest, &full).await);
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
        loops(&mut guest);
        assert!(guest.is_cut().await);
        task.await;
    });
}

/// Its own end of the connection, kept, would never be seen to hang up.
#[test]
fn what_is_no_eventfd_is_not_kept() {
    on_both(|| async {
        let memfd = memfd_create("no-eventfd", MemfdFlags::CLOEXEC).unwrap();
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.start().await;
        let own_end = guest.stream.socket().try_clone().unwrap();
        for other in [memfd, own_end] {
            assert!(pass(&guest, &other).await, "it is of no use, and of no harm");
        }
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
        drop(guest);
        task.await;
    });
}

#[test]
fn a_queue_that_there_is_not_has_no_faults() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.connect();
        guest.agree(FEATURES).await;
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let queue = 200u64.to_ne_bytes();
        assert!(!guest.ask(SET_VRING_ERR, &queue, Some(event.as_fd())).await);
        guest.hang_up().await;
        task.await;
    });
}
