//! What the rebuilt catalog will hold, from what all stores say and which keys there are. Pure.
//!
//! A volume with a tombstone on any store given is dead on all of them. Where it is still live, or half destroyed, its
//! destruction is taken up again. What cannot be rebuilt whole is a *loss*: the operator has to accept it.

use std::collections::{BTreeMap, BTreeSet};

use libvol::catalog::{
    CustomerRecord, DestroyRecord, DestroyedStore, Phase, StoreRecord, Tombstone, VolumeRecord,
};
use libvol::ids::{CmkId, CustomerId, DatasetId, Epoch, InstallationId, Name, StoreId, VolumeId, VolumePath};
use libvol::keys::CmkInfo;
use libvol::limits::STORES_MAX;
use libvol::store::{self, Inspection, Lineage, Severity, VolumeSlot, Word};
use libvol::{Error, Result};

use super::volume::{Rebuilt, Stores, decide, label};

/// Volumes named one by one where a store is missing; the rest is only counted.
const VOLUMES_NAMED: usize = 8;

/// A store that was given.
pub(super) struct Given {
    /// What it says.
    pub(super) inspection: Inspection,
    /// Its file system does not take O_DIRECT.
    pub(super) buffered: bool,
}

/// The catalog to be.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) installation: Option<InstallationId>,
    pub(super) stores: Vec<StoreRecord>,
    pub(super) customers: Vec<CustomerRecord>,
    pub(super) volumes: Vec<VolumeRecord>,
    pub(super) destroys: Vec<DestroyRecord>,
    pub(super) tombstones: Vec<Tombstone>,
    /// What stores have to be told before the catalog is put in place.
    pub(super) updates: Vec<(StoreId, store::VolumeRecord)>,
    /// What the operator has to accept, a line each.
    pub(super) losses: Vec<String>,
    /// What the operator should know, a line each.
    pub(super) notes: Vec<String>,
}

/// Plans the catalog.
///
/// # Errors
/// `Invalid`, `Refused` for stores that do not belong together; `Damaged` where they contradict each other in a way that
/// nobody can decide.
pub(super) fn plan(given: &[Given], cmks: &[CmkInfo], now_unix_seconds: u64) -> Result<Plan> {
    let stores = together(given)?;
    let mut planner = Planner {
        stores: &stores,
        now: now_unix_seconds,
        plan: Plan {
            installation: given.first().map(|g| g.inspection.info.installation),
            ..Plan::default()
        },
        missing: BTreeMap::new(),
        slots: Vec::new(),
    };
    for store in given {
        planner.store(store);
    }
    let dead = dead(&stores);
    let live: BTreeSet<VolumeId> = stores.values().flat_map(|s| s.volumes.keys().copied()).collect();
    for id in live.iter().filter(|id| !dead.contains_key(id)) {
        planner.volume(*id);
    }
    planner.unique_paths()?;
    planner.customers(cmks)?;
    for (volume, dataset) in dead {
        planner.plan.tombstones.push(Tombstone { volume, dataset });
        planner.destroy(volume);
    }
    planner.missing_stores();
    Ok(planner.plan)
}

/// The stores by id, all of one installation, each once.
fn together(given: &[Given]) -> Result<Stores<'_>> {
    let mut stores = Stores::new();
    let mut names: BTreeMap<&Name, &Inspection> = BTreeMap::new();
    for store in given.iter().map(|g| &g.inspection) {
        let (info, path) = (&store.info, store.info.path.display());
        let first = &given[0].inspection.info;
        if info.installation != first.installation {
            return Err(Error::refused(format!(
                "{path} belongs to installation {}, and {} to {}; give the stores of one installation only",
                info.installation,
                first.path.display(),
                first.installation
            )));
        }
        if let Some(other) = stores.insert(info.id, store) {
            return Err(Error::invalid(format!(
                "{path} and {} are the same store {:?}, or one is a copy of the other; give the one that was last in use",
                other.info.path.display(),
                info.name.as_str()
            )));
        }
        if let Some(other) = names.insert(&info.name, store) {
            return Err(Error::invalid(format!(
                "{path} and {} are two stores named {:?}; leave out the one that had been removed from the installation",
                other.info.path.display(),
                info.name.as_str()
            )));
        }
    }
    if stores.len() > STORES_MAX {
        return Err(Error::invalid(format!(
            "{} stores; one daemon has at most {STORES_MAX}",
            stores.len()
        )));
    }
    Ok(stores)
}

/// The volumes that must not come back, by every store's tombstones, with their datasets. Where a tombstone cannot be read
/// that may as well say that only a replica was given up, it counts if nobody has the volume any more.
fn dead(stores: &Stores<'_>) -> BTreeMap<VolumeId, DatasetId> {
    let is_live = |id: &VolumeId| stores.values().any(|store| store.volumes.contains_key(id));
    let tombstones = stores.values().flat_map(|store| &store.tombstones);
    let tombstones = tombstones.filter(|(volume, remains)| match remains.word {
        Word::Destroyed => true,
        Word::GivenUp => false,
        Word::Unknown => !is_live(volume),
    });
    let mut dead: BTreeMap<VolumeId, DatasetId> = tombstones
        .map(|(volume, remains)| (*volume, remains.dataset))
        .collect();
    let datasets: BTreeSet<DatasetId> = dead.values().copied().collect();
    for (id, volume) in stores.values().flat_map(|store| &store.volumes) {
        if datasets.contains(&volume.dataset) {
            dead.insert(*id, volume.dataset);
        }
    }
    dead
}

