//! What vold, nbdkit and qemu-nbd offer, asked of the real programs; the table in docs/NBD.md is what they answer.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use vold_tests::nbd::*;
use vold_tests::nbdkit::Nbdkit;
use vold_tests::tools::{docs_have_rows, run, tool};
use vold_tests::vold::parse_uri;
use vold_tests::{Vold, wait_for};

fn agrees(haggle: &mut Haggle, code: u32, data: &[u8]) -> bool {
    haggle.final_kind(code, data) == REP_ACK
}

/// The answers, a row of the table each.
fn features(socket: &Path, export: &str) -> Vec<(&'static str, bool)> {
    let mut found = Vec::new();
    let mut compact = Haggle::connect(socket).unwrap();
    let structured = agrees(&mut compact, OPT_STRUCTURED_REPLY, b"");
    found.push(("structured replies (8)", structured));
    let contexts = compact
        .ask(OPT_LIST_META_CONTEXT, &contexts_data(export, &[]))
        .unwrap();
    let lists = |wanted: &str| {
        let mut listed = contexts.iter().filter(|reply| reply.kind == REP_META_CONTEXT);
        listed.any(|reply| reply.data[4..] == *wanted.as_bytes())
    };
    found.push(("`base:allocation`", lists("base:allocation")));
    found.push(("`qemu:allocation-depth`", lists("qemu:allocation-depth")));
    found.push(("LIST (3)", agrees(&mut compact, OPT_LIST, b"")));
    let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
    let infos = compact
        .ask(OPT_INFO, &[&name[..], &[0, 3, 0, 1, 0, 2, 0, 3]].concat())
        .unwrap();
    let told = |kind: u16| {
        let mut infos = infos.iter().filter(|reply| reply.kind == REP_INFO);
        infos.any(|reply| reply.data[..2] == kind.to_be_bytes())
    };
    found.push(("INFO tells the name", told(1)));
    found.push(("INFO tells a description", told(2)));
    found.push(("INFO tells block sizes", told(3)));
    let mut extended = Haggle::connect(socket).unwrap();
    let has_extended = agrees(&mut extended, OPT_EXTENDED_HEADERS, b"");
    found.push(("extended headers (11)", has_extended));
    let mut haggle = compact;
    if has_extended {
        // A payload of BLOCK_STATUS is offered where there are contexts.
        haggle = extended;
        agrees(
            &mut haggle,
            OPT_SET_META_CONTEXT,
            &contexts_data(export, &["base:allocation"]),
        );
    }
    let flags = haggle.go(export).unwrap().flags();
    for (bit, feature) in [
        (2, "FLUSH"),
        (3, "FUA"),
        (5, "TRIM"),
        (6, "WRITE_ZEROES"),
        (11, "FAST_ZERO"),
        (7, "DF"),
        (10, "CACHE"),
        (8, "MULTI_CONN on a writable export"),
        (12, "BLOCK_STATUS payload"),
    ] {
        found.push((feature, flags & 1 << bit != 0));
    }
    found
}

/// A running qemu-nbd; ended with the value.
struct QemuNbd(Child);

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl QemuNbd {
    fn serve(image: &Path, socket: &Path) -> Self {
        let started = tool("qemu-nbd")
            .args(["-t", "-e", "8", "-A", "-f", "raw", "-k"])
            .args([socket, image])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let served = Self(started.unwrap());
        wait_for("qemu-nbd listens", || UnixStream::connect(socket).ok());
        served
    }
}

#[test]
fn the_table_in_the_docs_is_what_the_programs_answer() {
    let vold = Vold::start();
    let uri = vold.with_volume(1, "64M", "8M");
    let (qemu, image) = (vold.path("qemu.sock"), vold.path("image"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let nbdkit = Nbdkit::serve(&vold.path(""), &["file", image.to_str().unwrap()]);
    let _qemu = QemuNbd::serve(&image, &qemu);
    let columns = [
        features(&parse_uri(&uri).0, "acme/vol"),
        features(&parse_uri(&nbdkit.uri()).0, ""),
        features(&qemu, ""),
    ];
    let yes = |has: bool| if has { "yes" } else { "no" };
    let rows: Vec<String> = (0..columns[0].len())
        .map(|row| {
            let [ours, kit, qemu] = [0, 1, 2].map(|column: usize| yes(columns[column][row].1));
            format!("| {} | {ours} | {kit} | {qemu} |", columns[0][row].0)
        })
        .collect();
    assert!(
        columns[0].iter().all(|(_, has)| *has),
        "vold lacks one: {rows:#?}"
    );
    let is = |program: &str, version: &str| run(program, ["--version"]).contains(version);
    let are_those = is("nbdkit", " 1.32.") && is("qemu-nbd", " 10.");
    docs_have_rows("NBD.md", &rows, are_those);
}
