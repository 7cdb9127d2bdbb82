//! External programs. The suites use real clients; where one is missing the test fails and says how to install it, because
//! a test that skips itself looks like one that passed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// It names the package of every program, as `program:package`.
const SETUP: &str = include_str!("../../scripts/setup.sh");

/// A command for an external program.
///
/// # Panics
/// When the program is not installed, with the command that installs it.
pub fn tool(name: &str) -> Command {
    let path = find(name).unwrap_or_else(|| {
        let mut entries = SETUP.split_whitespace().filter_map(|word| word.split_once(':'));
        let (_, package) = entries
            .find(|(program, _)| *program == name)
            .unwrap_or_else(|| panic!("{name} is not installed, and scripts/setup.sh does not know it"));
        panic!(
            "{name} is not installed; install it with: apt-get install {package} (or run scripts/setup.sh)"
        )
    });
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian's non-root PATH leaves the sbin directories out.
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(sbin)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A binary of this workspace, from the directory that this very program was built into.
///
/// # Panics
/// When it has not been built.
pub fn workspace_binary(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("own path");
    let mut dir = exe.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in a profile's directory");
    }
    let path = dir.join(name);
    let profile = if dir.ends_with("release") {
        " --release"
    } else {
        ""
    };
    assert!(
        path.is_file(),
        "{} is not built; run: cargo build --workspace{profile} (make test and make bench do)",
        path.display()
    );
    path
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started.
pub fn output(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"))
}

/// Runs a command that must succeed; gives its standard output.
///
/// # Panics
/// When it fails, with all that it printed.
pub fn succeed(command: &mut Command) -> String {
    let output = output(command);
    let (out, err) = texts(&output);
    assert!(
        output.status.success(),
        "{command:?} ended with {}\nstdout: {out}\nstderr: {err}",
        output.status
    );
    out
}

/// Runs a command that must fail; gives all that it printed.
///
/// # Panics
/// When it succeeds.
pub fn fail(command: &mut Command) -> String {
    let output = output(command);
    let (out, err) = texts(&output);
    assert!(
        !output.status.success(),
        "{command:?} succeeded, and must not\nstdout: {out}\nstderr: {err}"
    );
    format!("{out}{err}")
}

/// Standard output and error as text.
pub fn texts(output: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// `tool name args…` that must succeed.
pub fn run<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> String {
    succeed(tool(name).args(args))
}

/// Whether two files hold the same bytes.
pub fn same_bytes(a: &Path, b: &Path) -> bool {
    output(tool("cmp").arg("-s").arg(a).arg(b)).status.success()
}

/// What failed, with its last words and what the machine must offer.
pub fn fail_hint(name: &str, output: &Output, hint: &str) -> String {
    let (_, err) = texts(output);
    format!("{name} failed ({}): {}; {hint}", output.status, err.trim())
}

/// Whether each row of a table stands in a page of docs/. `are_those`: the programs here are of the versions that the page speaks of;
/// of others, the first two cells are all that is held, the name and our own answer.
///
/// # Panics
/// When one does not.
pub fn docs_have_rows(page: &str, rows: &[String], are_those: bool) {
    let path = format!("{}/../docs/{page}", env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    for row in rows {
        let held = match are_those {
            true => row.clone(),
            false => row.split_inclusive('|').take(3).collect(),
        };
        assert!(
            docs.contains(&held),
            "docs/{page} lacks: {held}\nall rows:\n{}",
            rows.join("\n")
        );
    }
}
