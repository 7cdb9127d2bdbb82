//! Plans from made-up stores: every row of the table in [`super::volume`], and what a catalog is put together from.

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
    let slot = world
        .stores
        .iter()
        .find_map(|s| s.volumes.get(&world.volume)?.slot.clone());
    assert!(
        replicas.iter().map(|r| r.store).eq(slot.unwrap().stores),
        "every place of the slot is there: members and missed extents are told by place"
    );
    replicas
        .iter()
        .filter(|replica| replica.state != Member::Vacant)
        .map(|replica| format!("{}{}", store(replica), sign(replica)))
        .collect::<Vec<_>>()
        .join(" ")
}

use Member::{InSync as IN, Resyncing as RE, Stale as ST, Vacant as VA};

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
fn the_record_with_the_highest_epoch_is_believed() {
    type Set = (usize, u64, [Member; 3]);
    let table: &[(&str, &[Set], &str)] = &[
        (
            "b was dropped at epoch 2",
            &[(0, 2, [IN, ST, IN]), (2, 2, [IN, ST, IN])],
            "a+ b- c+",
        ),
        (
            "b catches up",
            &[(0, 3, [IN, RE, IN]), (1, 3, [IN, RE, IN]), (2, 3, [IN, RE, IN])],
            "a+ b- c+",
        ),
        (
            "the change to epoch 2 was cut, or c is an older copy of itself",
            &[(0, 2, [IN, ST, IN])],
            "a+ b- c-",
        ),
        (
            "a and b went on without each other",
            &[(0, 2, [IN, ST, IN]), (1, 2, [ST, IN, IN]), (2, 2, [IN, IN, IN])],
            "a- b- c+",
        ),
    ];
    for (why, sets, expected) in table {
        let mut world = World::new();
        for (store, epoch, members) in *sets {
            world.set(*store, *epoch, *members);
        }
        let plan = world.plan();
        assert_eq!(shape(&world, &plan), *expected, "{why}");
        let highest = sets.iter().map(|(_, epoch, _)| *epoch).max().unwrap();
        assert_eq!(
            plan.volumes[0].membership_epoch,
            Epoch(highest),
            "{why}: the epoch is kept"
        );
        assert_eq!((plan.losses.len(), plan.updates.len()), (0, 0), "{why}");
    }
}

#[test]
fn a_replica_on_a_missing_store_is_a_loss_and_the_stores_that_stay_are_told() {
    let mut world = World::new();
    let missing = world.stores.remove(0).info.id;
    let plan = world.plan();
    assert_eq!(plan.losses.len(), 1, "{:?}", plan.losses);
    assert!(
        plan.losses[0].contains(&missing.to_string()) && plan.losses[0].contains("acme/vol"),
        "{:?}",
        plan.losses
    );
    assert_eq!(shape(&world, &plan), "b+ c+");
    assert_eq!(plan.volumes[0].membership_epoch, Epoch(2));
    let told: Vec<StoreId> = plan.updates.iter().map(|(store, _)| *store).collect();
    assert_eq!(told, [world.id(0), world.id(1)]);
    for (_, record) in &plan.updates {
        assert_eq!(
            (record.membership_epoch, &record.members[..]),
            (Epoch(2), &[VA, IN, IN][..])
        );
    }
}

#[test]
fn a_stale_replica_on_a_missing_store_is_named_too_but_changes_no_epoch() {
    let mut world = World::new();
    for store in [0, 1] {
        world.set(store, 4, [IN, IN, ST]);
    }
    world.stores.truncate(2);
    let plan = world.plan();
    assert_eq!(plan.losses.len(), 1);
    assert_eq!(plan.volumes[0].membership_epoch, Epoch(4));
    assert_eq!(plan.updates, [], "all that stay know it already");
}

#[test]
fn a_missing_store_that_comes_back_to_a_later_rebuild_is_stale() {
    let mut world = World::new();
    let back = world.stores.remove(0);
    for (store, record) in world.plan().updates {
        let inspection = world.stores.iter_mut().find(|s| s.info.id == store).unwrap();
        let volume = record.volume;
        inspection.volumes.get_mut(&volume).unwrap().record = record;
    }
    world.stores.insert(0, back);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a- b+ c+");
    assert_eq!(plan.losses, [""; 0]);
}

