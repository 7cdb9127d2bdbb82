//! Old copies of a store are told from the store, whatever the power does while it is opened.

use std::cell::{Cell, RefCell};

use super::*;
use crate::disk::sim::{Call, Cut, Rng};
use crate::error::{Error, Kind};
use crate::runtime::spawn;
use crate::store::layout::SUPERBLOCK_B_AT;

/// What the catalog remembers. A change of it is durable at once, and happens between two disk calls: a cut at the next of
/// them is a cut right after it.
type Memory = Rc<RefCell<Lineage>>;

/// Opens a store that must not be taken for an old copy.
async fn open_remembered(file: &DiskFile, memory: &Memory, seed: u64) -> Result<StoreHandle> {
    let opening = begin_open(file, Expect::default()).await?;
    let found = opening.found();
    let verdict = memory.borrow().judge(&found);
    assert_eq!(verdict, Verdict::Continues, "{found:?}, {:?}", memory.borrow());
    let renewal = memory.borrow_mut().begin(&found, incarnation(seed));
    let store = opening.finish(Some(renewal)).await?;
    memory
        .borrow_mut()
        .confirm(store.incarnation(), store.committed_lsn());
    Ok(store)
}

/// What this medium would be taken for.
fn judged(media: &Media, memory: &Memory) -> Verdict {
    let driver = SimDriver::new(5, vec![media.clone()]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let found = runtime.block_on(async move { begin_open(&file, Expect::default()).await.unwrap().found() });
    memory.borrow().judge(&found)
}

/// Runs `work` until it ends or the power goes; whether it ended.
fn until_cut(driver: &Rc<SimDriver>, work: impl Future<Output = ()> + 'static) -> bool {
    let runtime = Runtime::new(driver.clone());
    let cut = driver.clone();
    runtime.block_on(async move {
        let mut work = std::pin::pin!(spawn(work));
        let mut until_cut = std::pin::pin!(cut.until_cut());
        std::future::poll_fn(|cx| {
            if work.as_mut().poll(cx).is_ready() {
                return std::task::Poll::Ready(true);
            }
            until_cut.as_mut().poll(cx).map(|()| false)
        })
        .await
    })
}

#[test]
fn a_power_cut_at_any_call_of_an_opening_leaves_no_old_copy() {
    for cut in [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors] {
        // Each opening is cut one call later than the one before, on what that one left; the last one ends.
        let memory = Memory::default();
        let mut media = formatted(true);
        let mut ended = false;
        for call in 1.. {
            let driver = SimDriver::new(call, vec![media]);
            driver.cut_after_calls(call);
            let (file, mine) = (driver.file(0), memory.clone());
            ended = until_cut(&driver, async move {
                open_remembered(&file, &mine, call).await.unwrap();
            });
            media = driver.media_after_cut(cut).remove(0);
            assert_eq!(
                judged(&media, &memory),
                Verdict::Continues,
                "{cut:?}, call {call}"
            );
            if ended {
                break;
            }
        }
        assert!(ended);
    }
}

/// A history of several lives, cut at any call; copies are taken on the way. Gives the number of copies.
fn run_one(seed: u64) -> usize {
    let mut rng = Rng::new(seed);
    let memory = Memory::default();
    let mut media = formatted(true);
    // Copies that are older than what the catalog knows.
    let old = Rc::new(RefCell::new(Vec::<Media>::new()));
    for _ in 0..8 {
        let before = media.clone();
        let driver = SimDriver::new(rng.next_u64(), vec![media]);
        let limit = [30, 300][rng.below(2) as usize];
        driver.cut_after_calls(1 + rng.below(limit));
        let (file, disks, mine, copies) = (driver.file(0), driver.clone(), memory.clone(), old.clone());
        let mut chance = Rng::new(rng.next_u64());
        until_cut(&driver, async move {
            let store = open_remembered(&file, &mine, chance.next_u64()).await.unwrap();
            copies.borrow_mut().push(before);
            let dataset = DatasetId::from_bytes(u128::from(chance.next_u64()).to_be_bytes());
            for logical in 1000.. {
                let copy = disks.media().remove(0);
                // Writes in place commit nothing; the daemon's watch then asks for a beat.
                match chance.one_in(2) && store.space().free > 0 {
                    true => drop(allocate(&store, dataset, logical, 1).await.unwrap()),
                    false => store.beat().await.unwrap(),
                }
                if chance.one_in(2)
                    && mine
                        .borrow_mut()
                        .raise(store.incarnation(), store.committed_lsn())
                {
                    copies.borrow_mut().push(copy);
                }
                if chance.one_in(20) {
                    store.close().await.unwrap();
                    mine.borrow_mut()
                        .raise(store.incarnation(), store.committed_lsn());
                    return;
                }
            }
        });
        let cut = Cut::random(&mut rng);
        media = driver.media_after_cut(cut).remove(0);
        assert_eq!(judged(&media, &memory), Verdict::Continues);
    }
    for copy in old.borrow().iter() {
        let verdict = judged(copy, &memory);
        assert!(matches!(verdict, Verdict::OldCopy(_)), "{verdict:?}");
    }
    old.borrow().len()
}

#[test]
fn whatever_the_power_does_the_store_is_itself_and_every_copy_below_the_floor_is_an_old_one() {
    let mut copies = 0;
    for seed in 0..60 {
        match std::panic::catch_unwind(|| run_one(seed)) {
            Ok(taken) => copies += taken,
            Err(panic) => {
                eprintln!("failing seed: {seed} (lineage::run_one({seed}))");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(copies > 600, "{copies}");
}

#[test]
fn an_opening_that_fails_at_any_write_or_sync_leaves_a_store_that_opens() {
    let memory = Memory::default();
    let mut media = formatted(true);
    let (mut failed, mut one_copy) = (0, 0);
    for call in 1.. {
        let driver = SimDriver::new(call, vec![media]);
        let countdown = Rc::new(Cell::new(call));
        let left = countdown.clone();
        driver.set_fault(Some(Box::new(move |_, call| {
            if matches!(call, Call::Read { .. }) {
                return None;
            }
            countdown.set(countdown.get().saturating_sub(1));
            (countdown.get() == 0).then_some(5)
        })));
        let runtime = Runtime::new(driver.clone());
        let (file, mine) = (driver.file(0), memory.clone());
        let opened = runtime.block_on(async move {
            let store = open_remembered(&file, &mine, call).await?;
            Ok::<_, Error>(store.findings().to_vec())
        });
        drop(runtime);
        media = driver.media_after_cut(Cut::TornSectors).remove(0);
        assert_eq!(judged(&media, &memory), Verdict::Continues, "call {call}");
        match opened {
            Ok(_) if left.get() > 0 => break,
            // Only writing a superblock copy may fail, and that is told of.
            Ok(findings) => {
                one_copy += 1;
                let texts: Vec<&str> = findings.iter().map(|f| f.text.as_str()).collect();
                assert!(
                    texts.iter().any(|text| text.contains("cannot be written")),
                    "call {call}: {texts:?}"
                );
            }
            Err(error) => {
                failed += 1;
                assert!(matches!(error.kind(), Kind::Io | Kind::Unavailable), "{error}");
            }
        }
    }
    // A sync of what was read, a checkpoint, a sync for each superblock copy.
    assert!(failed >= 4, "{failed}");
    assert_eq!(one_copy, 2);
}

/// What is wrong with a medium's superblock copies.
fn superblock_findings(media: &Media) -> Result<(u64, Vec<String>), Error> {
    let copies = [0, SUPERBLOCK_B_AT].map(|at| {
        let mut bytes = [0; superblock::fields::SIZE];
        media.read(at, &mut bytes);
        superblock::Superblock::decode(&bytes)
    });
    superblock::choose("x", copies).map(|(chosen, findings)| (chosen.sequence, findings))
}

#[test]
fn a_damaged_superblock_copy_is_written_first_so_that_a_good_one_is_always_there() {
    for damaged in [0, SUPERBLOCK_B_AT] {
        for cut in 1..40 {
            let mut media = formatted(true);
            media.overwrite(damaged + 40, b"rot");
            let driver = SimDriver::new(cut, vec![media]);
            driver.cut_after_calls(cut);
            let file = driver.file(0);
            let ended = until_cut(&driver, async move {
                open_anew(&file, 3).await.unwrap();
            });
            let media = driver.media_after_cut(Cut::TornSectors).remove(0);
            let (sequence, findings) = superblock_findings(&media).unwrap();
            if ended {
                assert_eq!((sequence, findings), (2, vec![]), "both are as they should be");
            }
        }
    }
}

#[test]
fn the_committed_lsn_rises_with_every_commit_and_beat_and_close_and_with_nothing_else() {
    with_store(1, formatted(true), async |store| {
        let at_open = store.committed_lsn();
        store.beat().await.unwrap();
        assert_eq!(store.committed_lsn(), at_open + 1);
        store.commit(vec![]).await.unwrap();
        assert_eq!(store.committed_lsn(), at_open + 1, "nothing was to be done");
        allocate(&store, DatasetId::random(), 0, 1).await.unwrap();
        assert_eq!(store.committed_lsn(), at_open + 2);
        store.close().await.unwrap();
        assert!(store.committed_lsn() > at_open + 2);
        let closed = store.committed_lsn();
        assert_eq!(store.beat().await.unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(store.committed_lsn(), closed);
    });
}

#[test]
fn many_beats_go_round_the_ring() {
    let (lsn, media) = with_store(2, formatted(true), async |store| {
        for _ in 0..200 {
            store.beat().await.unwrap();
        }
        store.committed_lsn()
    });
    with_store(3, media, async move |store| {
        assert!(store.committed_lsn() >= lsn);
        assert!(store.findings().is_empty());
    });
}

#[test]
fn a_log_that_ends_before_the_last_opening_is_damage() {
    let ((), media) = with_store(1, formatted(true), async |_| {});
    let driver = SimDriver::new(2, vec![media.clone()]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move {
        drop(open_anew(&file, 1).await.unwrap());
    });
    drop(runtime);
    let mut rolled_back = media;
    let mut superblocks = vec![0; 128 << 10];
    driver.media()[0].read(0, &mut superblocks);
    rolled_back.overwrite(0, &superblocks);
    with_store(3, rolled_back, async |store| {
        let damage = &store.findings()[0];
        assert_eq!(damage.severity, Severity::Damage);
        assert!(damage.text.contains("redo log"), "{}", damage.text);
    });
}
