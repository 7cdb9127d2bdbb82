//! `vold check`: looks at everything a stopped daemon left, changes nothing, and lists what is wrong.
//!
//! Catalog (a verified copy in memory), every store on its own, the replicas of every volume against each other, and the
//! catalog against the stores ([`cross`]); the audit log's chain. What an unclean stop leaves and the next start puts right
//! is a note, not damage. Status 0: clean; 1: damaged, or a store could not be looked at.
//!
//! With `--repair`: looked at, repaired ([`repair`]), and looked at again; what is gone was repaired, what is there is left.

mod cross;
mod repair;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use libvol::audit;
use libvol::catalog::{Catalog, Leaving, StoreRecord};
use libvol::disk::{DiskFile, EngineChoice, OpenMode, make_driver};
use libvol::ids::{PhysicalExtent, StoreId};
use libvol::limits::STORE_LOCK_WAIT;
use libvol::runtime::Runtime;
use libvol::store::{self, CheckReport, CheckScope, Expect, Finding, Severity};
use libvol::{Kind, Result};

use crate::data_dir::DataDir;
use cross::cross_check;

pub(crate) use cross::Known;

/// One store after its own check.
struct Checked {
    record: StoreRecord,
    file: DiskFile,
    report: CheckReport,
}

/// All that was found.
struct Examined {
    known: Known,
    findings: Vec<Finding>,
    /// Free extents that are not zero.
    unclean: BTreeMap<StoreId, Vec<PhysicalExtent>>,
}

/// Checks a data directory, repairs it if that is asked for, and prints what was found, done and left.
///
/// # Errors
/// `Busy` while a daemon runs, `NotFound`; `Damaged` when not even the catalog can be read.
pub(crate) fn run(dir: &Path, scope: CheckScope, repairs: bool) -> Result<ExitCode> {
    let dirs = DataDir::take_existing(dir)?;
    let catalog = Catalog::open_copy(&dirs.catalog())?;
    let installation = catalog.installation();
    let expect = move |record: &StoreRecord| Expect {
        installation: Some(installation),
        store: Some(record.id),
    };
    let mut found = examine(&catalog, expect, scope)?;
    // Nothing repairs it: what it says is somebody's to judge.
    let audited = examine_audit(&dirs.audit());
    found.findings.extend(audited.clone());
    if !repairs {
        return Ok(print(found.findings));
    }
    let before = damages(&found.findings);
    repair::repair(&dirs, found.known, expect, found.unclean)?;
    println!("checking again");
    // It may have latched a store.
    let catalog = Catalog::open_copy(&dirs.catalog())?;
    let mut left = examine(&catalog, expect, scope)?.findings;
    left.extend(audited);
    for gone in before.difference(&damages(&left)) {
        println!("repaired: {gone}");
    }
    Ok(print(left))
}

fn examine_audit(dir: &Path) -> Option<Finding> {
    if !dir.exists() {
        return Some(Finding::note("audit log: there is none"));
    }
    let broken = audit::verify(dir).err()?;
    Some(Finding::damage(format!("audit log: {broken}")))
}

fn damages(findings: &[Finding]) -> BTreeSet<String> {
    let damages = findings.iter().filter(|f| f.severity == Severity::Damage);
    damages.map(|finding| finding.text.clone()).collect()
}

fn runtime() -> Result<Runtime> {
    Ok(Runtime::new(make_driver(EngineChoice::Auto)?.0))
}

fn examine(
    catalog: &Catalog,
    expect: impl Fn(&StoreRecord) -> Expect + 'static,
    scope: CheckScope,
) -> Result<Examined> {
    let known = catalog.read(Known::load)?;
    runtime()?.block_on(async move {
        let mut findings = Vec::new();
        let mut checked = Vec::new();
        for record in &known.stores {
            if record.leaving == Some(Leaving::Lost) {
                findings.push(Finding::note(format!(
                    "store {:?}: given up as lost, not looked at",
                    record.name.as_str()
                )));
                continue;
            }
            match look_at(record, expect(record), scope).await {
                Ok(store) => checked.push(store),
                Err(e) => findings.push(Finding::damage(format!(
                    "store {:?}: cannot be checked: {e}",
                    record.name.as_str()
                ))),
            }
        }
        for store in &checked {
            let name = store.record.name.as_str();
            let named = store.report.findings.iter().map(|finding| Finding {
                severity: finding.severity,
                text: format!("store {name:?}: {}", finding.text),
            });
            findings.extend(named);
        }
        let reports: Vec<_> = checked.iter().map(|store| &store.report).collect();
        findings.extend(cross_check(&known, &reports));
        for store in &mut checked {
            known.overrule(&mut store.report);
        }
        let pairs: Vec<_> = checked.iter().map(|store| (&store.file, &store.report)).collect();
        findings.extend(store::compare_replicas(&pairs).await?);
        for store in &checked {
            println!(
                "store {:?}: {} volumes, {}",
                store.record.name.as_str(),
                store.report.volumes.len(),
                if store.report.is_clean() {
                    "clean"
                } else {
                    "DAMAGED"
                }
            );
        }
        let unclean = checked
            .into_iter()
            .map(|store| (store.record.id, store.report.unclean));
        Ok(Examined {
            findings,
            unclean: unclean.collect(),
            known,
        })
    })
}

async fn look_at(record: &StoreRecord, expect: Expect, scope: CheckScope) -> Result<Checked> {
    let file = DiskFile::open(
        &record.path,
        OpenMode::ReadOnly,
        record.allow_buffered,
        STORE_LOCK_WAIT,
    )
    .map_err(|e| match e.kind() {
        Kind::Busy => e.context("another process has it open"),
        _ => e,
    })?;
    let report = store::check(&file, expect, scope).await?;
    Ok(Checked {
        record: record.clone(),
        file,
        report,
    })
}

fn print(mut findings: Vec<Finding>) -> ExitCode {
    findings.sort_by_key(|finding| finding.severity == Severity::Note);
    let damaged = findings.iter().filter(|f| f.severity == Severity::Damage).count();
    for finding in &findings {
        let severity = match finding.severity {
            Severity::Damage => "damage",
            Severity::Note => "note",
        };
        println!("{severity}: {}", finding.text);
    }
    match damaged {
        0 => {
            println!("clean: no damage found");
            ExitCode::SUCCESS
        }
        n => {
            println!("DAMAGED: {n} finding{}", if n == 1 { "" } else { "s" });
            ExitCode::FAILURE
        }
    }
}
