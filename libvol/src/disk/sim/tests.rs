//! The simulated disks by themselves.

use super::*;
use crate::buf::Buf;
use crate::disk::Disk;
use crate::runtime::Runtime;

fn write_and_cut(cut: Cut, sync: bool) -> Vec<u8> {
    let driver = SimDriver::new(7, vec![Media::zeroed(1 << 20)]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move {
        let disk = Disk::attach(&file).unwrap();
        let mut buf = Buf::zeroed(4096);
        buf.fill(0xaa);
        disk.write(8192, Rc::new(buf), 0..4096).await.unwrap();
        if sync {
            disk.sync().await.unwrap();
        }
    });
    let mut out = vec![0; 4096];
    driver.media_after_cut(cut)[0].read(8192, &mut out);
    out
}

#[test]
fn a_synced_write_survives_every_cut() {
    for cut in [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors] {
        assert!(write_and_cut(cut, true).iter().all(|b| *b == 0xaa));
    }
}

#[test]
fn an_unsynced_write_may_be_lost_or_torn_at_512_bytes() {
    assert!(write_and_cut(Cut::KeepAll, false).iter().all(|b| *b == 0xaa));
    assert!(write_and_cut(Cut::DropAll, false).iter().all(|b| *b == 0));
    let torn = write_and_cut(Cut::TornSectors, false);
    let mut sectors = torn.chunks(512).map(|s| (s[0], s.iter().all(|b| *b == s[0])));
    assert!(sectors.all(|(value, whole)| whole && (value == 0 || value == 0xaa)));
}

