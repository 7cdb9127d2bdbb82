//! What a front-end may say, and what becomes of one that says something else.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};

use super::front_end::{ENTRIES, FEATURES, READ, WRITE};
use super::*;
use crate::vhost::config::{feature, protocol};
use crate::vhost::guest::{END, QUEUE, USER, memfd};
use crate::vhost::message::number::*;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn the_device_says_what_it_is() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (guest, _task) = attachment.connect();
        let features = guest.number(GET_FEATURES).await;
        assert_eq!(features & FEATURES, FEATURES);
        assert_eq!(guest.number(GET_PROTOCOL_FEATURES).await, protocol::OFFERED);
        assert_eq!(guest.number(GET_QUEUE_NUM).await, 128);
        assert!(guest.number(GET_MAX_MEM_SLOTS).await >= 32);
        guest.tell(SET_STATUS, &[15]).await;
        assert_eq!(guest.number(GET_STATUS).await, 15);
        let mut payload: Vec<u8> = [0u32, 8, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        payload.extend([0; 8]);
        guest.send(GET_CONFIG, &payload, None);
        let (_, payload, _) = guest.reply().await.unwrap();
        assert_eq!(payload[12..], (SIZE as u64 / 512).to_le_bytes());
    });
}

#[test]
fn what_cannot_be_done_is_told_to_who_asks_and_ends_the_conversation_of_who_does_not() {
    on_both(|| async {
        let pair = |first: u32, second: u32| [first.to_ne_bytes(), second.to_ne_bytes()].concat();
        let wrong: Vec<(&str, u32, Vec<u8>)> = vec![
            ("features", SET_FEATURES, words(&[1 << 40])),
            ("protocol features", SET_PROTOCOL_FEATURES, words(&[1 << 40])),
            ("queue", SET_VRING_NUM, pair(128, 64)),
            ("size", SET_VRING_NUM, pair(0, 1 << 16)),
            ("base", SET_VRING_BASE, pair(0, 1 << 16)),
            ("running", SET_VRING_NUM, pair(0, 64)),
            ("running", SET_VRING_BASE, pair(0, 0)),
            ("running", SET_FEATURES, words(&[FEATURES & !feature::BLK_FLUSH])),
            (
                "elsewhere",
                SET_VRING_ADDR,
                [pair(0, 0), words(&[USER, USER, USER, 0])].concat(),
            ),
            ("nowhere", SET_VRING_ENABLE, pair(9, 2)),
            ("memory", REM_MEM_REG, words(&[0, 1, 1, 1, 0])),
            ("polling", SET_VRING_KICK, words(&[1 | 1 << 8])),
            (
                "config",
                SET_CONFIG,
                [pair(0, 1), pair(0, 0)[..4].to_vec(), vec![1]].concat(),
            ),
            ("unknown", 99, vec![]),
            ("postcopy", 28, vec![]),
        ];
        for (what, request, payload) in wrong {
            let attachment = Attachment::new();
            let (mut guest, task) = attachment.start().await;
            // A payload that makes no sense is the end in any case.
            if what != "nowhere" {
                assert!(!guest.ask(request, &payload, None).await, "{what}");
                assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0, "{what}: it goes on");
            }
            guest.need_reply = false;
            guest.send(request, &payload, None);
            assert!(guest.is_cut().await, "{what}");
            task.await;
        }
    });
}

#[test]
fn descriptors_of_another_kind_or_number_are_refused() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES).await;
        let file = memfd(4096);
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for request in [SET_VRING_KICK, SET_VRING_CALL] {
            assert!(!guest.ask(request, &words(&[0]), Some(file.as_fd())).await);
        }
        assert!(!guest.ask(SET_BACKEND_REQ_FD, &[], Some(event.as_fd())).await);
        let region = words(&[0, 0, 4096, USER, 0]);
        assert!(!guest.ask(ADD_MEM_REG, &region, Some(event.as_fd())).await);
        assert!(guest.ask(ADD_MEM_REG, &region, Some(file.as_fd())).await);
        assert!(
            !guest.ask(ADD_MEM_REG, &region, Some(file.as_fd())).await,
            "it overlaps"
        );
        assert!(guest.ask(REM_MEM_REG, &region, None).await);
        guest.send(SET_OWNER, &[], Some(event.as_fd()));
        assert!(guest.is_cut().await);
    });
}

#[test]
fn memory_may_come_in_pieces_and_change_under_a_running_queue() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES).await;
        let (low, high) = (
            words(&[0, 0, 0x1_0000, USER, 0]),
            words(&[0, 0x1_0000, END - 0x1_0000, USER + 0x1_0000, 0x1_0000]),
        );
        for region in [&low, &high] {
            assert!(guest.ask(ADD_MEM_REG, region, Some(guest.guest.fd.as_fd())).await);
        }
        assert!(guest.start_queue(0).await);
        attachment.device.hold();
        guest.lay(0, READ, 0, 512);
        guest.offer(0);
        eventually("it is at the device", || attachment.device.running.get() == 1).await;
        assert!(guest.ask(REM_MEM_REG, &high, None).await);
        attachment.device.release();
        guest.called_for(1).await;
        assert_eq!(guest.status(0), 0, "it has what it began with");
        guest.lay(3, READ, 0, 512);
        guest.offer(3);
        assert!(guest.is_cut().await, "its memory is not there any more");
    });
}

