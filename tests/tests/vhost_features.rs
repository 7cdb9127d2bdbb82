//! What a vhost-user device says of itself and what it can do beside reading and writing: its configuration, its name, its cache, the
//! message of a new size, and the log of what it wrote into the guest.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, memfd_create};
use vold_tests::Vold;
use vold_tests::content::bytes;
use vold_tests::vhost::*;
use vold_tests::vold::STORE;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Where the cache's mode lies in the configuration (VIRTIO 1.2, 5.2.4).
const WRITEBACK: u32 = 32;

fn number(config: &[u8], at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&config[at..at + len]);
    u64::from_le_bytes(bytes)
}

#[test]
fn the_configuration_tells_size_blocks_queues_and_limits() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "24M");
    let front_end = FrontEnd::connect(&socket);
    for feature in [
        F_VERSION_1,
        F_INDIRECT_DESC,
        F_EVENT_IDX,
        F_MQ,
        F_FLUSH,
        F_DISCARD,
        F_WRITE_ZEROES,
    ] {
        assert_ne!(front_end.features & feature, 0, "feature {feature:#x}");
    }
    assert_eq!(front_end.features & F_RO, 0);
    let config = front_end.config(0, 60).unwrap();
    assert_eq!(number(&config, 0, 8), 24 * MIB / SECTOR, "sectors");
    assert!(number(&config, 8, 4) >= PAGE, "size of a part");
    assert!(number(&config, 12, 4) >= 32, "parts");
    assert_eq!(number(&config, 20, 4), 512, "logical block");
    assert_eq!(number(&config, 24, 1), 3, "a physical block has 8 of them");
    assert!(number(&config, 34, 2) >= 4, "queues");
    assert!(number(&config, 36, 4) >= 2048, "sectors of a discard");
    assert!(number(&config, 40, 4) >= 1, "segments of a discard");
    assert!(number(&config, 48, 4) >= 2048, "sectors of a write-zeroes");
    assert_eq!(number(&config, 56, 1), 1, "write-zeroes may unmap");
    // A part of it is the same part.
    assert_eq!(front_end.config(20, 4).unwrap(), config[20..24]);
}

#[test]
fn a_volume_has_a_name_of_its_own_that_stays() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    vold.ctl("volume create acme/other --size 8M");
    let other = vold.attach_vhost("acme/other", "vm1");
    let name = |socket: &std::path::Path| {
        let done = FrontEnd::connect(socket).call(T_GET_ID, 0, &[], 20);
        assert_eq!(done.status, S_OK);
        assert!(done.data[0] != 0 && done.data[0] != UNANSWERED, "{:?}", done.data);
        done.data
    };
    let first = name(&socket);
    assert_ne!(first, name(&other));
    vold.ctl("detach acme/vol --vm vm1");
    assert_eq!(name(&vold.attach_vhost("acme/vol", "vm1")), first);
}

#[test]
fn of_the_configuration_only_the_cache_can_be_set() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let shape = Shape {
        features: Shape::default().features | F_CONFIG_WCE,
        ..Shape::default()
    };
    let mut front_end = FrontEnd::connect_as(&socket, shape);
    assert_ne!(front_end.features & F_CONFIG_WCE, 0, "CONFIG_WCE is offered");
    for mode in [0, 1, 0] {
        assert!(front_end.sets_config(WRITEBACK, &[mode]));
        assert_eq!(front_end.config(WRITEBACK, 1).unwrap(), [mode]);
        front_end.write(0, &bytes(u64::from(mode), 8192)).unwrap();
        assert!(front_end.read(0, 8192).unwrap() == bytes(u64::from(mode), 8192));
    }
    let before = front_end.config(0, 60).unwrap();
    drop(front_end);
    // (What is there already may be written again.)
    for (offset, bytes) in [
        (0, vec![0xff; 8]),
        (20, vec![0, 16, 0, 0]),
        (WRITEBACK, vec![0, 1]),
        (WRITEBACK - 1, vec![1, 0]),
        (WRITEBACK, vec![2]),
        (60, vec![1]),
        (256, vec![1]),
        (u32::MAX, vec![1]),
    ] {
        let front_end = FrontEnd::connect_as(&socket, shape);
        let case = format!("{} bytes at {offset}", bytes.len());
        assert!(!front_end.sets_config(offset, &bytes), "{case}");
        drop(front_end);
        let mut after = FrontEnd::connect_as(&socket, shape).config(0, 60).unwrap();
        after[WRITEBACK as usize] = before[WRITEBACK as usize];
        assert_eq!(after, before, "{case}");
    }
}

/// The front-end does not tell the mode again: a daemon that came back and wrote back would break what the guest was promised.
#[test]
fn a_cache_that_writes_through_does_so_after_kill_9_and_has_what_was_written() {
    let mut vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let shape = Shape {
        features: Shape::default().features | F_CONFIG_WCE,
        ..Shape::default()
    };
    let mut front_end = FrontEnd::connect_as(&socket, shape);
    assert!(front_end.sets_config(WRITEBACK, &[0]));
    for i in 0..50 {
        front_end.write(i * 8192, &bytes(i, 8192)).unwrap();
    }
    vold.kill();
    vold.restart();
    front_end.reconnect(&socket);
    assert_eq!(front_end.config(WRITEBACK, 1).unwrap(), [0], "still through");
    for i in 0..50 {
        assert!(
            front_end.read(i * 8192, 8192).unwrap() == bytes(i, 8192),
            "write {i}"
        );
    }
}

