//! One volume, from what the stores given say about it. Pure.
//!
//! The record with the highest membership epoch is believed. What becomes of the replica on each store that the slot names:
//!
//! | that store | its replica |
//! |---|---|
//! | holds it, its record has the highest epoch, and all records of that epoch call it in sync | in sync |
//! | holds it otherwise (was dropped, missed a change of membership, or is an older copy of itself) | stale: everything is compared |
//! | its place is vacant by the highest epoch, and it was not given, does not hold the volume or has given it up | vacant |
//! | was not given | given up (its place is vacant): a loss |
//! | does not hold it | stale, and put there anew: a loss |
//! | holds what cannot be used, or another volume under its id, or has given it up | given up: a loss |
//!
//! Why everything, where the others' extent records say which extents a stale replica missed: they say so of what it held
//! when it was dropped. That it held that much, and is no older copy of itself, only the lost catalog knew. A store that holds
//! the volume and is not named any more (its replica has moved, or was given up before) is taken back as stale, so that
//! deleting the volume reaches its keys there.
//!
//! A volume without an in-sync replica gets its best stale one: a loss. With a loss the membership epoch rises, and the
//! stores that stay are told before the catalog says so: what was given up must not pass for in sync when it turns up in a
//! later rebuild. A replica that was put on a store and never had all is never believed.
//!
//! One case is no loss: a volume of the first epoch that holds nothing, and that a store given never had, is a creation
//! that was interrupted; the next start rolls it back.

use std::collections::BTreeMap;

use libvol::catalog::{Phase, ReplicaRecord};
use libvol::ids::{CustomerId, DatasetId, Epoch, Name, StoreId, VolumeId};
use libvol::limits::{REPLICAS_MAX, VOLUME_PLACES_MAX};
use libvol::store::{self, Inspection, LiveVolume, Member, VolumeSlot, Word};

/// Membership epoch of every new volume.
const FIRST_EPOCH: Epoch = Epoch(1);
/// Of a replica that was put on a store for a volume which had others, until it is in sync for the first time.
const NEVER_FILLED: Epoch = Epoch(0);

/// The stores given, by id.
pub(super) type Stores<'a> = BTreeMap<StoreId, &'a Inspection>;

/// What the catalog will say of a volume.
#[derive(Debug)]
pub(super) struct Rebuilt {
    /// Whose, its name, its dataset and keys.
    pub(super) slot: VolumeSlot,
    /// In use, or to be rolled back.
    pub(super) phase: Phase,
    /// The largest that any store has: an interrupted resize is finished.
    pub(super) size_bytes: u64,
    /// Membership epoch.
    pub(super) epoch: Epoch,
    /// By place (of a volume to be rolled back: those that are there).
    pub(super) replicas: Vec<ReplicaRecord>,
    /// How many replicas it is to have: as many as it had, those that are given up and those taken back among them.
    pub(super) wanted: usize,
    /// Stores that its slot names and that were not given.
    pub(super) missing: Vec<StoreId>,
    /// What is given up besides, a line each.
    pub(super) losses: Vec<String>,
    /// What is worth knowing, a line each.
    pub(super) notes: Vec<String>,
    /// What the stores of in-sync replicas have to be told first.
    pub(super) update: Option<store::VolumeRecord>,
}

