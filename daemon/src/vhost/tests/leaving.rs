//! How front-ends come and go: one at a time, nothing of an old one after a newer one, nothing lost that was not answered.

use std::os::fd::AsFd;

use rustix::net::RecvFlags;

use super::front_end::{ENTRIES, FEATURES, FrontEnd, READ, UNTOUCHED, WRITE};
use super::*;
use crate::leavings::tests::lingering;
use crate::vhost::config::{WRITEBACK_AT, feature};
use crate::vhost::message::number;

#[test]
fn a_second_front_end_is_turned_away_while_the_first_is_there() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut first, task) = attachment.start().await;
        let (second, turned_away) = attachment.connect();
        assert!(second.is_cut().await);
        turned_away.await;
        assert_eq!(first.carry_out(0, WRITE, 0, 512).await, 0);
        assert_eq!(attachment.sessions.connections(), 1);
        first.hang_up().await;
        task.await;
        let (mut third, _task) = attachment.start().await;
        assert_eq!(third.carry_out(0, READ, 0, 512).await, 0);
    });
}

#[test]
fn the_next_is_served_after_the_last_request_of_the_one_before_and_that_one_is_answered_nowhere() {
    on_both(|| async {
        let attachment = Attachment::new();
        attachment.device.fill(0, &pattern(9, 0x1000));
        let (mut first, _first) = attachment.start().await;
        attachment.device.hold();
        first.lay(0, READ, 0, 0x1000);
        first.offer(0);
        eventually("it is at the device", || attachment.device.running.get() == 1).await;
        first.hang_up().await;
        let (mut second, _second) = attachment.connect();
        let (third, _third) = attachment.connect();
        assert!(third.is_cut().await, "one waits already");
        many_turns().await;
        assert_eq!(
            attachment.sessions.connections(),
            1,
            "the first, whose request runs"
        );
        attachment.device.release();
        second.start().await;
        assert_eq!(second.carry_out(0, READ, 0, 512).await, 0);
        // Its memory may have been given to something else meanwhile.
        assert_eq!((first.used_index(), first.status(0)), (0, UNTOUCHED));
        assert!(
            first
                .guest
                .get(FrontEnd::data(0), 0x1000)
                .iter()
                .all(|byte| *byte == 0)
        );
    });
}

#[test]
fn a_queue_stops_after_its_last_request_and_says_where_it_stands() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        attachment.device.hold();
        for head in [0, 3] {
            guest.lay(head, WRITE, 0, 512);
            guest.offer(head);
        }
        eventually("both are at the device", || attachment.device.running.get() == 2).await;
        guest.send(number::GET_VRING_BASE, &[0; 8], None);
        guest.lay(6, WRITE, 0, 512);
        guest.offer(6);
        many_turns().await;
        assert_eq!(guest.used_index(), 0);
        attachment.device.release();
        let (_, payload, _) = guest.reply().await.unwrap();
        assert_eq!(payload, [0, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(guest.used_index(), 2, "the third is left for whoever goes on");
        assert!(guest.start_queue(2).await);
        guest.called_for(3).await;
        assert_eq!(guest.used_heads(), [0, 3, 6]);
        // One that does not run is stopped as well.
        assert_eq!(guest.stop_queue().await, Some(3));
        assert_eq!(guest.stop_queue().await, Some(3));
    });
}

#[test]
fn what_was_in_flight_when_the_back_end_ended_is_done_again_in_its_order_and_through_the_cache_as_before() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.connect();
        guest.agree(FEATURES | feature::BLK_CONFIG_WCE).await;
        let area = guest.inflight_area().await;
        assert!(guest.use_area(&area).await);
        assert!(guest.pass_memory().await && guest.start_queue(0).await);
        let through: Vec<u8> = [&WRITEBACK_AT.to_ne_bytes()[..], &1u32.to_ne_bytes(), &[0; 5]].concat();
        assert!(guest.ask(number::SET_CONFIG, &through, None).await);
        assert_eq!(guest.carry_out(9, WRITE, 9, 512).await, 0);
        attachment.device.hold();
        for head in [6, 0, 3] {
            guest.lay(head, WRITE, head.into(), 512);
            guest.offer(head);
        }
        eventually("all are at the device", || attachment.device.running.get() == 3).await;
        guest.hang_up().await;
        guest.lay(12, WRITE, 12, 512);
        guest.offer(12);
        attachment.device.release();
        task.await;
        assert_eq!(guest.used_heads(), [9]);

        attachment.device.log.borrow_mut().clear();
        let FrontEnd { guest: memory, .. } = guest;
        let (mut again, _task) = attachment.connect();
        again.guest = memory;
        again.agree(FEATURES | feature::BLK_CONFIG_WCE).await;
        assert!(again.use_area(&area).await);
        // As QEMU does, which knows no better than the used index.
        assert!(again.pass_memory().await && again.start_queue(1).await);
        again.called_for(5).await;
        // That writes are durable when they are acknowledged was promised to the guest before.
        let order = [6, 0, 3, 12].map(|sector| format!("write {}+512 fua=true", sector * 512));
        assert_eq!(*attachment.device.log.borrow(), order);
        assert_eq!(again.stop_queue().await, Some(5));
    });
}

