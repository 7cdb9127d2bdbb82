//! Attachments outlive the daemon, and a clean stop leaves nothing to recover.

use serde_json::Value;
use vold_tests::content::bytes;
use vold_tests::nbd::Client;
use vold_tests::raw::RawStore;
use vold_tests::{Engine, Vold};

/// All attachments, but for how many connections they have: those that clients have just closed may still be counted.
fn attachments(vold: &Vold) -> Value {
    let mut list = vold.ctl("attachment list");
    for attachment in list["items"].as_array_mut().unwrap() {
        attachment.as_object_mut().unwrap().remove("connections").unwrap();
    }
    list
}

#[test]
fn sigterm_leaves_no_dirty_mark_and_the_same_uri_works_after_the_restart() {
    for engine in Engine::ALL {
        let mut vold = Vold::start_on(engine);
        let uri = vold.with_volume(2, "128M", "32M");
        let before = attachments(&vold);
        let mut client = Client::connect(&uri);
        for i in 0..32u64 {
            client.write(i << 20, &bytes(i, 1 << 20)).unwrap();
        }
        // No flush, and a connection that is still open: the daemon flushes and cleans on its own.
        vold.stop();
        drop(client);
        for name in ["a", "b"] {
            let raw = RawStore::open(&vold.store_path(name));
            let dirty: Vec<_> = raw.extents().into_iter().filter(|extent| extent.dirty).collect();
            assert!(
                dirty.is_empty(),
                "store {name}: marks after a clean stop: {dirty:?}"
            );
        }
        vold.check_is_clean();
        vold.restart();
        assert_eq!(attachments(&vold), before);
        let volume = vold.volume("acme/vol");
        assert_eq!(
            (&volume["recovering_extents"], &volume["unverified_blocks"]),
            (&0.into(), &0.into()),
            "{volume}"
        );
        let mut client = Client::connect(&uri);
        for i in 0..32u64 {
            assert!(client.read(i << 20, 1 << 20).unwrap() == bytes(i, 1 << 20));
        }
    }
}

#[test]
fn attachments_sockets_and_uids_are_the_same_after_kill_9() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "128M", "32M");
    vold.ctl("volume create acme/second --size 8M");
    let second = vold.attach("acme/second", "vm1");
    Client::connect(&uri).write_fua(4096, b"first").unwrap();
    Client::connect(&second).write_fua(8000, b"second").unwrap();
    let before = attachments(&vold);
    for _ in 0..3 {
        vold.kill();
        vold.restart();
        assert_eq!(attachments(&vold), before);
        assert_eq!(Client::connect(&uri).read(4096, 5).unwrap(), b"first");
        assert_eq!(Client::connect(&second).read(8000, 6).unwrap(), b"second");
    }
    vold.ctl("detach acme/vol --vm vm1");
    vold.kill();
    vold.restart();
    assert_eq!(
        attachments(&vold)["items"].as_array().unwrap().len(),
        1,
        "what was detached stays detached"
    );
}

#[test]
fn an_empty_daemon_starts_and_stops_again_and_again() {
    let mut vold = Vold::start();
    for _ in 0..5 {
        vold.stop();
        let line = vold.restart();
        assert!(line.contains("api.sock"), "{line}");
    }
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn every_object_is_still_there_after_a_restart() {
    let mut vold = Vold::start();
    vold.with_volume(3, "128M", "32M");
    vold.ctl("customer create globex");
    vold.ctl("vm create globex-vm --customer globex --uid 4711");
    vold.ctl("volume create globex/db --size 1G --replicas 1");
    let lists = [
        "customer list",
        "vm list",
        "volume list",
        "store list",
        "attachment list",
        "destroy list",
    ];
    let before: Vec<_> = lists.iter().map(|words| vold.ctl(words)).collect();
    vold.stop();
    vold.restart();
    let after: Vec<_> = lists.iter().map(|words| vold.ctl(words)).collect();
    assert_eq!(before, after);
}
