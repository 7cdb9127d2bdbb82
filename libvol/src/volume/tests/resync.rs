//! A replica that catches up, and what happens beside it.

use super::*;
use crate::disk::sim::{Call, Rng};
use crate::runtime::spawn;

const EXTENTS: u64 = 12;

/// A volume whose second replica is out and lacks something of every extent.
async fn with_replica_out(stores: &Stores) -> Rc<Volume> {
    let volume = stores.volume(EXTENTS * EXTENT_BYTES, EAGER).await;
    let bytes = pattern(1, (EXTENTS * EXTENT_BYTES) as usize);
    write(&volume, 0, &bytes).await.unwrap();
    let mut failed = false;
    stores.driver.set_fault(Some(Box::new(move |slot, call| {
        let data = matches!(call, Call::Write { at, len: 4096 } if at >= STORE_BYTES - 80 * EXTENT_BYTES);
        let fails = slot.0 == 1 && data && !failed;
        failed |= fails;
        fails.then_some(5)
    })));
    for extent in 0..EXTENTS {
        write(&volume, extent * EXTENT_BYTES, &pattern(2, BLOCK as usize))
            .await
            .unwrap();
    }
    stores.driver.set_fault(None);
    assert_eq!(stores.register.state(1), Member::Stale);
    volume
}

async fn caught_up(stores: &Stores, volume: &Volume) {
    for _ in 0..10_000 {
        if stores.register.state(1) == Member::InSync {
            return;
        }
        assert_eq!(volume.failure(), None);
        sleep(Duration::from_millis(1)).await;
    }
    panic!("it does not catch up: {:?}", volume.replicas());
}

#[test]
fn extents_given_back_and_taken_again_meanwhile_are_on_the_replica_that_catches_up() {
    for seed in 0..150 {
        with_stores(seed, fresh(2, 80), async move |stores| {
            let volume = with_replica_out(&stores).await;
            volume.rejoin(1, stores.ios[1].clone(), false).await.unwrap();
            let churn = {
                let volume = volume.clone();
                spawn(async move {
                    let mut rng = Rng::new(seed);
                    for _ in 0..20 {
                        let at = rng.below(3) * EXTENT_BYTES;
                        volume.trim(at, EXTENT_BYTES, false).await.unwrap();
                        sleep(Duration::from_micros(rng.below(300))).await;
                        write(&volume, at, &pattern(rng.below(250) as u8, BLOCK as usize))
                            .await
                            .unwrap();
                    }
                })
            };
            caught_up(&stores, &volume).await;
            churn.await;
            volume.close().await.unwrap();
            stores.check_equal(true).await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn a_store_is_let_go_in_the_midst_of_catching_up_and_the_next_attempt_begins_anew() {
    for seed in 0..60 {
        with_stores(seed, fresh(2, 80), async move |stores| {
            let mut rng = Rng::new(seed);
            let volume = with_replica_out(&stores).await;
            for _ in 0..3 {
                volume.rejoin(1, stores.ios[1].clone(), false).await.unwrap();
                sleep(Duration::from_micros(rng.below(1500))).await;
                if volume.let_go(1).await.is_err() {
                    break;
                }
            }
            if volume.replicas()[1].state == Member::Stale {
                volume.rejoin(1, stores.ios[1].clone(), false).await.unwrap();
            }
            caught_up(&stores, &volume).await;
            volume.close().await.unwrap();
            stores.check_equal(true).await;
        })
        .0
        .unwrap();
    }
}
