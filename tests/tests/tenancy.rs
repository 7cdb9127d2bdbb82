//! A volume is reached by its own customer's VM and nobody else, and whoever may not have an export cannot tell it from
//! one that does not exist.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use vold_tests::nbd::{Client, EPERM, FLAG_READ_ONLY, Haggle, OPT_GO, OPT_INFO, REP_ERR_UNKNOWN, go_data};
use vold_tests::tools::{output, texts, tool};
use vold_tests::vold::parse_uri;
use vold_tests::{Vold, wait_for};

/// `acme/web` on `acme-vm`, `globex/db` on `globex-vm`; their URIs.
fn two_customers() -> (Vold, String, String) {
    let vold = Vold::start();
    vold.add_stores(&["a"], "128M");
    for (customer, volume) in [("acme", "web"), ("globex", "db")] {
        vold.ctl(&format!("customer create {customer}"));
        vold.ctl(&format!("vm create {customer}-vm --customer {customer}"));
        vold.ctl(&format!("volume create {customer}/{volume} --size 8M"));
    }
    let acme = vold.attach("acme/web", "acme-vm");
    let globex = vold.attach("globex/db", "globex-vm");
    (vold, acme, globex)
}

#[test]
fn another_customers_vm_is_refused_even_by_the_operator() {
    let (vold, ..) = two_customers();
    vold.ctl("detach acme/web --vm acme-vm");
    let before = vold.volume("acme/web");
    let refusal = vold.refused("attach acme/web --vm globex-vm");
    assert_eq!(refusal.code, "refused");
    for word in ["globex-vm", "acme/web", "customer"] {
        assert!(refusal.message.contains(word), "{refusal:?}");
    }
    assert_eq!(
        vold.volume("acme/web"),
        before,
        "a refused attach changes nothing"
    );
    assert_eq!(vold.ctl("attachment list")["items"].as_array().unwrap().len(), 1);
}

#[test]
fn a_second_vm_of_the_customer_is_refused_while_the_first_has_it_and_the_same_vm_gets_the_same_attachment() {
    let (vold, uri, _) = two_customers();
    vold.ctl("vm create acme-two --customer acme");
    let refusal = vold.refused("attach acme/web --vm acme-two");
    assert_eq!(refusal.code, "busy");
    assert!(
        refusal.message.contains("acme-vm") && refusal.message.contains("detach"),
        "{refusal:?}"
    );
    let first = vold.ctl("attachment list");
    assert_eq!(vold.attach("acme/web", "acme-vm"), uri);
    assert_eq!(vold.ctl("attachment list"), first);
}

#[test]
fn a_foreign_and_a_missing_export_get_the_same_bytes() {
    let (_vold, acme, _) = two_customers();
    let (socket, _) = parse_uri(&acme);
    // Same length, so that nothing may differ by it.
    for option in [OPT_GO, OPT_INFO] {
        let answer = |name: &str| {
            let mut haggle = Haggle::connect(&socket).unwrap();
            haggle.ask(option, &go_data(name)).unwrap()
        };
        let (foreign, missing) = (answer("globex/db"), answer("globex/no"));
        assert_eq!(foreign.last().unwrap().kind, REP_ERR_UNKNOWN);
        let text =
            |replies: &[vold_tests::nbd::OptionReply]| String::from_utf8_lossy(&replies[0].data).into_owned();
        assert_eq!(
            text(&foreign).replace("globex/db", "X"),
            text(&missing).replace("globex/no", "X")
        );
        assert_eq!(foreign.len(), missing.len());
        assert_eq!(
            foreign[0].data.len(),
            missing[0].data.len(),
            "not even the length differs"
        );
    }
    // EXPORT_NAME has no error reply: both connections simply end.
    for name in ["globex/db", "globex/no"] {
        let mut haggle = Haggle::connect(&socket).unwrap();
        haggle
            .send(vold_tests::nbd::OPT_EXPORT_NAME, name.as_bytes())
            .unwrap();
        let mut rest = Vec::new();
        haggle.into_stream().read_to_end(&mut rest).unwrap_or_default();
        assert_eq!(rest, Vec::<u8>::new(), "{name}");
    }
}

#[test]
fn list_shows_the_callers_own_export_only() {
    let (_vold, acme, globex) = two_customers();
    for (uri, own) in [(acme, "acme/web"), (globex, "globex/db")] {
        let (socket, _) = parse_uri(&uri);
        assert_eq!(Haggle::connect(&socket).unwrap().list().unwrap(), [own]);
        let listed = vold_tests::tools::run(
            "nbdinfo",
            [
                "--list",
                "--json",
                &format!("nbd+unix://?socket={}", socket.display()),
            ],
        );
        assert!(listed.contains(own), "{listed}");
    }
}

