//! Plans from made-up stores: what a catalog is put together from.

mod membership;
mod old_catalog;

use std::collections::{BTreeMap, BTreeSet};

use libvol::catalog::ReplicaRecord;
use libvol::disk::{Medium, MediumClass};
use libvol::ids::{
    CmkId, CustomerId, DatasetId, Epoch, Incarnation, InstallationId, KeyVersion, Name, StoreId, VolumeId,
};
use libvol::keys::{CmkInfo, WrappedKey};
use libvol::store::{Found, Inspection, LiveVolume, Remains, StoreInfo, VolumeRecord, VolumeSlot, Word};

use super::*;

const NOW: u64 = 1_700_000_000;

/// Stores `a`, `b` and `c` with a volume `acme/vol` on all three, in order.
struct World {
    stores: Vec<Inspection>,
    cmks: Vec<CmkInfo>,
    volume: VolumeId,
}

fn store(name: &str, installation: InstallationId) -> Inspection {
    Inspection {
        info: StoreInfo {
            id: StoreId::random(),
            name: name.parse().unwrap(),
            zone: format!("zone-{name}").parse().unwrap(),
            installation,
            path: format!("/stores/{name}").into(),
            extent_bytes: 4 << 20,
            extents: 100,
            medium: Medium {
                class: MediumClass::Unknown,
                reason: String::new(),
            },
        },
        found: Found {
            incarnation: Incarnation::NIL,
            sequence: 3,
            lsn: 7,
        },
        created_unix_seconds: 5,
        volumes: BTreeMap::new(),
        tombstones: BTreeMap::new(),
        unreadable_volumes: BTreeSet::new(),
        unreadable_tombstones: false,
        findings: Vec::new(),
    }
}

impl World {
    fn new() -> Self {
        let installation = InstallationId::random();
        let stores = ["a", "b", "c"].map(|name| store(name, installation)).into();
        let mut world = Self {
            stores,
            cmks: Vec::new(),
            volume: VolumeId::NIL,
        };
        world.volume = world.add("acme", "vol");
        world
    }

    /// A volume on all stores.
    fn add(&mut self, customer: &str, name: &str) -> VolumeId {
        let known = self.stores.iter().flat_map(|s| s.volumes.values());
        let known = known.filter_map(|v| v.slot.as_ref());
        let known = known
            .map(|slot| (slot.customer_name.clone(), slot.customer))
            .collect::<BTreeMap<Name, CustomerId>>();
        let customer_name: Name = customer.parse().unwrap();
        let customer = known
            .get(&customer_name)
            .copied()
            .unwrap_or_else(CustomerId::random);
        let cmk = match self.cmks.iter().find(|cmk| cmk.customer == customer) {
            Some(cmk) => cmk.id,
            None => {
                let cmk = CmkInfo {
                    id: CmkId::random(),
                    customer,
                    enabled: true,
                };
                self.cmks.push(cmk);
                cmk.id
            }
        };
        let volume = VolumeId::random();
        let slot = VolumeSlot {
            volume,
            customer,
            customer_name,
            volume_name: name.parse().unwrap(),
            dataset: DatasetId::random(),
            stores: self.stores.iter().map(|s| s.info.id).collect(),
            keys: vec![(KeyVersion(1), WrappedKey { cmk, bytes: vec![1] })],
        };
        let live = LiveVolume {
            record: VolumeRecord {
                volume,
                size_bytes: 1 << 30,
                membership_epoch: Epoch(1),
                members: vec![Member::InSync; self.stores.len()],
            },
            dataset: slot.dataset,
            slot: Some(slot),
            extents: 7,
        };
        for store in &mut self.stores {
            store.volumes.insert(volume, live.clone());
        }
        volume
    }

    fn on(&mut self, store: usize) -> &mut LiveVolume {
        let volume = self.volume;
        self.stores[store]
            .volumes
            .get_mut(&volume)
            .expect("it is on every store")
    }

    fn take(&mut self, store: usize) -> LiveVolume {
        let volume = self.volume;
        self.stores[store].volumes.remove(&volume).unwrap()
    }

    fn set(&mut self, store: usize, epoch: u64, members: [Member; 3]) {
        let record = &mut self.on(store).record;
        record.membership_epoch = Epoch(epoch);
        record.members = members.into();
    }

    fn try_plan(&self) -> Result<Plan> {
        let given: Vec<Given> = self
            .stores
            .iter()
            .map(|inspection| Given {
                inspection: inspection.clone(),
                buffered: false,
            })
            .collect();
        plan::plan(&given, &self.cmks, NOW)
    }

    fn plan(&self) -> Plan {
        self.try_plan().unwrap()
    }

    fn id(&self, store: usize) -> StoreId {
        self.stores[store].info.id
    }
}