/// What the slot's stores turn out to have.
enum Place<'a> {
    Holds(&'a LiveVolume),
    Missing,
    Never,
    GivenUp,
    Unusable(&'static str),
}

/// Decides about a volume that at least one of the stores has.
///
/// # Errors
/// Why it cannot be rebuilt, as text.
pub(super) fn decide(id: VolumeId, stores: &Stores<'_>) -> Result<Rebuilt, String> {
    let here = || {
        stores
            .iter()
            .filter_map(|(store, s)| Some((*store, s.volumes.get(&id)?)))
    };
    let readable = here().filter_map(|(store, volume)| {
        Some(Readable {
            store,
            epoch: volume.record.membership_epoch,
            slot: volume.slot.as_ref()?,
        })
    });
    let readable: Vec<Readable<'_>> = readable.collect();
    let mut slot = reference(id, &readable)?;
    let label = label(&slot);
    let holders = here().filter(|(_, volume)| !contradicts(volume, &slot));
    let holders: Vec<(StoreId, &LiveVolume)> = holders.collect();
    let Some(highest) = holders.iter().map(|(_, v)| v.record.membership_epoch).max() else {
        return Err(format!("{label}: no store has it as its slot says"));
    };
    let newest = holders
        .iter()
        .filter(|(_, v)| v.record.membership_epoch == highest);
    let newest: Vec<&[Member]> = newest.map(|(_, v)| &v.record.members[..]).collect();
    let named = slot.stores.clone();
    let vacant = |i: usize| {
        let says_so = |members: &&[Member]| members.get(i) == Some(&Member::Vacant);
        named.get(i).is_none_or(|store| *store == StoreId::NIL) || newest.iter().any(says_so)
    };
    let wanted = (0..named.len()).filter(|i| !vacant(*i)).count();
    let wanted = wanted.max(holders.len()).clamp(1, REPLICAS_MAX);
    take_back(&mut slot.stores, &holders, vacant);
    let places: Vec<Place<'_>> = slot
        .stores
        .iter()
        .map(|s| look(id, &slot, stores.get(s)))
        .collect();
    let held = || places.iter().filter_map(Place::held);
    let size_bytes = held().map(|volume| volume.record.size_bytes).max().unwrap_or(0);

    let never_made = highest == FIRST_EPOCH
        && places.iter().any(|place| matches!(place, Place::Never))
        && places.iter().all(|place| !matches!(place, Place::Unusable(_)))
        && held().all(|volume| volume.extents == 0);
    if never_made {
        let there = holders.iter().map(|(store, _)| ReplicaRecord::in_sync(*store));
        return Ok(Rebuilt {
            phase: Phase::Creating,
            size_bytes,
            epoch: highest,
            replicas: there.collect(),
            slot,
            wanted,
            missing: Vec::new(),
            losses: Vec::new(),
            notes: Vec::new(),
            update: None,
        });
    }

    let believed = |i: usize| {
        let in_sync = |members: &&[Member]| members.get(i) == Some(&Member::InSync);
        !vacant(i) && newest.iter().all(in_sync)
    };
    let mut in_sync: Vec<bool> = places
        .iter()
        .enumerate()
        .map(|(i, place)| {
            let newest = |volume: &LiveVolume| volume.record.membership_epoch == highest;
            place.held().is_some_and(newest) && believed(i)
        })
        .collect();
    let mut losses = Vec::new();
    let mut missing = Vec::new();
    let mut given_up = false;
    for (i, (place, store)) in places.iter().zip(&slot.stores).enumerate() {
        let why = match place {
            Place::Holds(_) => continue,
            Place::Missing | Place::Never | Place::GivenUp if vacant(i) => continue,
            Place::Missing => {
                missing.push(*store);
                given_up |= believed(i);
                continue;
            }
            Place::Never => "it should hold a replica and does not; is it an older copy of that store?",
            Place::GivenUp => "it should hold a replica, and gave it up; is another store an older copy?",
            Place::Unusable(why) => why,
        };
        given_up |= believed(i);
        losses.push(format!("{label}: store {}: {why}", name(stores, *store)));
    }
    let mut notes = Vec::new();
    for (store, held) in here().filter(|(store, _)| !slot.stores.contains(store)) {
        let store = name(stores, store);
        match held.record.membership_epoch < highest {
            true => notes.push(format!(
                "{label}: store {store} has an older replica of it, whose place was given up; it is destroyed when vold runs"
            )),
            false => losses.push(format!(
                "{label}: store {store} holds it, and its slot does not name that store"
            )),
        }
    }
    if !in_sync.contains(&true) {
        let Some(best) = best_stale(&places) else {
            return Err(format!(
                "{label}: no replica given was ever whole (they were being filled from others, whose stores are missing)"
            ));
        };
        in_sync[best] = true;
        given_up = true;
        losses.push(format!(
            "{label}: no replica given is in sync (membership epoch {highest}); the best is the stale one on store {}: \
             writes that were acknowledged after it fell behind are lost",
            name(stores, slot.stores[best])
        ));
    }
    let epoch = if given_up { Epoch(highest.0 + 1) } else { highest };
    let states = places.iter().zip(&in_sync).enumerate();
    let states = states.map(|(i, (place, in_sync))| match place {
        _ if *in_sync => Member::InSync,
        Place::Holds(_) => Member::Stale,
        Place::Never if !vacant(i) => Member::Stale,
        Place::Never | Place::GivenUp | Place::Missing | Place::Unusable(_) => Member::Vacant,
    });
    let members: Vec<Member> = states.collect();
    let places = slot.stores.iter().zip(&members);
    let replicas = places.map(|(store, state)| match state {
        Member::InSync => ReplicaRecord::in_sync(*store),
        Member::Stale | Member::Resyncing => ReplicaRecord {
            store: *store,
            state: Member::Stale,
            full_copy: true,
            reason: Some("it was behind the others when the catalog was rebuilt".into()),
        },
        Member::Vacant => ReplicaRecord {
            store: StoreId::NIL,
            state: Member::Vacant,
            full_copy: false,
            reason: None,
        },
    });
    Ok(Rebuilt {
        phase: Phase::Ready,
        size_bytes,
        epoch,
        replicas: replicas.collect(),
        wanted,
        missing,
        losses,
        notes,
        update: given_up.then_some(store::VolumeRecord {
            volume: id,
            size_bytes,
            membership_epoch: epoch,
            members,
        }),
        slot,
    })
}

/// Stores that have the volume and are not named any more, or not yet, get a vacant place, or one more.
fn take_back(named: &mut Vec<StoreId>, holders: &[(StoreId, &LiveVolume)], vacant: impl Fn(usize) -> bool) {
    let holds = |store: StoreId| holders.iter().any(|(other, _)| *other == store);
    for (store, _) in holders {
        if named.contains(store) {
            continue;
        }
        match (0..named.len()).find(|i| vacant(*i) && !holds(named[*i])) {
            Some(place) => named[place] = *store,
            None if named.len() < VOLUME_PLACES_MAX => named.push(*store),
            None => {}
        }
    }
}

/// A store's slot of the volume.
struct Readable<'a> {
    store: StoreId,
    epoch: Epoch,
    slot: &'a VolumeSlot,
}

