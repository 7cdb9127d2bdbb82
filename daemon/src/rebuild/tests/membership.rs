//! Every row of the table in [`super::super::volume`], and what is dead.

use super::*;

use Member::{InSync as IN, Resyncing as RE, Stale as ST, Vacant as VA};

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
    assert_eq!(plan.volumes[0].replicas_wanted, 3, "one more is looked for");
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
fn a_store_that_nobody_names_any_more_is_taken_back_and_to_be_copied_to() {
    // a was given up in a rebuild; the daemon has then made its place vacant in the slots, too.
    let mut world = World::new();
    for store in [1, 2] {
        world.set(store, 3, [VA, IN, IN]);
        world.on(store).slot.as_mut().unwrap().stores[0] = StoreId::NIL;
    }
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "a- b+ c+");
    assert_eq!((plan.losses.len(), plan.updates.len()), (0, 0));
    assert_eq!(plan.volumes[0].replicas_wanted, 3);
    // Its place was given to d, which is not given: then it gets one more.
    for store in [1, 2] {
        world.set(store, 4, [IN, IN, IN]);
        world.on(store).slot.as_mut().unwrap().stores[0] = StoreId::random();
    }
    let plan = world.plan();
    assert_eq!(shape(&world, &plan), "b+ c+ a-");
    assert_eq!(plan.volumes[0].replicas[0].state, VA);
    assert_eq!(plan.losses.len(), 1, "{:?}", plan.losses);
    assert_eq!(plan.updates[0].1.members, [VA, IN, IN, ST]);
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