#[test]
fn without_an_in_sync_replica_the_best_stale_one_is_taken_and_that_is_a_loss() {
    let mut world = World::new();
    // c alone was in sync, and is lost; b is the later one of the two that fell behind.
    world.set(0, 1, [IN, IN, IN]);
    world.set(1, 5, [ST, ST, IN]);
    world.stores.truncate(2);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a- b+");
    assert_eq!(plan.losses.len(), 2, "{:?}", plan.losses);
    assert!(
        plan.losses
            .iter()
            .any(|loss| loss.contains("no replica given is in sync") && loss.contains("\"b\"")),
        "{:?}",
        plan.losses
    );
    assert_eq!(plan.volumes[0].membership_epoch, Epoch(6));
    assert_eq!(plan.updates.len(), 1);
    assert_eq!(plan.updates[0].1.members, [ST, IN, VA]);

    // One that was being copied to is taken last.
    world.set(1, 5, [ST, RE, IN]);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ b-");
}

#[test]
fn a_replica_that_never_had_all_is_not_believed_whoever_else_is_missing() {
    // Put on c for a replica that was lost, and not filled yet: its record is of epoch 0.
    let mut world = World::new();
    for store in [0, 1] {
        world.set(store, 3, [IN, IN, ST]);
    }
    world.set(2, 0, [ST, ST, ST]);
    assert_eq!(shape(&world, &world.plan()), "a+ b+ c-");
    // b is stale, and older than what the missing a had; it once was whole.
    world.set(1, 1, [IN, ST, ST]);
    world.stores.remove(0);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "b+ c-");
    // c alone: zeros would be served for what it was not given yet.
    world.stores.remove(0);
    let plan = world.plan();
    assert!(plan.volumes.is_empty(), "{:?}", plan.volumes);
    assert!(
        plan.losses[0].contains("ever whole") && plan.losses[0].contains("left out"),
        "{:?}",
        plan.losses
    );
}

#[test]
fn a_vacant_place_is_no_loss_and_what_is_left_there_is_only_good_to_be_overwritten() {
    let mut world = World::new();
    for store in [0, 2] {
        world.set(store, 5, [IN, VA, IN]);
    }
    assert_eq!(
        shape(&world, &world.plan()),
        "a+ b- c+",
        "b still holds an older state"
    );
    world.take(1);
    for given in [3, 2] {
        let plan = world.plan();
        assert_eq!(shape(&world, &plan), "a+ c+");
        assert_eq!(
            (plan.losses.len(), plan.updates.len()),
            (0, 0),
            "{given} stores given"
        );
        assert_eq!(plan.volumes[0].membership_epoch, Epoch(5));
        if given == 3 {
            world.stores.remove(1);
        }
    }
}

#[test]
fn a_store_that_lost_the_volume_or_holds_another_one_is_a_loss() {
    let mut world = World::new();
    world.take(1);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ b- c+", "the daemon puts it there anew");
    assert!(plan.losses[0].contains("\"b\"") && plan.losses[0].contains("does not"));
    assert_eq!(plan.updates[0].1.members, [IN, ST, IN]);

    let mut world = World::new();
    world.take(1);
    let volume = world.volume;
    world.stores[1].unreadable_volumes.insert(volume);
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ c+");
    assert!(plan.losses[0].contains("\"b\"") && plan.losses[0].contains("damaged"));
    assert_eq!(plan.updates[0].1.members, [IN, VA, IN]);

    // Whatever the order of the stores, which is that of their random ids.
    for _ in 0..20 {
        let mut world = World::new();
        let foreign = DatasetId::random();
        world.on(2).dataset = foreign;
        world.on(2).slot.as_mut().unwrap().dataset = foreign;
        let plan = world.plan();
        assert_eq!(shape(&world, &plan), "a+ b+");
        assert!(plan.losses[0].contains("\"c\"") && plan.losses[0].contains("another volume"));

        // One against one: nobody can tell.
        world.take(1);
        let plan = world.plan();
        assert!(plan.volumes.is_empty());
        assert!(
            plan.losses[0].contains("contradict each other"),
            "{:?}",
            plan.losses
        );
    }
}

#[test]
fn a_store_that_cannot_tell_what_it_destroyed_may_have_destroyed_the_volume() {
    let mut world = World::new();
    world.take(2);
    world.stores[2].unreadable_tombstones = true;
    for store in [0, 1] {
        world.on(store).extents = 0;
    }
    let plan = world.plan();
    assert!(
        plan.losses[0].contains("may have been destroyed"),
        "{:?}",
        plan.losses
    );
}

#[test]
fn an_empty_volume_that_not_all_stores_have_was_never_made() {
    let mut world = World::new();
    world.take(1);
    world.take(2);
    world.on(0).extents = 0;
    let plan = world.plan();
    assert_eq!(plan.losses, [""; 0]);
    assert_eq!(plan.volumes[0].phase, Phase::Creating);
    assert_eq!(
        plan.volumes[0].replicas,
        [ReplicaRecord::in_sync(world.id(0))],
        "what is there is rolled back"
    );
    assert!(
        plan.notes.iter().any(|note| note.contains("rolls it back")),
        "{:?}",
        plan.notes
    );

    world.on(0).extents = 1;
    assert_eq!(
        world.plan().volumes[0].phase,
        Phase::Ready,
        "one that holds something was"
    );
}

