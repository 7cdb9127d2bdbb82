//! A running machine moves from one QEMU to another while it writes to its volume. The attachment is handed over between them: the
//! source is fenced by the next epoch before the target writes for the first time, and whatever the source does then changes nothing.
//! Over NBD the operator fences it; over vhost-user the target's device does, by starting.

use serde_json::{Value, json};
use vold_tests::guest::{Guest, Machine, nbd_blockdev};
use vold_tests::{Vold, wait_for};

fn another_round(guest: &mut Guest) {
    guest.says("another round of the load", |said| {
        said.starts_with("round ").then_some(())
    });
}

/// Sends the machine's state; the source is stopped when it is there.
fn migrate(source: &mut Guest, target: &mut Guest, socket: &std::path::Path) {
    let uri = format!("unix:{}", socket.display());
    target.qmp("migrate-incoming", json!({"uri": uri}));
    // The guest dirties its memory faster than an emulated machine could send it at a pause of no length.
    source.qmp(
        "migrate-set-parameters",
        json!({"downtime-limit": 5000, "max-bandwidth": 1u64 << 32}),
    );
    source.qmp("migrate", json!({"uri": uri}));
    for guest in [source, target] {
        wait_for("the machine's state is sent", || {
            let status = guest.qmp("query-migrate", json!({}));
            assert_ne!(status["status"], "failed", "{status}");
            (status["status"] == "completed").then_some(())
        });
    }
}

/// A node name of attach's arguments by the driver above.
fn node(attached: &Value, driver: &str) -> String {
    let mut arguments = attached["qemu_args"].as_array().unwrap().iter();
    let blockdev = arguments.find_map(|argument| argument.as_str()?.strip_prefix(driver));
    let mut options = blockdev.expect(driver).split(',');
    let name = options.find_map(|option| option.strip_prefix("node-name="));
    name.expect("a name").to_owned()
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_moves_to_another_qemu_over_nbd() {
    let mut vold = Vold::start();
    vold.with_detached_volume(2, "256M", "96M");
    let first = vold.ctl("attach acme/vol --vm vm1");
    let machine = || Machine::running(&vold.path(""), "load").with(&first["qemu_args"]);
    let mut source = machine().start();
    source.is_at("load");
    let mut target = machine().with(&json!(["-S", "-incoming", "defer"])).start();
    migrate(&mut source, &mut target, &vold.path("move"));
    assert_eq!(source.qmp("query-status", json!({}))["running"], false);
    assert_eq!(target.qmp("query-status", json!({}))["running"], false);

    // The source has written all that it ever will.
    vold.ctl("detach acme/vol --vm vm1");
    let second = vold.ctl("attach acme/vol --vm vm1");
    assert!(second["epoch"].as_u64() > first["epoch"].as_u64(), "{second}");
    // The target's drive gets the new attachment's connection in the place of the old one's.
    target.qmp("blockdev-add", nbd_blockdev(&second, "second"));
    let drive = json!({
        "driver": "raw",
        "node-name": node(&first, "driver=raw,"),
        "file": "second",
        "cache": {"direct": true},
        "discard": "unmap",
    });
    target.qmp("blockdev-reopen", json!({"options": [drive]}));
    let old = node(&first, "driver=nbd,");
    target.qmp("blockdev-del", json!({"node-name": old}));
    target.qmp("cont", json!({}));
    another_round(&mut target);

    // A source that runs on all the same (its operator's mistake) writes into nothing.
    source.qmp("cont", json!({}));
    another_round(&mut target);
    another_round(&mut target);
    source.kill();
    target.go();
    target.passes();
    vold.stop();
    vold.check_is_clean();
}

#[test]
#[ignore = "long; make test-full runs it"]
fn a_guest_under_load_moves_to_another_qemu_over_vhost_user() {
    let mut vold = Vold::start();
    vold.with_detached_volume(2, "256M", "96M");
    let machine = |attached: &Value| Machine::running(&vold.path(""), "load").with(&attached["qemu_args"]);
    let mut attached = vold.ctl("attach acme/vol --vm vm1 --via vhost-user");
    let mut source = machine(&attached).start();
    source.is_at("load");
    // There and back again.
    for _ in 0..2 {
        let next = vold.ctl("attach acme/vol --vm vm1 --via vhost-user --incoming");
        let mut target = machine(&next).with(&json!(["-incoming", "defer"])).start();
        // It goes on where it is for as long as it takes.
        another_round(&mut source);
        migrate(&mut source, &mut target, &vold.path("move"));
        another_round(&mut target);
        let attachments = vold.ctl("attachment list")["items"].clone();
        assert_eq!(attachments[0]["attachment_id"], next["attachment_id"]);
        assert_eq!(attachments.as_array().map(Vec::len), Some(1), "{attachments}");
        assert!(next["epoch"].as_u64() > attached["epoch"].as_u64(), "{next}");

        // A source that runs on all the same (its operator's mistake) writes into nothing.
        source.qmp("cont", json!({}));
        another_round(&mut target);
        another_round(&mut target);
        source.kill();
        (source, attached) = (target, next);
    }
    source.go();
    source.passes();
    vold.stop();
    vold.check_is_clean();
}

/// The target is given up before it runs: the machine stays where it is, and may move later.
#[test]
#[ignore = "long; make test-full runs it"]
fn a_move_over_vhost_user_that_is_given_up_leaves_the_guest_as_it_was() {
    let mut vold = Vold::start();
    vold.with_detached_volume(2, "256M", "96M");
    let machine = |attached: &Value| Machine::running(&vold.path(""), "load").with(&attached["qemu_args"]);
    let attached = vold.ctl("attach acme/vol --vm vm1 --via vhost-user");
    let mut source = machine(&attached).start();
    source.is_at("load");
    let next = vold.ctl("attach acme/vol --vm vm1 --via vhost-user --incoming");
    let mut target = machine(&next).with(&json!(["-incoming", "defer"])).start();
    let uri = format!("unix:{}", vold.path("move").display());
    target.qmp("migrate-incoming", json!({"uri": uri}));
    // So slow that it cannot end.
    source.qmp("migrate-set-parameters", json!({"max-bandwidth": 1 << 20}));
    source.qmp("migrate", json!({"uri": uri}));
    another_round(&mut source);
    target.kill();
    wait_for("the source notices", || {
        let status = source.qmp("query-migrate", json!({}));
        (status["status"] == "failed").then_some(())
    });
    vold.ctl("detach acme/vol --vm vm1 --incoming");
    another_round(&mut source);
    source.go();
    source.passes();
    vold.stop();
    vold.check_is_clean();
}
