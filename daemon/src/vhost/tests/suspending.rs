//! Queues that are stopped with requests in flight (GET_VRING_BASE_SKIP_DRAIN): these are left where the area says, touch nothing of the
//! guest's any more, and are done again by whoever goes on, after what was at the device has ended.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::RecvFlags;

use super::front_end::{FEATURES, FrontEnd, READ, UNTOUCHED, WRITE};
use super::*;
use crate::vhost::config::protocol;
use crate::vhost::message::number;

type Area = (OwnedFd, Vec<u8>);

/// A front-end whose queue runs, and its area.
async fn start(attachment: &Attachment, protocol: u64) -> (FrontEnd, Task<()>, Area) {
    let (mut guest, task) = attachment.connect();
    guest.agree_on(FEATURES, protocol).await;
    let area = guest.inflight_area().await;
    assert!(guest.use_area(&area).await && guest.pass_memory().await);
    assert!(guest.start_queue(0).await);
    (guest, task, area)
}

/// Requests of one sector each that the device holds back.
async fn held_back(attachment: &Attachment, guest: &mut FrontEnd, requests: &[(u16, u32)]) {
    attachment.device.hold();
    for (head, kind) in requests {
        guest.lay(*head, *kind, (*head).into(), 512);
        guest.offer(*head);
    }
    let all = requests.len();
    eventually("all are at the device", || attachment.device.running.get() == all).await;
}

fn is_answered(guest: &FrontEnd) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    rustix::net::recv(guest.stream.socket(), &mut [0; 1], flags).is_ok()
}

#[test]
fn a_queue_stops_at_once_and_what_was_in_flight_is_done_again_in_its_order() {
    on_both(|| async {
        let attachment = Attachment::new();
        attachment.device.fill(0, &pattern(5, 0x4000));
        let (mut guest, _task, _area) = start(&attachment, protocol::OFFERED).await;
        assert_eq!(guest.carry_out(9, WRITE, 9, 512).await, 0);
        held_back(&attachment, &mut guest, &[(6, WRITE), (0, READ), (3, WRITE)]).await;
        guest.guest.put(FrontEnd::data(0), &[0xab; 512]);
        // QEMU's two messages.
        assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 0).await);
        assert_eq!(guest.suspend_queue().await, Some(4));
        assert_eq!(attachment.device.running.get(), 3, "nobody has waited for them");
        attachment.device.release();
        eventually("they have ended", || attachment.device.ended.get() == 4).await;
        many_turns().await;
        assert_eq!(guest.used_heads(), [9]);
        assert_eq!([0, 3, 6].map(|head| guest.status(head)), [UNTOUCHED; 3]);
        assert_eq!(guest.guest.get(FrontEnd::data(0), 512), [0xab; 512]);
        // What the guest has asked for meanwhile comes after them.
        guest.lay(12, WRITE, 12, 512);
        guest.offer(12);
        attachment.device.log.borrow_mut().clear();
        assert!(guest.start_queue(4).await);
        guest.called_for(5).await;
        let log = [
            "write 3072+512 fua=false",
            "read 0+512",
            "write 1536+512 fua=false",
            "write 6144+512 fua=false",
        ];
        assert_eq!(*attachment.device.log.borrow(), log);
        assert_eq!([0, 3, 6, 12].map(|head| guest.status(head)), [0; 4]);
        assert_eq!(guest.guest.get(FrontEnd::data(0), 512), pattern(5, 512));
        assert_eq!(guest.stop_queue().await, Some(5));
    });
}

/// All that starts the queue again, but for the kick.
async fn describe_again(guest: &FrontEnd, base: u32) {
    assert!(
        guest
            .tell_queue(number::SET_VRING_NUM, 0, guest.entries.into())
            .await
    );
    assert!(guest.tell_queue(number::SET_VRING_BASE, 0, base).await);
    assert!(guest.set_addresses(None).await);
}

