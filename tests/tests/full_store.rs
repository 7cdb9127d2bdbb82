//! A store without free extents: new writes get ENOSPC, everything that was written stays readable and writable, and space
//! that a trim gives back can be written again.

use vold_tests::content::{bytes, random_file};
use vold_tests::nbd::{Client, ENOSPC};
use vold_tests::tools::{fail, tool};
use vold_tests::{Engine, Vold, wait_for};

#[test]
fn writes_into_a_full_store_get_enospc_and_nothing_written_before_is_lost() {
    for (engine, replicas) in [(Engine::Uring, 2), (Engine::Threads, 1)] {
        let mut vold = Vold::start_on(engine);
        let uri = vold.with_volume(replicas, "64M", "256M");
        let mut client = Client::connect(&uri);
        let extent = vold.store("a")["extent_bytes"].as_u64().unwrap();
        let total = vold.store("a")["total_bytes"].as_u64().unwrap() / extent;
        let mut written = Vec::new();
        let mut refused = 0;
        // One MiB at the start of each extent, up to the volume's end.
        for i in 0..(256 << 20) / extent {
            match client.write(i * extent, &bytes(i, 1 << 20)) {
                Ok(()) => written.push(i),
                Err(e) => {
                    assert_eq!(e, ENOSPC);
                    refused += 1;
                }
            }
        }
        assert_eq!(written.len() as u64, total, "every extent was used");
        assert!(refused > 0);
        let intact = |client: &mut Client, written: &[u64]| {
            for i in written {
                assert!(
                    client.read(i * extent, 1 << 20).unwrap() == bytes(*i, 1 << 20),
                    "extent {i}"
                );
            }
        };
        intact(&mut client, &written);
        // What has its extent can still be written, the rest still reads as zeros, and a flush still works.
        client.write((2 << 20) + 5, b"fits").unwrap();
        assert_eq!(client.read((2 << 20) + 5, 4).unwrap(), b"fits");
        assert_eq!(client.read(250 << 20, 4096).unwrap(), [0; 4096]);
        client.flush().unwrap();
        assert_eq!(vold.volume("acme/vol")["state"], "attached", "full is no failure");
        // Another client is told the same in its own words.
        random_file(&vold.path("big"), 1, 128 << 20);
        let said = fail(tool("nbdcopy").args([vold.path("big").to_str().unwrap(), &uri]));
        assert!(said.contains("No space left"), "{said}");
        // (It has overwritten the front; put that back.)
        for i in &written {
            client.write(i * extent, &bytes(*i, 1 << 20)).unwrap();
        }

        // A trim of whole extents gives their space back, after the scrub.
        for i in &written[..3] {
            client.trim(i * extent, extent as u32).unwrap();
        }
        let kept = &written[3..];
        wait_for("the trimmed extents can be written elsewhere", || {
            client.write(200 << 20, &bytes(77, 4096)).ok()
        });
        assert!(client.read(200 << 20, 4096).unwrap() == bytes(77, 4096));
        intact(&mut client, kept);
        drop(client);
        vold.kill();
        vold.restart();
        intact(&mut Client::connect(&uri), kept);
        vold.stop();
        vold.check_is_clean();
    }
}

#[test]
fn one_full_replica_store_of_two_refuses_the_write_on_both() {
    let mut vold = Vold::start();
    vold.add_stores(&["a"], "64M");
    vold.add_stores(&["b"], "256M");
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme");
    vold.ctl("volume create acme/vol --size 256M --replicas 2");
    let uri = vold.attach("acme/vol", "vm1");
    let mut client = Client::connect(&uri);
    let mut written = 0u64;
    let error = loop {
        match client.write(written << 20, &bytes(written, 1 << 20)) {
            Ok(()) => written += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error, ENOSPC);
    let volume = vold.volume("acme/vol");
    for replica in volume["replicas"].as_array().unwrap() {
        assert_eq!(
            replica["state"], "in_sync",
            "full is no replica failure: {volume}"
        );
    }
    for i in 0..written {
        assert!(client.read(i << 20, 1 << 20).unwrap() == bytes(i, 1 << 20));
    }
    // A volume elsewhere still finds room.
    vold.ctl("volume create acme/roomy --size 8M --replicas 1");
    let roomy = vold.attach("acme/roomy", "vm1");
    Client::connect(&roomy).write(0, b"room").unwrap();
    drop(client);
    vold.stop();
    vold.check_is_clean();
}