#[test]
fn the_socket_belongs_to_the_vms_uid_and_another_uid_is_turned_away_even_past_the_mode() {
    let vold = Vold::start();
    assert_root();
    vold.add_stores(&["a"], "128M");
    vold.ctl("customer create acme");
    vold.ctl("vm create vm1 --customer acme --uid 65534");
    vold.ctl("volume create acme/vol --size 8M");
    let uri = vold.attach("acme/vol", "vm1");
    let (socket, _) = parse_uri(&uri);
    let metadata = std::fs::metadata(&socket).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.permissions().mode() & 0o777),
        (65534, 0o600)
    );

    // The VM's uid gets in.
    let as_uid = |uid: u32| {
        let mut command = tool("setpriv");
        command
            .args([
                format!("--reuid={uid}"),
                format!("--regid={uid}"),
                "--clear-groups".into(),
            ])
            .args(["nbdinfo", "--size", &uri]);
        output(&mut command)
    };
    let own = as_uid(65534);
    assert!(own.status.success(), "{:?}", texts(&own));
    assert_eq!(texts(&own).0.trim(), "8388608");
    // Another uid is kept out by the mode already.
    let other = as_uid(1234);
    assert!(!other.status.success());
    assert!(
        texts(&other).1.contains("Permission denied"),
        "{:?}",
        texts(&other)
    );
    // That somebody opens the mode changes nothing: the peer's credentials decide.
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let other = as_uid(1234);
    assert!(
        !other.status.success(),
        "uid 1234 got in by the mode: {:?}",
        texts(&other)
    );
    assert!(vold.log().contains("turned away"), "{}", vold.log());
    assert!(as_uid(65534).status.success());

    // Root is no exception: it passes the mode, and is not even greeted.
    assert!(!output(tool("nbdinfo").args(["--size", &uri])).status.success());
    let mut stream = UnixStream::connect(&socket).expect("root passes the mode");
    let mut greeting = Vec::new();
    stream.read_to_end(&mut greeting).unwrap_or_default();
    assert_eq!(greeting, [0; 0], "a wrong uid is told nothing");
    assert!(vold.log().contains("uid=0"), "{}", vold.log());
}

/// Changing the uid needs root; a test that skipped itself here would look like one that passed.
fn assert_root() {
    assert!(
        rustix::process::getuid().is_root(),
        "this test changes uids and must run as root (sudo make test)"
    );
}

#[test]
fn a_detach_ends_the_session_and_what_it_still_sends_changes_nothing() {
    let (vold, uri, _) = two_customers();
    let mut client = Client::connect(&uri);
    client.write(0, b"before").unwrap();
    let epoch = vold.volume("acme/web")["epoch"].as_u64().unwrap();
    vold.ctl("detach acme/web --vm acme-vm");
    assert!(vold.volume("acme/web")["epoch"].as_u64().unwrap() > epoch);
    // The connection is cut; if a byte still goes out, nothing comes back.
    let late = client
        .submit(vold_tests::nbd::CMD_WRITE, 0, 0, 6, b"after!")
        .and_then(|_| client.reply());
    assert!(late.is_err(), "a detached session got an answer: {late:?}");
    let (socket, _) = parse_uri(&uri);
    assert!(UnixStream::connect(&socket).is_err(), "the socket is gone");
    let uri = vold.attach("acme/web", "acme-vm");
    assert_eq!(Client::connect(&uri).read(0, 6).unwrap(), b"before");
}

#[test]
fn a_read_only_attachment_reads_and_refuses_every_change_with_eperm() {
    let (vold, uri, _) = two_customers();
    Client::connect(&uri).write(0, b"fixed").unwrap();
    vold.ctl("detach acme/web --vm acme-vm");
    let attachment = vold.ctl("attach acme/web --vm acme-vm --read-only");
    assert_eq!(attachment["read_only"], true);
    let mut client = Client::connect(attachment["uri"].as_str().unwrap());
    assert_ne!(client.flags() & FLAG_READ_ONLY, 0);
    assert_eq!(client.write(0, b"other"), Err(EPERM));
    assert_eq!(client.trim(0, 4096), Err(EPERM));
    assert_eq!(client.write_zeroes(0, 4096, 0), Err(EPERM));
    assert_eq!(client.read(0, 5).unwrap(), b"fixed");
}

#[test]
fn a_volume_with_an_attachment_is_not_deleted_and_a_vm_with_one_is_not_removed() {
    let (vold, uri, _) = two_customers();
    for words in ["volume delete acme/web --now", "vm remove acme-vm"] {
        let refusal = vold.refused(words);
        assert_eq!(refusal.code, "busy", "{refusal:?}");
        assert!(refusal.message.contains("detach"), "{refusal:?}");
    }
    assert_eq!(vold.refused("store remove a").code, "busy");
    assert!(Client::connect(&uri).read(0, 512).is_ok());
    vold.ctl("detach acme/web --vm acme-vm");
    vold.ctl("vm remove acme-vm");
    vold.destroy("acme/web");
    wait_for("only globex's volume is left", || {
        (vold.ctl("volume list")["items"].as_array().unwrap().len() == 1).then_some(())
    });
}
