//! vhost-user-blk as an independent client sees it: the crate `blkio`, whose driver nobody of this project wrote.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use rand::RngExt;
use rand::seq::SliceRandom;
use vold_tests::content::{bytes, seeded};
use vold_tests::disk::{Ask, Disk};
use vold_tests::nbd::Client;
use vold_tests::vold::{Engine, STORE};
use vold_tests::{Vold, scale, wait_for};

const MIB: u64 = 1 << 20;

/// Writes different bytes all over the device, from all queues at once and as deep as they are, reads them again in another order,
/// and once more over NBD.
fn keeps_data(replicas: usize, queues: usize, depth: usize, request: usize) {
    keeps_data_on(&Vold::start(), replicas, queues, depth, request);
}

fn keeps_data_on(vold: &Vold, replicas: usize, queues: usize, depth: usize, request: usize) {
    let socket = vold.with_vhost_volume(replicas, STORE, "64M");
    let size = 64 * MIB;
    let mut rng = seeded("keeps_data");
    // As much as is worth the time; small requests cover a part of the device.
    let count = ((scale(16, 48) * MIB) as usize / request).min(scale(2048, 16384));
    let buffer = queues * depth * request;
    let mut disk = Disk::connect(&socket, queues, depth.max(16).next_power_of_two() * 4, buffer).unwrap();
    assert_eq!(disk.capacity().unwrap(), size);

    let mut places: Vec<u64> = (0..size / request as u64).collect();
    places.shuffle(&mut rng);
    places.truncate(count);
    let seed = rng.random::<u32>() as u64;
    let content = |place: u64| bytes(seed + place, request);

    // Rounds of as many requests as there is room for, over all queues; every answer is that of a request, and each comes once.
    let round = |disk: &mut Disk, places: &[u64], write: bool| {
        for chunk in places.chunks(queues * depth) {
            let mut waiting: Vec<BTreeMap<usize, u64>> = vec![BTreeMap::new(); queues];
            for (slot, place) in chunk.iter().enumerate() {
                let (at, len) = (place * request as u64, request);
                let ask = if write {
                    disk.fill(slot * request, &content(*place));
                    let from = slot * request;
                    Ask::Write { from, at, len }
                } else {
                    disk.fill(slot * request, &vec![0xee; request]);
                    let to = slot * request;
                    Ask::Read { to, at, len }
                };
                disk.push(slot % queues, ask, slot);
                waiting[slot % queues].insert(slot, *place);
            }
            for (queue, waiting) in waiting.iter_mut().enumerate() {
                while !waiting.is_empty() {
                    for done in disk.wait(queue, 1).unwrap() {
                        let place = waiting.remove(&done.tag).expect("an answer to a request");
                        assert_eq!(done.result, 0, "request of block {place}");
                        if !write {
                            let read = disk.bytes(done.tag * request, request);
                            assert!(read == content(place), "block {place} of {request} bytes");
                        }
                    }
                }
            }
        }
    };
    round(&mut disk, &places, true);
    assert_eq!(disk.call(Ask::Flush), 0);
    places.shuffle(&mut rng);
    round(&mut disk, &places, false);
    drop(disk);

    // The other front door shows the same bytes.
    vold.ctl("detach acme/vol --vm vm1");
    let mut client = Client::connect(&vold.attach("acme/vol", "vm1"));
    for place in places.iter().take(64) {
        let read = client.read(place * request as u64, request).unwrap();
        assert!(read == content(*place), "block {place} over NBD");
    }
}

#[test]
fn one_sector_after_the_other_is_kept() {
    keeps_data(1, 1, 1, 512);
}

#[test]
fn blocks_at_depth_32_are_kept() {
    keeps_data(2, 1, 32, 4096);
}

#[test]
fn odd_multiples_of_sectors_at_depth_16_are_kept() {
    keeps_data(2, 1, 16, 5 * 512);
}

#[test]
fn sectors_at_depth_256_are_kept() {
    keeps_data(1, 1, 256, 512);
}

#[test]
fn requests_of_one_mebibyte_are_kept() {
    keeps_data(2, 1, 8, 1 << 20);
}

#[test]
fn four_queues_keep_blocks_at_depth_256() {
    keeps_data(1, 4, 256, 4096);
}

#[test]
fn four_queues_keep_large_and_small_requests() {
    for (depth, request) in [(1, 64 << 10), (16, 512), (4, 1 << 20)] {
        keeps_data(2, 4, depth, request);
    }
}

#[test]
fn the_thread_pool_keeps_what_four_queues_write() {
    for request in [512, 4096, 1 << 20] {
        keeps_data_on(&Vold::start_on(Engine::Threads), 2, 4, 8, request);
    }
}

