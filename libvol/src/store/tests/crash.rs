//! Power cuts and device errors at any disk call, over random histories.
//!
//! Several clients, each with volumes of its own, work at the same time; the power goes at a random call, keeping, dropping
//! or tearing what was not synced; the store is opened again, and again cut, and so on. A client knows what it was told:
//! what was acknowledged must be there, what was not must be there wholly or not at all.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::disk::sim::{Call, Cut, Rng};
use crate::error::Kind;
use crate::runtime::spawn;

const CLIENTS: usize = 3;
const LIVES: usize = 6;

/// What a client knows of its present volume.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    Absent,
    Live {
        record: VolumeRecord,
        /// Logical extent to place and mark.
        extents: BTreeMap<u32, (PhysicalExtent, bool)>,
    },
    /// The destruction was acknowledged.
    Destroyed,
}

struct Client {
    slot: VolumeSlot,
    known: Known,
    /// What it becomes if the operation in flight takes effect.
    next: Option<Known>,
    /// Volumes destroyed before.
    graves: Vec<VolumeSlot>,
    /// A destruction that was begun, acknowledged or not.
    destroying: bool,
}

impl Client {
    fn new(rng: &mut Rng) -> Self {
        Self {
            slot: fresh_slot(rng),
            known: Known::Absent,
            next: None,
            graves: Vec::new(),
            destroying: false,
        }
    }
}

fn fresh_slot(rng: &mut Rng) -> VolumeSlot {
    let mut id = || {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&rng.next_u64().to_le_bytes());
        bytes[8..].copy_from_slice(&rng.next_u64().to_le_bytes());
        bytes
    };
    let mut slot = slots::tests::example(VolumeId::from_bytes(id()));
    slot.dataset = DatasetId::from_bytes(id());
    slot.keys[0].1.bytes = [id(), id(), id(), id()].concat();
    slot
}

type Clients = Rc<RefCell<Vec<Client>>>;

/// One client's work until the power goes or the store refuses.
async fn work(store: StoreHandle, clients: Clients, me: usize, mut rng: Rng) -> Result<()> {
    let io = attach(&store);
    loop {
        let known = clients.borrow()[me].known.clone();
        let slot = clients.borrow()[me].slot.clone();
        match known {
            Known::Absent => {
                let record = volume(slot.volume).1;
                let extents = BTreeMap::new();
                expect(
                    &clients,
                    me,
                    Known::Live {
                        record: record.clone(),
                        extents,
                    },
                );
                store.add_volume(slot, record).await?;
            }
            Known::Live { record, extents } => {
                live(&store, &io, &clients, me, &mut rng, record, extents).await?
            }
            Known::Destroyed => {
                store.scrubbed(slot.volume).await?;
                let mut clients = clients.borrow_mut();
                let client = &mut clients[me];
                client
                    .graves
                    .push(std::mem::replace(&mut client.slot, fresh_slot(&mut rng)));
                client.known = Known::Absent;
                client.destroying = false;
                continue;
            }
        }
        let mut clients = clients.borrow_mut();
        let client = &mut clients[me];
        if let Some(next) = client.next.take() {
            client.known = next;
        }
    }
}

fn expect(clients: &Clients, me: usize, next: Known) {
    clients.borrow_mut()[me].next = Some(next);
}

/// One step of a live volume.
async fn live(
    store: &StoreHandle,
    io: &StoreIo,
    clients: &Clients,
    me: usize,
    rng: &mut Rng,
    record: VolumeRecord,
    mut extents: BTreeMap<u32, (PhysicalExtent, bool)>,
) -> Result<()> {
    let slot = clients.borrow()[me].slot.clone();
    let some: Vec<u32> = extents.keys().copied().filter(|_| rng.one_in(2)).collect();
    let changes = match rng.below(10) {
        0..=2 => {
            let count = 1 + rng.below(6) as u32;
            let reserved = match store.reserve(count).await {
                Err(error) if error.kind() == Kind::NoSpace => return Ok(()),
                reserved => reserved?,
            };
            let mut logical = 0;
            let mut changes = Vec::new();
            for physical in reserved {
                while extents.contains_key(&logical) {
                    logical += 1;
                }
                extents.insert(logical, (physical, true));
                changes.push(Change::Allocate {
                    physical,
                    dataset: slot.dataset,
                    logical: ExtentIndex(logical),
                    key_version: KeyVersion(1),
                });
            }
            changes
        }
        3..=4 => {
            // Data and sums, flushed; only then is a mark cleared.
            let byte = 1 + rng.below(255) as u8;
            let dirty: Vec<_> = some.into_iter().filter(|logical| extents[logical].1).collect();
            for logical in &dirty {
                fill(io, extents[logical].0, slot.dataset, *logical, byte).await?;
            }
            let clear = |logical: &u32| {
                let extent = extents.get_mut(logical).expect("chosen among them");
                extent.1 = false;
                clear_mark(extent.0)
            };
            dirty.iter().map(clear).collect()
        }
        5..=6 => {
            let mark = |logical: &u32| {
                let extent = extents.get_mut(logical).expect("chosen among them");
                extent.1 = true;
                Change::Mark(extent.0)
            };
            some.iter().map(mark).collect()
        }
        7 => some
            .iter()
            .map(|logical| Change::Release(extents.remove(logical).expect("chosen among them").0))
            .collect(),
        8 => {
            let mut record = record;
            record.size_bytes += 4096;
            record.membership_epoch.0 += 1;
            expect(
                clients,
                me,
                Known::Live {
                    record: record.clone(),
                    extents,
                },
            );
            return store
                .commit(vec![
                    Change::SetSize {
                        volume: record.volume,
                        size_bytes: record.size_bytes,
                    },
                    Change::SetMembers {
                        volume: record.volume,
                        epoch: record.membership_epoch,
                        members: record.members,
                    },
                ])
                .await;
        }
        _ if rng.one_in(3) => {
            clients.borrow_mut()[me].destroying = true;
            expect(clients, me, Known::Destroyed);
            return store.destroy_volume(slot.volume).await;
        }
        _ => return Ok(()),
    };
    expect(clients, me, Known::Live { record, extents });
    store.commit(changes).await
}