#[test]
fn time_is_virtual_and_timers_fire_in_order() {
    let driver = SimDriver::new(1, vec![]);
    let runtime = Runtime::new(driver);
    let order = runtime.block_on(async {
        let log = Rc::new(RefCell::new(Vec::new()));
        let tasks: Vec<_> = [3000, 1000, 2000]
            .into_iter()
            .map(|seconds| {
                let log = log.clone();
                crate::runtime::spawn(async move {
                    crate::runtime::sleep(Duration::from_secs(seconds)).await;
                    log.borrow_mut().push(seconds);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        log.take()
    });
    assert_eq!(order, [1000, 2000, 3000]);
}

#[test]
fn a_power_cut_stops_every_later_call() {
    let driver = SimDriver::new(3, vec![Media::zeroed(1 << 20)]);
    let runtime = Runtime::new(driver.clone());
    driver.cut_after_calls(3);
    let file = driver.file(0);
    let written = Rc::new(Cell::new(0));
    let counter = written.clone();
    let until = driver.clone();
    runtime.block_on(async move {
        let work = crate::runtime::spawn(async move {
            let disk = Disk::attach(&file).unwrap();
            loop {
                disk.write(0, Rc::new(Buf::zeroed(512)), 0..512).await.unwrap();
                counter.set(counter.get() + 1);
            }
        });
        until.until_cut().await;
        drop::<crate::runtime::Task<()>>(work);
    });
    assert!(driver.is_cut());
    assert_eq!(written.get(), 2);
}

/// Runs `work` on one disk with a plan.
fn with_plan<T: 'static, F>(plan: FaultPlan, work: F) -> (T, Rc<SimDriver>)
where
    F: AsyncFnOnce(Disk, Rc<SimDriver>) -> T + 'static,
{
    let driver = SimDriver::new(11, vec![Media::zeroed(1 << 20)]);
    let runtime = Runtime::new(driver.clone());
    driver.plan_faults(0, plan, 5);
    let (file, inside) = (driver.file(0), driver.clone());
    let result = runtime.block_on(async move { work(Disk::attach(&file).unwrap(), inside).await });
    drop(runtime);
    (result, driver)
}

async fn write(disk: &Disk, at: u64, byte: u8) -> Result<(), crate::disk::DiskError> {
    let mut buf = Buf::zeroed(4096);
    buf.fill(byte);
    disk.write(at, Rc::new(buf), 0..4096).await
}

async fn read(disk: &Disk, at: u64) -> Result<Buf, crate::disk::DiskError> {
    let (result, buf) = disk.read(at, Buf::zeroed(4096), 0..4096).await;
    result.map(|()| buf)
}

#[test]
fn errors_happen_as_planned_and_no_more_often_than_the_budget_allows() {
    let plan = FaultPlan {
        read_errors: 1,
        write_errors: 1,
        sync_errors: 1,
        budget: 3,
        ..FaultPlan::default()
    };
    with_plan(plan, async |disk, _| {
        assert!(write(&disk, 0, 1).await.is_err());
        assert!(disk.sync().await.is_err());
        assert!(read(&disk, 0).await.is_err());
        assert!(read(&disk, 0).await.is_ok(), "the budget is spent");
    });
}

#[test]
fn after_a_failed_sync_a_write_is_durable_or_gone_and_reads_tell_which() {
    let plan = FaultPlan {
        sync_errors: 1,
        budget: 1,
        ..FaultPlan::default()
    };
    let (seen, driver) = with_plan(plan, async |disk, _| {
        for block in 0..16 {
            write(&disk, block * BLOCK, 7).await.unwrap();
        }
        assert!(disk.sync().await.is_err());
        disk.sync().await.unwrap();
        let mut seen = Vec::new();
        for block in 0..16 {
            seen.push(read(&disk, block * BLOCK).await.unwrap()[0]);
        }
        seen
    });
    assert!(seen.contains(&0) && seen.contains(&7), "{seen:?}");
    let after = driver.media_after_cut(Cut::DropAll);
    for (block, seen) in seen.iter().enumerate() {
        let mut byte = [0];
        after[0].read(block as u64 * BLOCK, &mut byte);
        assert_eq!(byte[0], *seen);
    }
}

#[test]
fn silent_damage_is_done_only_where_it_is_allowed() {
    let plan = FaultPlan {
        lost_writes: 1,
        bit_flips: 1,
        budget: 100,
        ..FaultPlan::default()
    };
    with_plan(plan, async |disk, driver| {
        write(&disk, 0, 1).await.unwrap();
        assert_eq!(read(&disk, 0).await.unwrap()[0], 1, "nobody has allowed anything");
        driver.allow_silent(Some(Box::new(
            |_, silent, _, _| matches!(silent, Silent::Lost { at, .. } if at == 4096),
        )));
        write(&disk, 4096, 2).await.unwrap();
        write(&disk, 0, 3).await.unwrap();
        assert_eq!(read(&disk, 4096).await.unwrap()[0], 0, "lost");
        assert_eq!(read(&disk, 0).await.unwrap()[0], 3);
        driver.allow_silent(Some(Box::new(|_, silent, _, _| {
            matches!(silent, Silent::Flip { .. })
        })));
        let ones = |buf: Buf| buf.iter().map(|byte| (byte ^ 3).count_ones()).sum::<u32>();
        assert_eq!(ones(read(&disk, 0).await.unwrap()), 1, "one bit");
    });
}

#[test]
fn a_misdirected_write_lies_elsewhere() {
    let plan = FaultPlan {
        misdirected_writes: 1,
        budget: 1,
        ..FaultPlan::default()
    };
    let (_, driver) = with_plan(plan, async |disk, driver| {
        driver.allow_silent(Some(Box::new(|_, _, _, _| true)));
        driver.keep_trace();
        while !driver.trace().iter().any(|event| {
            matches!(
                event.what,
                What::Call {
                    outcome: Outcome::Misdirected(_),
                    ..
                }
            )
        }) {
            write(&disk, 65536, 9).await.unwrap();
            disk.sync().await.unwrap();
        }
    });
    let media = &driver.media_after_cut(Cut::DropAll)[0];
    let mut all = vec![0; 1 << 20];
    media.read(0, &mut all);
    let found: Vec<usize> = (0..256).filter(|block| all[block * 4096] == 9).collect();
    assert_eq!(found.len(), 1);
    assert_ne!(found, [16]);
}

#[test]
fn a_disk_that_vanishes_comes_back_for_new_files_only_and_with_what_was_synced() {
    let plan = FaultPlan {
        vanishings: 3,
        away: Duration::from_millis(50),
        budget: 1,
        ..FaultPlan::default()
    };
    with_plan(plan, async |disk, driver| {
        while write(&disk, 0, 5).await.is_ok() && disk.sync().await.is_ok() {}
        assert!(disk.sync().await.is_err() && read(&disk, 0).await.is_err());
        let early = Disk::attach(&driver.file(0)).unwrap();
        assert!(read(&early, 0).await.is_err(), "it is still away");
        crate::runtime::sleep(Duration::from_millis(60)).await;
        assert_eq!(read(&early, 0).await.unwrap()[0], 5);
        assert!(read(&disk, 0).await.is_err());
        assert!(write(&disk, 0, 6).await.is_err());
        assert_eq!(read(&early, 0).await.unwrap()[0], 5);
    });
}

#[test]
fn what_was_under_way_when_the_process_ended_has_landed_or_not_and_never_later() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let driver = SimDriver::new(seed, vec![Media::zeroed(1 << 20)]);
        let runtime = Runtime::new(driver.clone());
        driver.plan_faults(
            0,
            FaultPlan {
                hangs: 1,
                budget: 1,
                ..FaultPlan::default()
            },
            seed,
        );
        let file = driver.file(0);
        runtime.block_on(async move {
            let disk = Disk::attach(&file).unwrap();
            let hung = crate::runtime::timeout(Duration::from_secs(1), write(&disk, 0, 9)).await;
            assert!(hung.is_none());
        });
        let mut after = driver.media_after_exit();
        let mut now = vec![0; 4096];
        after[0].read(0, &mut now);
        seen.insert(now[0]);
        after[0].overwrite(0, &[1; 4096]);
        let mut later = vec![0; 4096];
        after[0]
            .after_cut(Cut::DropAll, &mut Rng::new(1))
            .read(0, &mut later);
        assert!(later.iter().all(|byte| *byte == 1));
    }
    assert_eq!(seen, [0, 9].into());
}

#[test]
fn a_call_that_hangs_never_ends_and_the_others_go_on() {
    let plan = FaultPlan {
        hangs: 1,
        budget: 1,
        ..FaultPlan::default()
    };
    with_plan(plan, async |disk, _| {
        let hung = crate::runtime::timeout(Duration::from_secs(3600), write(&disk, 0, 1)).await;
        assert!(hung.is_none());
        write(&disk, 0, 2).await.unwrap();
    });
}

#[test]
fn equal_seeds_make_equal_traces_and_other_seeds_others() {
    let hash = |seed: u64| {
        let plan = FaultPlan {
            read_errors: 4,
            slowness: 3,
            budget: 5,
            ..FaultPlan::default()
        };
        let driver = SimDriver::new(seed, vec![Media::zeroed(1 << 20)]);
        driver.plan_faults(0, plan, seed);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        runtime.block_on(async move {
            let disk = Disk::attach(&file).unwrap();
            for i in 0..50 {
                write(&disk, i % 7 * 4096, 1).await.unwrap();
                let _ = read(&disk, i % 5 * 4096).await;
            }
        });
        driver.trace_hash()
    };
    assert_eq!(hash(1), hash(1));
    assert_ne!(hash(1), hash(2));
}

#[test]
fn a_snapshot_keeps_its_bytes_when_the_disk_goes_on() {
    let mut media = Media::zeroed(1 << 20);
    media.overwrite(100, &[1; 8000]);
    let snapshot = media.clone();
    media.overwrite(4096, &[2; 4096]);
    media.overwrite(200, &[3; 10]);
    let look = |media: &Media, at| {
        let mut byte = [0];
        media.read(at, &mut byte);
        byte[0]
    };
    assert_eq!((look(&snapshot, 200), look(&snapshot, 5000)), (1, 1));
    assert_eq!(
        (look(&media, 200), look(&media, 5000), look(&media, 8100)),
        (3, 2, 2)
    );
}