#[test]
fn what_is_written_to_the_guest_is_logged_while_that_is_agreed_on() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        let bits = memfd(4096);
        let logged = async |guest: &mut FrontEnd, head: u16| {
            assert_eq!(guest.carry_out(head, READ, 0, 512).await, 0);
            let mut bytes = [0; 64];
            rustix::io::pread(&bits, &mut bytes, 0).unwrap();
            rustix::io::pwrite(&bits, &[0; 64], 0).unwrap();
            let pages = (0..512).filter(|page| bytes[page / 8] & (1 << (page % 8)) != 0);
            pages.collect::<Vec<usize>>()
        };
        guest.send(SET_LOG_BASE, &words(&[4096, 0]), Some(bits.as_fd()));
        assert_eq!(guest.reply().await.unwrap().1, words(&[0]));
        assert!(logged(&mut guest, 0).await.is_empty(), "it is not agreed on");
        assert!(guest.tell(SET_FEATURES, &[FEATURES | feature::LOG_ALL]).await);
        assert!(guest.set_addresses(Some(QUEUE.used)).await);
        // Status and data, and the used ring.
        assert_eq!(logged(&mut guest, 3).await, [0x8, 0x14, 0x15]);
        assert!(guest.set_addresses(None).await);
        assert_eq!(logged(&mut guest, 6).await, [0x18, 0x19]);
        assert!(guest.tell(SET_FEATURES, &[FEATURES]).await);
        assert!(logged(&mut guest, 9).await.is_empty());
    });
}

#[test]
fn a_front_end_with_a_channel_is_told_that_the_device_has_grown_once_the_device_runs() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES).await;
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(guest.ask(SET_BACKEND_REQ_FD, &[], Some(theirs.as_fd())).await);
        drop(theirs);
        let told = || {
            let mut message = [0; 36];
            match rustix::net::recv(&ours, &mut message, rustix::net::RecvFlags::DONTWAIT) {
                Ok((received, _)) => message[..received].to_vec(),
                Err(rustix::io::Errno::AGAIN) => vec![],
                Err(e) => panic!("{e}"),
            }
        };
        let changed = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        attachment.device.grow(2 * SIZE);
        attachment.sessions.resized();
        assert!(told().is_empty(), "nothing runs, so nobody listens");
        assert!(guest.pass_memory().await && guest.start_queue(0).await);
        assert_eq!(told(), changed, "it runs");
        attachment.sessions.resized();
        assert_eq!(told(), changed);
        for ends in ["a pause", "a reset"] {
            match ends {
                "a pause" => assert_eq!(guest.stop_queue().await, Some(0)),
                _ => assert!(guest.ask(RESET_DEVICE, &[], None).await),
            }
            attachment.sessions.resized();
            assert!(told().is_empty(), "{ends}");
            assert!(guest.start_queue(0).await);
            assert_eq!(told(), changed, "{ends} is over");
        }
        // One that does not read is not waited for.
        for _ in 0..100_000 {
            attachment.sessions.resized();
        }
        assert_eq!(guest.number(GET_QUEUE_NUM).await, 128);
    });
}

#[test]
fn a_reset_stops_every_queue_and_keeps_the_memory() {
    on_both(|| async {
        for reset in [RESET_DEVICE, SET_STATUS] {
            let attachment = Attachment::new();
            let (mut guest, _task) = attachment.start().await;
            assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
            assert!(guest.tell(SET_STATUS, &[15]).await);
            let payload = if reset == SET_STATUS { words(&[0]) } else { vec![] };
            assert!(guest.ask(reset, &payload, None).await);
            assert_eq!(guest.number(GET_STATUS).await, 0);
            guest.lay(3, WRITE, 0, 512);
            guest.offer(3);
            many_turns().await;
            assert_eq!(guest.used_index(), 1);
            assert!(guest.tell_queue(SET_VRING_NUM, 0, ENTRIES.into()).await);
            assert!(guest.start_queue(1).await);
            guest.called_for(2).await;
        }
    });
}

#[test]
fn without_protocol_features_a_queue_begins_with_its_kick() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest
            .tell(SET_FEATURES, &[FEATURES & !feature::PROTOCOL_FEATURES])
            .await;
        guest.pass_memory().await;
        guest.tell_queue(SET_VRING_NUM, 0, ENTRIES.into()).await;
        guest.set_addresses(None).await;
        guest
            .ask(SET_VRING_CALL, &words(&[0]), Some(guest.call.as_fd()))
            .await;
        guest
            .ask(SET_VRING_KICK, &words(&[0]), Some(guest.kick.as_fd()))
            .await;
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
    });
}
