//! NBD over TLS: who has which certificate gets to which export, with real clients; and nobody else learns anything.

use std::io::Write;

use vold_tests::content::bytes;
use vold_tests::nbd::*;
use vold_tests::tls::Tls;
use vold_tests::tools::{output, run, same_bytes, tool};
use vold_tests::{Vold, wait_for};

#[test]
fn each_vm_opens_and_lists_its_own_export_and_no_other_is_told_from_a_missing_one() {
    let tls = Tls::start();
    let (acme, globex) = (tls.certificate("acme", "vm1"), tls.certificate("globex", "vm2"));
    tls.opens(&acme, "acme/vol").unwrap();
    tls.opens(&globex, "globex/vol").unwrap();
    tls.opens(&acme, "").unwrap();
    let foreign = tls.opens(&acme, "globex/vol").unwrap_err();
    let missing = tls.opens(&acme, "globex/nix").unwrap_err();
    assert_eq!(
        foreign.replace("globex/vol", "X"),
        missing.replace("globex/nix", "X"),
        "foreign and missing look the same"
    );
    let list = run("nbdinfo", ["--list", "--json", &tls.uri(&acme, "")]);
    assert!(list.contains("acme/vol") && !list.contains("globex"), "{list}");
    // Two volumes: neither is the default, both are listed and opened, on whichever shard.
    tls.vold.ctl("volume create acme/two --size 8M");
    tls.vold.attach("acme/two", "vm1");
    tls.opens(&acme, "acme/two").unwrap();
    tls.opens(&acme, "acme/vol").unwrap();
    tls.opens(&acme, "").unwrap_err();
    let list = run("nbdinfo", ["--list", "--json", &tls.uri(&acme, "")]);
    assert!(list.contains("acme/vol") && list.contains("acme/two"), "{list}");
}

#[test]
fn a_detached_volume_is_gone_at_once_also_for_who_is_connected() {
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    let mut qemu_io = tool("qemu-io")
        .args([
            "--object",
            &format!("tls-creds-x509,id=t,dir={},endpoint=client", acme.display()),
        ])
        .args(["--image-opts", "-n"])
        .arg(format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={},tls-creds=t,export=acme/vol",
            tls.port
        ))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut commands = qemu_io.stdin.take().unwrap();
    commands.write_all(b"write -P 7 0 64k\n").unwrap();
    wait_for("it is connected", || {
        let connections = tls.vold.ctl("attachment list")["items"][0]["connections"].clone();
        let written = tls.vold.volume("acme/vol")["allocated_bytes"].clone();
        (connections == 1 && written != 0).then_some(())
    });
    tls.vold.ctl("detach acme/vol --vm vm1");
    tls.opens(&acme, "acme/vol").unwrap_err();
    commands.write_all(b"read -P 7 0 64k\n").unwrap();
    drop(commands);
    let said = qemu_io.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("wrote 65536") && !said.contains("read 65536/65536"),
        "{said}"
    );
}

/// Certificates of every other kind are in `nbd_matrix.rs`.
#[test]
fn vms_without_an_attachment_get_nothing_and_a_revoked_certificate_nothing_more() {
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    // Of a VM that has nothing; of one that does not exist.
    for (customer, vm) in [("acme", "vm9"), ("globex", "vm1"), ("nobody", "vm1")] {
        tls.issue(customer, vm);
        tls.opens(&tls.certificate(customer, vm), "acme/vol").unwrap_err();
    }
    tls.opens(&acme, "acme/vol").unwrap();
    // Revoked, without a restart; the other VM's goes on working.
    tls.revoke("acme", "vm1");
    tls.opens(&acme, "acme/vol").unwrap_err();
    tls.opens(&tls.certificate("globex", "vm2"), "globex/vol")
        .unwrap();
}

#[test]
fn images_are_copied_in_and_out_over_one_and_more_connections() {
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    let (plain, back) = (tls.vold.path("plain"), tls.vold.path("back"));
    std::fs::write(&plain, bytes(5, 8 << 20)).unwrap();
    let uri = tls.uri(&acme, "acme/vol");
    for connections in ["1", "4"] {
        let connections = format!("--connections={connections}");
        run(
            "nbdcopy",
            ["--flush", &connections, plain.to_str().unwrap(), &uri],
        );
        run("nbdcopy", [&connections, &uri, back.to_str().unwrap()]);
        assert!(same_bytes(&plain, &back));
    }
    let object = format!("tls-creds-x509,id=t,dir={},endpoint=client", acme.display());
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={},tls-creds=t,export=acme/vol",
        tls.port
    );
    let compare = ["compare", "--object", &object, "--image-opts"];
    let file = format!("driver=raw,file.driver=file,file.filename={}", plain.display());
    run("qemu-img", compare.iter().copied().chain([&image[..], &file[..]]));
}

