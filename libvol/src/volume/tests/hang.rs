//! Devices that do not answer, or not this time: a call that never ends costs its replica, and nothing else waits for it; what
//! cannot be read today may be read tomorrow.

use super::*;
use crate::disk::sim::{Call, FaultPlan};
use crate::error::Kind;

/// Longer than anything may take.
const LONG: Duration = Duration::from_secs(1000);

/// The next call of that disk never ends.
fn hang(stores: &Stores, replica: usize) {
    let plan = FaultPlan {
        hangs: 1,
        budget: 1,
        ..FaultPlan::default()
    };
    stores.driver.plan_faults(replica, plan, 1);
}

fn is_out(stores: &Stores, replica: usize) -> bool {
    let latched = stores.handle(replica).fault();
    stores.register.state(replica) == Member::Stale
        && latched.is_some_and(|why| why.contains("may still land"))
}

#[test]
fn a_write_and_a_flush_end_though_a_replica_hangs() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        hang(&stores, 1);
        let bytes = pattern(2, BLOCK as usize);
        let written = timeout(LONG, write(&volume, 0, &bytes)).await;
        written.expect("it ends").unwrap();
        assert!(is_out(&stores, 1));
        timeout(LONG, volume.flush()).await.expect("it ends").unwrap();
        assert!(read(&volume, 0, BLOCK as usize).await.unwrap() == pattern(2, BLOCK as usize));
    });
}

#[test]
fn a_volume_closes_though_a_replica_hangs() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        hang(&stores, 1);
        timeout(LONG, volume.close()).await.expect("it ends").unwrap();
        assert!(is_out(&stores, 1));
    });
}

#[test]
fn a_volume_without_another_replica_closes_with_an_error_when_its_device_hangs() {
    simulate(1, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        hang(&stores, 0);
        let closed = timeout(LONG, volume.close()).await.expect("it ends");
        assert_eq!(closed.unwrap_err().kind(), Kind::Io);
        assert_eq!(stores.register.state(0), Member::InSync, "the last one stays");
    });
}

#[test]
fn a_volume_opens_though_a_replica_hangs_or_fails_when_it_is_told_the_membership() {
    for hangs in [true, false] {
        simulate(2, async move |stores| {
            // A cut came between the register and the stores.
            stores.register.0.borrow_mut().epoch = Epoch(2);
            match hangs {
                true => hang(&stores, 1),
                false => stores
                    .driver
                    .set_fault(Some(Box::new(|slot, _| (slot.0 == 1).then_some(5)))),
            }
            let opening = Volume::open_tuned(stores.spec(EXTENT_BYTES), IDLE);
            let volume = timeout(LONG, opening).await.expect("it ends").unwrap();
            assert_eq!(stores.register.state(1), Member::Stale);
            write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
            volume.close().await.unwrap();
        });
    }
}

#[test]
fn what_recovery_cannot_read_is_there_when_a_later_opening_can() {
    let bytes = pattern(3, 2 * BLOCK as usize);
    let kept = bytes.clone();
    let (_, driver) = with_stores(1, fresh(1, 80), async move |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &bytes).await.unwrap();
        volume.flush().await.unwrap();
        drop(volume);
    });
    simulate_on(driver.media(), async move |stores| {
        // The extent is the first of the store.
        let first = STORE_BYTES - 80 * EXTENT_BYTES;
        stores.driver.set_fault(Some(Box::new(move |_, call| {
            let hit = matches!(call, Call::Read { at, len } if at <= first && first < at + len as u64);
            hit.then_some(5)
        })));
        let volume = stores.volume(EXTENT_BYTES, EAGER).await;
        assert_eq!(
            read(&volume, 0, BLOCK as usize).await.unwrap_err().kind(),
            Kind::Io
        );
        assert!(read(&volume, BLOCK, BLOCK as usize).await.unwrap() == kept[BLOCK as usize..]);
        stores.driver.set_fault(None);
        sleep(Duration::from_millis(100)).await;
        volume.close().await.unwrap();
        let volume = stores.volume(EXTENT_BYTES, EAGER).await;
        assert!(read(&volume, 0, kept.len()).await.unwrap() == kept);
        volume.close().await.unwrap();
        assert_eq!(stores.handle(0).space().dirty, 0, "and then it is clean");
    });
}

fn simulate_on<F>(media: Vec<Media>, work: F)
where
    F: AsyncFnOnce(Stores) + 'static,
{
    with_stores(2, media, work).0.unwrap();
}