#[test]
fn one_bad_slot_is_made_up_for_by_another_and_only_all_are_a_loss() {
    let mut world = World::new();
    world.on(0).slot = None;
    world.on(1).slot = None;
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ b+ c+");
    assert_eq!(plan.losses, [""; 0]);
    world.on(2).slot = None;
    let plan = world.plan();
    assert!(plan.volumes.is_empty() && plan.destroys.is_empty());
    assert!(
        plan.losses[0].contains(&world.volume.to_string()) && plan.losses[0].contains("left out"),
        "{:?}",
        plan.losses
    );
}

#[test]
fn a_volume_destroyed_on_one_store_is_destroyed_on_all() {
    let mut world = World::new();
    let other = world.add("acme", "other");
    let dead = world.take(0);
    let volume = world.volume;
    let remains = |finished| Remains {
        word: Word::Destroyed,
        dataset: dead.dataset,
        extents: 9,
        finished,
    };
    world.stores[0].tombstones.insert(volume, remains(true));
    let plan = world.plan();
    assert_eq!(plan.losses, [""; 0]);
    assert_eq!(plan.volumes.iter().map(|v| v.id).collect::<Vec<_>>(), [other]);
    assert_eq!(plan.tombstones.len(), 1);
    let destroy = &plan.destroys[0];
    assert_eq!(
        (destroy.volume, destroy.path.to_string()),
        (volume, "acme/vol".to_owned())
    );
    let done: Vec<_> = destroy
        .stores
        .iter()
        .map(|part| (part.store, part.done))
        .collect();
    assert!(done.contains(&(world.id(0), true)));
    assert!(done.contains(&(world.id(1), false)) && done.contains(&(world.id(2), false)));

    // Half done everywhere: the slots are overwritten, so its name is gone.
    for store in [1, 2] {
        world.take(store);
        world.stores[store].tombstones.insert(volume, remains(false));
    }
    let plan = world.plan();
    assert_eq!(plan.destroys[0].path.customer.as_str(), "unknown");
    assert_eq!(plan.destroys[0].stores.iter().filter(|part| part.done).count(), 1);

    // Done everywhere: only the tombstone stays.
    for store in [1, 2] {
        world.stores[store].tombstones.insert(volume, remains(true));
    }
    let plan = world.plan();
    assert!(plan.destroys.is_empty());
    assert_eq!(plan.tombstones.len(), 1);
}

#[test]
fn a_replica_that_was_given_up_is_no_destruction() {
    // b's replica has moved to c: its place is vacant, c's is new.
    let mut world = World::new();
    let volume = world.volume;
    let given_up = world.take(1);
    for store in [0, 2] {
        world.set(store, 7, [IN, VA, IN]);
        world.on(store).slot.as_mut().unwrap().stores[1] = StoreId::NIL;
    }
    let remains = |word| Remains {
        dataset: given_up.dataset,
        extents: 9,
        finished: true,
        word,
    };
    world.stores[1].tombstones.insert(volume, remains(Word::GivenUp));
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ c+");
    assert_eq!(plan.losses, [""; 0]);
    assert!(plan.tombstones.is_empty() && plan.destroys.is_empty());
    // The others are older copies, of before b left.
    for store in [0, 2] {
        world.set(store, 4, [IN, IN, IN]);
        world.on(store).slot.as_mut().unwrap().stores[1] = world.stores[1].info.id;
    }
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a+ c+");
    assert!(plan.losses[0].contains("gave it up"), "{:?}", plan.losses);
    // A tombstone that cannot be read may mean either: the operator's to accept.
    world.stores[1].tombstones.insert(volume, remains(Word::Unknown));
    let plan = world.plan();
    assert!(plan.losses[0].contains("tombstone"), "{:?}", plan.losses);
    assert!(plan.tombstones.is_empty());
    // With nobody left who has it, it was destroyed.
    world.take(0);
    world.take(2);
    assert_eq!(world.plan().tombstones.len(), 1);
}