/// Which replicas a plan keeps: `+` in sync, `-` stale with a full copy to come. Vacant places are left out.
fn shape(world: &World, plan: &Plan) -> String {
    let sign = |replica: &ReplicaRecord| match (replica.state, replica.full_copy) {
        (Member::InSync, false) => '+',
        (Member::Stale, true) => '-',
        other => panic!("{other:?}"),
    };
    let store = |replica: &ReplicaRecord| {
        let store = world.stores.iter().find(|s| s.info.id == replica.store);
        store.unwrap().info.name.clone()
    };
    let replicas = &plan.volumes[0].replicas;
    let named = world
        .stores
        .iter()
        .find_map(|s| Some(s.volumes.get(&world.volume)?.slot.as_ref()?.stores.len()));
    assert!(
        replicas.len() >= named.unwrap(),
        "every place of the slot is there: members and missed extents are told by place"
    );
    replicas
        .iter()
        .filter(|replica| replica.state != Member::Vacant)
        .map(|replica| format!("{}{}", store(replica), sign(replica)))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn everything_the_stores_know_is_in_the_plan_and_nothing_is_lost() {
    let mut world = World::new();
    world.add("globex", "db");
    world.on(1).record.size_bytes = 2 << 30;
    let plan = world.plan();
    assert_eq!(plan.losses, [""; 0]);
    assert_eq!(plan.updates, []);
    assert_eq!(plan.installation, Some(world.stores[0].info.installation));
    let stores: Vec<_> = plan
        .stores
        .iter()
        .map(|s| {
            (
                s.id,
                s.name.as_str(),
                s.zone.as_str(),
                s.path.to_str().unwrap(),
                s.extents,
                s.created_unix_seconds,
            )
        })
        .collect();
    assert_eq!(stores[1], (world.id(1), "b", "zone-b", "/stores/b", 100, 5));
    assert_eq!(stores.len(), 3);
    let customers: BTreeSet<&str> = plan.customers.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(customers, BTreeSet::from(["acme", "globex"]));
    for customer in &plan.customers {
        assert!(
            world
                .cmks
                .iter()
                .any(|cmk| cmk.id == customer.cmk && cmk.customer == customer.id)
        );
    }
    let volume = plan.volumes.iter().find(|v| v.id == world.volume).unwrap();
    assert_eq!(volume.path.to_string(), "acme/vol");
    assert_eq!(
        (volume.size_bytes, volume.membership_epoch, volume.phase),
        (2 << 30, Epoch(1), Phase::Ready),
        "the larger size: an interrupted resize"
    );
    assert_eq!(
        volume.attachment_epoch,
        Epoch(NOW),
        "higher than any session's of before"
    );
    let replicas: Vec<_> = world
        .stores
        .iter()
        .map(|s| ReplicaRecord::in_sync(s.info.id))
        .collect();
    assert_eq!(volume.replicas, replicas);
}

#[test]
fn a_key_that_the_keystore_does_not_have_is_a_loss_that_names_the_customer() {
    let mut world = World::new();
    world.cmks.clear();
    let plan = world.plan();
    assert_eq!(plan.losses.len(), 1, "{:?}", plan.losses);
    for word in ["acme/vol", "\"acme\"", "keystore", "backup"] {
        assert!(
            plan.losses[0].contains(word),
            "{word} is missing in {:?}",
            plan.losses
        );
    }
    assert_eq!(
        plan.volumes.len(),
        1,
        "accepted, it is there to be deleted, or for a keystore that is found again"
    );
}

#[test]
fn stores_that_do_not_belong_together_are_refused_by_path() {
    let mut world = World::new();
    world.stores.push(store("d", InstallationId::random()));
    let error = world.try_plan().unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert!(
        error.message().contains("/stores/d") && error.message().contains("/stores/a"),
        "{error}"
    );

    let mut world = World::new();
    let mut copy = world.stores[0].clone();
    copy.info.path = "/stores/copy".into();
    world.stores.push(copy);
    let error = world.try_plan().unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.message().contains("/stores/copy"), "{error}");

    let mut world = World::new();
    let twin = store("a", world.stores[0].info.installation);
    world.stores.push(twin);
    assert_eq!(world.try_plan().unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn two_volumes_of_one_name_or_two_customers_of_one_are_nobodys_to_decide() {
    let mut world = World::new();
    world.add("acme", "vol");
    let error = world.try_plan().unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.message().contains("acme/vol"), "{error}");

    let mut world = World::new();
    let other = world.add("globex", "db");
    for store in &mut world.stores {
        let slot = store.volumes.get_mut(&other).unwrap().slot.as_mut().unwrap();
        slot.customer_name = "acme".parse().unwrap();
    }
    let error = world.try_plan().unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.message().contains("acme"), "{error}");
}