#[test]
fn a_queue_starts_again_only_after_what_was_left_at_the_device_has_ended() {
    on_both(|| async {
        for goes in [false, true] {
            let attachment = Attachment::new();
            let (mut guest, task, _area) = start(&attachment, protocol::OFFERED).await;
            held_back(&attachment, &mut guest, &[(0, WRITE)]).await;
            assert_eq!(guest.suspend_queue().await, Some(1));
            describe_again(&guest, 1).await;
            let queue = 0u64.to_ne_bytes();
            guest.send(number::SET_VRING_KICK, &queue, Some(guest.kick.as_fd()));
            many_turns().await;
            assert!(!is_answered(&guest));
            assert_eq!(
                attachment.device.log.borrow().len(),
                1,
                "it is not done again yet"
            );
            if goes {
                drop(guest);
                many_turns().await;
                assert!(!task.is_finished(), "its request runs");
                attachment.device.release();
                task.await;
                assert_eq!(attachment.device.log.borrow().len(), 1);
                continue;
            }
            attachment.device.release();
            assert_eq!(guest.reply().await.unwrap().1, queue, "it is started");
            guest.called_for(1).await;
            assert_eq!(*attachment.device.log.borrow(), ["write 0+512 fua=false"; 2]);
        }
    });
}

#[test]
fn what_was_left_before_it_reached_the_device_does_not_reach_it() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task, _area) = start(&attachment, protocol::OFFERED).await;
        attachment.device.hold();
        let heads: Vec<u16> = (0..24).map(|i| 3 * i).collect();
        for head in &heads {
            guest.lay(*head, WRITE, (*head).into(), 512);
            guest.offer(*head);
        }
        eventually("some are at the device", || attachment.device.running.get() > 3).await;
        many_turns().await;
        let running = attachment.device.running.get();
        assert!(running < heads.len(), "some wait for their turn");
        assert_eq!(guest.suspend_queue().await, Some(24));
        attachment.device.release();
        eventually("they have ended", || attachment.device.ended.get() == running).await;
        many_turns().await;
        assert_eq!(attachment.device.log.borrow().len(), running);
        attachment.device.log.borrow_mut().clear();
        assert!(guest.start_queue(24).await);
        guest.called_for(24).await;
        let order = heads
            .iter()
            .map(|head| format!("write {}+512 fua=false", u32::from(*head) * 512));
        assert_eq!(*attachment.device.log.borrow(), order.collect::<Vec<_>>());
    });
}

/// The area of one that is to be waited for may stay where it is: then nobody does again what it says. (QEMU after 11.0 agrees on
/// leaving requests with whoever offers it, and asks for it by a message of its own.)
#[test]
fn a_queue_stops_after_its_last_request_unless_that_is_to_be_left_and_there_is_an_area() {
    const INFLIGHT: u64 = protocol::GET_VRING_BASE_INFLIGHT;
    const SKIP_DRAIN: u64 = protocol::GET_VRING_BASE_SKIP_DRAIN;
    let stops = [
        (
            "an earlier front-end",
            SKIP_DRAIN | INFLIGHT,
            true,
            number::GET_VRING_BASE,
        ),
        ("QEMU 11.0", SKIP_DRAIN, true, number::GET_VRING_BASE),
        ("all is agreed on", 0, true, number::GET_VRING_BASE),
        ("no area", 0, false, number::GET_VRING_BASE_SKIP_DRAIN),
    ];
    for (what, without, has_area, message) in stops {
        on_both(|| async move {
            let attachment = Attachment::new();
            let (mut guest, _task) = attachment.connect();
            guest.agree_on(FEATURES, protocol::OFFERED & !without).await;
            if has_area {
                let area = guest.inflight_area().await;
                assert!(guest.use_area(&area).await);
            }
            assert!(guest.pass_memory().await && guest.start_queue(0).await);
            held_back(&attachment, &mut guest, &[(0, WRITE)]).await;
            if without == 0 && has_area {
                assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 0).await);
            }
            guest.send(message, &[0; 8], None);
            many_turns().await;
            assert!(!is_answered(&guest), "{what}");
            attachment.device.release();
            assert_eq!(guest.reply().await.unwrap().1, [0, 0, 0, 0, 1, 0, 0, 0]);
            assert_eq!((guest.used_heads(), guest.status(0)), (vec![0], 0), "{what}");
        });
    }
}

