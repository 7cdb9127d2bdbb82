//! A VM moves: a second attachment of its volume takes over from the first when its device starts. The first has written all it
//! ever will by then (I3), and nothing acknowledged to it is missing (I1).

use std::cell::RefCell;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;
use serde_json::Value;
use vold_tests::content::bytes;
use vold_tests::vhost::*;
use vold_tests::vold::STORE;
use vold_tests::{PATIENCE, Vold, scale};

const INCOMING: &str = "attach acme/vol --vm vm1 --via vhost-user --incoming";

fn attachments(vold: &Vold) -> Vec<Value> {
    vold.ctl("attachment list")["items"].as_array().unwrap().clone()
}

fn incoming(vold: &Vold) -> (Value, PathBuf) {
    let attachment = vold.ctl(INCOMING);
    let socket = attachment["socket"].as_str().unwrap().into();
    (attachment, socket)
}

/// The target has described its device and starts it while the source is at work.
fn takes_over(vold: &Vold, source: &mut Load, socket: &Path) -> FrontEnd {
    let mut target = FrontEnd::greeted(socket, Load::shape());
    assert!(
        target.capacity() > 0,
        "a device can be described before it starts"
    );
    source.run(200);
    source.push();
    target.start().expect("the device starts");
    source.front_end.wire.ends();
    source.take();
    let attachments = attachments(vold);
    assert_eq!(attachments.len(), 1, "{attachments:?}");
    assert_eq!(attachments[0]["socket"].as_str(), socket.to_str());
    target
}

/// All blocks, each of which the source may have left so.
fn all_that_was_left(source: &Load, target: &mut FrontEnd) -> Vec<Vec<u8>> {
    let block = |block: u64| {
        let data = target.read(block * Load::BLOCK as u64, Load::BLOCK).unwrap();
        assert!(source.may_hold(block, &data), "block {block}");
        data
    };
    (0..Load::BLOCKS).map(block).collect()
}

