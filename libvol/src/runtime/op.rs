//! The future of one operation.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::driver::{Done, Driver, Op, OpKey};

/// Waits for one operation. Dropping it leaves the operation with its driver.
pub struct OpFuture {
    driver: Rc<dyn Driver>,
    key: Option<OpKey>,
}

/// Submits `op` at once, before the future is polled.
pub fn submit(driver: &Rc<dyn Driver>, op: Op) -> OpFuture {
    OpFuture {
        driver: driver.clone(),
        key: Some(driver.submit(op)),
    }
}

impl Future for OpFuture {
    type Output = Done;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Done> {
        let key = self.key.expect("not polled after completion");
        let done = self.driver.poll(key, cx);
        if done.is_ready() {
            self.key = None;
        }
        done
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.driver.forget(key);
        }
    }
}