#[test]
fn a_list_of_stores_that_was_being_changed_forgets_nobody() {
    // c takes a's place, which is vacant; only c's own slot says so yet. b's still names a.
    let mut world = World::new();
    let [a, b, c] = [0, 1, 2].map(|store| world.id(store));
    world.take(0);
    world.on(1).slot.as_mut().unwrap().stores = vec![a, b];
    world.on(2).slot.as_mut().unwrap().stores = vec![c, b];
    for store in [1, 2] {
        world.on(store).record.members = vec![IN, IN];
        world.on(store).record.membership_epoch = Epoch(9);
    }
    for _ in 0..2 {
        let plan = world.plan();
        let stores: Vec<StoreId> = plan.volumes[0].replicas.iter().map(|r| r.store).collect();
        assert_eq!(stores, [c, b]);
        assert_eq!(plan.losses, [""; 0]);
        // The same with a vacant place there.
        world.on(1).slot.as_mut().unwrap().stores = vec![StoreId::NIL, b];
    }
}

#[test]
fn a_store_that_may_still_hold_a_destroyed_volume_must_not_be_missing() {
    let mut world = World::new();
    let dead = world.take(0);
    let volume = world.volume;
    world.stores[0].tombstones.insert(
        volume,
        Remains {
            word: Word::Destroyed,
            dataset: dead.dataset,
            extents: 9,
            finished: true,
        },
    );
    let missing = world.stores.remove(2).info.id;
    let losses = world.plan().losses;
    assert_eq!(losses.len(), 1, "{losses:?}");
    assert!(losses[0].contains(&missing.to_string()), "{losses:?}");
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

mod old_catalog {
    use super::*;
    use libvol::catalog::{VmRecord, VolumeRecord};

    fn path(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("catalog.redb")
    }

    #[test]
    fn a_sound_one_is_never_replaced_and_an_absent_or_damaged_one_is() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!check_old(&path(&dir)).unwrap());
        drop(Catalog::create(&path(&dir), InstallationId::random()).unwrap());
        let error = check_old(&path(&dir)).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
        assert!(error.message().contains("mv "), "{error}");
        for garbage in [&b""[..], &[0x5a; 1 << 16], b"redb"] {
            std::fs::write(path(&dir), garbage).unwrap();
            assert!(check_old(&path(&dir)).unwrap(), "{} bytes", garbage.len());
        }
    }

    #[test]
    fn whatever_byte_of_it_is_wrong_it_is_sound_or_damaged_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::create(&path(&dir), InstallationId::random()).unwrap();
        let vm = |n: u32| VmRecord {
            id: libvol::ids::VmId::random(),
            name: format!("vm-{n}").parse().unwrap(),
            customer: CustomerId::random(),
            uid: n,
            created_unix_seconds: 1,
        };
        for n in 0..50 {
            catalog.write(|tx| tx.insert(&vm(n))).unwrap();
        }
        drop(catalog);
        let sound = std::fs::read(path(&dir)).unwrap();
        let mut damaged = 0;
        // Every byte of the header, and a sample of all others.
        for at in (0..512).chain((512..sound.len()).step_by(sound.len() / 200 + 1)) {
            let mut bytes = sound.clone();
            bytes[at] ^= 0xff;
            std::fs::write(path(&dir), &bytes).unwrap();
            match check_old(&path(&dir)) {
                Ok(true) => damaged += 1,
                Err(e) => assert!(matches!(e.kind(), Kind::Exists | Kind::Unsupported), "{at}: {e}"),
                Ok(false) => panic!("{at}: it is there"),
            }
        }
        assert!(damaged > 0);
        for len in [1, 4095, 4096, sound.len() / 2, sound.len() - 1] {
            std::fs::write(path(&dir), &sound[..len]).unwrap();
            assert!(check_old(&path(&dir)).unwrap(), "cut to {len}");
        }
    }

    #[test]
    fn the_damaged_one_is_kept_under_the_next_free_number() {
        let dir = tempfile::tempdir().unwrap();
        for round in ["first", "second"] {
            std::fs::write(path(&dir), round).unwrap();
            let new = dir.path().join("new");
            std::fs::write(&new, "new").unwrap();
            put_in_place(&new, &path(&dir), true).unwrap();
            assert_eq!(std::fs::read(path(&dir)).unwrap(), b"new");
        }
        for (n, round) in [(1, "first"), (2, "second")] {
            let kept = dir.path().join(format!("catalog.redb.damaged-{n}"));
            assert_eq!(std::fs::read(kept).unwrap(), round.as_bytes());
        }
    }

    #[test]
    fn a_plan_becomes_a_catalog_of_the_stores_installation_and_an_earlier_attempt_is_no_hindrance() {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let plan = world.plan();
        std::fs::write(path(&dir), "half a catalog").unwrap();
        write(&plan, &path(&dir)).unwrap();
        let catalog = Catalog::open(&path(&dir)).unwrap();
        assert_eq!(catalog.installation(), world.stores[0].info.installation);
        let volumes = catalog.read(|view| view.all::<VolumeRecord>()).unwrap();
        assert_eq!(volumes, plan.volumes);
    }
}
