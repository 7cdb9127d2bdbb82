//! Handshake scripts.

use std::time::Duration;

use libvol::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX};

use super::client::*;
use super::*;

const UNSUP: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const SHUTDOWN: u32 = (1 << 31) + 7;
const TOO_BIG: u32 = (1 << 31) + 9;
const ACK: (u32, Vec<u8>) = (1, vec![]);

/// HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN, CACHE, FAST_ZERO.
const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048;
const FLAG_READ_ONLY: u16 = 2;
const FLAG_DF: u16 = 128;

const SIZE: usize = 1 << 20;

fn facts(flags: u16) -> Vec<u8> {
    [&(SIZE as u64).to_be_bytes()[..], &flags.to_be_bytes()].concat()
}

#[test]
fn export_name_starts_transmission_with_zeroes_unless_they_are_declined() {
    on_both(|| async {
        let server = Server::new(SIZE);
        for (client_flags, zeroes) in [(1, 124), (3, 0)] {
            let (mut client, _task) = server.connect();
            client.greet(client_flags).await;
            client.ask(1, b"acme/web").await;
            assert_eq!(client.take(10).await, facts(FLAGS));
            assert_eq!(client.take(zeroes).await, vec![0; zeroes]);
            let read = {
                client.request(0, READ, 5, 0, 512).await;
                client.answer(512).await
            };
            assert_eq!((read.simple, read.cookie, read.error), (true, 5, 0));
        }
    });
}

#[test]
fn export_name_works_for_a_client_without_fixed_newstyle_and_options_do_not() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(0).await;
        client.ask(1, b"acme/web").await;
        assert_eq!(client.take(134).await[..10], facts(FLAGS));
        let (mut client, task) = server.connect();
        client.greet(0).await;
        client.ask(3, b"").await;
        assert_eq!(client.hangup().await, 0);
        task.await;
    });
}

#[test]
fn an_export_name_that_is_not_served_ends_the_connection_without_a_word() {
    on_both(|| async {
        let server = Server::new(SIZE);
        for name in [&b"globex/web"[..], b"", b"acme/\xff", b"acme/web\0"] {
            let (mut client, task) = server.connect();
            client.greet(3).await;
            client.ask(1, name).await;
            assert_eq!(client.hangup().await, 0, "{name:?}");
            task.await;
        }
    });
}

#[test]
fn unknown_client_flags_end_the_connection() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, task) = server.connect();
        client.greet(4 | 1).await;
        assert_eq!(client.hangup().await, 0);
        task.await;
    });
}

#[test]
fn info_and_go_describe_the_export_as_asked() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        let plain = client.option(6, &export_query("acme/web", &[])).await;
        assert_eq!(plain, [(3, [&[0, 0], &facts(FLAGS)[..]].concat()), ACK]);
        // Unknown kinds of information (here 9) are ignored.
        let query = export_query("acme/web", &[1, 2, 3, 9]);
        let block_size = [&[0u8, 3][..], &[0, 0, 0, 1], &[0, 0, 16, 0], &[2, 0, 0, 0]].concat();
        let all = [
            (3, [&[0, 0], &facts(FLAGS)[..]].concat()),
            (3, b"\0\x01acme/web".to_vec()),
            (3, b"\0\x02acme/web of the test".to_vec()),
            (3, block_size),
            ACK,
        ];
        assert_eq!(client.option(6, &query).await, all);
        let read_only = client.option(6, &export_query("acme/web-ro", &[])).await;
        assert_eq!(read_only[0].1[2..], facts(FLAGS | FLAG_READ_ONLY));
        // DF is announced only to clients that have structured replies.
        assert_eq!(client.option(8, &[]).await, [ACK]);
        let go = client.option(7, &export_query("acme/web", &[])).await;
        assert_eq!(go, [(3, [&[0, 0], &facts(FLAGS | FLAG_DF)[..]].concat()), ACK]);
        client.prove_in_step().await;
    });
}

#[test]
fn a_foreign_and_a_missing_export_get_the_same_answer_and_haggling_goes_on() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        client.option(8, &[]).await;
        let mut answers = Vec::new();
        for name in ["globex/web", "no-such", ""] {
            for option in [6, 7] {
                answers.push(client.option(option, &export_query(name, &[])).await);
            }
            answers.push(client.option(9, &context_query(name, &[])).await);
            answers.push(
                client
                    .option(10, &context_query(name, &["base:allocation"]))
                    .await,
            );
        }
        assert!(answers.iter().all(|a| a == &answers[0]), "{answers:?}");
        assert_eq!(answers[0][0].0, UNKNOWN);
        client.option(7, &export_query("acme/web", &[])).await;
        client.prove_in_step().await;
    });
}

