//! What enters the build: every dependency comes from crates.io, under a licence that deny.toml allows.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;
use vold_tests::tools::succeed;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[test]
fn every_dependency_is_of_crates_io_and_under_an_allowed_licence() {
    let text = std::fs::read_to_string(format!("{ROOT}/deny.toml")).unwrap();
    let deny: toml::Table = text.parse().unwrap();
    let allowed: BTreeSet<&str> = deny["licenses"]["allow"]
        .as_array()
        .unwrap()
        .iter()
        .map(|licence| licence.as_str().unwrap())
        .collect();
    // What the build on this platform takes; crates of others need not even have been fetched.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = succeed(
        Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
            .current_dir(ROOT)
            .args(["metadata", "--format-version=1", "--locked", "--filter-platform"])
            .arg(platform),
    );
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "{} packages are few", packages.len());
    for package in packages {
        let name = format!("{} {}", package["name"], package["version"]);
        match package["source"].as_str() {
            // A member of this workspace.
            None => continue,
            Some(source) => assert_eq!(
                source, "registry+https://github.com/rust-lang/crates.io-index",
                "{name}"
            ),
        }
        let licence = package["license"]
            .as_str()
            .unwrap_or_else(|| panic!("{name} names no licence"));
        assert!(
            permits(licence, &allowed),
            "{name} is under {licence:?}; deny.toml does not allow that"
        );
    }
}

/// Whether an SPDX expression can be met with these licences. (A slash is the old way to write OR.)
fn permits(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let permitted = either(&mut words, allowed);
    assert!(words.next().is_none(), "{expression:?} is no SPDX expression");
    permitted
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn either(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut permitted = both(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        permitted |= both(words, allowed);
    }
    permitted
}

fn both(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let mut permitted = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        permitted &= one(words, allowed);
    }
    permitted
}

fn one(words: &mut Words<'_>, allowed: &BTreeSet<&str>) -> bool {
    let word = words.next().expect("a licence");
    if word == "(" {
        let permitted = either(words, allowed);
        assert_eq!(words.next(), Some(")"));
        return permitted;
    }
    match words.next_if_eq(&"WITH") {
        Some(_) => {
            let exception = words.next().expect("an exception");
            allowed.contains(format!("{word} WITH {exception}").as_str())
        }
        None => allowed.contains(word),
    }
}

#[test]
fn licence_expressions_are_read_with_their_precedence() {
    let allowed = BTreeSet::from(["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]);
    for (expression, permitted) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT/Apache-2.0", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 OR MIT AND ISC", true),
        ("MIT AND (GPL-3.0 OR ISC)", true),
        ("(MIT OR ISC) AND GPL-3.0", false),
        ("Apache-2.0", false),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
    ] {
        assert_eq!(permits(expression, &allowed), permitted, "{expression}");
    }
}