/// What the store says about a client's volume.
async fn observed(store: &StoreHandle, slot: &VolumeSlot) -> Known {
    match store.volume(slot.volume).await.unwrap() {
        VolumeState::Unknown => Known::Absent,
        VolumeState::Tombstoned { .. } => Known::Destroyed,
        VolumeState::Live(record, found) => {
            assert_eq!(found, *slot, "the slot is as it was written");
            let extents = store.extents_of(slot.dataset).await.unwrap();
            let extents = extents.iter().map(|e| (e.logical.0, (e.physical, e.dirty)));
            Known::Live {
                record,
                extents: extents.collect(),
            }
        }
    }
}

/// Holds the reopened store to what the clients know, and lets them go on from there. Fails only when the store refuses
/// because of an injected error.
async fn verify(store: &StoreHandle, clients: &Clients) -> Result<()> {
    let mut owned = BTreeSet::new();
    for me in 0..CLIENTS {
        let (slot, known, next, destroying) = {
            let client = &clients.borrow()[me];
            (
                client.slot.clone(),
                client.known.clone(),
                client.next.clone(),
                client.destroying,
            )
        };
        let found = observed(store, &slot).await;
        assert!(
            found == known || Some(&found) == next.as_ref(),
            "client {me}: knows {known:?}, or {next:?}; finds {found:?}"
        );
        {
            // Settled: what was found is durable. (This very look may be cut short, and is then repeated.)
            let client = &mut clients.borrow_mut()[me];
            client.known = found.clone();
            client.next = None;
        }
        if let Known::Live { extents, .. } = &found {
            assert!(
                extents.values().all(|(physical, _)| owned.insert(*physical)),
                "two owners"
            );
        }
        if destroying {
            // Interrupted at any point, it is simply begun again; once begun and durable it cannot be undone.
            if found == Known::Destroyed {
                store.destroy_volume(slot.volume).await?;
            }
            clients.borrow_mut()[me].destroying = found == Known::Destroyed;
        }
        let graves = clients.borrow()[me].graves.clone();
        for grave in graves {
            assert_eq!(
                store.volume(grave.volume).await.unwrap(),
                VolumeState::Tombstoned {
                    extents_left: 0,
                    given_up: false
                }
            );
            let error = store
                .add_volume(grave.clone(), volume(grave.volume).1)
                .await
                .unwrap_err();
            if matches!(error.kind(), Kind::Io | Kind::Unavailable) {
                return Err(error);
            }
            assert_eq!(error.kind(), Kind::Refused, "a destroyed volume came back");
        }
    }
    Ok(())
}

/// No wrapped key of a destroyed volume is anywhere on the medium.
fn no_keys_of_the_dead(media: &Media, clients: &Clients) {
    let mut head = vec![0; 4 << 20];
    media.read(0, &mut head);
    for client in clients.borrow().iter() {
        let acknowledged = (client.known == Known::Destroyed).then_some(&client.slot);
        for dead in client.graves.iter().chain(acknowledged) {
            let key = &dead.keys[0].1.bytes[..];
            let found = head
                .chunks_exact(4)
                .position(|w| w == &key[..4])
                .filter(|p| head[p * 4..].starts_with(key));
            assert_eq!(found, None, "a wrapped key of a destroyed volume is left");
        }
    }
}

