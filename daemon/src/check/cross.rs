//! The catalog against the stores, and against itself. Pure.

use std::collections::{BTreeMap, BTreeSet};

use libvol::Result;
use libvol::catalog::{
    AttachmentRecord, CustomerRecord, Phase, StoreRecord, Tombstone, View, VmRecord, VolumeRecord,
};
use libvol::ids::{CustomerId, StoreId, VmId, VolumeId};
use libvol::store::{CheckReport, Finding, Member, VolumeReport};

/// What the catalog says.
#[derive(Default)]
pub(super) struct Known {
    pub(super) stores: Vec<StoreRecord>,
    pub(super) customers: Vec<CustomerRecord>,
    pub(super) vms: Vec<VmRecord>,
    pub(super) volumes: Vec<VolumeRecord>,
    pub(super) attachments: Vec<AttachmentRecord>,
    pub(super) tombstones: Vec<Tombstone>,
}

impl Known {
    /// All of it.
    pub(super) fn load(view: &View<'_>) -> Result<Self> {
        Ok(Self {
            stores: view.all()?,
            customers: view.all()?,
            vms: view.all()?,
            volumes: view.all()?,
            attachments: view.all()?,
            tombstones: view.all()?,
        })
    }
}

/// Where they contradict each other. Stores without a report have been complained of already.
pub(super) fn cross_check(known: &Known, reports: &[&CheckReport]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for store in &known.stores {
        if let Some(fault) = &store.fault {
            findings.push(Finding::note(format!(
                "store {:?}: latched faulty: {}",
                store.name.as_str(),
                fault.reason
            )));
        }
    }
    let reports: BTreeMap<StoreId, &CheckReport> =
        reports.iter().map(|report| (report.store, *report)).collect();
    let customers: BTreeSet<CustomerId> = known.customers.iter().map(|c| c.id).collect();
    for volume in &known.volumes {
        if !customers.contains(&volume.customer) {
            findings.push(Finding::damage(format!(
                "volume {}: its customer is not in the catalog",
                volume.path
            )));
        }
        check_volume(volume, known, &reports, &mut findings);
    }
    check_unknown(known, &reports, &mut findings);
    check_attachments(known, &mut findings);
    findings
}

fn check_volume(
    volume: &VolumeRecord,
    known: &Known,
    reports: &BTreeMap<StoreId, &CheckReport>,
    findings: &mut Vec<Finding>,
) {
    let path = &volume.path;
    match volume.phase {
        Phase::Creating => {
            findings.push(Finding::note(format!(
                "volume {path}: its creation was interrupted; the next start rolls it back"
            )));
            return;
        }
        Phase::Destroying => {
            findings.push(Finding::note(format!(
                "volume {path}: its destruction is not finished; the next start goes on with it"
            )));
            return;
        }
        Phase::Ready => {}
    }
    for replica in &volume.replicas {
        let Some(report) = reports.get(&replica.store) else {
            if known.stores.iter().all(|store| store.id != replica.store) {
                findings.push(Finding::damage(format!(
                    "volume {path}: has a replica on store {}, which is not in the catalog",
                    replica.store
                )));
            }
            continue;
        };
        let store = report.name.as_str();
        let Some(here) = report.volumes.get(&volume.id) else {
            findings.push(Finding::damage(format!(
                "volume {path}: store {store:?} does not hold it"
            )));
            continue;
        };
        findings.extend(
            contradictions(volume, replica.state, here)
                .into_iter()
                .map(|what| Finding::damage(format!("volume {path}, store {store:?}: {what}"))),
        );
        if here.size_bytes != volume.size_bytes {
            findings.push(Finding::note(format!(
                "volume {path}: {} bytes in the catalog, {} on store {store:?}: a resize was interrupted; the next start finishes it",
                volume.size_bytes, here.size_bytes
            )));
        }
    }
}

/// What a store says of a volume and the catalog does not.
fn contradictions(volume: &VolumeRecord, state: Member, here: &VolumeReport) -> Vec<&'static str> {
    let mut what = Vec::new();
    if here.dataset != volume.dataset {
        what.push("its dataset is another than the catalog's");
    }
    if here.in_sync != (state == Member::InSync) {
        what.push("store and catalog disagree whether the replica is in sync");
    }
    if let Some(slot) = &here.slot {
        if slot.customer != volume.customer {
            what.push("its slot names another customer");
        }
        if !slot.stores.iter().eq(volume.replicas.iter().map(|r| &r.store)) {
            what.push("its slot names other stores");
        }
        if slot.keys.is_empty() {
            what.push("its slot holds no key");
        }
    }
    what
}