/// What comes along with STARTTLS, and EXPORT_NAME, are in `known_mistakes_tls.rs`.
#[test]
fn nothing_is_told_or_done_before_tls() {
    let tls = Tls::start();
    let mut plain = tls.greeted().unwrap();
    let contexts = contexts_data("acme/vol", &["base:allocation"]);
    for (option, data) in [
        (OPT_LIST, &b""[..]),
        (OPT_INFO, &go_data("acme/vol")),
        (OPT_GO, &go_data("acme/vol")),
        (OPT_STRUCTURED_REPLY, b""),
        (OPT_LIST_META_CONTEXT, &contexts),
        (OPT_SET_META_CONTEXT, &contexts),
        (OPT_EXTENDED_HEADERS, b""),
        (99, b""),
    ] {
        let replies = plain.ask(option, data).unwrap();
        let [reply] = &replies[..] else {
            panic!("option {option}: {replies:?}")
        };
        assert_eq!(reply.kind, REP_ERR_TLS_REQD, "option {option}");
        assert!(!String::from_utf8_lossy(&reply.data).contains("acme"));
    }
    // The attachment's own socket is as it was.
    let uri = tls.vold.attach("acme/vol", "vm1");
    Client::connect(&uri).read(0, 512).unwrap();
}

/// nbd-client of nbd 3.24 speaks TLS 1.2 and no other.
#[test]
fn tls_1_2_is_taken_only_where_the_operator_allows_it() {
    let mut tls = Tls::start();
    let lists = |tls: &Tls, customer: &str, vm: &str| {
        let files = tls.certificate(customer, vm);
        let mut client = tool("nbd-client");
        client
            .args(["-l", "localhost", &tls.port.to_string(), "-x"])
            .args(["-tlshostname", "localhost"]);
        for (option, file) in [
            ("-certfile", "client-cert.pem"),
            ("-keyfile", "client-key.pem"),
            ("-cacertfile", "ca-cert.pem"),
        ] {
            client.arg(option).arg(files.join(file));
        }
        let listed = output(&mut client);
        let said = String::from_utf8_lossy(&listed.stdout).into_owned();
        listed.status.success().then_some(said)
    };
    assert_eq!(lists(&tls, "acme", "vm1"), None);
    tls.vold.stop();
    let mut command = tls.vold.serve_command();
    command.arg("--tls-dir").arg(tls.vold.path("pki"));
    command.args(["--tls-1-2", "--listen", &format!("127.0.0.1:{}", tls.port)]);
    tls.vold.restart_with(command);
    let said = lists(&tls, "acme", "vm1").expect("it is let in");
    assert!(said.contains("acme/vol") && !said.contains("globex"), "{said}");
    let said = lists(&tls, "globex", "vm2").expect("it is let in");
    assert!(said.contains("globex/vol") && !said.contains("acme"), "{said}");
    // And TLS 1.3, as before.
    tls.opens(&tls.certificate("acme", "vm1"), "acme/vol").unwrap();
}

#[test]
fn a_listening_address_without_certificates_or_an_odd_one_is_refused_with_the_reason() {
    let vold = Vold::not_started(None);
    let refused = |args: &[&str]| {
        let mut command = vold.serve_command();
        vold.refuses_to_start(command.args(args))
    };
    let said = refused(&["--listen", "127.0.0.1:0"]);
    assert!(
        said.contains("--tls-dir") && said.contains("volctl tls init"),
        "{said}"
    );
    for odd in ["@abstract", "/run/x.sock", "localhost", "127.0.0.1", "[::1]"] {
        let said = refused(&["--listen", odd, "--tls-dir", "/nonexistent"]);
        assert!(said.contains("listen address"), "{said}");
    }
    let said = refused(&["--listen", "127.0.0.1:0", "--tls-dir", "/nonexistent"]);
    assert!(said.contains("/nonexistent/ca-cert.pem"), "{said}");
}