#[test]
fn features_are_not_agreed_on_without_those_that_they_need() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        let ack = protocol::REPLY_ACK;
        guest.tell(number::SET_PROTOCOL_FEATURES, &[ack]).await;
        guest.need_reply = true;
        let inflight = ack | protocol::GET_VRING_BASE_INFLIGHT;
        assert!(!guest.tell(number::SET_PROTOCOL_FEATURES, &[inflight]).await);
        let both = inflight | protocol::INFLIGHT_SHMFD;
        assert!(guest.tell(number::SET_PROTOCOL_FEATURES, &[both]).await);
        let skip_drain = ack | protocol::GET_VRING_BASE_SKIP_DRAIN;
        assert!(!guest.tell(number::SET_PROTOCOL_FEATURES, &[skip_drain]).await);
        let all = both | skip_drain;
        assert!(guest.tell(number::SET_PROTOCOL_FEATURES, &[all]).await);
    });
}

#[test]
fn a_queue_is_not_left_without_the_feature() {
    on_both(|| async {
        let attachment = Attachment::new();
        let without = protocol::OFFERED & !protocol::GET_VRING_BASE_SKIP_DRAIN;
        let (guest, _task, _area) = start(&attachment, without).await;
        guest.send(number::GET_VRING_BASE_SKIP_DRAIN, &[0; 8], None);
        assert!(guest.is_cut().await);
    });
}

/// What the source has left is at the device when the target starts. Its last write lands before the target's first.
#[test]
fn another_attachment_does_again_what_was_left_after_the_first_has_ended() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut source, source_task, area) = start(&attachment, protocol::OFFERED).await;
        held_back(&attachment, &mut source, &[(0, WRITE), (3, READ)]).await;
        assert_eq!(source.suspend_queue().await, Some(2));

        let fenced = Rc::new(Cell::new(false));
        let first = attachment.sessions.clone();
        let takeover = {
            let fenced = fenced.clone();
            move || -> std::pin::Pin<Box<dyn Future<Output = libvol::Result<()>>>> {
                let (first, fenced) = (first.clone(), fenced.clone());
                Box::pin(async move {
                    first.end_all(Duration::from_millis(1)).await;
                    fenced.set(true);
                    Ok(())
                })
            }
        };
        let second = Attachment {
            device: attachment.device.clone(),
            sessions: Sessions::new(Some(Box::new(takeover))),
            read_only: false,
            writeback: attachment.writeback.clone(),
            moved: true,
        };
        let (mut target, _task) = second.connect();
        let FrontEnd { guest: memory, .. } = source;
        target.guest = memory;
        target.agree(FEATURES).await;
        assert!(target.use_area(&area).await && target.pass_memory().await);
        describe_again(&target, 2).await;
        assert!(target.tell_queue(number::SET_VRING_ENABLE, 0, 1).await);
        let queue = 0u64.to_ne_bytes();
        assert!(
            target
                .ask(number::SET_VRING_CALL, &queue, Some(target.call.as_fd()))
                .await
        );
        target.send(number::SET_VRING_KICK, &queue, Some(target.kick.as_fd()));
        many_turns().await;
        assert!(
            !fenced.get() && !is_answered(&target),
            "the source's write is at the device"
        );
        assert_eq!(attachment.device.log.borrow().len(), 2);
        attachment.device.release();
        assert_eq!(target.reply().await.unwrap().1, queue, "it is started");
        assert!(fenced.get());
        source_task.await;
        target.called_for(2).await;
        assert_eq!(target.used_heads(), [0, 3]);
        assert_eq!(attachment.device.log.borrow().len(), 4);
    });
}