/// Reads the whole store offline: structure, sums of settled extents, zeros of free ones.
fn check_is_clean(media: Media) {
    let driver = SimDriver::new(9, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let report =
        runtime.block_on(async move { check(&file, Expect::default(), CheckScope::Full).await.unwrap() });
    assert!(report.is_clean(), "{:#?}", report.findings);
}

/// A slot to be erased, or a superblock copy.
fn may_not_be_written(finding: &str) -> bool {
    finding.contains("it cannot be erased") || finding.contains("superblock copy")
}

/// One history of several lives. Returns how many disk calls it took.
fn run_one(seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let clients: Clients = Rc::new(RefCell::new(
        (0..CLIENTS).map(|_| Client::new(&mut rng)).collect(),
    ));
    let mut media = formatted(rng.one_in(4));
    let mut calls = 0;
    for _ in 0..LIVES {
        let driver = SimDriver::new(rng.next_u64(), vec![media]);
        // Early cuts hit recovery itself.
        let limit = [40, 400, 2000][rng.below(3) as usize];
        driver.cut_after_calls(1 + rng.below(limit));
        let failed = Rc::new(Cell::new(false));
        if rng.one_in(4) {
            let (at, failed) = (Cell::new(1 + rng.below(limit)), failed.clone());
            driver.set_fault(Some(Box::new(move |_, call| {
                at.set(at.get().saturating_sub(1));
                let hit = at.get() == 0 && !matches!(call, Call::Read { .. });
                failed.set(failed.get() || hit);
                hit.then_some(5)
            })));
        }
        let runtime = Runtime::new(driver.clone());
        let (file, cut) = (driver.file(0), driver.clone());
        let (mine, life_seed) = (clients.clone(), rng.next_u64());
        runtime.block_on(async move {
            let life = spawn(async move {
                let Ok(store) = open_anew(&file, life_seed).await else {
                    // Only an injected error may keep a store from opening.
                    return;
                };
                // What the injected error has kept from being written is told of, and tried again at the next opening.
                let expected = |finding: &Finding| {
                    finding.severity == Severity::Note || (failed.get() && may_not_be_written(&finding.text))
                };
                assert!(store.findings().iter().all(expected), "{:?}", store.findings());
                if let Err(error) = verify(&store, &mine).await {
                    assert!(store.fault().is_some(), "{error:?} and no fault");
                    return;
                }
                let mut rng = Rng::new(life_seed);
                let tasks: Vec<_> = (0..CLIENTS)
                    .map(|me| spawn(work(store.clone(), mine.clone(), me, Rng::new(rng.next_u64()))))
                    .collect();
                for task in tasks {
                    let error = task.await.unwrap_err();
                    assert!(matches!(error.kind(), Kind::Io | Kind::Unavailable), "{error:?}");
                    // A failed data write stops its volume; of a slot, what was to be written there; a failed sync or other
                    // metadata write the whole store.
                    let message = error.message();
                    assert!(
                        store.fault().is_some()
                            || message.contains("extent")
                            || message.contains("volume slot"),
                        "{error:?} and no fault"
                    );
                }
            });
            let mut life = std::pin::pin!(life);
            let mut until_cut = std::pin::pin!(cut.until_cut());
            std::future::poll_fn(|cx| {
                let life = life.as_mut().poll(cx);
                let cut = until_cut.as_mut().poll(cx);
                if life.is_ready() || cut.is_ready() {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
        });
        drop(runtime);
        calls += driver.calls();
        let cut = Cut::random(&mut rng);
        media = driver.media_after_cut(cut).remove(0);
        no_keys_of_the_dead(&media, &clients);
        check_is_clean(media.clone());
    }
    // At last in peace.
    let ((), media) = with_store(rng.next_u64(), media, {
        let clients = clients.clone();
        async move |store| {
            verify(&store, &clients).await.unwrap();
            let pending: Vec<_> = clients
                .borrow()
                .iter()
                .filter(|c| c.destroying)
                .map(|c| c.slot.volume)
                .collect();
            for volume in pending {
                store.scrubbed(volume).await.unwrap();
            }
            store.close().await.unwrap();
        }
    });
    no_keys_of_the_dead(&media, &clients);
    check_is_clean(media);
    calls
}

#[test]
fn whatever_happens_when_the_power_goes_committed_changes_stay_and_others_are_all_or_nothing() {
    let seeds: u64 = std::env::var("VOLD_STORE_SEEDS").map_or(40, |n| n.parse().expect("a number"));
    let first: u64 = std::env::var("VOLD_STORE_FIRST_SEED").map_or(0, |n| n.parse().expect("a number"));
    for seed in first..first + seeds {
        let outcome = std::panic::catch_unwind(|| run_one(seed));
        if let Err(panic) = outcome {
            eprintln!("failing seed: {seed} (crash::run_one({seed}))");
            std::panic::resume_unwind(panic);
        }
    }
}