#[test]
fn the_empty_name_is_the_only_export_when_there_is_only_one() {
    on_both(|| async {
        let mut server = Server::new(SIZE);
        server.exports = Rc::new(Shelf(vec![("acme/web".into(), false, server.device.clone())]));
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        client.option(8, &[]).await;
        client
            .option(10, &context_query("acme/web", &["base:allocation"]))
            .await;
        let go = client.option(7, &export_query("", &[1])).await;
        assert_eq!(go[1].1, b"\0\x01acme/web");
        // The context was chosen under the export's other name, which is the same export.
        assert_eq!(client.call(0, BLOCK_STATUS, 0, 4096).await.error, 0);
    });
}

#[test]
fn the_list_holds_what_the_caller_may_see() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        let entry = |name: &str| {
            let len = (name.len() as u32).to_be_bytes();
            (
                2,
                [&len[..], name.as_bytes(), name.as_bytes(), b" of the test"].concat(),
            )
        };
        assert_eq!(
            client.option(3, b"").await,
            [entry("acme/web"), entry("acme/web-ro"), ACK]
        );
        assert_eq!(client.option(3, b"x").await[0].0, INVALID);
    });
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, task) = server.connect();
        client.greet(3).await;
        assert_eq!(client.option(2, b"").await, [ACK]);
        assert_eq!(client.hangup().await, 0);
        task.await;
        assert_eq!(server.sessions.connections(), 0);
    });
}

#[test]
fn options_not_served_are_refused_and_the_client_stays_in_step() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        let long = vec![7; NBD_OPTION_BYTES_MAX as usize + 1];
        let refused: &[(u32, &[u8], u32)] = &[
            (5, b"", POLICY),
            (5, b"x", INVALID),
            (11, b"x", INVALID),
            (4, b"anything", UNSUP),
            (99, &long[..1000], UNSUP),
            (u32::MAX, b"", UNSUP),
            (99, &long, TOO_BIG),
            (7, &long, TOO_BIG),
            (7, b"", INVALID),
            (7, &[0, 0, 0, 9, b'a'], INVALID),
            (7, &[0xff; 6], INVALID),
            (6, &export_query("acme/web\0", &[]), INVALID),
            (6, &export_query(&"n".repeat(4097), &[]), INVALID),
            (
                6,
                &[&export_query("acme/web", &[])[..], b"more"].concat(),
                INVALID,
            ),
            (6, &[0, 0, 0, 0, 0, 2, 0, 1], INVALID),
            (8, b"x", INVALID),
            // Contexts before structured replies.
            (9, &context_query("acme/web", &[]), INVALID),
            (10, &context_query("acme/web", &[]), INVALID),
            (10, &[0; 3], INVALID),
            (10, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], INVALID),
        ];
        for (option, data, error) in refused {
            let replies = client.option(*option, data).await;
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].0, *error, "option {option} with {} bytes", data.len());
            assert!(!replies[0].1.is_empty() && str::from_utf8(&replies[0].1).is_ok());
        }
        client.option(8, &[]).await;
        client.option(7, &export_query("acme/web", &[])).await;
        client.prove_in_step().await;
    });
}

#[test]
fn contexts_are_listed_by_name_by_wildcard_and_without_query() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        client.option(8, &[]).await;
        let listed = (4, b"\0\0\0\0base:allocation".to_vec());
        let depth = (4, b"\0\0\0\0qemu:allocation-depth".to_vec());
        for queries in [&["base:"][..], &["base:allocation"], &["x-other:y", "base:"]] {
            let replies = client.option(9, &context_query("acme/web", queries)).await;
            assert_eq!(replies, [listed.clone(), ACK], "{queries:?}");
        }
        for queries in [&["qemu:"][..], &["qemu:allocation-depth"]] {
            let replies = client.option(9, &context_query("acme/web", queries)).await;
            assert_eq!(replies, [depth.clone(), ACK], "{queries:?}");
        }
        for queries in [&[][..], &["qemu:", "base:"]] {
            let replies = client.option(9, &context_query("acme/web", queries)).await;
            assert_eq!(replies, [listed.clone(), depth.clone(), ACK], "{queries:?}");
        }
        for queries in [
            &["qemu:dirty-bitmap:a"][..],
            &["base:allocation2"],
            &["base"],
            &[""],
        ] {
            let replies = client.option(9, &context_query("acme/web", queries)).await;
            assert_eq!(replies, [ACK], "{queries:?}");
        }
    });
}