/// The slot to believe: of the highest epoch, what most stores say, with the stores that [`stores_by_place`] finds.
///
/// # Errors
/// When there is none, or two different ones are as good.
fn reference(id: VolumeId, readable: &[Readable<'_>]) -> Result<VolumeSlot, String> {
    let agreeing = |slot: &VolumeSlot| {
        let same = readable
            .iter()
            .filter(|other| identity(other.slot) == identity(slot));
        same.count()
    };
    let worth = |entry: &Readable<'_>| (entry.epoch, agreeing(entry.slot));
    let Some(best) = readable.iter().map(worth).max() else {
        return Err(format!(
            "volume {id}: both copies of its slot are bad on every store given, and with them its name and its keys are lost"
        ));
    };
    let good: Vec<&Readable<'_>> = readable.iter().filter(|entry| worth(entry) == best).collect();
    let first = good[0].slot;
    if good.iter().any(|entry| identity(entry.slot) != identity(first)) {
        return Err(format!(
            "volume {id}: stores contradict each other on whose it is, and nobody can tell which is right"
        ));
    }
    Ok(VolumeSlot {
        stores: stores_by_place(&good),
        ..first.clone()
    })
}

/// The list of stores was being changed when the slots differ in it, one slot after the other. The longest list counts, for
/// places are only added. At each place counts the store that names itself there, else any that is named: who is named and
/// not in sync costs a copy, who is in sync and not named would be forgotten.
fn stores_by_place(slots: &[&Readable<'_>]) -> Vec<StoreId> {
    let places = slots
        .iter()
        .map(|entry| entry.slot.stores.len())
        .max()
        .unwrap_or(0);
    let at_place = |i: usize| {
        let named = slots
            .iter()
            .filter_map(|entry| Some((entry.store, *entry.slot.stores.get(i)?)));
        let mut named = named.filter(|(_, store)| *store != StoreId::NIL);
        let itself = named.clone().find(|(own, store)| own == store);
        itself
            .or_else(|| named.next())
            .map_or(StoreId::NIL, |(_, store)| store)
    };
    (0..places).map(at_place).collect()
}

/// What never changes of a volume.
fn identity(slot: &VolumeSlot) -> (CustomerId, DatasetId, &Name, &Name) {
    let VolumeSlot {
        customer,
        dataset,
        customer_name,
        volume_name,
        ..
    } = slot;
    (*customer, *dataset, customer_name, volume_name)
}

impl<'a> Place<'a> {
    fn held(&self) -> Option<&'a LiveVolume> {
        match self {
            Place::Holds(volume) => Some(volume),
            _ => None,
        }
    }
}

fn look<'a>(id: VolumeId, slot: &VolumeSlot, store: Option<&&'a Inspection>) -> Place<'a> {
    let Some(store) = store else { return Place::Missing };
    match store.volumes.get(&id) {
        Some(volume) if contradicts(volume, slot) => {
            Place::Unusable("what it holds under this id is another volume's; is it another store's copy?")
        }
        Some(volume) => Place::Holds(volume),
        None if store.tombstones.contains_key(&id) => match store.tombstones[&id].word {
            Word::GivenUp => Place::GivenUp,
            Word::Unknown | Word::Destroyed => Place::Unusable(
                "the volume was destroyed there, or its replica given up, and the tombstone that tells which is damaged",
            ),
        },
        None if store.unreadable_volumes.contains(&id) => {
            Place::Unusable("the volume's record there is damaged, so nothing there can be used")
        }
        None if store.unreadable_tombstones => Place::Unusable(
            "it does not hold the volume, and its tombstones are damaged: the volume may have been destroyed",
        ),
        None => Place::Never,
    }
}