struct Planner<'a> {
    stores: &'a Stores<'a>,
    now: u64,
    plan: Plan,
    /// Stores that slots name and that were not given, and whose replicas they hold.
    missing: BTreeMap<StoreId, BTreeSet<String>>,
    /// Slots of the volumes rebuilt.
    slots: Vec<VolumeSlot>,
}

impl Planner<'_> {
    fn store(&mut self, given: &Given) {
        let Given { inspection, buffered } = given;
        let info = &inspection.info;
        self.plan.stores.push(StoreRecord {
            id: info.id,
            name: info.name.clone(),
            path: info.path.clone(),
            zone: info.zone.clone(),
            extent_bytes: info.extent_bytes,
            extents: info.extents,
            allow_buffered: *buffered,
            fault: None,
            lineage: Lineage::of(&inspection.found),
            leaving: None,
            created_unix_seconds: inspection.created_unix_seconds,
        });
        let name = info.name.as_str();
        if *buffered {
            self.plan.notes.push(format!(
                "store {name:?}: its file system does not support O_DIRECT; recorded as if added with --allow-buffered"
            ));
        }
        let damage = |f: &&store::Finding| f.severity == Severity::Damage;
        for finding in inspection.findings.iter().filter(damage) {
            self.plan
                .notes
                .push(format!("store {name:?}: damage: {}", finding.text));
        }
    }

    fn volume(&mut self, id: VolumeId) {
        let rebuilt = match decide(id, self.stores) {
            Ok(rebuilt) => rebuilt,
            Err(loss) => return self.plan.losses.push(format!("{loss}; it is left out")),
        };
        let Rebuilt {
            slot,
            phase,
            size_bytes,
            epoch,
            replicas,
            wanted,
            missing,
            losses,
            notes,
            update,
        } = rebuilt;
        let label = label(&slot);
        for store in missing {
            self.missing.entry(store).or_default().insert(label.clone());
        }
        self.plan.losses.extend(losses);
        self.plan.notes.extend(notes);
        if phase == Phase::Creating {
            self.plan.notes.push(format!(
                "{label}: its creation had been interrupted (it is empty, and not on all of its stores); the next start rolls it back"
            ));
        }
        if let Some(record) = update {
            let told = replicas.iter().filter(|r| r.state == store::Member::InSync);
            self.plan
                .updates
                .extend(told.map(|replica| (replica.store, record.clone())));
        }
        self.plan.volumes.push(VolumeRecord {
            id,
            path: path_of(&slot),
            customer: slot.customer,
            dataset: slot.dataset,
            size_bytes,
            replicas,
            replicas_wanted: wanted,
            membership_epoch: epoch,
            // Higher than any there was: epochs rise by one with an attach or detach, and have risen for less than a
            // second each since 1970. No session of before can pass.
            attachment_epoch: Epoch(self.now),
            phase,
            created_unix_seconds: self.now,
        });
        self.slots.push(slot);
    }

    /// # Errors
    /// `Damaged` when two volumes have one name.
    fn unique_paths(&self) -> Result<()> {
        let mut seen: BTreeMap<String, &VolumeRecord> = BTreeMap::new();
        for volume in &self.plan.volumes {
            if let Some(other) = seen.insert(volume.path.to_string(), volume) {
                return Err(Error::damaged(format!(
                    "two volumes are named {}: {} on {}, {} on {}; one of these stores is an older copy: leave it out",
                    volume.path,
                    other.id,
                    self.stores_of(other),
                    volume.id,
                    self.stores_of(volume)
                )));
            }
        }
        Ok(())
    }

    fn stores_of(&self, volume: &VolumeRecord) -> String {
        let names = volume.replicas.iter().filter_map(|r| self.stores.get(&r.store));
        let names: Vec<String> = names.map(|s| format!("{:?}", s.info.name.as_str())).collect();
        format!(
            "store{} {}",
            if names.len() == 1 { "" } else { "s" },
            names.join(", ")
        )
    }

    /// Customers, by the volumes they have, and their keys.
    ///
    /// # Errors
    /// `Damaged` when volumes disagree on a customer's name, or two customers have one.
    fn customers(&mut self, cmks: &[CmkInfo]) -> Result<()> {
        let keystore: BTreeMap<CmkId, CustomerId> = cmks.iter().map(|cmk| (cmk.id, cmk.customer)).collect();
        let mut names: BTreeMap<CustomerId, &Name> = BTreeMap::new();
        let mut ids: BTreeMap<&Name, CustomerId> = BTreeMap::new();
        let mut wrapping: BTreeMap<CustomerId, BTreeMap<CmkId, usize>> = BTreeMap::new();
        for slot in &self.slots {
            let name = names.entry(slot.customer).or_insert(&slot.customer_name);
            let id = ids.entry(&slot.customer_name).or_insert(slot.customer);
            if *name != &slot.customer_name || *id != slot.customer {
                return Err(Error::damaged(format!(
                    "{}: its customer is {:?} ({}), and another volume has {:?} ({id}); one of their stores is an older \
                     copy: leave it out",
                    label(slot),
                    slot.customer_name.as_str(),
                    slot.customer,
                    name.as_str()
                )));
            }
            let newest = slot.keys.iter().max_by_key(|(version, _)| *version);
            let Some((_, key)) = newest else {
                self.plan.losses.push(format!(
                    "{}: its slot holds no key, so it cannot be opened",
                    label(slot)
                ));
                continue;
            };
            *wrapping
                .entry(slot.customer)
                .or_default()
                .entry(key.cmk)
                .or_default() += 1;
            match keystore.get(&key.cmk) {
                Some(customer) if *customer == slot.customer => {}
                Some(customer) => self.plan.losses.push(format!(
                    "{}: its key is wrapped by CMK {}, which is customer {customer}'s in the keystore, so it cannot be opened",
                    label(slot),
                    key.cmk
                )),
                None => self.plan.losses.push(format!(
                    "{}: its key is wrapped by CMK {} of customer {:?}, which is not in the keystore, so it cannot be opened; \
                     put DIR/keys back from a backup made after that customer was created",
                    label(slot),
                    key.cmk,
                    slot.customer_name.as_str()
                )),
            }
        }
        for (id, name) in &names {
            let used = wrapping.get(id).into_iter().flatten();
            let best = used.max_by_key(|(cmk, volumes)| (keystore.contains_key(cmk), **volumes));
            self.plan.customers.push(CustomerRecord {
                id: *id,
                name: (*name).clone(),
                cmk: best.map_or(CmkId::NIL, |(cmk, _)| *cmk),
                created_unix_seconds: self.now,
            });
        }
        let nameless: BTreeSet<CustomerId> = cmks
            .iter()
            .map(|cmk| cmk.customer)
            .filter(|customer| !names.contains_key(customer))
            .collect();
        if !nameless.is_empty() {
            self.plan.notes.push(format!(
                "{} customers in the keystore have no volume on these stores, and so no name any more; create them again",
                nameless.len()
            ));
        }
        Ok(())
    }

    /// Takes a destruction up again, unless it is finished on every store given.
    fn destroy(&mut self, id: VolumeId) {
        let mut parts = Vec::new();
        let mut slot = None;
        for (store, inspection) in self.stores {
            let (live, remains) = (inspection.volumes.get(&id), inspection.tombstones.get(&id));
            slot = slot.or(live.and_then(|volume| volume.slot.as_ref()));
            let extents = match (live, remains) {
                (Some(live), _) => live.extents,
                (None, Some(remains)) => remains.extents,
                (None, None) => continue,
            };
            parts.push(DestroyedStore {
                store: *store,
                extents,
                lost: false,
                done: live.is_none() && remains.is_some_and(|r| r.finished),
            });
        }
        if parts.iter().all(|part| part.done) {
            return;
        }
        for store in slot.iter().flat_map(|slot| &slot.stores) {
            if let Some(slot) = slot
                && !self.stores.contains_key(store)
                && *store != StoreId::NIL
            {
                let label = format!("{} (destroyed)", label(slot));
                self.missing.entry(*store).or_default().insert(label);
            }
        }
        self.plan.destroys.push(DestroyRecord {
            volume: id,
            path: slot.map_or_else(|| nameless(id), path_of),
            customer: slot.map_or(CustomerId::NIL, |slot| slot.customer),
            stores: parts,
            started_unix_seconds: self.now,
            finished_unix_seconds: None,
        });
    }

    fn missing_stores(&mut self) {
        for (store, volumes) in std::mem::take(&mut self.missing) {
            let named: Vec<&str> = volumes.iter().take(VOLUMES_NAMED).map(String::as_str).collect();
            let more = match volumes.len() - named.len() {
                0 => String::new(),
                more => format!(" and of {more} more"),
            };
            self.plan.losses.push(format!(
                "store {store} was not given; it has a replica of {}{more}, which is given up (and if a volume was destroyed \
                 there, only that store knows)",
                named.join(", ")
            ));
        }
    }
}

fn path_of(slot: &VolumeSlot) -> VolumePath {
    VolumePath {
        customer: slot.customer_name.clone(),
        name: slot.volume_name.clone(),
    }
}

/// What a half-destroyed volume is called whose slots are overwritten already.
fn nameless(id: VolumeId) -> VolumePath {
    format!("unknown/{}", id.0.simple())
        .parse()
        .expect("32 hexadecimal digits")
}