#[test]
fn the_first_is_fenced_before_the_second_device_starts() {
    let mut vold = Vold::start();
    let mut socket = vold.with_vhost_volume(2, STORE, "8M");
    for round in 0..scale(3, 20) {
        let mut source = Load::start(&socket, "takeover");
        // (Every round begins with what the rounds before have left.)
        let zeros = vec![0; 64 << 10];
        for at in (0..Load::BLOCKS * Load::BLOCK as u64).step_by(zeros.len()) {
            source.front_end.write(at, &zeros).unwrap();
        }
        source.run(300);
        let before = attachments(&vold)[0].clone();
        let (attachment, next) = incoming(&vold);
        assert_eq!(
            attachment["epoch"].as_u64(),
            before["epoch"].as_u64().map(|epoch| epoch + 1)
        );
        assert_eq!(attachment["incoming"], true);
        assert_eq!(vold.ctl(INCOMING)["socket"], attachment["socket"], "asked again");
        assert_eq!(attachments(&vold).len(), 2);

        let mut target = takes_over(&vold, &mut source, &next);
        assert!(!socket.exists(), "the first socket is gone");
        let left = all_that_was_left(&source, &mut target);
        // The source goes on in its own memory, and that is all it does.
        source.push();
        source.front_end.queues[0].kick();
        source.front_end.queues[1].kick();
        let new = bytes(round as u64, Load::BLOCK);
        target.write(0, &new).unwrap();
        for (block, data) in left.iter().enumerate().skip(1) {
            let now = target.read((block * Load::BLOCK) as u64, Load::BLOCK).unwrap();
            assert!(now == *data, "block {block} changed after the takeover");
        }
        assert!(target.read(0, Load::BLOCK).unwrap() == new);
        assert_eq!(source.take(), 0, "the first answers nothing any more");
        socket = next;
    }
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn both_attachments_outlive_the_daemon_until_one_has_taken_over() {
    let mut vold = Vold::start();
    let first = vold.with_vhost_volume(2, STORE, "8M");
    let mut source = Load::start(&first, "killed before");
    source.run(200);
    let (_, second) = incoming(&vold);
    for kill in [true, false] {
        source.push();
        if kill {
            vold.kill();
        } else {
            vold.stop();
        }
        source.take();
        vold.restart();
        source.front_end.reconnect(&first);
        source.drain();
        source.run(100);
    }
    let mut target = takes_over(&vold, &mut source, &second);
    all_that_was_left(&source, &mut target);
    // And the one that has, outlives it alone.
    vold.kill();
    vold.restart();
    target.reconnect(&second);
    all_that_was_left(&source, &mut target);
    assert!(!first.exists());
    assert_eq!(attachments(&vold).len(), 1);
}

/// The source's front-end goes away with requests in flight, which go along with the machine's memory and the area.
fn stopped_with_requests_in_flight(load: &mut Load) -> usize {
    load.run(200);
    load.push();
    let front_end = &load.front_end;
    let mut left = 0;
    for queue in 0..front_end.queues.len() {
        // QEMU's two messages.
        front_end.enable_queue(queue, false).unwrap();
        let base = front_end.suspend_queue(queue).unwrap() as u16;
        // What it has taken and not given back.
        left += usize::from(base.wrapping_sub(front_end.queues[queue].used_index(&front_end.memory)));
    }
    load.take();
    left
}

fn leaving_requests() -> Shape {
    Shape {
        protocol: Shape::default().protocol | PF_GET_VRING_BASE_INFLIGHT | PF_GET_VRING_BASE_SKIP_DRAIN,
        ..Load::shape()
    }
}

#[test]
fn requests_that_a_stopped_source_leaves_in_flight_are_answered_once_by_the_target() {
    let mut vold = Vold::start();
    let first = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start_as(&first, leaving_requests(), "left in flight");
    assert_ne!(load.front_end.protocol & PF_GET_VRING_BASE_SKIP_DRAIN, 0);
    let mut left = 0;
    for _ in 0..scale(6, 60) {
        let (_, next) = incoming(&vold);
        left += stopped_with_requests_in_flight(&mut load);
        load.front_end.reconnect(&next);
        load.drain();
        assert_eq!(attachments(&vold).len(), 1);
    }
    println!("{} answers, {left} of them by a target", load.answered);
    assert!(left > 0, "something was left in flight");
    vold.ctl("detach acme/vol --vm vm1");
    load.is_right(&vold.attach("acme/vol", "vm1"));
    vold.stop();
    vold.check_is_clean();
}

/// A migration that fails: the source's machine runs on, and its queues start again over the connection that they had.
#[test]
fn requests_that_a_stopped_source_leaves_in_flight_are_answered_once_by_itself_when_it_goes_on() {
    let vold = Vold::start();
    let first = vold.with_vhost_volume(2, STORE, "8M");
    let mut load = Load::start_as(&first, leaving_requests(), "goes on");
    let mut left = 0;
    for _ in 0..scale(6, 60) {
        left += stopped_with_requests_in_flight(&mut load);
        for queue in 0..load.front_end.queues.len() {
            load.front_end.start_queue(queue).unwrap();
        }
        load.drain();
    }
    assert!(left > 0, "something was left in flight");
    vold.ctl("detach acme/vol --vm vm1");
    load.is_right(&vold.attach("acme/vol", "vm1"));
}

/// The first socket goes right after the record, and before the first attachment has ended: the daemon dies there.
#[test]
fn a_daemon_killed_after_the_record_of_a_takeover_leaves_the_volume_to_the_second_alone() {
    for round in 0..scale(3, 20) {
        let mut vold = Vold::start();
        let first = vold.with_vhost_volume(2, STORE, "8M");
        let mut source = Load::start(&first, &format!("killed in between {round}"));
        source.run(300);
        let (before, second) = incoming(&vold);
        let mut target = FrontEnd::greeted(&second, Load::shape());
        source.push();
        let starting = std::thread::spawn(move || {
            // It may be too late to be told that it may.
            let told = target.start().is_ok();
            (target, told)
        });
        // (Looked at without a break: what is meant to be met is short.)
        let begun = Instant::now();
        while first.exists() {
            assert!(begun.elapsed() < PATIENCE, "nothing is taken over");
            std::thread::yield_now();
        }
        vold.kill();
        let (mut target, told) = starting.join().unwrap();
        println!(
            "round {round}: killed {} it was fenced",
            if told { "after" } else { "before" }
        );
        source.front_end.wire.ends();
        source.take();
        vold.restart();
        let attachments = attachments(&vold);
        assert_eq!(attachments.len(), 1, "{attachments:?}");
        assert_eq!(attachments[0]["socket"].as_str(), second.to_str());
        assert_eq!(attachments[0]["epoch"], before["epoch"]);
        assert!(Wire::connect(&first).is_err(), "the first leads nowhere");
        target.reconnect(&second);
        let left = all_that_was_left(&source, &mut target);
        source.push();
        source.front_end.queues.iter().for_each(Queue::kick);
        assert!(all_that_was_left(&source, &mut target) == left);
        assert_eq!(source.take(), 0, "the first answers nothing any more");
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn a_move_that_is_called_off_changes_nothing() {
    let vold = Vold::start();
    let first = vold.with_vhost_volume(1, STORE, "8M");
    let mut source = Load::start(&first, "called off");
    let (attachment, second) = incoming(&vold);
    let target = FrontEnd::greeted(&second, Load::shape());
    vold.ctl("detach acme/vol --vm vm1 --incoming");
    target.wire.ends();
    assert!(!second.exists());
    source.run(200);
    source.drain();
    let refusal = vold.refused("detach acme/vol --vm vm1 --incoming");
    assert_eq!(refusal.code, "not_found", "{refusal:?}");
    // Another may take its place, and a detach takes both.
    let (again, third) = incoming(&vold);
    assert_ne!(again["attachment_id"], attachment["attachment_id"]);
    let target = FrontEnd::greeted(&third, Load::shape());
    vold.ctl("detach acme/vol --vm vm1");
    target.wire.ends();
    source.front_end.wire.ends();
    assert!(attachments(&vold).is_empty());
}

/// The device waits for the volume while the operator has its lock; neither waits for the other for good.
#[test]
fn a_detach_and_a_starting_device_do_not_wait_for_each_other() {
    let vold = Vold::start();
    vold.with_detached_volume(1, STORE, "8M");
    for _ in 0..scale(10, 100) {
        let first = vold.attach_vhost("acme/vol", "vm1");
        let source = FrontEnd::connect(&first);
        let (_, second) = incoming(&vold);
        let mut target = FrontEnd::greeted(&second, Shape::default());
        let starting = std::thread::spawn(move || {
            // It may come too late.
            let _ = target.start();
            target
        });
        vold.ctl("detach acme/vol --vm vm1");
        starting.join().unwrap().wire.ends();
        source.wire.ends();
    }
}

#[test]
fn only_the_vm_that_has_the_volume_gets_a_second_attachment_and_only_where_it_is_needed() {
    let vold = Vold::start();
    vold.with_detached_volume(1, STORE, "8M");
    let refusal = vold.refused(INCOMING);
    assert!(
        refusal.code == "not_found" && refusal.message.contains("nothing to take over"),
        "{refusal:?}"
    );
    vold.ctl("vm create vm2 --customer acme");
    vold.ctl("customer create globex");
    vold.ctl("vm create spy --customer globex");
    vold.attach_vhost("acme/vol", "vm1");
    for (words, kind) in [
        ("attach acme/vol --vm vm2 --via vhost-user --incoming", "busy"),
        ("attach acme/vol --vm spy --via vhost-user --incoming", "refused"),
        (
            "attach acme/vol --vm vm1 --via vhost-user --incoming --read-only",
            "busy",
        ),
        ("attach acme/vol --vm vm1 --incoming", "busy"),
    ] {
        let refusal = vold.refused(words);
        assert_eq!(refusal.code, kind, "{words}: {refusal:?}");
    }
    vold.ctl("detach acme/vol --vm vm1");
    vold.attach("acme/vol", "vm1");
    let refusal = vold.refused("attach acme/vol --vm vm1 --incoming");
    assert!(
        refusal.code == "invalid" && refusal.message.contains("via nbd"),
        "{refusal:?}"
    );
}

/// Where the cache's mode is in the configuration (VIRTIO 1.2, 5.2.4).
const WRITEBACK_AT: u32 = 32;

fn with_cache_mode() -> Shape {
    Shape {
        features: Shape::default().features | F_CONFIG_WCE,
        ..Shape::default()
    }
}

/// What the guest has set, its front-end does not tell the next one; and who has not taken over yet has no say in it.
#[test]
fn a_guest_that_writes_through_does_so_after_the_move() {
    let vold = Vold::start();
    let first = vold.with_vhost_volume(1, STORE, "8M");
    let source = FrontEnd::connect_as(&first, with_cache_mode());
    assert_eq!(source.config(WRITEBACK_AT, 1).unwrap(), [1]);
    let (_, second) = incoming(&vold);
    let mut target = FrontEnd::greeted(&second, with_cache_mode());
    assert!(!target.sets_config(WRITEBACK_AT, &[0]));
    assert_eq!(source.config(WRITEBACK_AT, 1).unwrap(), [1]);
    assert!(source.sets_config(WRITEBACK_AT, &[0]));
    assert!(!target.sets_config(WRITEBACK_AT, &[1]));
    target.start().unwrap();
    assert_eq!(target.config(WRITEBACK_AT, 1).unwrap(), [0]);
    assert!(target.sets_config(WRITEBACK_AT, &[1]));
    assert_eq!(target.config(WRITEBACK_AT, 1).unwrap(), [1]);
}

/// The daemon that knew is gone, and the source does not come back to tell the next one.
#[test]
fn where_nobody_knows_what_the_guest_has_set_it_writes_through() {
    let mut vold = Vold::start();
    let first = vold.with_vhost_volume(1, STORE, "8M");
    let source = FrontEnd::connect_as(&first, with_cache_mode());
    assert!(source.sets_config(WRITEBACK_AT, &[0]));
    let (_, second) = incoming(&vold);
    let mut target = FrontEnd::greeted(&second, with_cache_mode());
    vold.kill();
    drop(source);
    vold.restart();
    target.reconnect(&second);
    assert_eq!(target.config(WRITEBACK_AT, 1).unwrap(), [0]);
    // And so it stays for the next daemon.
    vold.kill();
    vold.restart();
    target.reconnect(&second);
    assert_eq!(target.config(WRITEBACK_AT, 1).unwrap(), [0]);
}

/// Descriptors whose close takes long are closed by the attachment's own thread; what it still has to do holds up nobody.
#[test]
fn front_ends_that_leave_what_is_never_closed_are_fenced_all_the_same() {
    let vold = Vold::start();
    let first = vold.with_vhost_volume(1, STORE, "8M");
    let source = FrontEnd::connect(&first);
    let (_, second) = incoming(&vold);
    let mut target = FrontEnd::greeted(&second, Shape::default());
    // The close of each waits for what its peer does not take.
    let lingering = Lingering::new();
    let mut sent = 0;
    for _ in 0..300 {
        let socket = lingering.socket();
        let message = message(SET_VRING_ERR, 0, &0_u64.to_le_bytes());
        // It is the daemon's alone before the daemon can close it.
        if source.wire.send_bytes(&message[..1], &[socket.as_fd()]).is_err() {
            std::mem::forget(socket);
            break;
        }
        drop(socket);
        if source.wire.send_bytes(&message[1..], &[]).is_err() {
            break;
        }
        sent += 1;
    }
    assert!(sent > 256, "{sent} are no more than may be unclosed");
    target.start().expect("the device starts");
    source.wire.ends();
    let block = bytes(3, 4096);
    target.write(0, &block).unwrap();
    assert!(target.read(0, 4096).unwrap() == block);
    vold.ctl("detach acme/vol --vm vm1");
    target.wire.ends();
}

/// TCP sockets whose closing takes minutes: there is something in them that nobody receives.
struct Lingering {
    listener: TcpListener,
    peers: RefCell<Vec<TcpStream>>,
}

impl Lingering {
    fn new() -> Self {
        Self {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            peers: RefCell::default(),
        }
    }

    fn socket(&self) -> TcpStream {
        let mut socket = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        self.peers.borrow_mut().push(self.listener.accept().unwrap().0);
        set_socket_linger(&socket, Some(Duration::from_secs(300))).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        socket
    }
}
