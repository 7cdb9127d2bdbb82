//! A certificate that was revoked stays revoked, whatever happens to the authority's files meanwhile.

use vold_tests::tls::Tls;
use vold_tests::wait_for;

#[test]
fn while_the_list_of_revocations_is_gone_nobody_is_let_in() {
    let tls = Tls::start();
    let (acme, globex) = (tls.certificate("acme", "vm1"), tls.certificate("globex", "vm2"));
    tls.revoke("acme", "vm1");
    tls.opens(&acme, "acme/vol").unwrap_err();
    tls.opens(&globex, "globex/vol").unwrap();
    let (list, away) = (tls.pki().join("ca-crl.pem"), tls.pki().join("away"));
    std::fs::rename(&list, &away).unwrap();
    tls.opens(&acme, "acme/vol").unwrap_err();
    tls.opens(&globex, "globex/vol").unwrap_err();
    wait_for("the log says why", || {
        tls.vold
            .log()
            .contains("the list of revoked certificates is gone")
            .then_some(())
    });
    std::fs::rename(&away, &list).unwrap();
    tls.opens(&acme, "acme/vol").unwrap_err();
    tls.opens(&globex, "globex/vol").unwrap();
}

#[test]
fn a_revocation_that_was_interrupted_is_finished_by_revoking_again() {
    let tls = Tls::start();
    let acme = tls.certificate("acme", "vm1");
    tls.revoke("acme", "vm1");
    // As far as it had come when the disk was full: written down, and not in the list that servers read.
    let list = tls.pki().join("ca-crl.pem");
    std::fs::remove_file(&list).unwrap();
    tls.revoke("acme", "vm1");
    assert!(list.exists());
    tls.opens(&acme, "acme/vol").unwrap_err();
}

#[test]
fn an_entry_that_cannot_be_understood_is_an_error_and_not_left_out() {
    let tls = Tls::start();
    tls.certificate("acme", "vm1");
    tls.revoke("acme", "vm1");
    let issued = tls.pki().join("issued.jsonl");
    let text = std::fs::read_to_string(&issued).unwrap();
    std::fs::write(
        &issued,
        text.replacen("\"serial\":\"", "\"serial\":\"no number ", 1),
    )
    .unwrap();
    let command = format!(
        "tls revoke --dir {} --customer globex --vm vm2",
        tls.pki().display()
    );
    let refused = tls.vold.refused(&command);
    assert!(
        refused.message.contains("cannot be understood"),
        "{}",
        refused.message
    );
}

#[test]
fn certificates_issued_at_the_same_time_are_all_written_down() {
    const MANY: usize = 8;
    let tls = Tls::start();
    std::thread::scope(|scope| {
        for i in 0..MANY {
            let tls = &tls;
            scope.spawn(move || {
                let out = tls.vold.path(&format!("out-{i}"));
                tls.issue_by(&tls.pki(), "acme", &format!("many-{i}"), &out, "");
            });
        }
    });
    let issued = std::fs::read_to_string(tls.pki().join("issued.jsonl")).unwrap();
    for i in 0..MANY {
        assert!(issued.contains(&format!("\"many-{i}\"")), "{issued}");
    }
}
