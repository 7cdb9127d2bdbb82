//! The shell scripts of the project.

use std::path::{Path, PathBuf};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Every file of these directories whose first line says that a shell runs it.
fn shell_scripts() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in ["scripts", "vm-images", ".ci"] {
        for entry in Path::new(ROOT).join(directory).read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && std::fs::read_to_string(&path).unwrap().starts_with("#!/bin/bash") {
                found.push(path);
            }
        }
    }
    found
}

/// Whether a line pipes into a program that may leave before it has read everything: `grep -q`, `grep -m`, `head`, `sed q`.
fn ends_at_a_reader_that_leaves(line: &str) -> bool {
    let code = line.trim_start();
    if code.starts_with('#') {
        return false;
    }
    code.replace("||", "  ").split('|').skip(1).any(|reader| {
        let words: Vec<&str> = reader.split_whitespace().collect();
        let option = |letters: &[char]| {
            words
                .iter()
                .skip(1)
                .any(|word| word.starts_with('-') && !word.starts_with("--") && word.contains(letters))
        };
        match words.first() {
            Some(&"head") => true,
            Some(&"grep") => option(&['q', 'm']) || words.contains(&"--quiet"),
            Some(&"sed") => words.iter().any(|word| word.trim_matches('\'').ends_with('q')),
            _ => false,
        }
    })
}

/// Under `pipefail` a pipe whose reader leaves early fails now and then: whoever writes may still have something to write,
/// and ends by SIGPIPE. A build of the guests failed so, one time in a hundred.
#[test]
fn no_pipe_of_a_script_ends_at_a_reader_that_may_leave_early() {
    let scripts = shell_scripts();
    assert!(scripts.len() >= 5, "{scripts:?}");
    let mut wrong = Vec::new();
    for path in &scripts {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(
            text.contains("\nset -euo pipefail\n"),
            "{path:?} goes on after errors"
        );
        // A pipe may begin on the line before.
        let joined = text.replace("\\\n", " ").replace("|\n", "| ");
        for line in joined.lines().filter(|line| ends_at_a_reader_that_leaves(line)) {
            wrong.push(format!("{}: {}", path.display(), line.trim()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn readers_that_may_leave_early_are_told_from_others() {
    for line in [
        "tr - _ <list | grep -q \"/$name\\.ko\" || fail",
        "first=$(sort list | head -n 1)",
        "a | b | grep -m1 x",
        "a | sed 5q",
    ] {
        assert!(ends_at_a_reader_that_leaves(line), "{line}");
    }
    for line in [
        "grep -q x list || fail",
        "a || grep -q x <<<\"$text\"",
        "# a | head",
        "a | grep -o x | sed -n 1p",
    ] {
        assert!(!ends_at_a_reader_that_leaves(line), "{line}");
    }
}
