//! What vold, nbdkit and qemu-nbd offer, asked of the real programs; the table in docs/NBD.md is what they answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use vold_tests::tools::{run, tool};
use vold_tests::{Vold, wait_for};

/// A handshake, option by option.
struct Probe(UnixStream);

impl Probe {
    fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        Self(stream)
    }

    /// All replies to an option: kind and data.
    fn ask(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let len = (data.len() as u32).to_be_bytes();
        let option = [b"IHAVEOPT", &code.to_be_bytes()[..], &len, data].concat();
        self.0.write_all(&option).unwrap();
        let mut replies = Vec::new();
        loop {
            let mut head = [0; 20];
            self.0.read_exact(&mut head).unwrap();
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut data = vec![0; word(16) as usize];
            self.0.read_exact(&mut data).unwrap();
            replies.push((word(12), data));
            if word(12) == 1 || word(12) >= 1 << 31 {
                return replies;
            }
        }
    }

    fn agrees(&mut self, code: u32, data: &[u8]) -> bool {
        self.ask(code, data).last().is_some_and(|(kind, _)| *kind == 1)
    }
}

/// The answers, a row of the table each.
fn features(socket: &Path, export: &str) -> Vec<(&'static str, bool)> {
    let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
    let mut found = Vec::new();
    let mut probe = Probe::connect(socket);
    let structured = probe.agrees(8, b"");
    found.push(("structured replies (8)", structured));
    let contexts = probe.ask(9, &[&name[..], &[0; 4]].concat());
    let lists = |wanted: &str| {
        let mut listed = contexts.iter().filter(|(kind, _)| *kind == 4);
        listed.any(|(_, data)| data[4..] == *wanted.as_bytes())
    };
    found.push(("`base:allocation`", lists("base:allocation")));
    found.push(("`qemu:allocation-depth`", lists("qemu:allocation-depth")));
    found.push(("LIST (3)", probe.agrees(3, b"")));
    let infos = probe.ask(6, &[&name[..], &[0, 3, 0, 1, 0, 2, 0, 3]].concat());
    let told = |kind: u16| {
        let mut infos = infos.iter().filter(|(reply, _)| *reply == 3);
        infos.any(|(_, data)| data[..2] == kind.to_be_bytes())
    };
    found.push(("INFO tells the name", told(1)));
    found.push(("INFO tells a description", told(2)));
    found.push(("INFO tells block sizes", told(3)));
    let mut extended = Probe::connect(socket);
    let has_extended = extended.agrees(11, b"");
    found.push(("extended headers (11)", has_extended));
    let go = match has_extended {
        true => {
            // A payload of BLOCK_STATUS is offered where there are contexts.
            let query = b"base:allocation";
            let one = [
                &1u32.to_be_bytes()[..],
                &(query.len() as u32).to_be_bytes(),
                query,
            ]
            .concat();
            extended.agrees(10, &[&name[..], &one].concat());
            extended.ask(7, &[&name[..], &[0, 0]].concat())
        }
        false => probe.ask(7, &[&name[..], &[0, 0]].concat()),
    };
    let export = go
        .iter()
        .find(|(kind, data)| *kind == 3 && data[..2] == [0, 0])
        .expect("an export");
    let flags = u16::from_be_bytes(export.1[10..12].try_into().unwrap());
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

struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn peer(name: &str, args: &[&str], socket: &Path) -> Peer {
    let started = tool(name)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let peer = Peer(started.unwrap());
    wait_for("the peer listens", || {
        UnixStream::connect(socket).is_ok().then_some(())
    });
    peer
}

#[test]
fn the_table_in_the_docs_is_what_the_programs_answer() {
    let vold = Vold::start();
    vold.with_volume(1, "64M", "8M");
    let ours = vold.ctl("attachment list")["items"][0]["socket"]
        .as_str()
        .unwrap()
        .to_owned();
    let (kit, qemu, image) = (vold.path("kit.sock"), vold.path("qemu.sock"), vold.path("image"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let _nbdkit = peer("nbdkit", &["-f", "-U", &path(&kit), "file", &path(&image)], &kit);
    let _qemu = peer(
        "qemu-nbd",
        &[
            "-t",
            "-e",
            "8",
            "-A",
            "-f",
            "raw",
            "-k",
            &path(&qemu),
            &path(&image),
        ],
        &qemu,
    );
    let columns = [
        features(ours.as_ref(), "acme/vol"),
        features(&kit, ""),
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
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/NBD.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let is = |program: &str, version: &str| run(program, ["--version"]).contains(version);
    if !is("nbdkit", " 1.32.") || !is("qemu-nbd", " 10.") {
        // The table says of which versions it speaks; of others, our own column is all that is held.
        return;
    }
    for row in &rows {
        assert!(
            docs.contains(row),
            "docs/NBD.md lacks: {row}\nall rows:\n{}",
            rows.join("\n")
        );
    }
}