#[test]
fn a_new_size_is_told_over_the_back_ends_own_channel() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut front_end = FrontEnd::connect(&socket);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let wire = &front_end.wire;
    wire.done(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let channel = Wire::over(ours);
    for size in [16, 24] {
        vold.ctl(&format!("volume resize acme/vol --size {size}M"));
        let told = channel.receive().unwrap();
        assert_eq!(told.request, BACKEND_CONFIG_CHANGE, "{told:?}");
        assert_eq!(front_end.capacity(), size * MIB);
        let last = (size - 1) * MIB;
        front_end.write(last, &bytes(size, 65536)).unwrap();
        assert!(front_end.read(last, 65536).unwrap() == bytes(size, 65536));
    }
}

/// The pages that the device writes, and no others, while it is told to log.
#[test]
fn the_log_has_the_pages_that_were_written_while_it_was_on() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let shape = Shape {
        features: Shape::default().features | F_LOG_ALL,
        ..Shape::default()
    };
    let mut front_end = FrontEnd::greeted(&socket, shape);
    let on = front_end.features;
    assert_ne!(on & F_LOG_ALL, 0, "LOG_ALL is offered");
    let off = on & !F_LOG_ALL;
    front_end.features = off;
    front_end.start().unwrap();
    let len = (front_end.memory.end() / PAGE / 8).next_multiple_of(PAGE);
    let log = File::from(memfd_create("log", MemfdFlags::empty()).unwrap());
    log.set_len(len).unwrap();
    let payload = [len.to_le_bytes(), [0; 8]].concat();
    let wire = &front_end.wire;
    wire.ask(SET_LOG_BASE, &payload, &[log.as_fd()]).unwrap();
    let is_marked = |at: u64| {
        let mut byte = [0];
        log.read_exact_at(&mut byte, at / PAGE / 8).unwrap();
        byte[0] & 1 << (at / PAGE % 8) != 0
    };
    let is_empty = || {
        let mut whole = vec![0; len as usize];
        log.read_exact_at(&mut whole, 0).unwrap();
        whole.iter().all(|byte| *byte == 0)
    };
    let head = front_end.queues[0].next_head();
    let (_, status, data) = front_end.slot(0, head);

    front_end.read(0, 8192).unwrap();
    assert!(is_empty(), "nothing is logged before it is wanted");

    front_end.set_features(on).unwrap();
    front_end.write(0, &bytes(1, 8192)).unwrap();
    assert!(is_marked(status), "a status was written");
    assert!(!is_marked(data), "a write's data is only read");
    assert!(front_end.read(0, 8192).unwrap() == bytes(1, 8192));
    assert!(
        is_marked(data) && is_marked(data + PAGE),
        "what was read was written"
    );
    assert!(!is_marked(data + 2 * PAGE), "and no more than that");

    // The used ring is logged where the front-end says, which it says while the queue runs. Here that is another place than
    // the ring's own, so that no other write marks it.
    let logged_at = front_end.spare.0;
    assert!(!is_marked(logged_at));
    let log_used_at = |front_end: &FrontEnd, at: Option<u64>| {
        let mut addresses = front_end.vring_addresses(0);
        addresses[4..8].copy_from_slice(&u32::from(at.is_some()).to_le_bytes());
        addresses[32..40].copy_from_slice(&at.unwrap_or(0).to_le_bytes());
        front_end.wire.done(SET_VRING_ADDR, &addresses, &[]).unwrap();
    };
    log_used_at(&front_end, Some(logged_at));
    front_end.read(0, 8192).unwrap();
    assert!(is_marked(logged_at), "the used ring was written");
    log_used_at(&front_end, None);
    log.write_all_at(&vec![0; len as usize], 0).unwrap();
    front_end.read(0, 8192).unwrap();
    assert!(
        is_marked(data) && !is_marked(logged_at),
        "it is not logged any more"
    );

    front_end.set_features(off).unwrap();
    log.write_all_at(&vec![0; len as usize], 0).unwrap();
    front_end.read(0, 65536).unwrap();
    assert!(is_empty(), "nothing is logged any more");
}

/// Not every driver keeps to what the configuration announces: EDK2 does not.
#[test]
fn a_request_beyond_what_is_announced_is_carried_out_in_pieces() {
    const PARTS: usize = 21;
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, "256M", "64M");
    let mut front_end = FrontEnd::connect(&socket);
    let (spare, room) = front_end.spare;
    let part = (room / 2 / PAGE * PAGE) as usize;
    let len = PARTS * part;
    assert!(len > 33 << 20 && len < 64 << 20, "{len}");
    let (header, status, data) = (spare, spare + 16, spare + PAGE);
    let content = bytes(21, part);
    let mut big = |kind, is_read| {
        front_end.write_header(header, kind, 0);
        let mut chain = vec![Part::readable(header, 16)];
        // (The same memory for each.)
        chain.extend((0..PARTS).map(|_| match is_read {
            true => Part::writable(data, part as u32),
            false => Part::readable(data, part as u32),
        }));
        chain.push(Part::writable(status, 1));
        let fill = if is_read {
            vec![UNANSWERED; part]
        } else {
            content.clone()
        };
        front_end.memory.write(data, &fill);
        let descriptors = front_end.queues[0].chain(&front_end.memory, &chain);
        assert_eq!(front_end.judge(descriptors, status), Some(S_OK));
        front_end.memory.read(data, part)
    };
    big(T_OUT, false);
    assert!(big(T_IN, true) == content);
    for at in [0, 3 * part, len - 65536] {
        let read = front_end.read(at as u64, 65536).unwrap();
        let wanted: Vec<u8> = (at..at + 65536).map(|i| content[i % part]).collect();
        assert!(read == wanted, "at {at}");
    }
    assert!(front_end.read(len as u64, 4096).unwrap() == [0; 4096]);
}