/// Volumes that are on stores and should not be.
fn check_unknown(known: &Known, reports: &BTreeMap<StoreId, &CheckReport>, findings: &mut Vec<Finding>) {
    let placed: BTreeSet<(VolumeId, StoreId)> = known
        .volumes
        .iter()
        .flat_map(|volume| volume.replicas.iter().map(|replica| (volume.id, replica.store)))
        .collect();
    let destroyed: BTreeSet<VolumeId> = known.tombstones.iter().map(|t| t.volume).collect();
    for (store, report) in reports {
        for id in report
            .volumes
            .keys()
            .filter(|id| !placed.contains(&(**id, *store)))
        {
            let name = report.name.as_str();
            findings.push(Finding::damage(if destroyed.contains(id) {
                format!("store {name:?}: volume {id} was destroyed and is there again")
            } else {
                format!("store {name:?}: volume {id} is not in the catalog")
            }));
        }
    }
}

fn check_attachments(known: &Known, findings: &mut Vec<Finding>) {
    let volumes: BTreeMap<VolumeId, &VolumeRecord> = known.volumes.iter().map(|v| (v.id, v)).collect();
    let vms: BTreeMap<VmId, &VmRecord> = known.vms.iter().map(|vm| (vm.id, vm)).collect();
    for attachment in &known.attachments {
        let what = match (volumes.get(&attachment.volume), vms.get(&attachment.vm)) {
            (Some(volume), Some(vm)) if volume.customer != vm.customer => "is of another customer's VM",
            (Some(volume), Some(_)) if volume.attachment_epoch != attachment.epoch => {
                "is not of the volume's epoch"
            }
            (Some(volume), Some(_)) if volume.phase != Phase::Ready => "is of a volume that is not in use",
            (Some(_), Some(_)) => continue,
            (None, _) => "is of a volume that is not in the catalog",
            (_, None) => "is of a VM that is not in the catalog",
        };
        findings.push(Finding::damage(format!("attachment {}: {what}", attachment.id)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::catalog::ReplicaRecord;
    use libvol::control::Protocol;
    use libvol::ids::{AttachmentId, CmkId, DatasetId, Epoch, KeyVersion};
    use libvol::keys::WrappedKey;
    use libvol::store::{Severity, VolumeSlot};

    /// One volume on two stores, attached, and everything in order.
    fn consistent() -> (Known, Vec<CheckReport>) {
        let customer = CustomerRecord {
            id: CustomerId::random(),
            name: "acme".parse().unwrap(),
            cmk: CmkId::random(),
            created_unix_seconds: 1,
        };
        let vm = VmRecord {
            id: VmId::random(),
            name: "web-1".parse().unwrap(),
            customer: customer.id,
            uid: 1,
            created_unix_seconds: 1,
        };
        let stores: Vec<StoreRecord> = ["a", "b"]
            .map(|name| StoreRecord {
                id: StoreId::random(),
                name: name.parse().unwrap(),
                path: format!("/{name}").into(),
                zone: name.parse().unwrap(),
                extent_bytes: 4 << 20,
                extents: 10,
                allow_buffered: false,
                fault: None,
                lineage: Default::default(),
                created_unix_seconds: 1,
            })
            .into();
        let volume = VolumeRecord {
            id: VolumeId::random(),
            path: "acme/web".parse().unwrap(),
            customer: customer.id,
            dataset: DatasetId::random(),
            size_bytes: 8192,
            replicas: stores
                .iter()
                .map(|store| ReplicaRecord::in_sync(store.id))
                .collect(),
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(3),
            phase: Phase::Ready,
            created_unix_seconds: 1,
        };
        let attachment = AttachmentRecord {
            id: AttachmentId::random(),
            volume: volume.id,
            vm: vm.id,
            customer: customer.id,
            epoch: Epoch(3),
            protocol: Protocol::Nbd,
            read_only: false,
        };
        let slot = VolumeSlot {
            volume: volume.id,
            customer: customer.id,
            customer_name: "acme".parse().unwrap(),
            volume_name: "web".parse().unwrap(),
            dataset: volume.dataset,
            stores: stores.iter().map(|store| store.id).collect(),
            keys: vec![(
                KeyVersion(1),
                WrappedKey {
                    cmk: customer.cmk,
                    bytes: vec![1],
                },
            )],
        };
        let reports = stores
            .iter()
            .map(|store| CheckReport {
                store: store.id,
                name: store.name.clone(),
                findings: Vec::new(),
                volumes: BTreeMap::from([(
                    volume.id,
                    VolumeReport {
                        dataset: volume.dataset,
                        size_bytes: 8192,
                        slot: Some(slot.clone()),
                        in_sync: true,
                        extents: BTreeMap::new(),
                        dirty: Vec::new(),
                    },
                )]),
            })
            .collect();
        let known = Known {
            stores,
            customers: vec![customer],
            vms: vec![vm],
            volumes: vec![volume],
            attachments: vec![attachment],
            tombstones: Vec::new(),
        };
        (known, reports)
    }

    fn findings(known: &Known, reports: &[CheckReport]) -> Vec<Finding> {
        cross_check(known, &reports.iter().collect::<Vec<_>>())
    }

    type Change = fn(&mut Known, &mut Vec<CheckReport>);

    fn here(reports: &mut [CheckReport]) -> &mut VolumeReport {
        reports[1].volumes.values_mut().next().unwrap()
    }

    #[test]
    fn a_consistent_catalog_gives_no_findings() {
        let (known, reports) = consistent();
        assert_eq!(findings(&known, &reports), []);
    }

    #[test]
    fn every_contradiction_is_one_line_of_damage() {
        let table: &[(&str, Change)] = &[
            ("does not hold it", |_, reports| reports[1].volumes.clear()),
            ("dataset", |_, reports| {
                here(reports).dataset = DatasetId::random()
            }),
            ("in sync", |_, reports| here(reports).in_sync = false),
            ("in sync", |known, _| {
                known.volumes[0].replicas[1].state = Member::Stale
            }),
            ("another customer", |_, reports| {
                here(reports).slot.as_mut().unwrap().customer = CustomerId::random();
            }),
            ("other stores", |_, reports| {
                here(reports).slot.as_mut().unwrap().stores.reverse()
            }),
            ("no key", |_, reports| {
                here(reports).slot.as_mut().unwrap().keys.clear()
            }),
            ("customer is not in the catalog", |known, _| {
                known.customers.clear()
            }),
            ("another customer's VM", |known, _| {
                known.vms[0].customer = CustomerId::random()
            }),
            ("VM that is not in the catalog", |known, _| known.vms.clear()),
            ("not of the volume's epoch", |known, _| {
                known.attachments[0].epoch = Epoch(2)
            }),
            ("which is not in the catalog", |known, reports| {
                reports.pop();
                known.stores.pop();
            }),
        ];
        for (text, change) in table {
            let (mut known, mut reports) = consistent();
            change(&mut known, &mut reports);
            let found = findings(&known, &reports);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert_eq!(found[0].severity, Severity::Damage, "{text}");
            assert!(found[0].text.contains(text), "{text}: {found:?}");
        }
    }

    #[test]
    fn a_volume_on_a_store_that_the_catalog_does_not_place_there_is_damage() {
        let (mut known, reports) = consistent();
        let gone = known.volumes.pop().unwrap();
        known.attachments.clear();
        let found = findings(&known, &reports);
        assert_eq!(found.len(), 2);
        assert!(
            found.iter().all(|f| f.text.contains("is not in the catalog")),
            "{found:?}"
        );
        known.tombstones.push(Tombstone {
            volume: gone.id,
            dataset: gone.dataset,
        });
        let found = findings(&known, &reports);
        assert!(
            found.iter().all(|f| f.text.contains("was destroyed")),
            "{found:?}"
        );
    }

    #[test]
    fn what_the_next_start_puts_right_is_a_note() {
        let table: &[(&str, Change)] = &[
            ("creation was interrupted", |known, reports| {
                known.attachments.clear();
                known.volumes[0].phase = Phase::Creating;
                reports[1].volumes.clear();
            }),
            ("destruction is not finished", |known, reports| {
                known.attachments.clear();
                known.volumes[0].phase = Phase::Destroying;
                reports[0].volumes.clear();
            }),
            ("a resize was interrupted", |_, reports| {
                here(reports).size_bytes = 16384
            }),
        ];
        for (text, change) in table {
            let (mut known, mut reports) = consistent();
            change(&mut known, &mut reports);
            let found = findings(&known, &reports);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert_eq!(found[0].severity, Severity::Note, "{text}");
            assert!(found[0].text.contains(text), "{text}: {found:?}");
        }
    }
}
