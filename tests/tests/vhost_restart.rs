//! A vhost-user device outlives its daemon: what was in flight when the daemon died is done when the next one comes, once, and the
//! driver sees no error. The front-end holds the note of what was in flight, as QEMU does.

use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::vhost::*;
use vold_tests::vold::{Engine, STORE};
use vold_tests::{Vold, scale};

fn is_right_over_nbd(vold: &Vold, load: &Load) {
    vold.ctl("detach acme/vol --vm vm1");
    load.is_right(&vold.attach("acme/vol", "vm1"));
}

#[test]
fn what_was_in_flight_at_kill_9_is_answered_once_by_the_next_daemon() {
    is_answered_once_by_the_next(Vold::start());
}

#[test]
fn what_was_in_flight_at_kill_9_on_the_thread_pool_is_answered_once_by_the_next_daemon() {
    is_answered_once_by_the_next(Vold::start_on(Engine::Threads));
}

fn is_answered_once_by_the_next(mut vold: Vold) {
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start(&socket, "kill_9");
    let mut replayed = 0;
    for round in 0..scale(6, 40) {
        load.run(200 + 37 * round);
        load.push();
        vold.kill();
        // What it answered before its end is answered.
        load.take();
        replayed += load.running.len();
        vold.restart();
        load.front_end.reconnect(&socket);
        // Nobody kicks: that something is to be done stands in the area and in the ring.
        load.drain();
    }
    println!("{} answers, {replayed} of them by the next daemon", load.answered);
    assert!(replayed > 0, "something was in flight");
    load.run(100);
    load.drain();
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_planned_restart_is_no_more_than_a_pause() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start(&socket, "planned");
    for _ in 0..scale(4, 20) {
        load.run(300);
        load.push();
        vold.stop();
        vold.restart();
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

/// Both the old daemon's requests and those that were put into the ring while there was none.
#[test]
fn requests_made_while_there_is_no_daemon_are_served_by_the_next() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let mut load = Load::start(&socket, "no daemon");
    load.run(50);
    load.drain();
    for kill in [true, false] {
        if kill {
            vold.kill();
        } else {
            vold.stop();
        }
        load.push();
        vold.restart();
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
}

/// Killed over and over before it has come far: a replay that is cut short is replayed.
#[test]
fn daemons_killed_during_the_replay() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start(&socket, "replay");
    for _ in 0..scale(3, 15) {
        load.run(100);
        load.push();
        for _ in 0..3 {
            vold.kill();
            load.take();
            vold.restart();
            load.front_end.reconnect(&socket);
        }
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
    vold.stop();
    vold.check_is_clean();
}

/// A front-end dies with requests in flight. The next one's write to the same place is the last.
#[test]
fn the_next_front_end_is_served_after_the_requests_of_the_last_have_ended() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let len = DATA_MAX as usize;
    for round in 0..scale(20, 200u64) {
        let mut first = FrontEnd::connect(&socket);
        for i in 0..16 {
            first.submit(0, T_OUT, 0, &bytes(round * 100 + i, len), 0);
        }
        first.notify(0);
        drop(first);
        let mut second = FrontEnd::connect(&socket);
        let new = bytes(round * 100 + 99, len);
        second.write(0, &new).unwrap();
        for _ in 0..5 {
            assert!(
                second.read(0, len).unwrap() == new,
                "a late write of a lost connection"
            );
        }
        drop(second);
        let mut third = FrontEnd::connect(&socket);
        assert!(third.read(0, len).unwrap() == new);
    }
}

/// The connection is cut, and the daemon lives: the same driver comes back with its area.
#[test]
fn a_driver_whose_connection_was_cut_comes_back_and_loses_nothing() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start(&socket, "cut");
    for _ in 0..scale(10, 100) {
        load.run(100);
        load.push();
        load.front_end.hang_up();
        load.front_end.reconnect(&socket);
        load.drain();
    }
    is_right_over_nbd(&vold, &load);
}

/// A detach by the operator is no accident: the device ends, and the next attachment's device begins with an empty area.
#[test]
fn a_detach_ends_the_device_and_no_later_request_changes_anything() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start(&socket, "detach");
    load.run(200);
    load.drain();
    load.push();
    vold.ctl("detach acme/vol --vm vm1");
    load.front_end.wire.ends();
    load.take();
    let uri = vold.attach("acme/vol", "vm1");
    // Each block is as it was, or as what was in flight made it; and stays so, whatever the ring is told.
    let seen = |uri: &str| {
        let mut client = Client::connect(uri);
        (0..Load::BLOCKS)
            .map(|block| client.read(block * Load::BLOCK as u64, Load::BLOCK).unwrap())
            .collect::<Vec<_>>()
    };
    let first = seen(&uri);
    for (block, data) in first.iter().enumerate() {
        assert!(load.may_hold(block as u64, data), "block {block}");
    }
    load.front_end.queues[0].kick();
    load.front_end.queues[1].kick();
    assert!(seen(&uri) == first, "a detached device changed something");
    assert_eq!(load.take(), 0, "a detached device answered something");
}