#[test]
fn the_last_choice_of_contexts_counts_and_only_for_its_export() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let chosen = (4, b"\0\0\0\x01base:allocation".to_vec());
        let good = context_query("acme/web", &["base:allocation"]);
        // Choices in order, and whether block status works on acme/web afterwards.
        let other = context_query("acme/web-ro", &["base:allocation"]);
        let wildcard = context_query("acme/web", &["base:"]);
        let nothing = context_query("acme/web", &[]);
        let foreign = context_query("globex/web", &["base:allocation"]);
        for (choices, works) in [
            (vec![&good], true),
            (vec![&other, &good], true),
            (vec![&good, &other], false),
            (vec![&good, &wildcard], false),
            (vec![&good, &nothing], false),
            (vec![&good, &foreign], false),
            (vec![], false),
        ] {
            let (mut client, _task) = server.connect();
            client.greet(3).await;
            client.option(8, &[]).await;
            for choice in &choices {
                let replies = client.option(10, choice).await;
                if *choice == &good {
                    assert_eq!(replies, [chosen.clone(), ACK]);
                }
            }
            client.option(7, &export_query("acme/web", &[])).await;
            let status = client.call(0, BLOCK_STATUS, 0, 4096).await;
            assert_eq!(status.error, if works { 0 } else { EINVAL }, "{choices:?}");
            client.prove_in_step().await;
        }
    });
}

#[test]
fn a_draining_server_refuses_options_but_takes_a_goodbye() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let (mut client, _task) = server.connect();
        client.greet(3).await;
        server.sessions.drain(Duration::from_secs(1)).await;
        assert_eq!(
            client.option(7, &export_query("acme/web", &[])).await[0].0,
            SHUTDOWN
        );
        assert_eq!(client.option(3, b"").await[0].0, SHUTDOWN);
        assert_eq!(client.option(2, b"").await, [ACK]);
        let (mut client, task) = server.connect();
        client.greet(3).await;
        client.ask(1, b"acme/web").await;
        assert_eq!(client.hangup().await, 0);
        task.await;
    });
}

#[test]
fn garbage_and_too_many_options_end_the_connection() {
    on_both(|| async {
        let server = Server::new(SIZE);
        // Instead of flags, instead of an option, an option that is far too long.
        let too_long = [&b"IHAVEOPT"[..], &99u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
        let long_name = [&b"IHAVEOPT"[..], &1u32.to_be_bytes(), &20_000u32.to_be_bytes()].concat();
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &too_long, &long_name, &[0; 64]] {
            let (mut client, task) = server.connect();
            client.greet(3).await;
            client.try_send(garbage).await;
            client.hangup().await;
            task.await;
        }
        let (mut client, task) = server.connect();
        client.take(18).await;
        client.try_send(b"SSH-2.0-OpenSSH_9.2\r\n").await;
        assert_eq!(client.hangup().await, 0);
        task.await;

        let (mut client, task) = server.connect();
        client.greet(3).await;
        for _ in 0..NBD_OPTIONS_MAX {
            client.option(3, b"").await;
        }
        assert_eq!(client.hangup().await, 0);
        task.await;
        assert_eq!(Rc::strong_count(&server.sessions), 1, "nothing is left of them");
    });
}

#[test]
fn a_client_that_leaves_at_any_byte_of_the_handshake_leaves_nothing_behind() {
    on_both(|| async {
        let server = Server::new(SIZE);
        let mut script = 3u32.to_be_bytes().to_vec();
        for (option, data) in [
            (8u32, vec![]),
            (10, context_query("acme/web", &["base:allocation"])),
            (7, export_query("acme/web", &[3])),
        ] {
            script.extend(b"IHAVEOPT");
            script.extend(option.to_be_bytes());
            script.extend((data.len() as u32).to_be_bytes());
            script.extend(data);
        }
        for len in 0..=script.len() {
            let (client, task) = server.connect();
            client.send(&script[..len]).await;
            drop(client);
            within(task).await;
        }
        assert_eq!(server.sessions.connections(), 0);
        assert_eq!(Rc::strong_count(&server.sessions), 1);
    });
}

#[test]
fn a_handshake_that_is_not_finished_in_time_is_dropped() {
    const STEP: Duration = Duration::from_secs(60);
    const STEPS: u32 = 100;
    on_both_with_clock(|clock| async move {
        let mut server = Server::new(SIZE);
        server.handshake = STEP * STEPS;
        // One that says nothing, one that talks on and on.
        let (mut silent, silent_task) = server.connect();
        let (mut chatty, chatty_task) = server.connect();
        chatty.greet(3).await;
        let list = [&b"IHAVEOPT"[..], &3u32.to_be_bytes(), &[0; 4]].concat();
        // What is left at the end is more than a test takes.
        for byte in list.iter().cycle().take(STEPS as usize - 2) {
            chatty.send(&[*byte]).await;
            clock.advance(STEP);
            yield_now().await;
        }
        assert!(!silent_task.is_finished() && !chatty_task.is_finished());
        clock.advance(STEP * 2);
        within(silent_task).await;
        within(chatty_task).await;
        silent.hangup().await;
        chatty.hangup().await;
        assert_eq!(Rc::strong_count(&server.sessions), 1);
    });
}
