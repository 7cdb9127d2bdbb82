//! A volume's register with an eye on its changes: the power may go at one of the next disk calls after a membership was
//! written down. That is when only the register knows of it, and nothing of what led to it may be left in a cache.

use std::rc::Rc;

use async_trait::async_trait;
use libvol::disk::sim::SimDriver;
use libvol::ids::{Epoch, VolumeId};
use libvol::volume::{Membership, Register};

/// See the module's text.
pub struct Watched<R> {
    /// Where memberships are written down.
    pub register: R,
    /// The machine.
    pub driver: Rc<SimDriver>,
    /// The power goes at the so manieth disk call after a change.
    pub cut: Option<u64>,
}

#[async_trait(?Send)]
impl<R: Register> Register for Watched<R> {
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> libvol::Result<()> {
        self.register.swap(volume, from, to).await?;
        if let Some(calls) = self.cut {
            self.driver.cut_after_calls(calls);
        }
        Ok(())
    }
}