#[test]
fn overlapping_writes_of_four_queues_leave_one_of_them_whole() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    const LEN: usize = 64 << 10;
    let mut disk = Disk::connect(&socket, 4, 64, 16 * LEN).unwrap();
    for round in 0..scale(20, 200u64) {
        for slot in 0..16 {
            disk.fill(slot * LEN, &[slot as u8 + 1; LEN]);
            let ask = Ask::Write {
                from: slot * LEN,
                at: round % 4 * 4096,
                len: LEN,
            };
            disk.push(slot % 4, ask, slot);
        }
        for queue in 0..4 {
            let mut answers = 0;
            while answers < 4 {
                let done = disk.wait(queue, 1).unwrap();
                assert!(done.iter().all(|done| done.result == 0), "{done:?}");
                answers += done.len();
            }
        }
        let read = disk.read(round % 4 * 4096, LEN);
        for block in read.chunks(4096) {
            assert!(block.iter().all(|byte| *byte == block[0]), "a mixed block");
        }
    }
    drop(disk);
    let mut vold = vold;
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_discard_gives_room_back_and_reads_as_zeros() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "64M");
    let mut disk = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    assert!(disk.property("max-discard-len") >= 4096, "discard is offered");
    for i in 0..32 {
        disk.write(i * MIB, &bytes(i, 1 << 20));
    }
    let allocated = || vold.volume("acme/vol")["allocated_bytes"].as_u64().unwrap();
    let before = allocated();
    let step = disk.property("max-discard-len").min(16 * MIB);
    for at in (0..16 * MIB).step_by(step as usize) {
        let len = step.min(16 * MIB - at);
        assert_eq!(disk.call(Ask::Discard { at, len }), 0);
    }
    assert_eq!(disk.call(Ask::Flush), 0);
    wait_for("the room is given back", || {
        (allocated() + 16 * MIB <= before).then_some(())
    });
    for i in 0..16 {
        assert!(
            disk.read(i * MIB, 1 << 20) == vec![0; 1 << 20],
            "MiB {i} is zeros"
        );
    }
    for i in 16..32 {
        assert!(disk.read(i * MIB, 1 << 20) == bytes(i, 1 << 20), "MiB {i} stays");
    }
}

#[test]
fn write_zeroes_makes_zeros_to_the_sector_with_and_without_unmap() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "16M");
    let mut disk = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    for may_unmap in [true, false] {
        // From the middle of one block to the middle of another; a whole number of blocks; one sector; more than an extent.
        for (at, len) in [(512 * 3, 512 * 21), (8192, 65536), (512 * 9, 512), (MIB, 9 * MIB)] {
            for i in 0..11 {
                disk.write(i * MIB, &bytes(i + 100, 1 << 20));
            }
            let whole =
                |disk: &mut Disk| -> Vec<u8> { (0..11).flat_map(|i| disk.read(i * MIB, 1 << 20)).collect() };
            let mut expected = whole(&mut disk);
            let most = disk.property("max-write-zeroes-len").max(512);
            let mut done = 0;
            while done < len {
                let step = most.min(len - done);
                let at = at + done;
                assert_eq!(
                    disk.call(Ask::WriteZeroes {
                        at,
                        len: step,
                        may_unmap
                    }),
                    0
                );
                done += step;
            }
            expected[at as usize..(at + len) as usize].fill(0);
            assert!(whole(&mut disk) == expected, "{len} bytes at {at}, {may_unmap}");
        }
    }
}

#[test]
fn a_read_only_attachment_says_so_and_reads() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let mut disk = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    disk.write(0, &bytes(5, 4096));
    let fixed = disk.read(0, 4096);
    drop(disk);
    vold.ctl("detach acme/vol --vm vm1");
    let attached = vold.ctl("attach acme/vol --vm vm1 --via vhost-user --read-only");
    let socket = std::path::PathBuf::from(attached["socket"].as_str().unwrap());
    // The driver refuses to start a read-only device for writing.
    let refused = Disk::connect(&socket, 1, 64, 1 << 20).err().expect("read-only");
    assert!(refused.message().contains("read-only"), "{refused}");
    let mut disk = Disk::connect_read_only(&socket).unwrap();
    assert!(disk.read(0, 4096) == fixed);
}

#[test]
fn the_socket_is_the_vms_and_another_uid_is_turned_away() {
    let vold = Vold::start();
    vold.add_stores(&["a"], STORE);
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme --uid 65534");
    vold.ctl("volume create acme/vol --size 8M");
    let socket = vold.attach_vhost("acme/vol", "vm1");
    let metadata = std::fs::metadata(&socket).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.permissions().mode() & 0o777),
        (65534, 0o600)
    );
    // Root passes the mode, and is told nothing.
    assert!(
        Disk::connect(&socket, 1, 64, 1 << 20).is_err(),
        "another uid got in"
    );
    assert!(vold.log().contains("uid=0"), "{}", vold.log());
}

#[test]
fn a_detach_ends_the_device_and_a_new_attachment_has_the_data() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(1, STORE, "8M");
    let mut disk = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    disk.write(4096, &bytes(7, 8192));
    vold.ctl("detach acme/vol --vm vm1");
    assert!(disk.capacity().is_err(), "the connection has ended");
    assert!(UnixStream::connect(&socket).is_err(), "the socket is gone");
    // What it still asks for changes nothing.
    disk.fill(0, &[0xbb; 8192]);
    disk.push(
        0,
        Ask::Write {
            from: 0,
            at: 4096,
            len: 8192,
        },
        1,
    );
    let _ = disk.wait(0, 0);
    let socket = vold.attach_vhost("acme/vol", "vm1");
    let mut again = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    assert!(again.read(4096, 8192) == bytes(7, 8192));
    drop(disk);
}

#[test]
fn a_resize_is_seen() {
    let vold = Vold::start();
    let socket = vold.with_vhost_volume(2, STORE, "8M");
    let mut disk = Disk::connect(&socket, 1, 64, 1 << 20).unwrap();
    assert_eq!(disk.capacity().unwrap(), 8 * MIB);
    let beyond = Ask::Write {
        from: 0,
        at: 12 * MIB,
        len: 4096,
    };
    assert_ne!(disk.call(beyond), 0, "beyond the end");
    vold.ctl("volume resize acme/vol --size 16M");
    assert_eq!(disk.capacity().unwrap(), 16 * MIB);
    disk.write(12 * MIB, &bytes(3, 1 << 20));
    assert!(disk.read(12 * MIB, 1 << 20) == bytes(3, 1 << 20));
}