#[test]
fn a_device_that_is_reset_does_nothing_again() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task, area) = start(&attachment, protocol::OFFERED).await;
        held_back(&attachment, &mut guest, &[(0, WRITE), (3, WRITE)]).await;
        assert_eq!(guest.suspend_queue().await, Some(2));
        guest.send(number::RESET_DEVICE, &[], None);
        many_turns().await;
        assert!(!is_answered(&guest), "they are at the device");
        attachment.device.release();
        assert_eq!(guest.reply().await.unwrap().1, 0u64.to_ne_bytes());
        attachment.device.log.borrow_mut().clear();
        assert!(guest.use_area(&area).await);
        guest.guest.begin_at(0);
        assert!(guest.start_queue(0).await);
        many_turns().await;
        assert!(attachment.device.log.borrow().is_empty());
        assert_eq!(guest.carry_out(6, WRITE, 6, 512).await, 0);
        assert_eq!(*attachment.device.log.borrow(), ["write 3072+512 fua=false"]);
    });
}

/// Stopped once at once, and then, while they are done again, by QEMU's two messages for a stop that waits.
#[test]
fn what_was_left_is_answered_before_a_paused_queue_has_stopped() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task, _area) = start(&attachment, protocol::OFFERED).await;
        held_back(&attachment, &mut guest, &[(0, WRITE), (3, READ)]).await;
        assert_eq!(guest.suspend_queue().await, Some(2));
        attachment.device.release();
        eventually("they have ended", || attachment.device.ended.get() == 2).await;
        attachment.device.hold();
        assert!(guest.start_queue(2).await);
        assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 0).await);
        guest.send(number::GET_VRING_BASE, &[0; 8], None);
        many_turns().await;
        assert!(!is_answered(&guest));
        assert!(guest.used_heads().is_empty());
        attachment.device.release();
        assert_eq!(guest.reply().await.unwrap().1, [0, 0, 0, 0, 2, 0, 0, 0]);
        let mut heads = guest.used_heads();
        heads.sort_unstable();
        assert_eq!(heads, [0, 3]);
        assert_eq!([0, 3].map(|head| guest.status(head)), [0; 2]);
    });
}

/// One that brings its area again, and resets the device before a queue starts.
#[test]
fn a_reset_forgets_what_an_earlier_connection_has_left() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut first, task, area) = start(&attachment, protocol::OFFERED).await;
        held_back(&attachment, &mut first, &[(0, WRITE)]).await;
        assert_eq!(first.suspend_queue().await, Some(1));
        let FrontEnd {
            guest: memory,
            stream,
            ..
        } = first;
        drop(stream);
        attachment.device.release();
        task.await;
        attachment.device.log.borrow_mut().clear();
        let (mut next, _task) = attachment.connect();
        next.guest = memory;
        next.agree(FEATURES).await;
        assert!(next.use_area(&area).await);
        assert!(next.tell(number::RESET_DEVICE, &[]).await);
        assert!(next.pass_memory().await);
        next.guest.begin_at(0);
        assert!(next.start_queue(0).await);
        many_turns().await;
        assert!(attachment.device.log.borrow().is_empty());
        assert_eq!(next.carry_out(6, WRITE, 6, 512).await, 0);
    });
}

/// QEMU says that when it has stopped the queues, and before it looks at the area.
#[test]
fn what_was_left_outlives_a_status_of_nothing() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task, _area) = start(&attachment, protocol::OFFERED).await;
        held_back(&attachment, &mut guest, &[(0, WRITE)]).await;
        assert_eq!(guest.suspend_queue().await, Some(1));
        assert!(guest.tell(number::SET_STATUS, &[0]).await);
        assert_eq!(attachment.device.running.get(), 1, "nobody has waited for it");
        attachment.device.release();
        assert!(guest.start_queue(1).await);
        guest.called_for(1).await;
        assert_eq!(guest.used_heads(), [0]);
    });
}
