//! The catalog against the stores, and against itself. Pure.

use std::collections::{BTreeMap, BTreeSet};

use libvol::Result;
use libvol::catalog::{
    AttachmentRecord, CustomerRecord, DestroyRecord, Phase, StoreRecord, Tombstone, View, VmRecord,
    VolumeRecord,
};
use libvol::ids::{CustomerId, StoreId, VmId, VolumeId};
use libvol::store::{CheckReport, Finding, Member, Verdict, VolumeReport, VolumeSlot};

/// What the catalog says.
#[derive(Default)]
pub(crate) struct Known {
    pub(crate) stores: Vec<StoreRecord>,
    pub(crate) customers: Vec<CustomerRecord>,
    pub(crate) vms: Vec<VmRecord>,
    pub(crate) volumes: Vec<VolumeRecord>,
    pub(crate) attachments: Vec<AttachmentRecord>,
    pub(crate) destroys: Vec<DestroyRecord>,
    pub(crate) tombstones: Vec<Tombstone>,
}

impl Known {
    /// All of it.
    pub(crate) fn load(view: &View<'_>) -> Result<Self> {
        Ok(Self {
            stores: view.all()?,
            customers: view.all()?,
            vms: view.all()?,
            volumes: view.all()?,
            attachments: view.all()?,
            destroys: view.all()?,
            tombstones: view.all()?,
        })
    }