#[test]
fn an_inflight_area_may_be_for_larger_queues_and_not_for_smaller_ones() {
    on_both(|| async {
        for entries in [ENTRIES / 2, ENTRIES, 2 * ENTRIES] {
            let attachment = Attachment::new();
            let (mut guest, _task) = attachment.connect();
            guest.agree(FEATURES).await;
            let area = guest.inflight_area_of(entries).await;
            assert!(guest.use_area(&area).await && guest.pass_memory().await);
            if entries < ENTRIES {
                assert!(guest.starting_queue_is_the_end(0).await);
                continue;
            }
            assert!(guest.start_queue(0).await, "{entries} entries");
            assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
            assert_eq!(guest.stop_queue().await, Some(1));
        }
    });
}

#[test]
fn what_a_larger_queue_left_in_flight_is_not_done_in_a_smaller_one() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.connect();
        guest.agree(FEATURES).await;
        let area = guest.inflight_area().await;
        assert!(guest.use_area(&area).await && guest.pass_memory().await);
        assert!(guest.start_queue(0).await);
        attachment.device.hold();
        let beyond = 129;
        guest.lay(beyond, WRITE, 0, 512);
        guest.offer(beyond);
        eventually("it is at the device", || attachment.device.running.get() == 1).await;
        guest.hang_up().await;
        attachment.device.release();
        task.await;
        let FrontEnd { guest: memory, .. } = guest;
        let (mut again, _task) = attachment.connect();
        (again.guest, again.entries) = (memory, 128);
        again.agree(FEATURES).await;
        assert!(again.use_area(&area).await && again.pass_memory().await);
        assert!(again.starting_queue_is_the_end(0).await);
        assert_eq!(attachment.device.log.borrow().len(), 1);
    });
}

#[test]
fn a_queue_is_disabled_after_its_last_request_unless_its_front_end_goes_before() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.start().await;
        for goes_before in [false, true] {
            let (before, head) = (guest.used_index(), if goes_before { 3 } else { 0 });
            attachment.device.hold();
            guest.lay(head, READ, 0, 512);
            guest.offer(head);
            eventually("it is at the device", || attachment.device.running.get() == 1).await;
            guest.send(number::SET_VRING_ENABLE, &[0; 8], None);
            many_turns().await;
            let peeked = rustix::net::recv(
                guest.stream.socket(),
                &mut [0; 1],
                RecvFlags::PEEK | RecvFlags::DONTWAIT,
            );
            assert_eq!(peeked.err(), Some(rustix::io::Errno::AGAIN), "no answer yet");
            assert_eq!((guest.used_index(), guest.status(head)), (before, UNTOUCHED));
            if goes_before {
                guest.hang_up().await;
                attachment.device.release();
                break;
            }
            attachment.device.release();
            assert_eq!(guest.reply().await.unwrap().1, 0u64.to_ne_bytes());
            assert_eq!((guest.used_index(), guest.status(head)), (before + 1, 0));
            assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 1).await);
        }
        task.await;
        assert_eq!((guest.used_index(), guest.status(3)), (1, UNTOUCHED));
    });
}

#[test]
fn an_attachment_that_ends_answers_what_it_took_and_takes_nothing_more() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        attachment.device.hold();
        guest.lay(0, WRITE, 0, 512);
        guest.offer(0);
        eventually("it is at the device", || attachment.device.running.get() == 1).await;
        let sessions = attachment.sessions.clone();
        let ending = spawn(async move { sessions.end_all(FAR).await });
        many_turns().await;
        guest.lay(3, WRITE, 0, 512);
        guest.offer(3);
        many_turns().await;
        assert!(!ending.is_finished());
        attachment.device.release();
        ending.await;
        assert!(guest.is_cut().await);
        assert_eq!((guest.used_heads(), guest.status(0)), (vec![0], 0));
        assert_eq!(guest.status(3), UNTOUCHED);
        let (late, _task) = attachment.connect();
        assert!(late.is_cut().await);
        assert_eq!(attachment.sessions.connections(), 0);
    });
}

#[test]
fn an_end_does_not_wait_for_ever_to_answer_and_always_for_requests_to_end() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        attachment.device.hold();
        guest.lay(0, WRITE, 0, 512);
        guest.offer(0);
        eventually("it is at the device", || attachment.device.running.get() == 1).await;
        let sessions = attachment.sessions.clone();
        let ending = spawn(async move { sessions.end_all(Duration::from_millis(5)).await });
        assert!(guest.is_cut().await);
        many_turns().await;
        assert!(!ending.is_finished(), "its request runs");
        attachment.device.release();
        ending.await;
        assert_eq!((guest.used_index(), guest.status(0)), (0, UNTOUCHED));
    });
}

#[test]
fn what_a_front_end_has_passed_is_closed_by_its_attachments_own_thread() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.start().await;
        let queue = 0u64.to_ne_bytes();
        assert!(
            guest
                .ask(number::SET_VRING_ERR, &queue, Some(guest.call.as_fd()))
                .await
        );
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
        let leavings = attachment.sessions.leavings().clone();
        leavings.all_closed().await;
        // The thread is busy from here on.
        let (socket, peer) = lingering();
        leavings.put(socket);
        guest.hang_up().await;
        // Kick, call, that for faults, the memory's file and the connection itself.
        eventually("all are left", || leavings.len() == 6).await;
        many_turns().await;
        assert!(!task.is_finished(), "they are not closed yet");
        drop(peer);
        task.await;
        assert_eq!(leavings.len(), 0);
    });
}
