//! What a queue does with a guest's requests.

use libvol::error::Kind;

use super::front_end::{DISCARD, ENTRIES, FEATURES, FLUSH, FrontEnd, GET_ID, READ, UNTOUCHED, WRITE, ZERO};
use super::*;
use crate::vhost::config::{WRITEBACK_AT, feature};
use crate::vhost::guest::{END, QUEUE};
use crate::vhost::message::number;

#[test]
fn what_is_written_is_stored_and_read_back() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        let bytes = pattern(7, 0x3000);
        guest.guest.put(FrontEnd::data(0), &bytes);
        assert_eq!(guest.carry_out(0, WRITE, 3, 0x3000).await, 0);
        assert_eq!(attachment.device.contents(3 * 512, 0x3000), bytes);
        assert_eq!(guest.carry_out(3, FLUSH, 0, 0).await, 0);
        assert_eq!(guest.carry_out(6, READ, 2, 0x1000).await, 0);
        let read = guest.guest.get(FrontEnd::data(6), 0x1000);
        assert!(read[..512].iter().all(|byte| *byte == 0), "a hole before it");
        assert_eq!(read[512..], bytes[..0xe00]);
        assert_eq!(guest.carry_out(9, GET_ID, 0, 20).await, 0);
        assert_eq!(guest.guest.get(FrontEnd::data(9), 20), b"0123456789abcdefghij");
        assert_eq!(guest.used_heads(), [0, 3, 6, 9]);
        let log = attachment.device.log.borrow();
        assert_eq!(*log, ["write 1536+12288 fua=false", "flush", "read 1024+4096"]);
    });
}

#[test]
fn ranges_are_discarded_and_zeroed_and_holes_are_left_where_the_guest_allows_it() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        attachment.device.fill(0, &pattern(1, SIZE));
        let range = |sector: u64, sectors: u32, flags: u32| {
            [
                &sector.to_le_bytes()[..],
                &sectors.to_le_bytes(),
                &flags.to_le_bytes(),
            ]
            .concat()
        };
        guest
            .guest
            .put(FrontEnd::data(0), &[range(8, 8, 0), range(32, 16, 0)].concat());
        assert_eq!(guest.carry_out(0, DISCARD, 0, 32).await, 0);
        guest
            .guest
            .put(FrontEnd::data(3), &[range(64, 8, 1), range(80, 1, 0)].concat());
        assert_eq!(guest.carry_out(3, ZERO, 0, 32).await, 0);
        assert_eq!(
            *attachment.device.log.borrow(),
            [
                "trim 4096+4096 fua=false",
                "trim 16384+8192 fua=false",
                "zero 32768+4096 fua=false no_hole=false",
                "zero 40960+512 fua=false no_hole=true"
            ]
        );
    });
}

#[test]
fn errors_reach_the_guest_and_the_device_goes_on() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        assert_eq!(
            guest.carry_out(0, READ, (SIZE / 512) as u64, 512).await,
            1,
            "beyond the end"
        );
        assert_eq!(guest.carry_out(3, READ, 0, 511).await, 1, "no whole sectors");
        assert_eq!(guest.carry_out(6, 99, 0, 512).await, 2, "an unknown kind");
        attachment.device.fail(Some(Kind::Io));
        assert_eq!(guest.carry_out(9, WRITE, 0, 512).await, 1);
        attachment.device.fail(None);
        assert_eq!(guest.carry_out(12, WRITE, 0, 512).await, 0);
        // The volume grows under the running device.
        attachment.device.grow(2 * SIZE);
        assert_eq!(guest.carry_out(15, READ, (SIZE / 512) as u64, 512).await, 0);
    });
}

#[test]
fn a_read_only_device_refuses_what_would_change_it() {
    on_both(|| async {
        let attachment = Attachment {
            read_only: true,
            ..Attachment::new()
        };
        let (mut guest, _task) = attachment.connect();
        let writing = feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
        let offered = guest.number(number::GET_FEATURES).await;
        assert_eq!(offered & (feature::BLK_RO | writing), feature::BLK_RO);
        guest.agree(FEATURES & !writing | feature::BLK_RO).await;
        assert!(guest.pass_memory().await && guest.start_queue(0).await);
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 1);
        assert_eq!(guest.carry_out(3, DISCARD, 0, 16).await, 2);
        assert_eq!(guest.carry_out(6, READ, 0, 512).await, 0);
        assert_eq!(*attachment.device.log.borrow(), ["read 0+512"]);
    });
}

/// The cache's mode in the configuration space.
async fn mode_of(guest: &FrontEnd) -> u8 {
    guest.send(number::GET_CONFIG, &mode_payload(0), None);
    guest.reply().await.unwrap().1[12]
}

async fn set_mode(guest: &FrontEnd, mode: u8) -> bool {
    guest.ask(number::SET_CONFIG, &mode_payload(mode), None).await
}

fn mode_payload(mode: u8) -> Vec<u8> {
    let header = [WRITEBACK_AT, 1, 0].into_iter().flat_map(u32::to_ne_bytes);
    header.chain([mode]).collect()
}