    /// A replica that the catalog calls out of sync is not held to the others, whatever its store believes.
    pub(super) fn overrule(&self, report: &mut CheckReport) {
        for volume in &self.volumes {
            if let Some(here) = report.volumes.get_mut(&volume.id) {
                here.in_sync &= volume.is_in_sync_on(report.store);
            }
        }
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
    check_lineage(known, reports, &mut findings);
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

/// Stores that are not what the catalog remembers.
fn check_lineage(known: &Known, reports: &[&CheckReport], findings: &mut Vec<Finding>) {
    for report in reports {
        let record = known.stores.iter().find(|store| store.id == report.store);
        let name = report.name.as_str();
        match record.map(|record| record.lineage.judge(&report.found)) {
            None | Some(Verdict::Continues) => {}
            Some(Verdict::OldCopy(why)) => findings.push(Finding::damage(format!(
                "store {name:?}: is an old copy: {why}; at the next start its replicas are stale"
            ))),
            Some(Verdict::Ahead(why)) => findings.push(Finding::damage(format!(
                "store {name:?}: was opened after this catalog was written ({why}): the catalog is an old copy"
            ))),
        }
    }
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
    for (_, replica) in volume.held() {
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
            let text = format!("volume {path}: store {store:?} does not hold it");
            findings.push(match replica.state {
                Member::InSync => Finding::damage(text),
                Member::Stale | Member::Resyncing | Member::Vacant => Finding::note(text),
            });
            continue;
        };
        // Unless it claims more, which is damage (below).
        let knows_better = here.in_sync && here.membership_epoch >= volume.membership_epoch;
        if replica.state != Member::InSync && !knows_better {
            findings.push(Finding::note(format!(
                "volume {path}: its replica on store {store:?} is out of sync; it catches up when vold runs"
            )));
        }
        let contradictions = contradictions(volume, replica.state, here);
        let other_stores = |slot: &VolumeSlot| slot.stores != volume.stores();
        let moved = here.slot.as_ref().is_some_and(other_stores) && !contradictions.contains(&OTHER_STORES);
        let damage = |what: &str| Finding::damage(format!("volume {path}, store {store:?}: {what}"));
        findings.extend(contradictions.into_iter().map(damage));
        if moved {
            findings.push(Finding::note(format!(
                "volume {path}: its slot on store {store:?} names other stores than the catalog: a replica that moved was interrupted; the volume's next opening writes it anew"
            )));
        }
        if here.size_bytes != volume.size_bytes {
            findings.push(Finding::note(format!(
                "volume {path}: {} bytes in the catalog, {} on store {store:?}: a resize was interrupted; the next start finishes it",
                volume.size_bytes, here.size_bytes
            )));
        }
    }
}

const OTHER_STORES: &str = "its slot names other stores";

/// What a store says of a volume and the catalog does not.
fn contradictions(volume: &VolumeRecord, state: Member, here: &VolumeReport) -> Vec<&'static str> {
    let mut what = Vec::new();
    if here.dataset != volume.dataset {
        what.push("its dataset is another than the catalog's");
    }
    // A replica that was out when the membership changed does not know of it.
    if here.membership_epoch >= volume.membership_epoch && here.in_sync != (state == Member::InSync) {
        what.push("store and catalog disagree whether the replica is in sync");
    }
    if let Some(slot) = &here.slot {
        if slot.customer != volume.customer {
            what.push("its slot names another customer");
        }
        // A store never has another place than it had.
        let mut named = slot.stores.iter().enumerate();
        if named.any(|(place, store)| volume.replica_on(*store).is_some_and(|own| own != place)) {
            what.push(OTHER_STORES);
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
        .flat_map(|volume| volume.held().map(|(_, replica)| (volume.id, replica.store)))
        .collect();
    let being_destroyed: BTreeSet<(VolumeId, StoreId)> = known
        .destroys
        .iter()
        .flat_map(|job| job.stores.iter().map(|part| (job.volume, part)))
        .filter(|(_, part)| !part.done)
        .map(|(volume, part)| (volume, part.store))
        .collect();
    let destroyed: BTreeSet<VolumeId> = known.tombstones.iter().map(|t| t.volume).collect();
    for (store, report) in reports {
        for id in report
            .volumes
            .keys()
            .filter(|id| !placed.contains(&(**id, *store)))
        {
            let name = report.name.as_str();
            let older = |volume: &VolumeRecord| {
                volume.id == *id && report.volumes[id].membership_epoch < volume.membership_epoch
            };
            let has_moved = known.volumes.iter().any(older);
            findings.push(if being_destroyed.contains(&(*id, *store)) {
                Finding::note(format!(
                    "store {name:?}: the destruction of volume {id} is not finished; the next start goes on with it"
                ))
            } else if has_moved {
                Finding::note(format!(
                    "store {name:?}: the replica of volume {id} has moved; what is left of it here is destroyed when vold runs"
                ))
            } else if destroyed.contains(id) {
                Finding::damage(format!(
                    "store {name:?}: volume {id} was destroyed and is there again"
                ))
            } else {
                Finding::damage(format!("store {name:?}: volume {id} is not in the catalog"))
            });
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
    use libvol::catalog::{DestroyedStore, ReplicaRecord};
    use libvol::control::Protocol;
    use libvol::ids::{AttachmentId, CmkId, DatasetId, Epoch, Incarnation, KeyVersion};
    use libvol::keys::WrappedKey;
    use libvol::store::{Found, Lineage, Severity, VolumeSlot};

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
                leaving: None,
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
            replicas_wanted: stores.len(),
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
            successor: None,
            moved: false,
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
                found: Found {
                    incarnation: Incarnation::NIL,
                    sequence: 3,
                    lsn: 7,
                },
                findings: Vec::new(),
                unclean: Vec::new(),
                volumes: BTreeMap::from([(
                    volume.id,
                    VolumeReport {
                        dataset: volume.dataset,
                        size_bytes: 8192,
                        slot: Some(slot.clone()),
                        in_sync: true,
                        membership_epoch: Epoch(1),
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
            destroys: Vec::new(),
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
            ("\"b\": is an old copy", |known, reports| {
                known.stores[1].lineage = Lineage::of(&reports[1].found);
                reports[1].found.lsn -= 1;
            }),
            ("the catalog is an old copy", |known, reports| {
                known.stores[1].lineage = Lineage::of(&reports[1].found);
                reports[1].found.incarnation = Incarnation::random();
                reports[1].found.sequence += 1;
            }),
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
    fn a_vacant_place_is_no_replica_and_what_is_there_is_a_note_only_if_it_is_of_before() {
        for replica in [0, 1] {
            let (mut known, mut reports) = consistent();
            let place = &mut known.volumes[0].replicas[replica];
            (place.state, place.store) = (Member::Vacant, StoreId::NIL);
            let named = |findings: &[Finding]| {
                let texts = findings.iter().map(|finding| finding.text.clone());
                texts
                    .filter(|text| !text.contains("names other stores"))
                    .collect::<Vec<_>>()
            };
            let found = named(&findings(&known, &reports));
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains("is not in the catalog"), "{found:?}");
            // The membership has risen since.
            known.volumes[0].membership_epoch = Epoch(2);
            for report in &mut reports {
                let here = report.volumes.values_mut().next().unwrap();
                here.slot.as_mut().unwrap().stores = known.volumes[0].stores();
            }
            let other = &mut reports[1 - replica];
            other.volumes.values_mut().next().unwrap().membership_epoch = Epoch(2);
            let found = findings(&known, &reports);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].severity == Severity::Note && found[0].text.contains("has moved"),
                "{found:?}"
            );
            reports.remove(replica);
            known.stores.remove(replica);
            assert_eq!(findings(&known, &reports), []);
        }
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
            ("names other stores", |_, reports| {
                here(reports)
                    .slot
                    .as_mut()
                    .unwrap()
                    .stores
                    .push(StoreId::random());
            }),
            ("is out of sync", |known, _| {
                known.volumes[0].replicas[1].state = Member::Stale;
                known.volumes[0].membership_epoch = Epoch(2);
            }),
            ("destruction of volume", |known, reports| {
                known.attachments.clear();
                let volume = known.volumes.remove(0);
                let part = |store: &StoreRecord, done| DestroyedStore {
                    lost: false,
                    store: store.id,
                    extents: 0,
                    done,
                };
                known.destroys.push(DestroyRecord {
                    volume: volume.id,
                    path: volume.path,
                    customer: volume.customer,
                    stores: vec![part(&known.stores[0], true), part(&known.stores[1], false)],
                    started_unix_seconds: 1,
                    finished_unix_seconds: None,
                });
                known.tombstones.push(Tombstone {
                    volume: volume.id,
                    dataset: volume.dataset,
                });
                reports[0].volumes.clear();
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