/// Whether a store's volume is not the slot's, in what never changes.
fn contradicts(volume: &LiveVolume, slot: &VolumeSlot) -> bool {
    let other = |own: &VolumeSlot| identity(own) != identity(slot);
    volume.dataset != slot.dataset || volume.slot.as_ref().is_some_and(other)
}

/// The newest of stale replicas that once were whole; a half-finished copy only when there is nothing else.
fn best_stale(places: &[Place<'_>]) -> Option<usize> {
    let held = places.iter().enumerate();
    let held = held.filter_map(|(i, place)| Some((i, place.held()?)));
    let worth = |i: usize, volume: &LiveVolume| {
        let whole = volume.record.members.get(i) != Some(&Member::Resyncing);
        (whole, volume.record.membership_epoch, volume.extents)
    };
    let once_whole = held.filter(|(_, volume)| volume.record.membership_epoch != NEVER_FILLED);
    // Of equals the first: the slot's order is the order of preference.
    once_whole
        .rev()
        .max_by_key(|(i, volume)| worth(*i, volume))
        .map(|(i, _)| i)
}

/// What people call a volume.
pub(super) fn label(slot: &VolumeSlot) -> String {
    format!("volume {}/{}", slot.customer_name, slot.volume_name)
}

fn name(stores: &Stores<'_>, id: StoreId) -> String {
    match stores.get(&id) {
        Some(store) => format!("{:?}", store.info.name.as_str()),
        None => id.to_string(),
    }
}
