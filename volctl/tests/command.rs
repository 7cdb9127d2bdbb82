//! The program as scripts see it: exit status, what is on which stream, one JSON document.

#[allow(dead_code, missing_docs)]
#[path = "../src/fake.rs"]
mod fake;

use std::process::{Command, Output, Stdio};

use fake::FakeDaemon;
use serde_json::{Value, json};

const STORE: &str = r#"{"name":"a","id":"5f0c","path":"/srv/a","zone":"a","state":"online","reason":null,"replicas":0,
    "medium":"in_place","medium_reason":"ext4","extent_bytes":4194304,"total_bytes":8388608,"free_bytes":8388608,
    "pending_scrub_bytes":0,"allocated_bytes":0}"#;

fn volctl(api: &str, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volctl"));
    command
        .env("VOLD_API", api)
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

fn run(api: &str, arguments: &str) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = volctl(api, arguments).output().expect("volctl runs");
    (
        status.code(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

#[test]
fn a_done_command_exits_0_and_keeps_standard_error_empty() {
    let fake = FakeDaemon::answering(200, STORE);
    let (status, stdout, stderr) = run(&fake.api(), "store show a");
    assert_eq!((status, stderr.as_str()), (Some(0), ""));
    assert!(
        stdout.starts_with("Name           a\n") && stdout.ends_with("Pending scrub  0 B\n"),
        "{stdout}"
    );
}

#[test]
fn json_output_is_the_daemons_document_field_for_field() {
    let fake = FakeDaemon::answering(200, STORE);
    let (status, stdout, _) = run(&fake.api(), "--output json store show a");
    assert_eq!(status, Some(0));
    let printed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(printed, serde_json::from_str::<Value>(STORE).unwrap());
}

#[test]
fn a_refusal_exits_1_with_one_line_on_standard_error() {
    let fake = FakeDaemon::answering(403, r#"{"error":{"code":"refused","message":"not\nyours"}}"#);
    let (status, stdout, stderr) = run(&fake.api(), "attach acme/web --vm vm1");
    assert_eq!(
        (status, stdout.as_str(), stderr.as_str()),
        (Some(1), "", "volctl: not yours\n")
    );
}

#[test]
fn a_refusal_with_json_output_is_one_error_document() {
    let fake = FakeDaemon::answering(403, r#"{"error":{"code":"refused","message":"not yours"}}"#);
    let (status, stdout, stderr) = run(&fake.api(), "attach acme/web --vm vm1 --output json");
    assert_eq!((status, stderr.as_str()), (Some(1), "volctl: not yours\n"));
    let printed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        printed,
        json!({"error": {"code": "refused", "message": "not yours"}})
    );
}

#[test]
fn wrong_usage_exits_2_and_reaches_no_daemon() {
    let (status, stdout, stderr) = run("unix:/nonexistent/api.sock", "volume create acme/web --size 1.5G");
    assert_eq!((status, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("1536M"), "{stderr}");
    let (status, stdout, _) = run(
        "unix:/nonexistent/api.sock",
        "--output json volume create Acme/web --size 1G",
    );
    assert_eq!(status, Some(2));
    let printed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(printed["error"]["code"], "invalid");
    assert!(
        printed["error"]["message"]
            .as_str()
            .unwrap()
            .contains("not a valid name"),
        "{printed}"
    );
}

#[test]
fn a_daemon_that_is_not_running_is_one_line_with_the_next_step() {
    let (status, stdout, stderr) = run("unix:/nonexistent/api.sock", "status");
    assert_eq!((status, stdout.as_str()), (Some(1), ""));
    assert!(
        stderr.contains("/nonexistent/api.sock") && stderr.contains("vold serve"),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1);
}

#[test]
fn the_option_names_the_socket_before_the_environment_does() {
    let fake = FakeDaemon::answering(200, STORE);
    let arguments = format!("--api {} store show a", fake.api());
    let (status, _, stderr) = run("unix:/nonexistent/api.sock", &arguments);
    assert_eq!(status, Some(0), "{stderr}");
}

#[test]
fn a_reader_that_has_gone_away_is_neither_a_panic_nor_a_failure() {
    let fake = FakeDaemon::answering(200, STORE);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = volctl(&fake.api(), "store show a")
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!(
        (status.code(), String::from_utf8(stderr).unwrap().as_str()),
        (Some(0), "")
    );
}

#[test]
fn waiting_for_a_destruction_keeps_progress_off_standard_output() {
    let destroy = |state: &str, step: &str, done: u64| {
        json!({"volume_id": "00000000-0000-4000-8000-000000000000", "volume": "acme/web", "state": state,
            "stores": [{"store": "a", "state": step, "extents": 1, "bytes_done": done, "bytes_total": 4096}],
            "started_unix_seconds": 0, "finished_unix_seconds": null})
        .to_string()
    };
    let (begun, done) = (
        destroy("destroying", "scrubbing", 1024),
        destroy("destroyed", "done", 4096),
    );
    let fake = FakeDaemon::answering_in_turn(&[(200, &begun), (200, &done)]);
    let wait = "--output json destroy wait 00000000-0000-4000-8000-000000000000";
    let (status, stdout, stderr) = run(&fake.api(), wait);
    assert_eq!(status, Some(0));
    let printed: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(printed["state"], "destroyed");
    assert_eq!(
        stderr,
        " 25 %  1 KiB of 4 KiB  a scrubbing\n100 %  4 KiB of 4 KiB  a done\n"
    );
}

#[test]
fn deleting_prints_the_id_and_the_command_that_waits() {
    let destroy = json!({"volume_id": "00000000-0000-4000-8000-000000000000", "volume": "acme/web",
        "state": "destroying", "stores": [], "started_unix_seconds": 0, "finished_unix_seconds": null});
    let fake = FakeDaemon::answering(200, &destroy.to_string());
    let (status, stdout, stderr) = run(&fake.api(), "volume delete acme/web --now");
    assert_eq!(status, Some(0));
    assert!(
        fake.request()
            .starts_with("DELETE /v1/volumes/acme/web?now=true HTTP/1.1\r\n")
    );
    let id = "00000000-0000-4000-8000-000000000000";
    assert!(stdout.contains(&format!("Id        {id}\n")), "{stdout}");
    assert!(
        stdout.ends_with(&format!("volctl destroy wait {id}\n")),
        "{stdout}"
    );
    assert_eq!(stderr, "");
}

#[test]
fn completions_need_no_daemon_and_name_every_noun() {
    for shell in ["bash", "zsh", "fish"] {
        let (status, stdout, stderr) = run("unix:/nonexistent/api.sock", &format!("completions {shell}"));
        assert_eq!((status, stderr.as_str()), (Some(0), ""));
        for noun in [
            "store", "customer", "vm", "volume", "attach", "detach", "scrub", "destroy", "status", "version",
        ] {
            assert!(stdout.contains(noun), "{shell}: {noun}");
        }
    }
}
