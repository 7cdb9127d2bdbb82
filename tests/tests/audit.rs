//! The audit log: who asked for what and how it ended, what the daemon mended, over kill -9; and what was done to it is found.

use std::fs;

use serde_json::Value;
use vold_tests::Vold;
use vold_tests::content::bytes;
use vold_tests::raw::RawStore;
use vold_tests::tools::run;

const SIZE: usize = 8 << 20;

fn entries(vold: &Vold) -> Vec<Value> {
    vold.ctl("audit list --limit 1000")["items"]
        .as_array()
        .unwrap()
        .clone()
}

fn found<'a>(entries: &'a [Value], action: &str, subject: &str, outcome: &str) -> Option<&'a Value> {
    entries
        .iter()
        .find(|entry| entry["action"] == action && entry["subject"] == subject && entry["outcome"] == outcome)
}

#[test]
fn every_change_is_written_down_with_who_what_and_how_it_ended_and_survives_kill_9() {
    let mut vold = Vold::start();
    vold.with_volume(1, "64M", &SIZE.to_string());
    vold.ctl("customer create globex");
    vold.ctl("vm create theirs --customer globex");
    vold.refused("attach acme/vol --vm theirs");
    vold.kill();
    vold.restart();
    let all = entries(&vold);
    let by_me = format!("uid {}", rustix::process::geteuid().as_raw());
    for (action, subject) in [
        ("store.add", "a"),
        ("customer.create", "acme"),
        ("volume.create", "acme/vol"),
    ] {
        let entry = found(&all, action, subject, "done").unwrap_or_else(|| panic!("no {action} in {all:?}"));
        assert_eq!(entry["actor"], by_me.as_str());
    }
    let refusal = found(&all, "volume.attach", "acme/vol to theirs", "refused").expect("the refusal");
    assert!(!refusal["detail"].as_str().unwrap().is_empty());
    let verified = vold.ctl("audit verify");
    assert_eq!(verified["entries"].as_u64().unwrap(), all.len() as u64);
    assert_eq!(verified["head"].as_str().unwrap().len(), 64);
    // What comes later is chained to it.
    vold.ctl("customer create later");
    let next = vold.ctl(&format!("audit list --after {}", verified["last"]));
    assert_eq!(next["items"][0]["previous"], verified["head"]);
}

#[test]
fn what_is_healed_is_written_down_even_when_the_volume_closes_at_once() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "64M", &SIZE.to_string());
    fs::write(vold.path("plain"), bytes(4, SIZE)).unwrap();
    run("nbdcopy", ["--flush", vold.path("plain").to_str().unwrap(), &uri]);
    let id = vold.volume("acme/vol")["id"].as_str().unwrap().to_owned();
    vold.stop();
    for name in ["a", "b"] {
        let raw = RawStore::open(&vold.store_path(name));
        let physical = raw.extents_of(raw.slot(&id).unwrap().dataset)[&u32::from(name == "b")];
        raw.flip(raw.data_at(physical) + 8192, 4096);
    }
    vold.restart();
    vold.ctl("scrub start acme/vol");
    vold_tests::wait_for("both blocks are repaired", || {
        (vold.volume("acme/vol")["healed_blocks"] == 2).then_some(())
    });
    vold.stop();
    vold.restart();
    let all = entries(&vold);
    let healed = all.iter().filter(|entry| entry["action"] == "volume.healed");
    let blocks: u64 = healed
        .map(|entry| {
            assert_eq!(
                (&entry["actor"], &entry["subject"]),
                (&"vold".into(), &"acme/vol".into())
            );
            let detail = entry["detail"].as_str().unwrap();
            detail.split(' ').next().unwrap().parse::<u64>().unwrap()
        })
        .sum();
    assert_eq!(blocks, 2);
}

#[test]
fn a_changed_entry_is_found_by_both_verifications_and_stops_nothing() {
    let mut vold = Vold::start();
    ["one", "two", "three"]
        .iter()
        .for_each(|name| drop(vold.ctl(&format!("customer create {name}"))));
    vold.stop();
    vold.check_is_clean();
    let path = vold.data_dir().join("audit").join(format!("{:020}.log", 1));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("\"two\"", "\"tow\"", 1)).unwrap();
    let report = vold.check_finds_damage();
    assert!(
        report.contains("audit log: ") && report.contains("line 3"),
        "{report}"
    );
    vold.restart();
    let refusal = vold.refused("audit verify");
    assert!(refusal.message.contains("changed"), "{}", refusal.message);
    vold.ctl("customer create four");
}