#[test]
fn a_write_is_durable_before_it_is_acknowledged_unless_the_guest_has_a_cache_to_flush() {
    on_both(|| async {
        let cannot_flush = FEATURES & !feature::BLK_FLUSH | feature::BLK_CONFIG_WCE;
        for (features, writeback, fua) in [
            (cannot_flush, None, true),
            (cannot_flush, Some(1), true),
            (FEATURES, None, false),
            (FEATURES & !feature::BLK_FLUSH, None, true),
            (FEATURES | feature::BLK_CONFIG_WCE, None, false),
            (FEATURES | feature::BLK_CONFIG_WCE, Some(0), true),
            (FEATURES | feature::BLK_CONFIG_WCE, Some(1), false),
        ] {
            let attachment = Attachment::new();
            let (mut guest, _task) = attachment.connect();
            assert_eq!(mode_of(&guest).await, 1, "before anything is agreed on");
            guest.agree(features).await;
            assert!(guest.pass_memory().await && guest.start_queue(0).await);
            if let Some(writeback) = writeback {
                assert!(set_mode(&guest, writeback).await);
            }
            if features & feature::BLK_CONFIG_WCE != 0 {
                assert_eq!(mode_of(&guest).await, u8::from(!fua), "{features:#x}");
            }
            assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
            assert_eq!(
                *attachment.device.log.borrow(),
                [format!("write 0+512 fua={fua}")]
            );
        }
    });
}

/// The daemon that knew died while the volume was taken over.
#[test]
fn a_guest_that_has_moved_writes_through_until_it_says_otherwise() {
    on_both(|| async {
        let attachment = Attachment {
            moved: true,
            ..Attachment::new()
        };
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES | feature::BLK_CONFIG_WCE).await;
        assert!(guest.pass_memory().await && guest.start_queue(0).await);
        assert_eq!(mode_of(&guest).await, 0);
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
        assert!(set_mode(&guest, 1).await);
        assert_eq!(guest.carry_out(3, WRITE, 0, 512).await, 0);
        assert_eq!(
            *attachment.device.log.borrow(),
            ["write 0+512 fua=true", "write 0+512 fua=false"]
        );
    });
}

#[test]
fn requests_are_found_without_a_kick_and_a_disabled_queue_is_not_looked_at() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.connect();
        guest.agree(FEATURES).await;
        guest.lay(0, WRITE, 0, 512);
        guest.guest.offer(ENTRIES, 0);
        assert!(guest.pass_memory().await && guest.start_queue(0).await);
        guest.called_for(1).await;
        assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 0).await);
        guest.lay(3, WRITE, 0, 512);
        guest.offer(3);
        many_turns().await;
        assert_eq!((guest.used_index(), guest.status(3)), (1, UNTOUCHED));
        assert!(guest.tell_queue(number::SET_VRING_ENABLE, 0, 1).await);
        guest.called_for(2).await;
    });
}

#[test]
fn requests_at_the_device_are_capped_below_the_guests_depth_and_all_are_answered() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, _task) = attachment.start().await;
        let heads: Vec<u16> = (0..48).map(|i| 3 * i).collect();
        attachment.device.hold();
        for head in &heads {
            guest.lay(*head, WRITE, u64::from(*head), 512);
            guest.guest.offer(ENTRIES, *head);
        }
        guest.lay(150, FLUSH, 0, 0);
        guest.offer(150);
        eventually("two thirds are at the device", || {
            attachment.device.running.get() == 33
        })
        .await;
        many_turns().await;
        assert_eq!(attachment.device.running.get(), 33, "of 49");
        attachment.device.release();
        guest.called_for(49).await;
        let mut used = guest.used_heads();
        used.sort_unstable();
        assert_eq!(used, heads.into_iter().chain([150]).collect::<Vec<_>>());
    });
}

#[test]
fn a_guest_that_breaks_its_queue_is_disconnected() {
    on_both(|| async {
        let breaks: [fn(&mut FrontEnd); 4] = [
            // The index jumps.
            |guest| guest.guest.put_u16(QUEUE.avail + 2, 1000),
            // A head that is none.
            |guest| guest.guest.offer(ENTRIES, ENTRIES),
            // A chain that ends nowhere.
            |guest| {
                guest.guest.descriptor(QUEUE.desc, 0, (END, 16), 0, 0);
                guest.guest.offer(ENTRIES, 0);
            },
            // No place for a status.
            |guest| {
                guest.guest.chain(QUEUE.desc, 0, &[(0, 16, false)]);
                guest.guest.offer(ENTRIES, 0);
            },
        ];
        for (which, break_it) in breaks.iter().enumerate() {
            let attachment = Attachment::new();
            let (mut guest, task) = attachment.start().await;
            break_it(&mut guest);
            rustix::io::write(&guest.kick, &1u64.to_ne_bytes()).unwrap();
            assert!(guest.is_cut().await, "{which}");
            task.await;
            assert_eq!(attachment.sessions.connections(), 0);
            assert!(attachment.device.log.borrow().is_empty());
        }
    });
}

#[test]
fn memory_that_is_taken_away_under_the_device_disconnects_it() {
    on_both(|| async {
        let attachment = Attachment::new();
        let (mut guest, task) = attachment.start().await;
        assert_eq!(guest.carry_out(0, WRITE, 0, 512).await, 0);
        guest.lay(3, READ, 0, 0x1000);
        attachment.device.fill(0, &pattern(3, 0x1000));
        guest.guest.offer(ENTRIES, 3);
        rustix::fs::ftruncate(&guest.guest.fd, FrontEnd::data(3)).unwrap();
        rustix::io::write(&guest.kick, &1u64.to_ne_bytes()).unwrap();
        assert!(guest.is_cut().await);
        task.await;
    });
}
